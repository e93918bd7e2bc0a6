"""Walking through folders of images: every image once, what is left out said in one line."""

import collections
import os
import pathlib
import stat
import sys

import jax

from addp_jax import files, parameters
from addp_jax.data.transforms import EXTENSIONS

ENDINGS = ", ".join(ending[1:] for ending in EXTENSIONS)
JUNK = ("__MACOSX", "@eaDir")  # folders that archives and network drives leave behind
UNKNOWN = -1  # label of an image whose class no folder tells; size of a file that is not there
SHOWN = 5  # names in a line

_announced = set()


def say(text: str) -> None:
    """A line on stderr, once in a process; also for a worker process, which must not ask jax for its number."""
    if text not in _announced:
        _announced.add(text)
        print(files.printable(text), file=sys.stderr, flush=True)


def announce(text: str) -> None:
    """`say` of what all processes of a run find alike: the first one speaks."""
    if jax.process_index() == 0:
        say(text)


class Walk:
    """Image files below folders, each once: a folder that was met before, through a link, is not entered again."""

    def __init__(self, field: str):
        self.field = field
        self.met = set()  # (device, inode) of folders
        self.left_out = collections.Counter()  # {ending: files}
        self.irregular = []  # pipes and devices with the ending of an image

    def mark(self, folder: str) -> bool:
        """Whether `folder` is met for the first time."""
        status = self._try(os.stat, folder)
        new = (status.st_dev, status.st_ino) not in self.met
        self.met.add((status.st_dev, status.st_ino))
        return new

    def mark_above(self, folder: str) -> None:
        """Keep links from leading to the folders above `folder`."""
        for above in pathlib.Path(folder).resolve().parents:
            self.mark(str(above))

    def images(self, folder: str, nested: bool = True) -> tuple[list[str], list[int]]:
        """(paths relative to `folder`, bytes of each), sorted; a folder's own come before those of its sub-folders."""
        paths, sizes, waiting = [], [], [""]
        self.mark(folder)
        while waiting:
            prefix = waiting.pop()
            entries = sorted(self._try(os.scandir, os.path.join(folder, prefix)), key=lambda entry: entry.name)
            entries = [entry for entry in entries if not entry.name.startswith(".")]
            for entry in entries:
                if is_folder(entry):
                    continue
                if not entry.name.lower().endswith(EXTENSIONS):
                    self.left_out[os.path.splitext(entry.name)[1].lower() or "no ending"] += 1
                    continue
                mode, size = _mode_and_size(entry)
                if mode is not None and not stat.S_ISREG(mode):
                    self.irregular.append(entry.path)
                else:
                    paths.append(prefix + entry.name)
                    sizes.append(size)
            if nested:
                below = [entry for entry in entries if is_folder(entry) and entry.name not in JUNK]
                waiting += [f"{prefix}{entry.name}/" for entry in reversed(below) if self.mark(entry.path)]
        return paths, sizes

    def _try(self, function, path):
        with files.explain(f"{self.field}: cannot read {path!r}"):
            return function(path)

    def announce(self, root: str) -> None:
        """Say what was left out."""
        if self.left_out:
            kinds = ", ".join(f"{count} {ending}" for ending, count in self.left_out.most_common(SHOWN))
            count = sum(self.left_out.values())
            announce(f"{root}: left out {count} files that are no images ({kinds}); images are {ENDINGS}")
        if self.irregular:
            names = parameters.shortened(self.irregular, SHOWN)
            announce(f"{root}: left out {len(self.irregular)} pipes or devices: {names}")


def _mode_and_size(entry: os.DirEntry) -> tuple[int | None, int]:
    try:
        status = entry.stat()
        return status.st_mode, status.st_size
    except OSError:  # a broken link: reading it says so
        return None, UNKNOWN


def is_folder(entry: os.DirEntry) -> bool:
    """Whether it is a folder, or a link to one; a link to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def has_image(folder: str) -> bool:
    """Whether there is an image below `folder`; stops at the first."""
    met, waiting = set(), [folder]
    while waiting:
        where = waiting.pop()
        try:
            status, entries = os.stat(where), list(os.scandir(where))
        except OSError:  # reading it says so
            continue
        if (status.st_dev, status.st_ino) in met:
            continue
        met.add((status.st_dev, status.st_ino))
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if is_folder(entry):
                waiting += [entry.path] * (entry.name not in JUNK)
            elif entry.name.lower().endswith(EXTENSIONS):
                mode, _ = _mode_and_size(entry)
                if mode is None or stat.S_ISREG(mode):
                    return True
    return False
