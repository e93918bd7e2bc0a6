"""Folders of images and of label maps, PNG files whose pixels are numbers of classes: ADE20k's layout or another."""

import hashlib
import os

from addp_jax import errors, files, parameters
from addp_jax.data import class_names, sources, walk
from addp_jax.data.sources.image_folder import SPLIT_NAMES

FIELD = "config.data.path"
LABELS = "annotations", "labels", "masks"  # names of the folder beside "images"
LAYOUT = f"PATH/images/SPLIT/*.jpg and PATH/{{{','.join(LABELS)}}}/SPLIT/*.png of the same names"
ADE_NAMES = "objectInfo150.txt"  # ADE20k's table of classes: a heading, then rows whose last column is the name


def open_split(config, split: str, image_size: int) -> sources.Source:
    root, name = sources.require_path(config), config.train_split if split == "train" else config.eval_split
    usual = SPLIT_NAMES[0 if split == "train" else 1]
    images = _folder(root, ("images",), (name, *usual), split)
    labels = _folder(root, LABELS, (os.path.basename(images), name, *usual), split)
    return LabelMaps(images, labels, _names(config, root))


def _folder(root: str, kinds: tuple[str, ...], splits: tuple[str, ...], split: str) -> str:
    for kind in kinds:
        for name in splits:
            if os.path.isdir(os.path.join(root, kind, name)):
                return os.path.join(root, kind, name)
    wanted = os.path.join(root, kinds[0], splits[0])
    raise errors.UserError(f"{FIELD}: no folder {wanted!r}; set config.data.{split}_split, or use the layout {LAYOUT}")


def _names(config, root: str) -> tuple[str, ...]:
    """Of the file config.data.class_names, or of ADE20k's table in `root`; else ()."""
    if config.class_names:
        return class_names.read(config.class_names)
    table = os.path.join(root, ADE_NAMES)
    if not os.path.isfile(table):
        return ()
    try:
        rows = [line.split("\t")[-1].strip() for line in files.read_lines(table)[1:] if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise errors.UserError(f"{FIELD}: cannot read {table}: {files.reason(error)}") from error
    return tuple(rows) if config.shift_labels else ("other", *rows)


class LabelMaps(sources.Files):
    """Images with a label for every pixel. Images in nested folders have their label maps in folders of the same names.

    `source[i]` is a dict of image, label (-1), index and path, as every source has it, and

      label_map   the bytes of the PNG file
      label_path  the file

    Args:
      images, labels: folders of a split.
      classes: names by label, or () when unknown.

    Raises:
      UserError: a folder cannot be read or holds no images, an image has no label map, or two share one.
    """

    has_label_maps = True

    def __init__(self, images: str, labels: str, classes: tuple[str, ...] = ()):
        walker = walk.Walk(FIELD)
        paths, sizes = walker.images(images)
        walker.announce(images)
        if not paths:
            raise errors.UserError(f"{FIELD}: no images ({walk.ENDINGS}) in {images!r}; the layout is {LAYOUT}")
        self.label_root = labels
        maps = {path for path in walk.Walk(FIELD).images(labels)[0] if path.endswith(".png")}
        self._check(images, paths, maps)
        super().__init__(images, paths, [walk.UNKNOWN] * len(paths), classes, sizes)

    def _check(self, images: str, paths: list[str], maps: set[str]) -> None:
        taken = {}
        for path in paths:
            other = taken.setdefault(_map_name(path), path)
            if other != path:
                raise errors.UserError(f"{FIELD}: {path} and {other} in {images!r} would share a label map; remove one")
        missing = [path for path in paths if _map_name(path) not in maps]
        if missing:
            lacking = f"no label map {os.path.join(self.label_root, _map_name(missing[0]))!r} for {missing[0]}"
            more = f" and none for {len(missing) - 1} other images" * (len(missing) > 1)
            raise errors.UserError(f"{FIELD}: {lacking}{more}; add them or remove the images")
        if extra := sorted(maps - set(taken)):
            shown = parameters.shortened(extra, walk.SHOWN)
            walk.announce(f"{self.label_root}: left out {len(extra)} label maps without an image: {shown}")

    def label_path(self, i: int) -> str:
        """The label map of example i."""
        return os.path.join(self.label_root, _map_name(os.path.relpath(self.path(i), self.root)))

    def __getitem__(self, i: int) -> dict:
        path = self.label_path(i)
        return super().__getitem__(i) | {"label_map": sources.patiently(files.read_bytes, path), "label_path": path}

    def fingerprint(self, times: bool = False) -> str:
        """As `Files.fingerprint`, of images and label maps."""
        maps = sources.file_fingerprint((self.label_path(i) for i in range(len(self))), times=times)
        return hashlib.blake2b((super().fingerprint(times) + maps).encode(), digest_size=8).hexdigest()


def _map_name(path: str) -> str:
    return os.path.splitext(path)[0] + ".png"
