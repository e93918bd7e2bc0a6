"""Damaged images and image sets are read as arrays of their own size, or refused in one line; nothing else happens."""

import io

import numpy as np
import pytest
from PIL import Image

from addp_jax import errors
from addp_jax.data import transforms
from addp_jax.measuring import image_set

MUTANTS = 120  # of each format


def mutants(data: bytes, count: int, seed: int = 0):
    """`data` cut off, with flipped bits, overwritten, swapped, doubled or with bytes put in front."""
    rng = np.random.default_rng(seed)
    for n in range(count):
        changed, at = bytearray(data), int(rng.integers(len(data)))
        kind = n % 6
        if kind == 0:
            changed = changed[:at]
        elif kind == 1:
            changed[at] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            run = rng.integers(0, 256, int(rng.integers(1, 32)), np.uint8).tobytes()
            changed[at : at + len(run)] = run
        elif kind == 3:
            other = int(rng.integers(len(data)))
            changed[at : at + 8], changed[other : other + 8] = changed[other : other + 8], changed[at : at + 8]
        elif kind == 4:
            changed[at:at] = changed[: int(rng.integers(len(data)))]
        else:
            changed = bytearray(rng.integers(0, 256, int(rng.integers(1, 9)), np.uint8).tobytes()) + changed
        yield bytes(changed)


def refusal(read):
    """What `read` returns, or None when it is refused, in one line."""
    try:
        return read()
    except errors.UserError as error:
        assert "FILE" in str(error) and str(error).isprintable() and len(str(error)) < 500
        return None


def check_images(kind: str, count: int, seed: int):
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (13, 17, 3), np.uint8))
    buffer = io.BytesIO()
    picture.convert("P" if kind == "GIF" else "RGB").save(buffer, kind)
    read = 0
    for data in mutants(buffer.getvalue(), count, seed):
        image = refusal(lambda data=data: transforms.decode(data, "FILE"))
        if image is not None:
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size <= 3 * transforms.MAX_PIXELS
            read += 1
    return read


@pytest.mark.parametrize("kind", transforms.FORMATS)
def test_damaged_images(kind):
    check_images(kind, MUTANTS, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", transforms.FORMATS)
def test_damaged_images_at_length(kind):
    check_images(kind, 100 * MUTANTS, seed=1)


@pytest.mark.parametrize("save", (np.savez, np.savez_compressed))
def test_damaged_image_sets(tmp_path, save):
    images = np.random.default_rng(2).integers(0, 256, (5, 6, 7, 3), np.uint8)
    buffer = io.BytesIO()
    save(buffer, arr_0=images, mu=np.zeros(3), sigma=np.eye(3))
    path = tmp_path / "FILE.npz"
    for data in mutants(buffer.getvalue(), MUTANTS):
        path.write_bytes(data)
        found = refusal(lambda: np.concatenate(list(image_set.ImageSet(str(path), 0, "--real").batches(2))))
        assert found is None or (found.shape == images.shape and (found == images).all())  # zip has checksums
        refusal(lambda: image_set.read_arrays(str(path), ("mu", "sigma"), "--real"))


def header(shape, dtype="|u1") -> bytes:
    text = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    text += b" " * (63 - (len(text) + 10) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize("shape", [(2**50, 8, 8, 3), (10**8, 8, 8, 3), (4, -8, -8, 3), (2, 2**32, 2**32, 3), (2**70, 1, 1, 3), (0, 8, 8, 3)])
def test_the_shape_in_a_header_is_not_believed(tmp_path, shape):
    import zipfile

    with zipfile.ZipFile(tmp_path / "FILE.npz", "w") as archive:
        archive.writestr("arr_0.npy", header(shape) + bytes(768))
    with pytest.raises(errors.UserError, match="FILE.npz"):
        image_set.ImageSet(str(tmp_path / "FILE.npz"), 0, "--real")
