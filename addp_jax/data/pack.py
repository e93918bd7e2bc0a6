"""Packs an image folder into array_record shards: one large sequential file instead of many small ones.

    python -m addp_jax.data.pack --input FOLDER --output FOLDER [--split train] [--shards N]

The shards hold the files' bytes as they are, in the order of the folder or of its list `meta/<split>.txt`. They are
read with config.data.source=array_record.
"""

import argparse
import concurrent.futures
import json
import os
import shutil
import tempfile
import time

import msgpack
from array_record.python import array_record_module

from addp_jax import errors, files
from addp_jax.data import sources, transforms, walk
from addp_jax.data.sources import image_folder, meta_list

_IMAGES_PER_SHARD = 10_000


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m addp_jax.data.pack", description=__doc__.splitlines()[0])
    parser.add_argument("--input", required=True, type=files.expand, help="images, or a folder with meta/<split>.txt")
    parser.add_argument("--output", required=True, type=files.expand, help="folder for the shards")
    parser.add_argument("--split", default="train", choices=("train", "val"))
    parser.add_argument("--shards", type=int, default=0, help=f"default: one per {_IMAGES_PER_SHARD} images")
    options = parser.parse_args(argv)
    with files.exit_on_mistake():
        pack(options.input, options.output, options.split, options.shards)


def pack(input_folder: str, output: str, split: str = "train", num_shards: int = 0):
    """Writes `<split>-00000-of-0000N.array_record` and `<split>-classes.json` to `output`, which is made if missing.

    The files appear under their names only when all of them are complete.

    Args:
      input_folder: what config.data.path would be for the unpacked images, or the folder of this split alone.
      split: "train" or "val", with the meaning it has for the input.
      num_shards: 0 = one per 10,000 images.
    Raises UserError: shards of this split are already there, or an image, which it names, cannot be decoded.
    """
    if num_shards < 0:
        raise errors.UserError(f"--shards={num_shards}: use at least 1, or 0 for one per {_IMAGES_PER_SHARD} images")
    source = _open(input_folder, split)
    existed = os.path.isdir(output)
    files.require_writable(output, "--output")
    if existed and any(name.startswith(f"{split}-") for name in os.listdir(output)):
        raise errors.UserError(f"--output: {output!r} already holds {split}- files; choose another folder")
    folder = tempfile.mkdtemp(prefix=".packing-", dir=output)
    try:
        write_all(source, folder, split, min(num_shards or 1 + len(source) // _IMAGES_PER_SHARD, len(source)))
        for name in sorted(os.listdir(folder)):
            os.rename(os.path.join(folder, name), os.path.join(output, name))
    finally:
        shutil.rmtree(folder)
        if not existed and not os.listdir(output):
            os.rmdir(output)


def _open(folder: str, split: str) -> sources.Files:
    """The whole split: of a folder with `meta/<split>.txt`, of one with `train` and `val`, or of such a sub-folder."""
    if os.path.exists(os.path.join(folder, "meta", f"{split}.txt")):
        return meta_list.MetaList(folder, split)
    if any(os.path.isdir(os.path.join(folder, name)) for name in ("train", "val")):
        source = image_folder.ImageFolder(folder, "train" if split == "train" else "eval")
    else:  # the split's own folder: all of it is packed
        source = image_folder.ImageFolder(folder, "train", hold_out=False)
    if source.classes == ("all",) or source.labels.min() < 0:
        walk.announce(f"{source.root}: no folders of classes; all images get label {source.labels[0]}")
    return source


def write_all(source: sources.Files, folder: str, split: str, num_shards: int):
    start = time.time()
    bounds = [len(source) * shard // num_shards for shard in range(num_shards + 1)]
    names = [f"{split}-{shard:05}-of-{num_shards:05}.array_record" for shard in range(num_shards)]
    with open(os.path.join(folder, f"{split}-classes.json"), "w", encoding="utf-8") as file:
        json.dump(source.classes, file)
    # Threads suffice: decoding releases the interpreter lock.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as executor:
        jobs = [
            executor.submit(_write, source, range(bounds[shard], bounds[shard + 1]), os.path.join(folder, name))
            for shard, name in enumerate(names)
        ]
        try:
            for done, job in enumerate(jobs, 1):
                job.result()
                rate = bounds[done] / (time.time() - start)
                print(f"{names[done - 1]}: {bounds[done]} of {len(source)} images, {rate:.0f} images/s", flush=True)
        finally:
            executor.shutdown(cancel_futures=True)


def _write(source: sources.Files, indices: range, path: str):
    writer = array_record_module.ArrayRecordWriter(path, "group_size:1,uncompressed")
    try:
        for i in indices:
            example = source[i]
            transforms.decode(example["image"], example["path"])
            name = os.path.relpath(example["path"], source.root)
            record = {"image": example["image"], "label": int(example["label"]), "path": name}
            writer.write(msgpack.packb(record, unicode_errors="surrogateescape"))
    finally:
        writer.close()


if __name__ == "__main__":
    main()
