"""Weight files: read without trusting them, written whole or not at all.

What a file holds is untrusted: no code of it runs (`pickles`), and nothing is read into memory that is not in the file,
so that a small file cannot become a large array: its tensors together are at most `SHARING` times as long as the file.
Whatever is wrong with a file is one line that names it and leads on. Names out of a file are made printable and cut.

The tensors stand at the top, or in the dict under the first of `WRAPPERS` that is there, again and again; what stands
beside it is not read. Averaged tensors (`AVERAGED`, `model_ema.`) are read where there are no raw ones; otherwise one
line says that they are there.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable
from typing import IO

import numpy as np
import safetensors
from flax import serialization

from addp_jax import errors, files
from addp_jax.weights import pickles, torch_files

TORCH = (".pth", ".pt", ".ckpt", ".bin")
SAFETENSORS_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
FLOATS = tuple(SAFETENSORS_FLOATS.values())
SAFETENSORS_TYPES = {name: short for short, name in SAFETENSORS_FLOATS.items()} | {"int64": "I64"}
CONFIG_KEY = "addp_jax"  # in the header of a safetensors file: the config of the run, JSON of its task and model
WRAPPERS = ("model", "state_dict", "model_state_dict", "params", "module")  # keys under which the tensors are kept
AVERAGED = ("model_ema", "ema", "state_dict_ema", "ema_state_dict", "model_ema_state_dict", "params_ema", "ema_model")
AVERAGED_NAMES = ("model_ema.", "n_averaged")  # beginnings of names beside raw tensors
DEPTH = 8  # dicts around the tensors
SHARING = 4  # several names may share bytes, as frozen networks do
NAME_LENGTH = 80  # characters of a name that are kept, more than any layout has
TENSORFLOW = "of a TensorFlow checkpoint: save its tensors as .safetensors under the names of a layout"
UNPACK = "unpack it and give the weight file in it"
OTHER_KINDS = (  # how other files begin, and what to do with them
    (rb"version https://git-lfs", "a Git LFS pointer, not the weights: run git lfs pull in its folder"),
    (rb"\s*<(!doctype|html|head|\?xml)", "a web page, not the weights: download the file itself"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd", f"a compressed archive: {UNPACK}"),
    (rb"(?s).{257}ustar", f"a tar archive: {UNPACK}"),
    (rb"\x89HDF", "an HDF5 file (Keras): save its tensors as .safetensors under the names of a layout"),
    (rb"\x93NUMPY", "a NumPy array, not named tensors: save them as .safetensors"),
    (rb"model_checkpoint_path:", TENSORFLOW),
    (rb"\s*[{\[]\s*[\"\]}]", "a JSON text, not the weights: "
     "of a checkpoint in several parts, join these into one .safetensors file"),
)


class Stored:
    """A tensor in a file: its shape is known, its values are read by `np.asarray`, as float32.

    float16 and bfloat16 are widened exactly, float64 is rounded. Raises UserError, when read, if the type is no
    other float or a value is NaN or infinite. where: file and name for messages; read: () -> array.
    """

    def __init__(self, where: str, shape, dtype: str, read: Callable):
        self.where, self.shape, self.dtype, self.read = where, tuple(shape), printable(dtype), read
        self.on_read = lambda: None

    def __array__(self, dtype=None, copy=None):
        if self.dtype not in FLOATS:
            raise errors.UserError(f"{self.where} is {self.dtype}; weights are {', '.join(FLOATS)}")
        # Any error: the file was changed, or its disk fails. What overflows is refused below.
        with files.explain(f"{self.where} cannot be read", Exception), np.errstate(over="ignore"):
            array = np.array(self.read(), np.float32)  # a copy: the file may change while its values are in use
        if not np.isfinite(array).all():
            raise errors.UserError(f"{self.where} holds values that are NaN or infinite")
        self.on_read()
        return array


def read(path: str) -> dict[str, Stored]:
    """The tensors of a weight file, by name.

    `.safetensors`; `.pth`, `.pt`, `.ckpt` and `.bin` (PyTorch); `.msgpack` or no extension (flax; names joined by
    slashes). Raises UserError naming the file when it cannot be read, is damaged, or holds anything but tensors.
    """
    extension = os.path.splitext(path)[1].lower()
    refuse_other_kinds(path, extension)
    readers = {".safetensors": read_safetensors, ".msgpack": read_msgpack, "": read_msgpack}
    readers |= dict.fromkeys(TORCH, read_torch)
    if extension not in readers:
        known = f"use .safetensors, {', '.join(TORCH)} or flax's .msgpack"
        raise errors.UserError(f"{path}: {printable(extension)} is no weight file; {known}")
    return readers[extension](path)


def refuse_other_kinds(path: str, extension: str) -> None:
    """Raises UserError if the first bytes are those of another kind of file than `extension` says."""
    with files.explain(f"{path} cannot be read", OSError, ValueError), files.open_regular(path) as file:
        start = file.read(512)
    if not start:
        raise errors.UserError(f"{path} is empty: copy or download it again")
    if re.search(r"\.(index|meta|data-\d+-of-\d+)$", path.lower()):
        raise errors.UserError(f"{path} is {TENSORFLOW}")
    for pattern, what in OTHER_KINDS:
        if re.match(pattern, start, re.IGNORECASE):
            raise errors.UserError(f"{path} is {what}")
    if extension not in TORCH and (start.startswith(torch_files.ZIP) or torch_files.PICKLE.match(start)):
        raise errors.UserError(f"{path} is a file of PyTorch's by its content: give it a name that ends in .pth")
    if extension != ".safetensors" and re.match(rb"(?s).{6}\0\0\{", start):  # a length below 256 TiB, then JSON
        raise errors.UserError(f"{path} is a safetensors file by its content: give it a name that ends in .safetensors")


def printable(name) -> str:
    """A name out of a file, in one line and at most `NAME_LENGTH` characters."""
    return files.printable(str(name), NAME_LENGTH)


def read_safetensors(path: str) -> dict[str, Stored]:
    try:
        file = safetensors.safe_open(path, "numpy")
        tensors = {}
        for name in file.keys():
            part, where = file.get_slice(name), f"{path}: {printable(name)}"
            dtype = SAFETENSORS_FLOATS.get(part.get_dtype(), part.get_dtype())
            tensors[name] = Stored(where, part.get_shape(), dtype, functools.partial(file.get_tensor, name))
    except Exception as error:  # the library has several kinds, and panics
        reason = files.reason(error).removeprefix("Error while deserializing header: ")
        raise errors.UserError(f"{path} is not a whole safetensors file: {reason}") from error
    return {printable(name): tensor for name, tensor in raw_only(path, tensors).items()}


def read_config(path: str) -> str:
    """The text under `CONFIG_KEY` in a .safetensors file, else "". Raises UserError naming a file that is damaged."""
    if not path.lower().endswith(".safetensors"):
        return ""
    refuse_other_kinds(path, ".safetensors")
    with files.explain(f"{path} is not a whole safetensors file", Exception):  # as above
        return (safetensors.safe_open(path, "numpy").metadata() or {}).get(CONFIG_KEY, "")


def read_torch(path: str) -> dict[str, Stored]:
    file = torch_files.File(path)
    tensors, total = {}, 0
    for key, value in tensors_of(path, file.tree).items():
        where = f"{path}: {printable(key)}"
        try:
            tensor = file.tensor(value)
        except Exception as error:  # arguments of any kind
            why = files.reason(error) if isinstance(error, ValueError) else "arguments that make no tensor"
            raise errors.UserError(f"{where} is not stored whole: {why}") from error
        if tensor is None:
            raise not_a_tensor(where, value)
        total += tensor.nbytes
        tensors[printable(key)] = Stored(where, tensor.shape, tensor.dtype, tensor.read)
    if total > SHARING * file.size:
        sizes = f"its tensors are {total / 1e6:.0f} MB, the file {file.size / 1e6:.0f} MB"
        raise errors.UserError(f"{path} is refused: {sizes}")
    return tensors


def read_msgpack(path: str) -> dict[str, Stored]:
    """Of a file of `flax.serialization`."""
    with files.explain(f"{path} is not a whole flax msgpack file", Exception):  # numpy and msgpack raise anything
        tree = serialization.msgpack_restore(files.read_bytes(path))
    tensors, waiting = {}, [("", tensors_of(path, tree))]
    while waiting:  # no recursion: a file can nest deeply
        prefix, branch = waiting.pop()
        for key, value in branch.items():
            name = printable(f"{prefix}{key}")
            if isinstance(value, dict):
                waiting.append((f"{name}/", value))
            elif isinstance(value, np.ndarray):
                tensors[name] = Stored(f"{path}: {name}", value.shape, str(value.dtype), lambda value=value: value)
            else:
                raise not_a_tensor(f"{path}: {name}", value)
    return tensors


def not_a_tensor(where: str, value) -> errors.UserError:
    kind = value.name if isinstance(value, pickles.Made) else type(value).__name__
    return errors.UserError(f"{where} is a {printable(kind)}, not a tensor")


def tensors_of(path: str, tree) -> dict:
    """The dict of tensors in what a file holds."""
    for _ in range(DEPTH):
        inside = lambda keys: [key for key in keys if isinstance(tree, dict) and isinstance(tree.get(key), dict)]
        raw, averaged = inside(WRAPPERS), inside(AVERAGED)
        if raw and averaged:
            tell_averaged(path, averaged[0])
        if not raw + averaged:
            break
        tree = tree[(raw + averaged)[0]]
    if isinstance(tree, pickles.Made):
        what = f"an object of {printable(tree.name)}, not a dict of tensors"
        raise errors.UserError(f"{path} holds {what}: save its state_dict() by torch.save")
    if not isinstance(tree, dict) or not tree:
        raise errors.UserError(f"{path} holds no dict of tensors")
    return raw_only(path, tree)


def raw_only(path: str, tensors: dict) -> dict:
    """Without averaged tensors that stand beside raw ones, and without the count of `torch.optim.swa_utils`."""
    averaged = [name for name in tensors if str(name).startswith(AVERAGED_NAMES)]
    if not averaged or len(averaged) == len(tensors):
        return tensors
    if any(name != "n_averaged" for name in averaged):
        tell_averaged(path, averaged[0])
    return {name: tensor for name, tensor in tensors.items() if name not in averaged}


def tell_averaged(path: str, name: str) -> None:
    advice = "the raw ones are read. Save the averaged alone to read them"
    print(f"{path}: holds averaged tensors as well ({printable(name)}); {advice}")


def without_prefix(tensors: dict, known: Callable[[Iterable[str]], bool]) -> dict:
    """`tensors` without the prefixes (`module.`, `_orig_mod.`, `model.`...) that all names share.

    known: whether names are those of a network that is looked for. Returns `tensors` as they are if no prefix helps.
    """
    shorter = tensors
    while not known(shorter):
        prefixes = {match[0] if (match := re.match(r"[^./]*[./]", name)) else "" for name in shorter}
        if len(prefixes) != 1 or "" in prefixes:
            return tensors
        (prefix,) = prefixes
        shorter = {name.removeprefix(prefix): tensor for name, tensor in shorter.items()}
    return shorter


def check_output(path: str, force: bool) -> None:
    """Raises UserError unless `path` names a file of a kind that can be written here, and is free or `force` is set."""
    extension, folder = os.path.splitext(path)[1].lower(), os.path.dirname(path)
    if extension in TORCH:
        import_torch(path)
    elif extension != ".safetensors":
        raise errors.UserError(f"output={path}: give a name that ends in .safetensors or {', '.join(TORCH)}")
    if not os.path.isdir(folder or "."):
        raise errors.UserError(f"output={path}: there is no folder {folder}")
    if os.path.exists(path) and not force:
        raise errors.UserError(f"output={path}: there is such a file already; force replaces it")


def write(path: str, tensors: dict[str, np.ndarray], wrapper: str, config: str = "") -> None:
    """Writes contiguous arrays to `path` (see `check_output`): under another name first, so that it appears whole.

    wrapper: key of the dict around the tensors in a PyTorch file; config: text for `read_config` in a safetensors file;
    "" = none. Raises UserError when there is no room.
    """
    size, free = sum(array.nbytes for array in tensors.values()), shutil.disk_usage(os.path.dirname(path) or ".").free
    if size > free:
        raise errors.UserError(f"{path} needs {size / 1e6:.0f} MB, and its disk has {free / 1e6:.0f} MB left")
    function, text = (write_safetensors, config) if path.lower().endswith(".safetensors") else (write_torch, wrapper)
    with files.explain(f"cannot write {path}", OSError, RuntimeError, advice="; is the disk full?"):
        files.replace(path, lambda file: function(file, tensors, text))


def write_safetensors(file: IO[bytes], tensors: dict[str, np.ndarray], config: str = "") -> None:
    """Array by array, so that no copy of all is in memory; the widest elements first, so that each array is aligned."""
    header, end = {"__metadata__": {CONFIG_KEY: config}} if config else {}, 0
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    for name in names:
        start, end = end, end + tensors[name].nbytes
        dtype, shape = SAFETENSORS_TYPES[str(tensors[name].dtype)], list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in names:
        file.write(tensors[name].reshape(-1).view(np.uint8))


def write_torch(file: IO[bytes], tensors: dict[str, np.ndarray], wrapper: str) -> None:
    """An array under several names is stored once."""
    torch = import_torch(file.name)
    shared = {id(array): torch.from_numpy(array) for array in tensors.values()}
    state = {name: shared[id(array)] for name, array in tensors.items()}
    torch.save({wrapper: state} if wrapper else state, file)


def import_torch(path: str):
    try:
        import torch
    except ImportError as error:
        advice = "pip install torch; a .safetensors file does not"
        raise errors.UserError(f"{path} needs PyTorch to be written: {advice}") from error
    return torch
