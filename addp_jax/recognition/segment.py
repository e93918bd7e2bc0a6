"""The mode predict of a task that segments images: the class of every pixel of own images."""

from __future__ import annotations

import dataclasses
import os

import jax
import numpy as np

from addp_jax import errors, files, partition, pictures, processes
from addp_jax.data import pipeline, transforms
from addp_jax.recognition import own


def segment(program, config: own.Config, workdir: str) -> None:
    """Write `labels`, a PNG file per image, `pictures`, the images tinted above a legend, and `classes.txt`.

    The numbers in the files are those of the label maps that the network was trained on, whose ignored number none has.
    Each of several processes writes those of its share.
    """
    given = own.given_names(program)  # a mistake there is said before anything is computed
    output, source = own.output_of(config, os.path.join(workdir, "predictions")), own.open_images(config)
    names_of_files = names_of(source)
    shift, readable = int(program.config.data.shift_labels), []
    with jax.set_mesh(program.mesh):
        nets, identity = program.load(workdir)
        names = given or own.recorded_names(program, identity, workdir)
        palette = np.concatenate([np.zeros((shift, 3), np.uint8), pictures.colours(len(names))])
        for example in images_of(program, source):
            image, index = example["image"], int(example["index"])
            label = program.task.segment(*nets, image if example["valid"] else None)
            if label is None:
                continue
            name = names_of_files[index]
            pictures.save_labels(os.path.join(output, "labels", f"{name}.png"), label + np.uint8(shift), palette)
            picture = pictures.segmentation(image, label, names)
            pictures.save_pictures(os.path.join(output, "pictures"), {name: picture})
            readable.append(index)
        readable = sorted(map(int, processes.gathered(dict.fromkeys(map(str, readable), True))))
    if jax.process_index() == 0:
        path = os.path.join(output, "classes.txt")
        with files.explain(f"cannot write {path}"):
            files.write_text(path, "".join(f"{files.printable(name)}\n" for name in names))
        print(*(os.path.join(output, name) for name in ("labels", "pictures", "classes.txt")), sep="\n")
    own.refuse_unreadable(source, np.array(readable, int))


def names_of(source) -> list[str]:
    """Of the images, without their endings. Raises UserError if two share one."""
    paths, taken = own.paths_of(source, range(len(source))), {}
    for path in paths:
        other = taken.setdefault(os.path.splitext(path)[0], path)
        if other != path:
            raise errors.UserError(f"config.predict.images: {other} and {path} would share a label map; rename one")
    return list(taken)


def images_of(program, source):
    """{"image", "index", "valid"} of this process's share of the images."""
    data = dataclasses.replace(program.config.data, on_unreadable="skip")
    share = partition.share(program.mesh)
    return pipeline.one_by_one(source, decoded, config=data, share=share, fields=("image", "index"))


def decoded(example: dict, rng: np.random.Generator) -> dict:
    del rng
    return {"image": transforms.decode(example["image"], example["path"]), "index": np.int32(example["index"])}
