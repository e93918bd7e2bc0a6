"""Files: only regular ones are read, what is written appears whole and survives a power cut, reasons are one line.

Every module that opens, writes or names a file of the user's goes through here, so that each rule stands once:

    a file that is read is a regular one (no pipe, no device), so that reading ends        `open_regular`
    a file appears under its name when it is complete and on the disk                      `replace`
    a name that another file gives stays below that file's folder                          `below`
    a list has one entry per line, in UTF-8, with or without a byte order mark             `read_lines`
    a folder is known to be writable before the work begins                                `require_writable`
    `~` is the home folder                                                                 `expand`
    what goes to a terminal is one line without control characters                         `printable`, `reason`
    what the system or another library refuses is a UserError                              `explain`
    a mistake of the user's ends a command with one line and status 2                      `exit_on_mistake`
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import re
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import IO

from addp_jax import errors

REASON_LENGTH = 200  # characters of another library's message that are shown
TEMPORARY = ".tmp"  # ending of a file that is being written
PASSING = {  # what a mount, a network or a disk says that may be well again later
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.ENOTCONN, errno.ECONNRESET,
    errno.ECONNABORTED, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOSPC, errno.EDQUOT,
}  # fmt: skip


def expand(path: str) -> str:
    """`path` with a leading `~` or `~user` replaced by the home folder."""
    return os.path.expanduser(path)


def printable(text: str, limit: int = 0) -> str:
    """`text` in one line, control and undecodable characters escaped, cut to `limit` characters (0 = whole)."""
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
    return escaped if not limit or len(escaped) <= limit else escaped[: limit - 3] + "..."


def reason(error: BaseException) -> str:
    """The first line of what an exception says, at most 200 printable characters; of an OSError what the system says."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return printable((text.strip() or type(error).__name__).splitlines()[0], REASON_LENGTH)


def may_pass(error: Exception) -> bool:
    """Whether what failed may be well again later."""
    return error.passing if isinstance(error, errors.UserError) else isinstance(error, OSError) and error.errno in PASSING


@contextlib.contextmanager
def explain(
    problem: str, *kinds: type[Exception], advice: str = "", passing: Callable[[Exception], bool] = may_pass
) -> Iterator[None]:
    """An error of the block becomes a UserError: `problem`, its reason, and `advice` as it is.

    kinds: OSError where none is given. A UserError passes as it is, unless it is one of the kinds.
    passing: of an error, whether it may be well again later.
    """
    try:
        yield
    except kinds or OSError as error:
        if isinstance(error, errors.UserError) and errors.UserError not in kinds:
            raise
        raise errors.UserError(f"{problem}: {reason(error)}{advice}", passing(error)) from error


def cause_of_failed_write(error: BaseException) -> str:
    """"no space left on", "cannot write (why) to", or "" for an error that tells of neither."""
    text = str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        text = "No space left on device"
    if re.search("No space left on device|Disk quota exceeded", text):  # from OSError and tensorstore
        return "no space left on"
    return f"cannot write ({reason(error)}) to" if isinstance(error, OSError) or "os_error_code" in text else ""


@contextlib.contextmanager
def exit_on_mistake() -> Iterator[None]:
    """Prints a UserError of the block as `error: ...` on stderr, and exits with status 2."""
    try:
        yield
    except errors.UserError as error:
        print("error:", printable(str(error)), file=sys.stderr)
        sys.exit(2)


def open_regular(path: str | os.PathLike) -> IO[bytes]:
    """Opens a file to read its bytes. Raises OSError also for a pipe, a device or a folder, without waiting for one."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_BINARY", 0))  # NONBLOCK: a pipe would wait
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file (a pipe or a device)", os.fspath(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: str | os.PathLike) -> bytes:
    """The bytes of a regular file. Raises OSError."""
    with open_regular(path) as file:
        return file.read()


def read_lines(path: str | os.PathLike) -> list[str]:
    """The lines of a text file in UTF-8; a byte order mark and carriage returns are dropped. Raises OSError, UnicodeDecodeError."""
    return [line.removesuffix("\r") for line in read_bytes(path).decode("utf-8-sig").split("\n")]


def read_json(path: str | os.PathLike):
    """The value in a JSON file. Raises OSError, and ValueError for what is no JSON (deep nesting as well)."""
    try:
        return json.loads(read_bytes(path))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def below(root: str | os.PathLike, name: str) -> str:
    """`root`/`name`, for a `name` that stands in a file. Raises ValueError if it is absolute, empty, or leads out of `root`."""
    if not name or "\0" in name or name.startswith("/") or ".." in name.split("/"):
        raise ValueError(f"{printable(name, REASON_LENGTH)!r} leads out of the folder")
    return os.path.join(root, name)


def replace(path: str | os.PathLike, fill: Callable[[IO[bytes]], object]) -> None:
    """Writes a file by `fill(file)` beside `path`, syncs it to the disk, and renames it: `path` is never seen half written.

    Raises OSError; nothing is left behind then.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{os.getpid()}-{hash(path.name) & 0xFFFFFFFF:08x}{TEMPORARY}")  # short: names have a limit
    try:
        with open(temporary, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_text(path: str | os.PathLike, text: str) -> None:
    """`replace` with a text in UTF-8."""
    replace(path, lambda file: file.write(text.encode("utf-8", "surrogateescape")))


def sync_folder(folder: str | os.PathLike) -> None:
    """Makes the names in a folder durable, where the file system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def require_writable(folder: str | os.PathLike, field: str) -> None:
    """Makes `folder` where it is missing. Raises UserError naming `field` if nothing can be written there."""
    with explain(f"{field}: cannot write to {folder}"):
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=os.fspath(folder)) as file:
            file.write(b"\0")
