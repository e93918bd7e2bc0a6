"""Weight files: the types that are read, and hostile or broken files, which are refused in one line and leave nothing behind."""

import argparse
import copy
import json
import os
import pathlib
import pickle
import resource
import struct
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import serialization
from safetensors import numpy as safetensors_numpy

from addp_jax import errors
from addp_jax.codecs import vqgan
from addp_jax.weights import convert, pytorch, weight_files

CONFIG = vqgan.Config(image_size=8, channels=4, multipliers=(1, 2), num_res_blocks=1, num_codes=6, code_width=3, num_groups=2)


def tensors() -> dict:
    """A small VQGAN under its official names."""
    shapes = jax.eval_shape(lambda rng: vqgan.init(vqgan.Tokenizer(CONFIG), rng), jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    return pytorch.to_torch(params, pytorch.tokenizer_rules(CONFIG))


CODEBOOK, BIAS = "quantize.embedding.weight", "encoder.conv_out.bias"


def changed(**changes):
    """A writer of the VQGAN with some tensors replaced, added, or (None) left out."""
    names = {"codebook": CODEBOOK, "bias": BIAS, "surprise": "surprise"}

    def write(path):
        state = tensors() | {names[name]: change(tensors()[names[name]] if names[name] in tensors() else None) if change else None
                             for name, change in changes.items()}  # fmt: skip
        safetensors_numpy.save_file({name: array for name, array in state.items() if array is not None}, path)

    return write


def raw_safetensors(header, body=b"", length=None):
    text = json.dumps(header).encode()
    return lambda path: path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)


def f32(start, stop, shape=(2,)):
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [start, stop]}


def wide_vector(path):
    """One large tensor that claims a width whose weight matrices would be of many terabytes."""
    vector = np.zeros((3, 3, 10**6, 1), np.float32).transpose(3, 2, 0, 1)
    safetensors_numpy.save_file(tensors() | {"encoder.conv_in.weight": np.ascontiguousarray(vector.reshape(10**6, 9, 1, 1)[:, :3])}, path)


HOSTILE = {
    "overlap.safetensors": (raw_safetensors({"a": f32(0, 8), "b": f32(4, 12)}, bytes(12)), "invalid offset for tensor `b`"),
    "huge_header.safetensors": (raw_safetensors({}, length=10**15), "header too large"),
    "header_beyond_file.safetensors": (raw_safetensors({}, length=10**6), "invalid header length"),
    "large_claim.safetensors": (raw_safetensors({"a": f32(0, 8, (2**40,))}, bytes(8)), "invalid shape"),
    "cut.safetensors": (lambda path: path.write_bytes(safetensors_numpy.save(tensors())[:-100]), "not fully covered"),
    "empty.safetensors": (lambda path: path.write_bytes(b""), "is empty: copy or download it again"),
    "weights.txt": (lambda path: path.write_text("hello"), ".txt is no weight file"),
    "folder.safetensors": (lambda path: path.mkdir(), "no checkpoint in"),
    "nan.safetensors": (changed(bias=lambda array: array * np.nan), f"{BIAS} holds values that are NaN or infinite"),
    "too_large_for_float32.safetensors": (changed(bias=lambda array: array * np.float64(1e300)), "NaN or infinite"),
    "integers.safetensors": (changed(bias=lambda array: array.astype(np.int32)), f"{BIAS} is I32; weights are float32"),
    "shape.safetensors": (changed(bias=lambda array: np.zeros(4, np.float32)), f"{BIAS} is [4], expected [3]"),
    "rank.safetensors": (changed(codebook=lambda array: array[0].copy()), "shapes of its tensors contradict each other"),
    "no_size.safetensors": (changed(bias=lambda array: array[:0]), "shapes of its tensors contradict each other"),
    "wide.safetensors": (wide_vector, "shapes of its tensors contradict each other"),
    "missing.safetensors": (changed(bias=None), f"{BIAS} [3] is missing"),
    "unknown.safetensors": (changed(surprise=lambda _: np.zeros(3, np.float32)), "surprise [3] is not expected"),
    "unlike_any.safetensors": (changed(codebook=None), "none of the tensors by which a layout is known"),
    "cut.msgpack": (lambda path: path.write_bytes(serialization.msgpack_serialize(tensors())[:-100]), "not a whole flax msgpack"),
    "large_claim.msgpack": (lambda path: path.write_bytes(b"\xc6\xff\xff\xff\xff"), "not a whole flax msgpack"),
    "no_arrays.msgpack": (lambda path: path.write_bytes(serialization.msgpack_serialize({"a": "text"})), "is a str, not a tensor"),
}  # fmt: skip


class Command:
    """Pickles as a call that makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path) + ".was_here",)


def torch_state():
    import torch

    return {name: torch.from_numpy(array) for name, array in tensors().items()}


def save(content, **options):
    def write(path):
        import torch

        torch.save(content(path) if callable(content) else content, path, **options)

    return write


def rezipped(change):
    """A PyTorch file of which `change(entries, path)` makes another zip."""

    def write(path):
        save(torch_state())(path)
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
        change(entries, path)

    return write


def compressed(entries, path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
        archive.writestr("archive/data/bomb", bytes(10**8))


def overlapping(entries, path):
    """Every entry of the directory stands there a thousand times."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
        archive.filelist += [copy.copy(entry) for entry in archive.filelist if entry.file_size > 100 for _ in range(1000)]


def cut(path, keep=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def expanded(_):
    import torch

    return torch_state() | {BIAS: torch.ones(1).expand(10**12)}


HOSTILE_TORCH = {
    "runs_code.pth": (save(lambda path: {"model": torch_state() | {"x": Command(path)}}), "x is a posix.mkdir, not a tensor"),
    "is_code.pth": (save(lambda path: Command(path)), "holds an object of posix.mkdir, not a dict of tensors"),
    "runs_code_plainly.pt": (lambda path: path.write_bytes(pickle.dumps(Command(path), protocol=2)), "is a pickle, but none of PyTorch's"),
    "other_type.pth": (save(lambda _: torch_state() | {"x": pathlib.PurePosixPath("x")}), "x is a pathlib.PurePosixPath, not a tensor"),
    "cut.ckpt": (lambda path: (save(lambda _: torch_state())(path), cut(path)), "is damaged or cut short: File is not a zip file"),
    "cut_old.pth": (
        lambda path: (save(lambda _: torch_state(), _use_new_zipfile_serialization=False)(path), cut(path)),
        "is damaged or cut short",
    ),
    "empty.pth": (lambda path: path.write_bytes(b""), "is empty: copy or download it again"),
    "picture.pth": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" * 9), "begins with other bytes"),
    "bomb.pth": (lambda path: rezipped(compressed)(path), "it is a compressed zip"),
    "overlap.pth": (lambda path: rezipped(overlapping)(path), "the entries of its zip overlap"),
    "expanded.pth": (save(expanded), f"{BIAS} is not stored whole"),
    "number.pth": (save(lambda _: torch_state() | {"x": 3}), "x is a int, not a tensor"),
    "list.pth": (save([1, 2]), "holds no dict of tensors"),
}  # fmt: skip


def assert_refused(tmp_path, name, write, message):
    path = tmp_path / name
    write(path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(errors.UserError) as caught:
        convert.import_weights([str(path)], str(tmp_path / "run"))
    text = str(caught.value)
    assert message in text and str(path) in text and len(text) < 600 and "\n" not in text
    assert sorted(tmp_path.rglob("*")) == before == [path]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_and_broken_files_are_refused_in_one_line_and_leave_nothing(tmp_path, name):
    assert_refused(tmp_path, name, *HOSTILE[name])


@pytest.mark.parametrize("name", HOSTILE_TORCH)
def test_hostile_and_broken_pytorch_files_are_refused_in_one_line_and_leave_nothing(torch, tmp_path, name):
    assert_refused(tmp_path, name, *HOSTILE_TORCH[name])


def test_each_refusal_has_its_own_message():
    messages = [message for _, message in (HOSTILE | HOSTILE_TORCH).values()]
    assert len(set(messages)) >= 20


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        read = np.asarray(found[name])
        assert read.dtype == np.float32 and found[name].shape == read.shape
        np.testing.assert_array_equal(read, array.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_floats_of_any_width_become_float32(tmp_path, dtype):
    state = {name: array.astype(dtype) for name, array in tensors().items()}
    safetensors_numpy.save_file(state, tmp_path / "a.safetensors")
    assert_same(weight_files.read(str(tmp_path / "a.safetensors")), state)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_floats_of_any_width_become_float32(torch, tmp_path, dtype, zipped):
    state = {name: tensor.to(getattr(torch, dtype)) for name, tensor in torch_state().items()}
    content = {"model": state, "epoch": 3, "args": argparse.Namespace(lr=0.1), "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    assert_same(weight_files.read(str(tmp_path / "a.pth")), {name: tensor.float().numpy() for name, tensor in state.items()})


def test_pytorch_parameters_and_transposed_tensors_are_read_as_they_are_seen(torch, tmp_path):
    state = {"a": torch.nn.Parameter(torch.rand(2, 3)), "b": torch.rand(4, 5).T}
    torch.save(state, tmp_path / "a.pth")
    assert_same(weight_files.read(str(tmp_path / "a.pth")), {name: tensor.detach().numpy() for name, tensor in state.items()})


@pytest.mark.parametrize("extension", [".safetensors", ".pth"])
def test_what_is_written_is_read_back_and_others_may_read_it(request, tmp_path, extension):
    if extension == ".pth":
        request.getfixturevalue("torch")
    path = str(tmp_path / f"a{extension}")
    weight_files.write(path, tensors(), "model")
    assert_same(weight_files.read(path), tensors())
    (tmp_path / "plain").write_text("")
    assert os.stat(path).st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("extension", [".safetensors", ".pth"])
def test_a_full_disk_leaves_the_old_file_and_no_other(request, tmp_path, extension):
    if extension == ".pth":
        request.getfixturevalue("torch")
    path = tmp_path / f"a{extension}"
    path.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # as a disk with 10 kB left
    try:
        with pytest.raises(errors.UserError, match=f"cannot write {path}.*is the disk full"):
            weight_files.write(str(path), tensors(), "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_file_that_the_disk_has_no_room_for_is_not_begun(tmp_path):
    huge = {"a": np.broadcast_to(np.float32(0), (10**6, 10**9))}
    with pytest.raises(errors.UserError, match="needs 4000000000 MB, and its disk has"):
        weight_files.write(str(tmp_path / "a.safetensors"), huge, "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, message", [("a.txt", "ends in .safetensors"), ("no/a.safetensors", "there is no folder"),
                                           ("there.safetensors", "; force replaces it")])  # fmt: skip
def test_outputs_that_cannot_be_are_refused(tmp_path, name, message):
    (tmp_path / "there.safetensors").write_text("")
    with pytest.raises(errors.UserError, match=message):
        weight_files.check_output(str(tmp_path / name), force=False)
    weight_files.check_output(str(tmp_path / "there.safetensors"), force=True)
