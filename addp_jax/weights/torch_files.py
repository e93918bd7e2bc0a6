"""PyTorch's files, the zips and the older ones, read without PyTorch and without running code from them.

A tensor is read only if the file stores all of it: its storage is one record of the file, as long as the storage
claims, shape and strides stay inside the storage, and no element is there twice. Records of a zip are stored
uncompressed, do not overlap, and have the CRC that the zip states when their values are read. So nothing larger than
the file comes out of it, and nothing but what was written.
"""

from __future__ import annotations

import io
import math
import mmap
import re
import struct
import zipfile
import zlib
from typing import NamedTuple

import ml_dtypes
import numpy as np

from addp_jax import errors, files
from addp_jax.weights import pickles

ZIP, PICKLE = b"PK\x03\x04", re.compile(rb"\x80[\x02-\x05]")  # how the newer and the older files begin
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # first and second pickle of an older file
DTYPES = {  # of a storage, by the class that the pickle names
    "Float": np.float32, "Half": np.float16, "BFloat16": ml_dtypes.bfloat16, "Double": np.float64, "Long": np.int64,
    "Int": np.int32, "Short": np.int16, "Char": np.int8, "Byte": np.uint8, "Bool": np.bool_,
    "ComplexFloat": np.complex64, "ComplexDouble": np.complex128,
}  # fmt: skip
REBUILD, PARAMETER = "torch._utils._rebuild_tensor", "torch._utils._rebuild_parameter"
SUBCLASS = "torch._tensor._rebuild_from_type_v2"


class Record:
    """Bytes of the file, compared with their CRC-32 when they are first taken."""

    def __init__(self, where: tuple[str, str], data: mmap.mmap, start: int, size: int, crc: int | None = None):
        """where: file and name of the record for messages; crc: None where the format has none."""
        self.where, self.data, self.start, self.size, self.crc = where, data, start, size, crc

    def checked(self) -> Record:
        if self.crc is not None:
            with memoryview(self.data) as view, view[self.start : self.start + self.size] as part:
                crc = zlib.crc32(part)
            if crc != self.crc:
                path, name = self.where
                raise errors.UserError(f"{path} is damaged: CRC of {name} differs")
            self.crc = None
        return self


class Tensor(NamedTuple):
    """Where a tensor lies. shape, strides and offset count elements; `dtype` is numpy's name."""

    record: Record | None
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize if self.record else 0

    def read(self) -> np.ndarray:
        """A view of the file."""
        record, dtype = self.record.checked(), np.dtype(self.dtype)
        flat = np.frombuffer(record.data, dtype, record.size // dtype.itemsize, record.start)
        strides = [stride * dtype.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, strides, writeable=False)


class File:
    """An opened file: `tree` is what it holds, as plain values and `pickles.Made`; `tensor` finds the tensors."""

    def __init__(self, path: str):
        """Raises UserError naming the file if it is damaged or no file of PyTorch's."""
        self.path = path
        with files.explain(f"{path} is damaged or cut short", Exception):  # a hostile zip can raise anything
            with files.open_regular(path) as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.size = len(self.data)
            if self.data[: len(ZIP)] == ZIP:
                self.tree, self.records = self.open_zip()
            elif PICKLE.match(self.data):
                self.tree, self.records = self.open_older()
            else:
                raise self.error("is not a PyTorch file: it begins with other bytes")

    def error(self, problem: str) -> errors.UserError:
        return errors.UserError(f"{self.path} {problem}")

    def open_zip(self):
        with files.open_regular(self.path) as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
        names = {entry.filename for entry in entries}
        if names and all(name.endswith(".npy") for name in names):
            raise self.error("is a NumPy archive (.npz), not weights of PyTorch; save them as .safetensors")
        roots = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(roots) != 1:
            advice = "unpack it and give the weight file in it"
            raise self.error(f"is a zip, but none of PyTorch's (no data.pkl); {advice}")
        (root,) = roots
        if any(name == f"{root}constants.pkl" or name.startswith(f"{root}code/") for name in names):
            advice = "save the tensors by torch.save(torch.jit.load(PATH).state_dict(), NEW)"
            raise self.error(f"is a TorchScript program, not a dict of tensors; {advice}")
        records = self.zip_records(entries, root)
        if (order := records.get("byteorder")) and self.bytes_of(order) != b"little":
            raise self.error("was written by a big-endian machine, which is not read")
        with io.BytesIO(self.bytes_of(records["data.pkl"])) as file:
            tree, _ = pickles.load(file)
        return tree, {name[5:]: record for name, record in records.items() if name.startswith("data/")}

    def zip_records(self, entries, root: str) -> dict[str, Record]:
        """{name after `root`: record}; UserError unless the entries are as PyTorch writes them."""
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise self.error("is refused: it is a compressed zip, and PyTorch writes uncompressed ones")
        records, end = {}, 0
        for entry in sorted(entries, key=lambda entry: entry.header_offset):
            name = files.printable(entry.filename.removeprefix(root), 60)
            if entry.header_offset < end or name in records:
                raise self.error("is refused: the entries of its zip overlap")
            if self.data[entry.header_offset : entry.header_offset + 4] != ZIP:
                raise self.error(f"is damaged: {name} is not where the zip says")
            start = entry.header_offset + 30 + sum(struct.unpack_from("<HH", self.data, entry.header_offset + 26))
            end = start + entry.file_size
            if end > self.size:
                raise self.error(f"is damaged: {name} reaches beyond the end of the file")
            records[name] = Record((self.path, name), self.data, start, entry.file_size, entry.CRC)
        return records

    def bytes_of(self, record: Record) -> bytes:
        record.checked()
        return self.data[record.start : record.start + record.size]

    def open_older(self):
        """Five pickles (magic number, protocol, machine, tree, keys of the storages), then length and bytes of each."""
        if pickles.load(self.data)[0] != MAGIC:
            raise self.error("is a pickle, but none of PyTorch's; save the tensors by torch.save")
        protocol, machine = pickles.load(self.data)[0], pickles.load(self.data)[0]
        if protocol != PROTOCOL or not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise self.error("is of another protocol or a big-endian machine, which is not read")
        tree, persistent = pickles.load(self.data)
        dtypes = {key: dtype for key, dtype, _ in map(storage_of, persistent)}
        records, start = {}, 0
        for key in (keys := pickles.load(self.data)[0]):
            start = self.data.tell() if not records else start
            if not isinstance(key, str) or key in records or dtypes.get(key) is None:
                raise ValueError("its list of storages is wrong")
            (count,) = struct.unpack_from("<q", self.data, start)
            size = count * dtypes[key].itemsize
            if not 0 <= size <= self.size - start - 8:
                raise ValueError(f"storage {len(records)} of {len(keys)} reaches beyond the end of the file")
            records[key] = Record((self.path, files.printable(key, 60)), self.data, start + 8, size)
            start += 8 + size
        return tree, records

    def tensor(self, value) -> Tensor | None:
        """The tensor that `value` stands for; None if it is none. Raises ValueError if it is not stored whole."""
        for _ in range(4):  # a parameter of a subclass holds a tensor, and so on
            if not isinstance(value, pickles.Made) or not isinstance(value.args, tuple) or not value.args:
                return None
            if value.name.startswith(PARAMETER):
                value = value.args[0]
            elif value.name == SUBCLASS and len(value.args) > 2 and isinstance(value.args[0], pickles.Made):
                value = pickles.Made(value.args[0].name, value.args[2])
            else:
                break
        if not value.name.startswith(REBUILD) and not value.name.startswith("torch._utils._rebuild_"):
            return None
        if value.name not in (REBUILD, f"{REBUILD}_v2", f"{REBUILD}_v3"):
            raise ValueError("a sparse, quantised or foreign tensor")
        storage, offset, shape, strides, *rest = value.args
        key, dtype, count = storage_of(storage)
        if value.name.endswith("_v3") and len(rest) > 2:  # of bytes, with the type beside it
            return Tensor(None, type_name(rest[2]), 0, sizes(shape), ())
        if len(rest) > 2 and rest[2]:
            raise ValueError("a negative or conjugate view")
        if dtype is None:
            return Tensor(None, type_name(storage.args[1]), 0, sizes(shape), ())
        shape, strides, record = sizes(shape), sizes(strides), self.records.get(key)
        if record is None or record.size != count * dtype.itemsize:
            raise ValueError("its storage is missing or has another size")
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides))
        inside = isinstance(offset, int) and 0 <= offset <= count and (0 in shape or last < count)
        if not inside or len(shape) != len(strides) or math.prod(shape) > count:
            raise ValueError("an expanded tensor, or one that reaches out of its storage")
        return Tensor(record, dtype.name, offset, shape, strides)


def sizes(value) -> tuple[int, ...]:
    """A shape as the pickle has it. Raises ValueError unless it is up to 32 integers in int64."""
    value = value.args[0] if isinstance(value, pickles.Made) and value.name == "torch.Size" and value.args else value
    integers = isinstance(value, tuple) and all(isinstance(size, int) and 0 <= size < 2**63 for size in value)
    if not integers or len(value) > 32:
        raise ValueError("a tensor of an impossible shape")
    return value


def storage_of(made) -> tuple[str, np.dtype | None, int]:
    """`(key, dtype, number of elements)` of a persistent id; dtype None if it is one that no weights have."""
    args = made.args if isinstance(made, pickles.Made) and made.name == pickles.PERSISTENT else None
    if not isinstance(args, tuple) or len(args) < 5 or args[0] != "storage":
        raise ValueError("a tensor without a storage in the file")
    _, kind, key, _, count, *view = args
    types = isinstance(kind, pickles.Made) and isinstance(key, str) and isinstance(count, int)
    if not types or count < 0 or any(part is not None for part in view):
        raise ValueError("a tensor without a storage in the file")
    kind = DTYPES.get(type_name(kind).removesuffix("Storage"))
    return key, None if kind is None else np.dtype(kind), count


def type_name(made) -> str:
    """float8_e4m3fn of torch.float8_e4m3fn, FloatStorage of torch.FloatStorage."""
    return files.printable(made.name.rpartition(".")[2], 40) if isinstance(made, pickles.Made) else "of an unknown type"
