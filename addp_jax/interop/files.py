"""Weight files: read without trusting them, written whole or not at all.

What a file holds is untrusted: a `.pth` is unpickled by PyTorch's restricted unpickler, which runs no code, with
`argparse.Namespace` (the released files hold one) as the only additional type. Nothing is read into memory that is not
in the file, so that a small file cannot become a large array.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import zipfile

import msgpack
import numpy as np
import safetensors
from flax import serialization, traverse_util
from safetensors import numpy as safetensors_numpy

from addp_jax import errors

TORCH = (".pth", ".pt", ".ckpt")
FLOATS = ("float32", "float16", "bfloat16", "float64")
SAFETENSORS_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
WRAPPERS = ("model", "state_dict", "params")  # keys under which the releases keep the tensors
ZIP, PICKLE = b"PK\x03\x04", b"\x80\x02"  # how PyTorch's files begin, the newer and the older ones


class Stored:
    """A tensor in a file: its shape is known, its values are read by `np.asarray`, as float32.

    float16 and bfloat16 are widened exactly, float64 is rounded. Raises UserError, when read, if the type is no
    other float or a value is NaN or infinite.
    """

    def __init__(self, where: str, shape, dtype: str, read):
        """where: file and name for messages; read: () -> array."""
        self.where, self.shape, self.dtype, self.read = where, tuple(shape), dtype, read
        self.on_read = lambda: None

    def __array__(self, dtype=None, copy=None):
        if self.dtype not in FLOATS:
            raise errors.UserError(f"{self.where} is {self.dtype}; weights are {', '.join(FLOATS)}")
        with np.errstate(over="ignore"):  # what overflows is refused below
            array = np.array(self.read(), np.float32)  # a copy: the file may change while its values are in use
        if not np.isfinite(array).all():
            raise errors.UserError(f"{self.where} holds values that are NaN or infinite")
        self.on_read()
        return array


def read(path: str) -> dict[str, Stored]:
    """The tensors of a weight file, by name.

    `.safetensors`; `.pth`, `.pt` and `.ckpt` (needs PyTorch); `.msgpack` or no extension (flax; names joined by slashes).
    Raises UserError naming the file when it cannot be read, is damaged, or holds anything but tensors.
    """
    extension = os.path.splitext(path)[1].lower()
    if extension == ".safetensors":
        return read_safetensors(path)
    if extension in TORCH:
        return tensors_of(path, *read_torch(path))
    if extension in (".msgpack", ""):
        return tensors_of(path, read_msgpack(path), np.ndarray)
    raise errors.UserError(f"{path}: {extension} is no weight file; use .safetensors, {', '.join(TORCH)} or flax's .msgpack")


def read_safetensors(path: str) -> dict[str, Stored]:
    try:
        file = safetensors.safe_open(path, "numpy")
    except (OSError, safetensors.SafetensorError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise errors.UserError(f"{path} is not a whole safetensors file: {reason}") from error
    slices = {name: file.get_slice(name) for name in file.keys()}
    return {
        name: Stored(
            f"{path}: {name}",
            tensor.get_shape(),
            SAFETENSORS_FLOATS.get(tensor.get_dtype(), tensor.get_dtype()),
            lambda name=name: file.get_tensor(name),
        )
        for name, tensor in slices.items()
    }


def read_torch(path: str):
    """`(object, tensor type)` of a PyTorch file, its tensors memory-mapped where the format allows."""
    torch = import_torch(path)
    try:
        with open(path, "rb") as file:
            start = file.read(len(ZIP))
        if not start.startswith((ZIP, PICKLE)):
            raise errors.UserError(f"{path} is not a PyTorch file: it is empty, or begins with other bytes")
        if start == ZIP:
            check_zip(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=start == ZIP), torch.Tensor
    except errors.UserError:
        raise
    except Exception as error:  # a hostile pickle can make the unpickler raise anything
        raise errors.UserError(f"{path} {torch_problem(error)}") from error


def torch_problem(error: Exception) -> str:
    """One clause for what PyTorch says at length."""
    unsafe = re.search(r"GLOBAL ([\w.]+)", str(error))
    if unsafe:
        return f"is refused: its pickle asks for {unsafe[1]}, and only tensors and argparse.Namespace are read"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
    return f"is damaged or cut short: {reason[:120]}"


def check_zip(path: str) -> None:
    """Raises UserError unless the archive is as PyTorch writes it: uncompressed, no bytes used twice."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise errors.UserError(f"{path} is refused: it is a compressed zip, and PyTorch writes uncompressed ones")
    if sum(entry.file_size for entry in entries) > os.path.getsize(path):
        raise errors.UserError(f"{path} is refused: the entries of its zip overlap")


def read_msgpack(path: str):
    """The tree in a file of `flax.serialization`."""
    try:
        with open(path, "rb") as file:
            return serialization.msgpack_restore(file.read())
    except (OSError, msgpack.UnpackException, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise errors.UserError(f"{path} is not a whole flax msgpack file: {reason[:120]}") from error


def tensors_of(path: str, tree, kind: type) -> dict[str, Stored]:
    """The tensors of a loaded `tree`, without the dict that the releases put around them and what else is in there."""
    inner = [tree[key] for key in WRAPPERS if isinstance(tree, dict) and isinstance(tree.get(key), dict)]
    tree = inner[0] if inner else tree
    if not isinstance(tree, dict) or not tree:
        raise errors.UserError(f"{path} holds no dict of tensors")
    flat = traverse_util.flatten_dict(tree, sep="/") if kind is np.ndarray else tree
    return {str(name): stored(f"{path}: {name}", value, kind) for name, value in flat.items()}


def stored(where: str, value, kind: type) -> Stored:
    if not isinstance(value, kind):
        raise errors.UserError(f"{where} is a {type(value).__name__}, not a tensor")
    dtype = str(value.dtype).removeprefix("torch.")
    if kind is np.ndarray:
        return Stored(where, value.shape, dtype, lambda: value)
    plain = str(value.layout) == "torch.strided" and value.device.type == "cpu" and not value.is_quantized
    if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise errors.UserError(f"{where} is not stored whole (a sparse, quantised, expanded or empty tensor)")
    return Stored(where, value.shape, dtype, lambda: value.detach().float().numpy())


def check_output(path: str, force: bool) -> None:
    """Raises UserError unless `path` names a file of a kind that can be written here, and is free or `force` is set."""
    extension = os.path.splitext(path)[1].lower()
    if extension in TORCH:
        import_torch(path)
    elif extension != ".safetensors":
        raise errors.UserError(f"--output={path}: give a name that ends in .safetensors or {', '.join(TORCH)}")
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise errors.UserError(f"--output={path}: there is no folder {os.path.dirname(path)}")
    if os.path.exists(path) and not force:
        raise errors.UserError(f"--output={path}: there is such a file already; --force replaces it")


def write(path: str, tensors: dict[str, np.ndarray], wrapper: str) -> None:
    """Writes contiguous arrays to `path` (see `check_output`): under another name first, so that it appears whole.

    wrapper: key of the dict around the tensors in a PyTorch file; "" = none. Raises UserError when there is no room.
    """
    size, free = sum(array.nbytes for array in tensors.values()), shutil.disk_usage(os.path.dirname(path) or ".").free
    if size > free:
        raise errors.UserError(f"{path} needs {size / 1e6:.0f} MB, and its disk has {free / 1e6:.0f} MB left")
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        if path.lower().endswith(".safetensors"):
            safetensors_numpy.save_file(tensors, temporary)
        else:
            write_torch(temporary, tensors, wrapper)
        os.umask(umask := os.umask(0))
        os.chmod(temporary, 0o666 & ~umask)  # safetensors makes files that only their owner can read
        os.replace(temporary, path)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise errors.UserError(f"cannot write {path}: {str(error).splitlines()[0]}; is the disk full?") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_torch(path: str, tensors: dict[str, np.ndarray], wrapper: str) -> None:
    """An array under several names is stored once."""
    torch = import_torch(path)
    shared = {id(array): torch.from_numpy(array) for array in tensors.values()}
    state = {name: shared[id(array)] for name, array in tensors.items()}
    torch.save({wrapper: state} if wrapper else state, path)


def import_torch(path: str):
    try:
        import torch
    except ImportError as error:
        raise errors.UserError(f"{path} needs PyTorch: pip install torch; a .safetensors file does not") from error
    return torch
