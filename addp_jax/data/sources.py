"""Random-access sources of labelled images.

A source has `len(source)`, `classes` (names by label; empty when unknown) and
`source[i]`, a dict:

  image  the undecoded bytes of one file (decoding is the transform's work)
  label  int32
  index  int32, position in the source
  path   the file, for error messages

Sources are cheap to pickle, because every worker process gets a copy.
"""

import glob
import hashlib
import json
import os
import re

import grain
import msgpack
import numpy as np

from addp_jax import errors

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
LAYOUTS = "PATH/{train,val}/CLASS/*.jpg, PATH/CLASS/*.jpg or PATH/*.jpg (also jpeg, png, webp, bmp)"
HELD_OUT = 20  # one image in this many is kept for evaluation where a folder has no splits


class Files:
    """Image files with labels, their paths kept as one bytes object.

    A list of a million paths takes a second to pickle, this takes milliseconds.

    Args:
      root: folder that `paths` are relative to.
      paths: file names.
      labels: one int per path.
      classes: class names by label, or () when unknown.

    `labels` is int32 [N].
    """

    def __init__(self, root: str, paths: list[str], labels: list[int], classes: tuple[str, ...]):
        encoded = [os.fsencode(path) for path in paths]
        self.root = root
        self.classes = classes
        self._names = b"".join(encoded)
        self._ends = np.cumsum([0] + [len(name) for name in encoded])
        self.labels = np.array(labels, np.int32)

    def path(self, i: int) -> str:
        """The file of example i."""
        name = self._names[self._ends[i] : self._ends[i + 1]]
        return os.path.join(self.root, os.fsdecode(name))

    def fingerprint(self) -> str:
        """Changes when a file is added, removed, renamed, relabelled or rewritten."""
        return _fingerprint((self.path(i) for i in range(len(self))), self.labels.tobytes())

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict:
        path = self.path(i)
        try:
            with open(path, "rb") as file:
                image = file.read()
        except OSError as error:
            raise errors.UserError(f"cannot read {path}: {error.strerror}") from error
        return {"image": image, "label": self.labels[i], "index": np.int32(i), "path": path}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.root!r}, {len(self)} images)"


def fingerprint(source) -> str:
    """Changes with the examples of `source`; of files, without reading them."""
    return source.fingerprint() if hasattr(source, "fingerprint") else repr(source)


def _fingerprint(paths, more: bytes = b"") -> str:
    """16 hex digits from names, sizes and times of change: a million files cannot be read through.

    The time of change, unlike that of modification, cannot be set back by what copies or unpacks files.
    """
    digest = hashlib.blake2b(more, digest_size=8)
    for path in paths:
        try:
            status = os.stat(path)
        except OSError as error:
            raise errors.UserError(f"cannot read {path}: {error.strerror}") from error
        digest.update(os.fsencode(path) + f"\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}\0".encode())
    return digest.hexdigest()


class ImageFolder(Files):
    """A folder of images: one sub-folder per class, or no sub-folders at all.

    Three layouts are understood: `root/<split>/class/...`, `root/class/...` and
    images directly in `root` (or `root/<split>`), which then all get label 0 of
    the one class "all". Images in nested sub-folders belong to the class above
    them. Class names are sorted over both splits, so that labels agree.
    Names that start with a dot are ignored, and so are loose images beside
    class folders.

    Where neither split has a folder, one image in 20 (at least one) is held out
    for evaluation: the same ones on every machine, chosen by a hash of the
    path below `root`.

    Args:
      root: config.data.path.
      split: "train" or "eval".
      train_split: folder name of the training split.
      eval_split: folder name of the evaluation split.

    Raises:
      UserError: the folder is missing, unreadable or holds no images, or only
        one of the two splits has a folder.
    """

    def __init__(self, root: str, split: str = "train", train_split: str = "train", eval_split: str = "val"):
        if not os.path.isdir(root):
            raise errors.UserError(f"config.data.path: no folder {root!r}; understood layouts: {LAYOUTS}")
        folders = {"train": os.path.join(root, train_split), "eval": os.path.join(root, eval_split)}
        present = [folder for folder in folders.values() if os.path.isdir(folder)]
        if present and folders[split] not in present:
            raise errors.UserError(
                f"config.data.path: {root!r} has a folder {present[0]!r} but no {folders[split]!r}; "
                f"add it, or set config.data.{split}_split"
            )
        folder = folders[split] if present else root
        classes = sorted({name for one in present or [root] for name in _folder_names(one)})
        paths, labels = _labelled(folder, classes)
        if not paths:  # no image below a class folder: the flat layout
            classes, paths = ["all"], _images(folder, nested=False)
            labels = [0] * len(paths)
        if not paths:
            raise errors.UserError(f"config.data.path: no images in {folder!r}; understood layouts: {LAYOUTS}")
        if not present:
            keep = _hold_out(paths, split, root)
            paths, labels = [paths[i] for i in keep], [labels[i] for i in keep]
        super().__init__(folder, paths, labels, tuple(classes))


def open_folder(root: str, field: str) -> Files:
    """Every image below `root`, in sorted order, all with label 0; `field`: where the user set it, for messages.

    Raises UserError: no such folder, or no images in it.
    """
    paths = _images(root) if os.path.isdir(root) else []
    if not paths:
        raise errors.UserError(f"{field}: no images (jpg, jpeg, png, webp, bmp) in {root!r}")
    return Files(root, paths, [0] * len(paths), ())


def open_classes(root: str, classes: tuple[str, ...], field: str) -> Files:
    """Every image below the folders in `root` that are named like one of `classes`, labelled with its position there.

    Raises UserError naming `field`: no such folder, or no such images.
    """
    paths, labels = _labelled(root, list(classes))
    if not paths:
        raise errors.UserError(f"{field}: {root!r} has no folder of images named like a class (config.data.class_names)")
    return Files(root, paths, labels, classes)


def _unreadable(error: OSError):
    raise errors.UserError(f"config.data.path: cannot read {error.filename!r}: {error.strerror}") from error


def _folder_names(folder: str) -> list[str]:
    for _, names, _ in os.walk(folder, onerror=_unreadable):
        return [name for name in names if not name.startswith(".")]
    return []


def _images(folder: str, nested: bool = True) -> list[str]:
    """Image files below `folder`, relative to it, in sorted order."""
    found = []
    for where, names, files in os.walk(folder, onerror=_unreadable, followlinks=True):
        names[:] = sorted(name for name in names if nested and not name.startswith("."))
        found += [
            os.path.relpath(os.path.join(where, file), folder)
            for file in sorted(files)
            if file.lower().endswith(EXTENSIONS) and not file.startswith(".")
        ]
    return found


def _labelled(folder: str, classes: list[str]) -> tuple[list[str], list[int]]:
    paths, labels = [], []
    for label, name in enumerate(classes):
        if os.path.isdir(os.path.join(folder, name)):
            found = _images(os.path.join(folder, name))
            paths += [os.path.join(name, path) for path in found]
            labels += [label] * len(found)
    return paths, labels


def _hold_out(paths: list[str], split: str, root: str) -> list[int]:
    """The positions that belong to `split`, in increasing order."""
    if len(paths) < 2:
        raise errors.UserError(f"config.data.path: {root!r} holds one image; training and evaluation need at least two")
    order = sorted(range(len(paths)), key=lambda i: hashlib.sha1(os.fsencode(paths[i])).digest())
    held_out = max(1, len(paths) // HELD_OUT)
    return sorted(order[-held_out:] if split == "eval" else order[:-held_out])


class MetaList(Files):
    """Images named in `root/meta/<split>.txt`, a line being "relative/path label".

    The images lie in `root/<split>/` (as the released code has it) or in
    `root/`. Labels are integers and are taken as they are.

    Raises:
      UserError: no list, no images where it points, or a line that is not
        understood, with its number.
    """

    def __init__(self, root: str, split: str = "train"):
        list_file = os.path.join(root, "meta", f"{split}.txt")
        try:
            with open(list_file, encoding="utf-8") as file:
                lines = file.read().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise errors.UserError(
                f"config.data.path: cannot read the list {list_file}: {getattr(error, 'strerror', error)}"
            ) from error
        entries = [_entry(line, f"{list_file} line {n}") for n, line in enumerate(lines, 1) if line.strip()]
        if not entries:
            raise errors.UserError(f"config.data.path: the list {list_file} is empty")
        paths, labels = zip(*entries)
        super().__init__(_image_root(root, split, paths[0], list_file), paths, labels, ())


def _entry(line: str, where: str) -> tuple[str, int]:
    path, _, label = line.strip().rpartition(" ")
    if not path or not label.isdecimal():
        raise errors.UserError(f'{where}: expected "relative/path label" with label 0, 1, 2, ..., got {line!r}')
    return path.strip(), int(label)


def _image_root(root: str, split: str, path: str, list_file: str) -> str:
    candidates = (os.path.join(root, split), root)
    for folder in candidates:
        if os.path.exists(os.path.join(folder, path)):
            return folder
    raise errors.UserError(f"{list_file} names {path!r}, found neither in {candidates[0]!r} nor in {root!r}")


class ArrayRecord:
    """Shards written by `python -m addp_jax.data.pack`.

    Args:
      path: the folder of the shards, or a glob that matches them.
      split: shards named `<split>-00000-of-00004.array_record` are read.

    Raises:
      UserError: no shard, a missing shard, or a file of another format.
    """

    def __init__(self, path: str, split: str = "train"):
        self.path, self.split = path, split
        files = shards(path, split)
        folder = os.path.dirname(files[0])
        try:
            self._records = grain.sources.ArrayRecordDataSource(files)
            with open(os.path.join(folder, f"{split}-classes.json"), encoding="utf-8") as file:
                self.classes = tuple(json.load(file))
        except Exception as error:  # array_record raises bare C++ errors
            reason = _one_line(error)
            raise errors.UserError(f"config.data.path: cannot open {split} shards in {folder!r}: {reason}") from error

    def fingerprint(self) -> str:
        """Changes with the shards."""
        return _fingerprint(shards(self.path, self.split))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> dict:
        try:
            record = msgpack.unpackb(self._records[int(i)])
            image, label, path = record["image"], np.int32(record["label"]), record["path"]
        except Exception as error:  # as above
            where = f"{self.path!r}, split {self.split}, record {i}"
            raise errors.UserError(f"{where}: damaged, or not by addp_jax.data.pack: {_one_line(error)}") from error
        return {"image": image, "label": label, "index": np.int32(i), "path": path}

    def __repr__(self) -> str:
        return f"ArrayRecord({self.path!r}, {self.split!r}, {len(self)} images)"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def shards(path: str, split: str) -> list[str]:
    """The shard files of a split, in order.

    Raises:
      UserError: there is none, or fewer than their names promise.
    """
    pattern = re.compile(re.escape(split) + r"-\d+-of-(\d+)\.array_record")
    files = sorted(glob.glob(os.path.join(glob.escape(path), "*") if os.path.isdir(path) else path))
    found = [(file, match) for file in files if (match := pattern.fullmatch(os.path.basename(file)))]
    if not found:
        raise errors.UserError(
            f"config.data.path: no {split}-*.array_record in {path!r}; write them with python -m addp_jax.data.pack"
        )
    promised = int(found[0][1].group(1))
    if len(found) != promised:
        raise errors.UserError(f"config.data.path: {len(found)} of {promised} {split} shards found in {path!r}")
    return [file for file, _ in found]


class Tfds:
    """A TensorFlow data set prepared as array_record; read without TensorFlow.

    Args:
      name: e.g. "imagenet2012".
      split: a TFDS split, e.g. "train" or "validation[:1000]".
      data_dir: where it was prepared; "" = the TFDS default.

    Raises:
      UserError: unknown, not prepared, prepared as TFRECORD, without such a
        split, or without images and labels.
    """

    def __init__(self, name: str, split: str = "train", data_dir: str = ""):
        self.name, self.split = name, split
        self._data = _tfds_data(name, split, data_dir)
        features = self._data.dataset_info.features
        if "image" not in features or "label" not in features:
            raise errors.UserError(f"config.data.name: {name!r} has no image and label; it has {sorted(features)}")
        self.classes = tuple(features["label"].names or ())

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, i: int) -> dict:
        example = self._data[int(i)]
        where = f"{self.name} {self.split} example {i}"
        return {"image": example["image"], "label": np.int32(example["label"]), "index": np.int32(i), "path": where}

    def fingerprint(self) -> str:
        """Changes with the prepared files and the split."""
        files = sorted(glob.glob(os.path.join(glob.escape(self._data.dataset_info.data_dir), "*")))
        return _fingerprint(files, self.split.encode())

    def __repr__(self) -> str:
        return f"Tfds({self.name!r}, {self.split!r}, {len(self)} images)"


def _tfds_data(name: str, split: str, data_dir: str):
    place = repr(data_dir) if data_dir else "the TFDS default folder"
    build = f"run tfds build {name} --file_format=array_record"
    try:
        import tensorflow_datasets as tfds

        builder = tfds.builder(name, data_dir=data_dir or None)
    except ImportError as error:
        raise errors.UserError("config.data.source=tfds: run pip install tensorflow-datasets") from error
    except Exception as error:  # every failure has its own type; the message lists all data sets
        raise errors.UserError(f"config.data.name: TFDS knows no {name!r}, nor is it in {place}") from error
    if not builder.info.splits:
        raise errors.UserError(f"config.data.name: {name!r} is not in {place}; set config.data.path or {build}")
    try:
        return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    except NotImplementedError as error:
        raise errors.UserError(f"config.data.name: {name!r} in {place} is stored as TFRECORD; {build}") from error
    except Exception as error:  # a wrong split raises KeyError or ValueError, depending on its form
        have = f"has no {split!r}, it has {', '.join(builder.info.splits)}"
        raise errors.UserError(f"config.data.train_split/eval_split: {name!r} {have}") from error
