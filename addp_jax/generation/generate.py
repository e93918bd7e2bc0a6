"""`--mode=generate`: sample N images across the mesh, or edit the user's own; write PNGs, ADM's `.npz`, pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import shutil

import jax
import numpy as np
from flax import traverse_util

from addp_jax import errors, files, logs, parameters, partition, pictures, processes, samplers, schema, tasks
from addp_jax.generation import sample_folder, starts

STRIP_COLUMNS = 20  # steps shown of a film strip, spread evenly
GIF_FRAMES = 40
PER_DEVICE = 64  # images at a time, unless the config says how many
EDITS = 8, 4  # own images, and results of each, in edits.png


@schema.config
class Config:
    """Fields of `config.generate`."""

    num_images: int = schema.field(64, least=1, tiny=4)  # from nothing; of user images: all
    batch_size: int = schema.field(0, least=0, tiny=4)  # over all devices; 0 = 64 on each
    seed: int = 0
    output: str = ""  # folder; "" = WORKDIR/generated, of a sweep WORKDIR/sweep. It goes on where it was stopped
    strips: int = schema.field(4, least=0, tiny=2)  # film strips of the denoising steps
    sweep: str = ""  # draw the first images with each of these settings of the sampler: "steps=8,20;temperature=1,6"
    images: str = ""  # folder of user images to edit; "" = from nothing. What of them is drawn anew, one of:
    mask_ratio: float = schema.field(1.0, least=0, most=1)  # this share of the tokens; 0 = none: reconstructions
    masks: str = ""  # what is white in the mask of the same name in this folder, or in this one file for all
    margins: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # left, above, right, below; parts of the canvas
    whole: bool = False  # the bands around an image that is shrunk, not cropped, until it fits; margins beyond these
    variants: int = schema.field(1, least=1)  # results per user image
    feather: int = schema.field(0, least=0)  # pixels; above 0 the user's pixels come back, blended over so many

    def __post_init__(self):
        changed = {field.name for field in dataclasses.fields(self) if getattr(self, field.name) != field.default}
        regions = changed & {"masks", "margins", "whole"}
        for name in ("mask_ratio", "masks", "margins", "whole", "variants", "feather"):
            if name in changed and not self.images:
                raise ValueError(f"{name}: needs images, a folder to start from")
        if regions and self.mask_ratio < 1:
            raise ValueError("mask_ratio: what is drawn anew is already said by masks, margins or whole")
        if self.images and not regions and self.mask_ratio == 1:
            raise ValueError("images: needs what is drawn anew: mask_ratio below 1, masks, margins or whole")
        if self.feather and not regions:
            raise ValueError("feather: needs masks, margins or whole: elsewhere no user pixels are left")


def make_starts(program, config: Config):
    """Raises UserError for a task that draws no images, and for own images that do not fit."""
    tasks.require(program.task, program.config.task, tasks.Generator)
    if not config.images:
        return starts.FromNothing(config)
    return starts.FromImages(config, program.task.image_size, program.task.config.tokenizer.grid)


def batch_size(config: Config, mesh) -> int:
    """Images that are drawn at a time."""
    return partition.batch_size(config.batch_size or PER_DEVICE * mesh.size, mesh)


def padded(numbers, size: int):
    """`numbers`, the last repeated, up to `size`."""
    return np.pad(numbers, (0, size - len(numbers)), "edge")


def generate(program, config: Config, workdir: str) -> None:
    """Write `images/*.png`, `samples.npz`, `grid.png`, `strip.png`, `steps.gif`, and of own images `edits.png`.

    What is there already is not drawn again. Raises UserError when all is written, if own images were unreadable.
    """
    output = config.output or os.path.join(workdir, "generated")
    files.require_writable(output, "config.generate.output")
    start = make_starts(program, config)
    needed, free = 3 * len(start) * program.task.image_size**2, shutil.disk_usage(output).free
    if needed > free:
        sizes = f"samples.npz takes {needed / 1e6:.0f} MB, and the disk of {output} has {free / 1e6:.0f} MB left"
        raise errors.UserError(f"config.generate.output: {sizes}")
    with jax.set_mesh(program.mesh), contextlib.ExitStack() as stack:
        params, frozen = program.load_for_sampling(workdir)
        settings = describe(program, config, start, params, frozen)
        networks = program.place(params), program.place(frozen), jax.random.key(config.seed)
        first = jax.process_index() == 0  # it alone writes
        folder = stack.enter_context(sample_folder.SampleFolder(output, settings)) if first else None
        draw_missing(program, config, start, networks, folder)
        strips = film_strips(program, config, start, networks)
        if folder and any(start.readable(i) for i in range(len(start))):  # their pixels are read while drawing
            collect(folder, start, program.task.image_size, strips)
    tell_skipped(start)


def tell_skipped(start) -> None:
    """Raises UserError naming the own images that could not be read, if there were any."""
    if start.skipped:
        names = "; ".join(f"{path} ({reason})" for path, reason in start.skipped.items())
        count = f"{len(start.skipped)} of {len(start.own)} files"
        raise errors.UserError(f"config.generate.images: {count} skipped: {names}")


def describe(program, config: Config, start, params, frozen) -> dict:
    """Everything that an image depends on besides its number: equal settings give equal images."""
    return {"seed": config.seed} | settings(program, params, frozen) | start.settings()


def settings(program, params, frozen) -> dict:
    """The sampler, its schedule for images that start from nothing, the dtype and the networks, as JSON takes them."""
    sampler = dataclasses.asdict(program.task.sampler_config)
    networks = traverse_util.flatten_dict(schema.identity(program.task.config, "network"), sep=".")
    return {
        "task": program.config.task,
        "dtype": partition.compute_dtype(program.config.dtype, program.mesh).name,
        **networks,
        **{f"sampler.{name}": value for name, value in sampler.items()},
        "at each step": at_each_step(program.task),
        **{f"weights of {name}": parameters.content_hash(tree) for name, tree in (params | frozen).items()},
    }


def at_each_step(task) -> dict[str, list]:
    """The sampler's schedule for images that start from nothing, a value for each step that is run."""
    parts = [at for _, at in task.sampler.segments(task.sampler_config, task.config.tokenizer.length, 1.0)]
    columns = zip(parts[0]._fields, *parts)
    return {name: np.concatenate(values).tolist() for name, *values in columns if values[0] is not None}


def draw_missing(program, config: Config, start, networks, folder) -> None:
    """Draw what `folder` lacks. Every process takes part in every batch; the one that has the `folder` writes.

    Batches begin at the same numbers however often the run was stopped, so that the same program sees the same rows.
    """
    names = [start.name(i) for i in range(len(start))]
    missing = processes.from_first(folder.missing(names) if folder else np.zeros(len(names), bool))
    done, drawn = int((~missing).sum()), []
    progress = logs.Progress(len(names), done, unit="image", enabled=folder is not None)
    draw = samplers.drawing(program.task, program.mesh, start.mask_ratio, start.fewest)
    size = batch_size(config, program.mesh)
    for first in range(0, len(names), size):
        numbers = np.arange(first, min(first + size, len(names)))
        if not missing[numbers].any():
            continue
        batch = start.batch(padded(numbers, size))
        rows = [row for row, i in enumerate(numbers) if missing[i] and start.readable(i)]
        if not rows:
            continue
        drawn.append((rows, batch, draw(networks, partition.put(batch, partition.batch_sharding(program.mesh)))))
        if len(drawn) > 1:
            hand_over(folder, start, *drawn.pop(0))  # while the devices draw the batch after it
        done += len(rows)
        progress.update(done)
    for batch in drawn:
        hand_over(folder, start, *batch)
    progress.close()


def hand_over(folder, start, rows, batch, images) -> None:
    """Have `folder` write these rows of a batch: it encodes them while this process goes on."""
    images = partition.chosen(images, rows)
    if folder is None:
        return
    folder.wait(allowed=len(images))  # so memory stays bounded
    for row, image in zip(rows, images):
        i = int(batch["number"][row])
        folder.write(start.name(i), functools.partial(start.finished, i, image, batch, row))


def film_strips(program, config: Config, start, networks):
    """For the first `strips` images, uint8 [n,?,H,W,3]: the own image and what is hidden of it, if any, and the image
    after each step, at most GIF_FRAMES of them. None when no strips are wanted."""
    numbers = [i for i in range(len(start)) if start.readable(i)][: config.strips]
    if not numbers:
        return None
    batch = start.batch(padded(numbers, partition.batch_size(len(numbers), program.mesh)))
    draw = samplers.drawing(program.task, program.mesh, start.mask_ratio, start.fewest, frames=True)
    frames = draw(networks, partition.put(batch, partition.batch_sharding(program.mesh)))
    frames = partition.chosen(frames, np.arange(len(numbers)))
    frames = frames[:, spread(frames.shape[1], GIF_FRAMES)]
    finished = [start.finished(i, frames[row], batch, row) for row, i in enumerate(numbers)]
    return np.stack([np.stack([*start.before(batch, row), *strip]) for row, strip in enumerate(finished)])


def spread(count: int, most: int):
    """At most `most` of 0..count-1, evenly, the last one among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def collect(folder, start, size: int, strips) -> None:
    """The pictures, and `samples.npz`, from the images in the folder."""
    folder.wait()
    names = [start.name(i) for i in range(len(start)) if start.readable(i)]
    columns = min(8, math.ceil(math.sqrt(len(names))))
    sheets = {"grid": pictures.grid(np.stack(list(folder.read(names[: columns**2]))), columns)}
    if strips is not None:
        frames = strips[:, spread(strips.shape[1], STRIP_COLUMNS)]
        sheets["strip"] = pictures.grid(frames.reshape(-1, *frames.shape[2:]), frames.shape[1])
    if isinstance(start, starts.FromImages):
        sheets["edits"] = edits(folder, start)
    print(*pictures.save_pictures(folder.path, sheets), sep="\n")
    if strips is not None:
        squares = math.ceil(math.sqrt(len(strips)))
        frames = np.stack([pictures.grid(frame, squares) for frame in strips.swapaxes(0, 1)])
        print(pictures.save_gif(folder.path / "steps.gif", frames))
    print(folder.write_npz(names, (size, size, 3)))


def edits(folder, start):
    """A row for each of the first own images: as it was, what was hidden of it, its results."""
    most, variants = EDITS
    numbers = [i for i in range(len(start.own)) if start.readable(i)][:most]
    batch, shown = start.batch(numbers), []
    for row, i in enumerate(numbers):
        results = [start.name(k) for k in range(i, len(start), len(start.own))][:variants]
        shown += [*start.before(batch, row), *folder.read(results)]
    return pictures.grid(np.stack(shown), len(shown) // len(numbers))
