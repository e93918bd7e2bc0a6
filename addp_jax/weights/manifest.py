"""A folder's manifest: the size and hash of each of its files, so that damage is noticed before anything is used.

The rule: a folder is sound if it holds regular files and folders only, and its manifest lists exactly these files,
each with its size and hash. Names come from the folder, never from the manifest: nothing outside is opened.

A manifest that is missing or torn (empty, cut off, NUL bytes: what a kill or a power cut leaves) counts as none:
`inspect` then cannot tell whether the contents are sound.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import stat
from collections.abc import Callable, Iterable

from addp_jax import files

NAME = "blake2.json"
LARGEST = 2**26  # bytes of a manifest or another small file that are read at most
CHUNK = 2**20
EXPANSION, ZEROS = 4096, 2**28  # files may claim so many times their size, and so many bytes of zeros


def write_manifest(folder: str | os.PathLike, stop: Callable[[], bool] = bool) -> None:
    """Puts the files of `folder` on the disk, then writes the manifest; gives up if `stop()`. Raises OSError."""
    folder = pathlib.Path(folder)
    names = sizes(folder)
    names.pop(NAME, None)
    listing = entries(folder, sorted(names), sync=True, stop=stop)
    if stop():
        return
    for inner in sorted({parent for name in names for parent in pathlib.PurePosixPath(name).parents}):
        files.sync_folder(folder / inner)
    files.write_text(folder / NAME, text(listing))
    files.sync_folder(folder.parent)


def entries(folder: str | os.PathLike, names: Iterable[str], sync=False, stop: Callable[[], bool] = bool) -> dict:
    """`{name: [bytes, hash]}` of files below `folder`, which `sync` puts on the disk. Raises OSError."""
    found = sizes(folder)
    return {name: [found[name], _hash(pathlib.Path(folder, name), found[name], sync, stop)] for name in names}


def text(entries: dict[str, list]) -> str:
    """The manifest with these entries."""
    return json.dumps(entries, indent=0)


def inspect(folder: str | os.PathLike, inner: str = "") -> str:
    """What is wrong with the files of `folder`, in a few words; "" if they are sound or have no manifest.

    inner: a folder within it that must be there.
    """
    folder = pathlib.Path(folder)
    if not (folder / inner).is_dir() and not (folder / inner).is_symlink():
        return f"folder {inner} is missing"
    try:
        stored, entries = sizes(folder), _read(folder)
        if entries is None:
            return ""
        stored.pop(NAME)
        for name in sorted(entries.keys() | stored.keys()):
            if name not in entries:
                return f"file {_shown(name)}: not listed in {NAME}"
            if name not in stored:
                return f"file {_shown(name)}: missing"
            if stored[name] != entries[name][0]:
                return f"file {_shown(name)}: {stored[name]} bytes instead of {entries[name][0]}"
        for name, (size, digest) in entries.items():
            if _hash(folder / name, size) != digest:
                return f"file {_shown(name)}: hash differs"
    except OSError as error:
        return f"cannot be read: {files.reason(error)}"
    except ValueError as error:
        return files.reason(error)
    return ""


def exists(folder: str | os.PathLike) -> bool:
    """Whether `folder` has a manifest, be it sound or not; a torn one counts as none. Raises OSError."""
    try:
        return _read(pathlib.Path(folder)) is not None
    except ValueError:
        return True


def verified(folder: str | os.PathLike, name: str) -> bytes | None:
    """The bytes of one file of `folder`, or None unless they are those that the manifest lists."""
    folder = pathlib.Path(folder)
    try:
        entries = _read(folder) or {}
        data = small(folder / name) if name in entries else None
    except (OSError, ValueError):
        return None
    return data if data is not None and [len(data), _digest(data)] == entries[name] else None


def small(path: str | os.PathLike) -> bytes:
    """The bytes of a regular file that is meant to be small. Raises OSError, and ValueError above 64 MiB."""
    with files.open_regular(path) as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ValueError(f"file {_shown(os.path.basename(path))}: larger than {LARGEST >> 20} MiB")
    return data


def sizes(folder: str | os.PathLike) -> dict[str, int]:
    """`{name with slashes: bytes}` of all files below `folder`. Raises OSError; ValueError for a link or a device."""
    result, waiting = {}, [""]
    while waiting:
        prefix = waiting.pop()
        with os.scandir(os.path.join(folder, prefix)) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    waiting.append(f"{prefix}{entry.name}/")
                elif stat.S_ISREG(status.st_mode):
                    result[prefix + entry.name] = status.st_size
                else:
                    raise ValueError(f"file {_shown(prefix + entry.name)}: not a regular file (a link, pipe or device)")
    return result


def require_plausible(folder: str | os.PathLike, claimed: int) -> None:
    """Raises ValueError if the arrays in the files of `folder` cannot have the `claimed` bytes."""
    stored = sum(sizes(folder).values())
    if claimed > EXPANSION * stored + ZEROS:
        raise ValueError(f"its metadata tell of {claimed} bytes of arrays in {stored} bytes of files")


def _read(folder: pathlib.Path) -> dict[str, list] | None:
    """The entries, None without a manifest or with a torn one. Raises OSError, and ValueError for anything else."""
    try:
        text = small(folder / NAME)
    except FileNotFoundError:
        return None
    try:
        pairs = json.loads(text.decode(), object_pairs_hook=tuple)
    except (ValueError, RecursionError) as error:
        if b"\0" in text or not text.rstrip().endswith(b"}"):
            return None  # begun and not ended; a single wrong letter in a whole one is damage
        raise ValueError(f"file {NAME}: not readable as JSON") from error
    entries = dict(pairs) if isinstance(pairs, tuple) else {}
    if not entries or len(entries) < len(pairs) or not all(map(_is_entry, entries.values())):
        raise ValueError(f"file {NAME}: not a list of files, each once, with size and hash")
    return entries


def _is_entry(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and type(value[0]) is int and isinstance(value[1], str)


def _hash(path: pathlib.Path, size: int, sync: bool = False, stop: Callable[[], bool] = bool) -> str:
    """Of at most the first `size` bytes; of fewer if `stop()`."""
    digest = hashlib.blake2b(digest_size=16)
    with files.open_regular(path) as file:
        while size > 0 and not stop() and (data := file.read(min(size, CHUNK))):
            digest.update(data)
            size -= len(data)
        if sync:
            os.fsync(file.fileno())
    return digest.hexdigest()


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _shown(name: str) -> str:
    return files.printable(name, files.REASON_LENGTH)
