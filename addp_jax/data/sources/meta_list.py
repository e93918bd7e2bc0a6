"""Images named in a list, as the released code has them."""

import os

from addp_jax import errors, files
from addp_jax.data import sources


def open_split(config, split: str, image_size: int) -> sources.Source:
    return MetaList(sources.require_path(config), config.train_split if split == "train" else config.eval_split)


class MetaList(sources.Files):
    """Images named in `root/meta/<split>.txt`, a line being "relative/path label".

    The images lie in `root/<split>/` (as the released code has it) or in `root/`, and not outside. Labels are integers
    and are taken as they are. Raises UserError: no list, no images where it points, or a line that is not understood.
    """

    def __init__(self, root: str, split: str = "train"):
        list_file = os.path.join(root, "meta", f"{split}.txt")
        with files.explain(f"config.data.path: cannot read the list {list_file}", OSError, UnicodeDecodeError):
            lines = files.read_lines(list_file)
        entries = [_entry(line, f"{list_file} line {n}") for n, line in enumerate(lines, 1) if line.strip()]
        if not entries:
            raise errors.UserError(f"config.data.path: the list {list_file} is empty")
        paths, labels = zip(*entries)
        super().__init__(_image_root(root, split, paths[0], list_file), paths, labels, ())


def _entry(line: str, where: str) -> tuple[str, int]:
    path, _, label = line.strip().rpartition(" ")
    path = path.strip()
    digits = label.isascii() and label.isdecimal() and len(label) <= len(str(sources.LARGEST_LABEL))
    if not path or not digits or int(label) > sources.LARGEST_LABEL:
        shown = files.printable(line, files.REASON_LENGTH)
        raise errors.UserError(f'{where}: expected "relative/path label" with label 0, 1, 2, ..., got {shown!r}')
    try:
        files.below("", path)
    except ValueError as error:
        raise errors.UserError(f"{where}: {error} of the images") from error
    return path, int(label)


def _image_root(root: str, split: str, path: str, list_file: str) -> str:
    inner = os.path.join(root, split)
    for folder in (inner, root):
        if os.path.exists(os.path.join(folder, path)):
            return folder
    raise errors.UserError(f"{list_file} names {path!r}, found neither in {inner!r} nor in {root!r}")
