"""A folder of images.

The rules for folders: a class is a sub-folder with at least one image, its label its place among the sorted names of
the training split; every image is taken once, however links lead to it; what is left out is said in one line.
"""

import hashlib
import os

from addp_jax import errors, files, parameters
from addp_jax.data import sources, walk

LAYOUTS = f"PATH/{{train,val}}/CLASS/*.jpg, PATH/CLASS/*.jpg or PATH/*.jpg (also {walk.ENDINGS})"
HELD_OUT = 20  # one image in this many is kept for evaluation where a folder has no splits
SPLIT_NAMES = ("train", "training"), ("val", "valid", "validation", "eval", "test")  # usual names of their folders


def open_split(config, split: str, image_size: int) -> sources.Source:
    return ImageFolder(sources.require_path(config), split, config.train_split, config.eval_split, config.hold_out)


class ImageFolder(sources.Files):
    """A folder of images: one sub-folder per class, or no sub-folders at all.

    Three layouts are understood: `root/<split>/class/...`, `root/class/...` and images directly in `root` (or
    `root/<split>`), which then all get label 0 of the one class "all". Images in nested sub-folders belong to the class
    above them. The classes are those of the training split, sorted; of an evaluation split without class folders the
    labels are unknown (-1) where training has classes. Names that start with a dot are ignored, and so are loose images
    beside class folders.

    Where neither split has a folder, one image in 20 (at least one) is held out for evaluation: the same ones on every
    machine, chosen by a hash of the path below `root`.

    Args:
      root: config.data.path.
      split: "train" or "eval"; `train_split` and `eval_split` are the names of their folders.
      hold_out: False trains on all images of a folder without splits.
    Raises UserError: the folder is missing, unreadable or holds no images, only one of the two splits has a folder, or
    the evaluation split has classes that the training split lacks.
    """

    def __init__(self, root: str, split="train", train_split="train", eval_split="val", hold_out: bool = True):
        if not os.path.isdir(root):
            raise errors.UserError(f"config.data.path: no folder {root!r}; understood layouts: {LAYOUTS}")
        folders = {"train": os.path.join(root, train_split), "eval": os.path.join(root, eval_split)}
        present = [folder for folder in folders.values() if os.path.isdir(folder)]
        if present and folders[split] not in present:
            lacking = f"has a folder {present[0]!r} but no {folders[split]!r}"
            raise errors.UserError(f"config.data.path: {root!r} {lacking}; add it, or set config.data.{split}_split")
        if present:
            folder, classes = folders[split], _classes(folders["train"])
            if split == "eval":
                _compare_classes(folders, classes, _classes(folder))
        else:
            folder, classes = root, _classes(root)
            _look_deeper(root, classes, (train_split, eval_split))
        paths, labels, sizes = _read_folder(folder, classes, flat_label=walk.UNKNOWN if classes else 0)
        if not paths:
            raise errors.UserError(f"config.data.path: no images in {folder!r}; understood layouts: {LAYOUTS}")
        if not present:
            keep = _hold_out(paths, split, root, hold_out)
            paths, labels, sizes = ([column[i] for i in keep] for column in (paths, labels, sizes))
        super().__init__(folder, paths, labels, tuple(classes) or ("all",), sizes)


def _classes(folder: str) -> list[str]:
    """The names of the sub-folders with images, sorted; those without are named in a line."""
    with files.explain(f"config.data.path: cannot read {folder!r}"):
        names = sorted(entry.name for entry in os.scandir(folder) if walk.is_folder(entry) and entry.name[0] != ".")
    classes = [name for name in names if name not in walk.JUNK and walk.has_image(os.path.join(folder, name))]
    if classes and (empty := [name for name in names if name not in classes]):
        walk.announce(f"{folder}: {len(empty)} folders without images are no classes: {_shortened(empty)}")
    return classes


def _compare_classes(folders: dict[str, str], train: list[str], held_out: list[str]) -> None:
    """Raises UserError if the evaluation split has classes that training lacks; says which it lacks itself."""
    extra, missing = sorted(set(held_out) - set(train)), sorted(set(train) - set(held_out))
    if train and extra:
        lacking = f"{folders['eval']!r} has classes that {folders['train']!r} lacks: {_shortened(extra)}"
        raise errors.UserError(f"config.data.path: {lacking}; rename or remove them")
    if held_out and missing:
        walk.announce(f"{folders['eval']}: no images of {len(missing)} classes: {_shortened(missing)}")


def _shortened(names: list[str]) -> str:
    return parameters.shortened(names, walk.SHOWN)


def _look_deeper(root: str, classes: list[str], splits: tuple[str, str]) -> None:
    """Raises UserError if the two splits lie one folder deeper, or are there under other names."""
    train, held_out = splits
    train_like, held_out_like = ([name for name in classes if name.lower() in usual] for usual in SPLIT_NAMES)
    if train_like and held_out_like:
        lacking = f"{root!r} has no {train!r} and {held_out!r}, but {train_like[0]!r} and {held_out_like[0]!r}"
        advice = "set config.data.train_split and config.data.eval_split to them"
        raise errors.UserError(f"config.data.path: {lacking}; {advice}")
    for name in classes:
        inner = os.path.join(root, name)
        deeper = [os.path.isdir(os.path.join(inner, split)) for split in splits]
        if all(deeper) or (len(classes) == 1 and any(deeper)):
            where = f"{root!r} has its {train!r} and {held_out!r} one folder deeper"
            raise errors.UserError(f"config.data.path: {where}; set it to {inner!r}")


def _read_folder(folder: str, classes: list[str], flat_label: int, field: str = "config.data.path"):
    """(paths, labels, sizes) of the images below the folders of `classes`; without such, of those in `folder`."""
    walker = walk.Walk(field)
    places = [os.path.join(folder, name) for name in classes]
    walker.mark(folder)
    walker.mark_above(folder)
    # All are marked before any link to them is met.
    unmet = [label for label, place in enumerate(places) if os.path.isdir(place) and walker.mark(place)]
    paths, labels, sizes = [], [], []
    for label in unmet:
        names, bytes_each = walker.images(places[label])
        paths += [os.path.join(classes[label], name) for name in names]
        labels += [label] * len(names)
        sizes += bytes_each
    loose, loose_sizes = walker.images(folder, nested=False)
    if not paths:
        paths, labels, sizes = loose, [flat_label] * len(loose), loose_sizes
    elif loose:
        walk.announce(f"{folder}: left out {len(loose)} images beside the class folders")
    walker.announce(folder)
    return paths, labels, sizes


def open_folder(root: str, field: str) -> sources.Files:
    """Every image below `root`, sorted, with label 0. Raises UserError naming `field`: no such folder, or no images."""
    walker = walk.Walk(field)
    if os.path.isdir(root):
        walker.mark_above(root)
    paths, sizes = walker.images(root) if os.path.isdir(root) else ([], [])
    walker.announce(root)
    if not paths:
        raise errors.UserError(f"{field}: no images ({walk.ENDINGS}) in {root!r}")
    return sources.Files(root, paths, [0] * len(paths), (), sizes)


def open_classes(root: str, classes: tuple[str, ...], field: str) -> sources.Files:
    """Every image below the folders in `root` that are named like one of `classes`; its label is the position there.

    Raises UserError naming `field`: no such folder, or no such images.
    """
    columns = _read_folder(root, list(classes), walk.UNKNOWN, field) if os.path.isdir(root) else ([], [], [])
    paths, labels, sizes = columns
    if not paths or min(labels) < 0:
        raise errors.UserError(f"{field}: {root!r} has no folder of images named like a class of the run")
    return sources.Files(root, paths, labels, classes, sizes)


def _hold_out(paths: list[str], split: str, root: str, hold_out: bool) -> list[int]:
    """The positions that belong to `split`, in increasing order."""
    if not hold_out:
        if split == "eval":
            lacking = f"{root!r} has no evaluation images; add a folder for config.data.eval_split"
            raise errors.UserError(f"config.data.hold_out=False: {lacking}")
        return list(range(len(paths)))
    if len(paths) < 2:
        raise errors.UserError(f"config.data.path: {root!r} holds one image; training and evaluation need at least two")
    order = sorted(range(len(paths)), key=lambda i: hashlib.sha1(os.fsencode(paths[i])).digest())
    held_out = max(1, len(paths) // HELD_OUT)
    count = f"{held_out} of {len(paths)} images are held out for evaluation (config.data.hold_out=False: none)"
    walk.announce(f"{root}: no folders of splits; {count}")
    return sorted(order[-held_out:] if split == "eval" else order[:-held_out])
