"""Sets of images that are measured: every format has one meaning, every mistake one line."""

import io

import numpy as np
import pytest
from PIL import Image

from addp_jax import errors
from addp_jax.data import part
from addp_jax.measuring import image_set


def pictures(count, size=(6, 8)):
    return np.random.default_rng(0).integers(0, 256, (count, *size, 3), np.uint8)


def save(folder, images):
    for index, image in enumerate(images):
        path = folder / f"{index // 4}" / f"{index:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    return str(folder)


def read(path, limit=0, batch_size=3):
    images = image_set.ImageSet(str(path), limit, "--samples")
    found = np.concatenate(list(images.batches(batch_size)))
    assert len(found) == len(images) and found.shape[1:3] == images.size
    return found


def message(path, limit=0) -> str:
    with pytest.raises(errors.UserError) as caught:
        read(path, limit)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("save_npz", (np.savez, np.savez_compressed))
def test_a_folder_and_an_npz_hold_the_same_images(tmp_path, save_npz):
    expected = pictures(10)
    save_npz(tmp_path / "images.npz", arr_0=expected, mu=np.zeros(3))
    for path in (save(tmp_path, expected), tmp_path / "images.npz"):
        np.testing.assert_array_equal(read(path), expected)
        np.testing.assert_array_equal(read(path, limit=10, batch_size=16), expected)
        np.testing.assert_array_equal(read(path, limit=4), expected[part.spread(10, 4)])


def test_the_hash_is_of_content_and_order_not_of_names(tmp_path):
    digest = lambda path: image_set.ImageSet(str(path), 0, "--real").content_hash
    for name, images in (("one", pictures(3)), ("other", pictures(3)), ("turned", pictures(3)[::-1])):
        (tmp_path / name).mkdir()
        save(tmp_path / name, images)
    (tmp_path / "other" / "0").rename(tmp_path / "other" / "renamed")
    assert digest(tmp_path / "one") == digest(tmp_path / "other") != digest(tmp_path / "turned")


def test_other_formats_become_rgb(tmp_path):
    """Grey: three equal channels; RGBA: the alpha channel is dropped; 16 bits: scaled to 8."""
    colour = pictures(1)[0]
    grey, deep = colour[..., 0], colour[..., 0].astype(np.uint16) * 257
    alpha = np.concatenate([colour, np.full((6, 8, 1), 9, np.uint8)], -1)
    save(tmp_path, (colour, grey, alpha))
    buffer = io.BytesIO()
    Image.fromarray(deep).save(buffer, "png")
    (tmp_path / "0" / "003.png").write_bytes(buffer.getvalue())
    three = np.repeat(grey[..., None], 3, -1)
    np.testing.assert_array_equal(read(tmp_path), [colour, three, colour, three])


def test_an_unreadable_image_is_named(tmp_path):
    save(tmp_path, pictures(3))
    (tmp_path / "0" / "001.png").write_bytes(b"no image")
    assert "001.png" in message(tmp_path)


def test_images_of_another_size_are_named(tmp_path):
    save(tmp_path, (*pictures(2), pictures(1, (8, 6))[0]))
    text = message(tmp_path)
    assert "002.png has 6x8 pixels, the first image of --samples 8x6" in text and "addp_jax.data.prepare" in text


def test_fewer_images_than_asked(tmp_path):
    np.savez(tmp_path / "images.npz", arr_0=pictures(5))
    for path in (save(tmp_path, pictures(5)), tmp_path / "images.npz"):
        assert "holds 5 images, fewer than the 6 asked for" in message(path, limit=6)


def test_a_folder_that_is_missing_or_empty(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        assert message(path).startswith("--samples: no images")


@pytest.mark.parametrize("content", (None, b"", b"text", b"PK\x03\x04 torn"))
def test_a_file_that_is_no_npz(tmp_path, content):
    path = tmp_path / "images.npz"
    if content is not None:
        path.write_bytes(content)
    assert message(path).startswith(f"--samples={path}: ")


@pytest.mark.parametrize(
    "arrays",
    ({"other": pictures(2)}, {"arr_0": pictures(2) / 255}, {"arr_0": pictures(1)[0]}, {"arr_0": pictures(0)}, {"arr_0": np.array([{}])}),
)
def test_an_npz_without_images(tmp_path, arrays):
    np.savez(tmp_path / "images.npz", **arrays)
    assert "arr_0" in message(tmp_path / "images.npz")


def test_the_hash_of_a_part_of_an_npz_says_which_part(tmp_path, monkeypatch):
    """A cache of features is named by it."""
    np.savez(tmp_path / "images.npz", arr_0=pictures(10))
    digest = lambda limit: image_set.ImageSet(str(tmp_path / "images.npz"), limit, "--real").content_hash
    whole, part = digest(0), digest(4)
    assert whole == digest(10) != part
    monkeypatch.setattr(image_set.part, "spread", lambda total, size: np.arange(size))
    assert digest(4) != part
