"""Images named in an index file, so that opening a split of a million files reads one file instead of walking folders.

    python -m addp_jax.data.sources.index --input FOLDER

writes `index/train.jsonl` and `index/val.jsonl` into a folder as `image_folder` understands it. They are read with
config.data.source=index. Whoever adds or removes images writes them anew: nothing looks at the folder again.

The first line holds the names of the classes and the folder of the images, relative to FOLDER; every other line is one
image: `[path, bytes, label]`.
"""

import argparse
import json
import os

from addp_jax import errors, files
from addp_jax.data import sources, walk
from addp_jax.data.sources import image_folder

SPLITS = {"train": "train", "eval": "val"}
ADVICE = "; write it with python -m addp_jax.data.sources.index"


def open_split(config, split: str, image_size: int) -> sources.Source:
    return Index(sources.require_path(config), split)


class Index(sources.Files):
    """The images of `root/index/train.jsonl` or `val.jsonl`, in their order.

    Its fingerprint is that of the folder: a run may change between the two.
    Raises UserError: no index, or a line that is not understood.
    """

    def __init__(self, root: str, split: str = "train"):
        path = _path(root, split)
        with files.explain(f"config.data.path: cannot read {path}", OSError, UnicodeDecodeError, advice=ADVICE):
            first, *lines = files.read_lines(path) or [""]
        where = f"config.data.path: {path} line"
        with files.explain(f"{where} 1", ValueError, KeyError, TypeError, RecursionError, advice=ADVICE):
            head = json.loads(first)
            folder, classes = files.below(root, head["folder"]), tuple(map(str, head["classes"]))
        entries = [_entry(line, f"{where} {n}") for n, line in enumerate(lines, 2) if line.strip()]
        if len(entries) != head.get("images"):
            promised = files.printable(str(head.get("images")), files.REASON_LENGTH)
            raise errors.UserError(f"config.data.path: {path} names {len(entries)} of {promised} images{ADVICE}")
        paths, sizes, labels = zip(*entries)
        super().__init__(folder, paths, labels, classes, list(sizes))


def _path(root: str, split: str) -> str:
    return os.path.join(root, "index", f"{SPLITS[split]}.jsonl")


def _entry(line: str, where: str) -> tuple[str, int, int]:
    try:
        path, size, label = json.loads(line)
        numbers = type(size) is type(label) is int and walk.UNKNOWN <= label <= sources.LARGEST_LABEL
        if not (isinstance(path, str) and numbers):
            raise ValueError("expected [path, bytes, label]")
        files.below("", path)
        return path, size, label
    except (ValueError, TypeError, RecursionError) as error:
        raise errors.UserError(f"{where}: {files.reason(error)}{ADVICE}") from error


def write(source: sources.Files, root: str, split: str) -> str:
    """Write the index of a split to `root`; returns the file's name. source: one whose folder lies in `root`."""
    head = {"images": len(source), "folder": os.path.relpath(source.root, root), "classes": source.classes}
    rows = zip(source.file_names(), source.file_sizes().tolist(), source.labels.tolist())
    path = _path(root, split)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    files.write_text(path, "".join(json.dumps(line) + "\n" for line in [head, *rows]))
    return path


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m addp_jax.data.sources.index", description=__doc__.splitlines()[0])
    parser.add_argument("--input", required=True, type=files.expand, help="what config.data.path is")
    parser.add_argument("--train_split", default="train", help="its folder of training images")
    parser.add_argument("--eval_split", default="val", help="its folder of images for evaluation")
    options = parser.parse_args(argv)
    with files.exit_on_mistake():
        for split in SPLITS:
            source = image_folder.ImageFolder(options.input, split, options.train_split, options.eval_split)
            print(f"{write(source, options.input, split)}: {len(source)} images, {len(source.classes)} classes")


if __name__ == "__main__":
    main()
