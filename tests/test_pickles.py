"""PyTorch's files without PyTorch: what is read, what is passed over, and attacks that cost nothing."""

import argparse
import io
import os
import pathlib
import pickle
import sys
import time
import types
import zipfile

import numpy as np
import pytest
from flax import serialization
from msgpack import ExtType, packb
from safetensors import numpy as safetensors_numpy
from test_files import BIAS, CODEBOOK, Command, assert_same, rezipped, save, tensors, torch_state

from addp_jax import errors
from addp_jax.weights import layouts, pickles, weight_files

SECONDS = 5  # within which everything hostile is refused


def refused(path, read=weight_files.read) -> str:
    start = time.process_time()
    with pytest.raises(errors.UserError) as caught:
        read(str(path))
    text = str(caught.value)
    assert str(path) in text and text.isprintable() and len(text) < 600 and time.process_time() - start < SECONDS
    return text


def as_zip(pickled: bytes):
    def write(path):
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n"}.items():
                archive.writestr(f"a/{name}", content)

    return write


class Call:
    """Pickles as the call `function(*args)`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def laugh(levels=40):
    """Tuples within tuples as a key: hashing them takes 9^levels steps."""
    key = b")"
    for i in range(levels):
        key = b"(" + key + b"q" + bytes([i]) + (b"h" + bytes([i])) * 9 + b"t"
    return b"\x80\x02}" + key + b"K\x01s."


def itself():
    """A dict that holds itself as its model."""
    return b"\x80\x02}q\x00U\x05modelh\x00s."


ATTACKS = {
    "bytearray": (pickle.dumps({"x": Call(bytearray, 3 * 10**12)}, 2), "x is a __builtin__.bytearray, not a tensor"),
    "list": (pickle.dumps({"x": Call(eval, "[0] * 10**12")}, 2), "x is a __builtin__.eval, not a tensor"),
    "key of tuples": (laugh(), "holds no dict of tensors"),
    "set of tuples": (laugh().replace(b"\x80\x02}", b"\x80\x04\x8f(").replace(b"K\x01s.", b"\x90."), "holds no dict of tensors"),
    "itself": (itself(), "is a dict, not a tensor"),
    "long string": (b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f", "damaged or cut short"),
    "many operations": (b"\x80\x02" + b"N0" * 2_000_000 + b"N.", "more than 3,000,000 operations"),
    "no mark": (b"\x80\x02t.", "its pickle is damaged"),
    "empty stack": (b"\x80\x020.", "takes more from the stack"),
    "extension": (b"\x80\x02\x82\x01.", "the operation EXT1"),
    "no end": (b"\x80\x02}", "damaged or cut short"),
    "memo": (b"\x80\x02h\x07.", "its pickle is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_hostile_pickles_are_refused_at_once(tmp_path, name):
    content, message = ATTACKS[name]
    as_zip(content)(tmp_path / "a.pth")
    assert message in refused(tmp_path / "a.pth")


def test_nothing_is_called(tmp_path):
    for value in (Command(tmp_path / "a"), [Command(tmp_path / "a")], {"a": {1: Command(tmp_path / "a")}}):
        pickles.load(io.BytesIO(pickle.dumps(value, 4)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_are_those_of_a_pickle(protocol):
    value = {"a": [1, -(2**70), 0.5, "é\n", None, True, False], "b": {"c": (1, (2, 3), (), (4, 5, 6, 7))}, 3: {"d": []}, "e": 2**40}
    found, persistent = pickles.load(io.BytesIO(pickle.dumps(value, protocol)))
    assert found == value and not persistent


def made_tensor(shape):
    import torch

    return Call(torch.Tensor, *shape)


def storages(change):
    """Of the file's storages another size or place, by changing its pickle."""

    def write(entries, path):
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in change(dict(entries)).items():
                archive.writestr(name, content)

    return rezipped(write)


def without_a_record(entries):
    return {name: content for name, content in entries.items() if not name.endswith("/data/3")}


def short_record(entries):
    return {name: content[:-4] if name.endswith("/data/3") else content for name, content in entries.items()}


def expanded(shape):
    import torch

    return torch.ones(1).expand(shape)


TORCH_ATTACKS = {
    "constructed": (lambda path: save(torch_state() | {CODEBOOK: made_tensor((120_000_000, 3))})(path), "is a torch.Tensor, not a tensor"),
    "expanded": (lambda path: save(torch_state() | {BIAS: expanded((10**9, 3))})(path), "is not stored whole"),
    "no record": (lambda path: storages(without_a_record)(path), "is not stored whole: its storage is missing or has another size"),
    "short record": (lambda path: storages(short_record)(path), "is not stored whole: its storage is missing or has another size"),
    "shared": (lambda path: save({f"a.{i}": t for i in range(500) for t in [SHARED()]})(path), "is refused: its tensors are"),
}  # fmt: skip
KEPT = []


def SHARED():
    import torch

    KEPT[:] = KEPT or [torch.ones(100_000)]
    return KEPT[0]


@pytest.mark.parametrize("name", TORCH_ATTACKS)
@pytest.mark.parametrize("extension", ["pth", "bin"])
def test_tensors_that_the_file_does_not_hold_are_refused(torch, tmp_path, name, extension):
    write, message = TORCH_ATTACKS[name]
    write(tmp_path / f"a.{extension}")
    assert message in refused(tmp_path / f"a.{extension}")


def test_a_flipped_bit_differs_from_the_crc(torch, tmp_path):
    path = tmp_path / "a.pth"
    save(torch_state())(path)
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    data = bytearray(path.read_bytes())
    data[largest.header_offset + 400] ^= 1
    path.write_bytes(data)
    message = f"is damaged: CRC of {largest.filename.split('/', 1)[1]} differs"
    assert message in refused(path, layouts.read)


def test_views_and_attributes_of_tensors(torch, tmp_path):
    state = torch_state()
    negative = torch._neg_view(torch.ones(3))
    save(state | {BIAS: negative})(tmp_path / "a.pth")
    assert "a negative or conjugate view" in refused(tmp_path / "a.pth")
    state[BIAS].numel = 5
    save(state)(tmp_path / "b.pth")
    assert_same(weight_files.read(str(tmp_path / "b.pth")), tensors())
    base = torch.arange(24.0).reshape(4, 6)
    views = {"rows": base[1:3], "columns": base[:, 2:4], "transposed": base.T, "scalar": base[2, 3]}
    save(views)(tmp_path / "c.pth")
    assert_same(weight_files.read(str(tmp_path / "c.pth")), {name: view.numpy() for name, view in views.items()})


def lightning_class(module):
    for name in ("lightning_stub", module):
        sys.modules[name] = types.ModuleType(name)
    kind = type("ModelCheckpoint", (), {"__module__": module})
    sys.modules[module].ModelCheckpoint = kind
    return kind


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("beside", ["callback class", "numpy scalar", "path", "arguments", "array", "optimizer"])
def test_what_stands_beside_the_tensors_is_passed_over(torch, tmp_path, zipped, beside):
    kind = lightning_class("lightning_stub.callbacks")
    content = {
        "callback class": {kind: {"best": 1.0}}, "numpy scalar": np.float64(0.5), "path": pathlib.PurePosixPath("x"),
        "arguments": argparse.Namespace(lr=0.1), "array": np.arange(5), "optimizer": {"state": {0: {"step": torch.ones(2)}}},
    }[beside]  # fmt: skip
    torch.save({"state_dict": torch_state(), "x": content, kind: 1}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    assert_same(weight_files.read(str(tmp_path / "a.ckpt")), tensors())


def test_pytorch_files_need_no_pytorch(torch, tmp_path, monkeypatch):
    save({"model": torch_state()})(tmp_path / "a.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert_same(weight_files.read(str(tmp_path / "a.bin")), tensors())
    with pytest.raises(errors.UserError, match="needs PyTorch to be written: pip install torch"):
        weight_files.check_output(str(tmp_path / "b.pth"), False)


# --- where the tensors stand ------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "first_stage_model.module."])
def test_a_prefix_that_all_names_share_is_taken_off(tmp_path, prefix):
    safetensors_numpy.save_file({prefix + name: array for name, array in tensors().items()}, tmp_path / "a.safetensors")
    assert set(layouts.read(str(tmp_path / "a.safetensors"))) == {"tokenizer"}


def test_a_prefix_that_not_all_names_share_stays(tmp_path):
    state = {f"module.{name}": array for name, array in tensors().items()} | {"other.a": np.ones(2, np.float32)}
    safetensors_numpy.save_file(state, tmp_path / "a.safetensors")
    assert "none of the tensors by which a layout is known" in refused(tmp_path / "a.safetensors", layouts.read)


@pytest.mark.parametrize("wrappers", [("state_dict", "model"), ("model_state_dict",), ("module",), ("model_ema",), ("ema", "module")])
def test_dicts_around_the_tensors_are_opened(tmp_path, wrappers):
    tree = tensors()
    for key in reversed(wrappers):
        tree = {key: tree, "epoch": 3}
    (tmp_path / "a.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    assert_same(weight_files.read(str(tmp_path / "a.msgpack")), tensors())


@pytest.mark.parametrize("key", ["model_ema", "ema", "state_dict_ema"])
def test_raw_tensors_are_read_and_averaged_ones_told(tmp_path, capsys, key):
    tree = {"model": tensors(), key: {name: array + 1 for name, array in tensors().items()}}
    (tmp_path / "a.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    assert_same(weight_files.read(str(tmp_path / "a.msgpack")), tensors())
    assert f"holds averaged tensors as well ({key}); the raw ones are read" in capsys.readouterr().out


def test_averaged_names_beside_raw_ones(tmp_path, capsys):
    state = {f"model.{name}": array for name, array in tensors().items()} | {"model_ema.a": np.ones(2, np.float32)}
    safetensors_numpy.save_file(state | {"n_averaged": np.ones(1, np.int64)}, tmp_path / "a.safetensors")
    assert set(layouts.read(str(tmp_path / "a.safetensors"))) == {"tokenizer"}
    assert "holds averaged tensors as well (model_ema.a)" in capsys.readouterr().out


# --- other kinds of files ---------------------------------------------------------------------------

KINDS = {
    "a.pth": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "is a Git LFS pointer, not the weights: run git lfs pull"),
    "a.safetensors": (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    "b.pth": (b"<!DOCTYPE html><html>", "is a web page"),
    "c.bin": (b"\n  <HTML lang=en>", "is a web page"),
    "d.pth": (b"\x1f\x8b\x08\0\0", "is a compressed archive: unpack it"),
    "e.ckpt": (b"x" * 257 + b"ustar\x0000", "is a tar archive: unpack it"),
    "f.h5": (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
    "model.safetensors.index.json": (b'{"metadata": {}, "weight_map": {}}', "join these into one"),
    "model.ckpt.index": (b"\0\0\1", "of a TensorFlow checkpoint"),
    "model.ckpt.data-00000-of-00001": (b"\0\0\1", "of a TensorFlow checkpoint"),
    "checkpoint": (b'model_checkpoint_path: "x"', "of a TensorFlow checkpoint"),
    "g.bin": (safetensors_numpy.save({"a": np.ones(2, np.float32)}), "is a safetensors file by its content: give it a name"),
    "h.safetensors": (b"PK\x03\x04", "is a file of PyTorch's by its content"),
    "i.msgpack": (b"", "is empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_other_kinds_of_files_are_named(tmp_path, name):
    content, message = KINDS[name]
    (tmp_path / name).write_bytes(content)
    assert message in refused(tmp_path / name)


def test_other_zips_are_named(torch, tmp_path):
    np.savez(tmp_path / "a.npz", a=np.ones(3))
    (tmp_path / "a.npz").rename(tmp_path / "a.pth")
    assert "is a NumPy archive" in refused(tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "b.pth", "w") as archive:
        archive.writestr("weights.safetensors", b"")
    assert "is a zip, but none of PyTorch's (no data.pkl); unpack it" in refused(tmp_path / "b.pth")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 3)), tmp_path / "c.pt")
    assert "is a TorchScript program" in refused(tmp_path / "c.pt")


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "a.msgpack", "a"])
def test_a_pipe_a_device_or_a_folder_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    assert "not a regular file" in refused(tmp_path / name)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    assert "not a regular file" in refused(tmp_path / name)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    assert "Is a directory" in refused(tmp_path / name)


ARRAY = ExtType(1, packb(((1,), "float32", bytes(4))))
MSGPACK = {
    "int": packb({1: ARRAY}), "bytes": packb({b"a": ARRAY}), "none": packb({None: ARRAY}), "complex": packb({"a": ExtType(2, packb([]))}),
    "deep": b"\x81\xa1a" * 1000 + b"\x01", "deeper": b"\x81\xa1a" * 100_000 + b"\x01",
    "dtype": packb({"a": ExtType(1, packb(((1,), "f4,(1", bytes(8))))}), "object": packb({"a": ExtType(1, packb(((1,), "O", bytes(8))))}),
    "shape": packb({"a": ExtType(1, packb(((2**62, 2**62), "float32", bytes(8))))}), "other": packb({"a": ExtType(77, b"")}),
    "chunks": packb({"a": {"__msgpack_chunked_array__": True}}), "list key": b"\x81\x90\x01", "twice": packb({"a": ARRAY}) * 2,
}  # fmt: skip


@pytest.mark.parametrize("name", MSGPACK)
def test_hostile_msgpack_is_refused_in_one_line(tmp_path, name):
    (tmp_path / "a.msgpack").write_bytes(MSGPACK[name])
    refused(tmp_path / "a.msgpack", layouts.read)


def test_names_from_a_file_are_printable_and_cut(tmp_path):
    strange = {"a\nerror: all is well\x1b[2J": np.zeros(2, np.float32), "b" * 10**5: np.zeros(2, np.float32)}
    safetensors_numpy.save_file(tensors() | strange, tmp_path / "a.safetensors")
    assert "a\\nerror: all is well\\x1b[2J [2] is not expected" in refused(tmp_path / "a.safetensors", layouts.read)
    (tmp_path / "a.msgpack").write_bytes(serialization.msgpack_serialize({"a\x1b[2J": "text"}))
    assert "a\\x1b[2J is a str" in refused(tmp_path / "a.msgpack")


@pytest.mark.parametrize("levels, blocks", [(70, 1), (2000, 1), (1, 5000)])
def test_absurd_numbers_of_levels_contradict_each_other(tmp_path, levels, blocks):
    state = dict(tensors())
    for level in range(levels):
        for block in range(blocks):
            state[f"encoder.down.{level}.block.{block}.conv1.weight"] = np.ones((4, 4, 3, 3), np.float32)
    safetensors_numpy.save_file(state, tmp_path / "a.safetensors")
    assert "contradict each other" in refused(tmp_path / "a.safetensors", layouts.read)
