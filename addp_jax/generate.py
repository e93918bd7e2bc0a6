"""`--mode=generate`: sample N images across the mesh; write PNGs, the ADM-style `.npz`, a grid and film strips."""

from __future__ import annotations

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from addp_jax import errors, evaluate, partition, samplers, writers
from addp_jax.data import sources, transforms


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields of `config.generate`."""

    num_images: int = 64
    batch_size: int = 64
    seed: int = 0
    output: str = ""  # folder; "" = <workdir>/generated
    images: str = ""  # folder of own images to start from; "" = from nothing
    mask_ratio: float = 1.0  # tokens of an own image that are hidden and drawn anew
    strips: int = 4  # film strips of the denoising steps

    def __post_init__(self):
        for name in ("num_images", "batch_size"):
            if getattr(self, name) < 1:
                raise errors.UserError(f"config.generate.{name}: {getattr(self, name)}; use at least 1")
        if not 0 < self.mask_ratio <= 1:
            raise errors.UserError(f"config.generate.mask_ratio: {self.mask_ratio}; use a fraction above 0, at most 1")
        if self.images == "" and self.mask_ratio != 1.0:
            raise errors.UserError("config.generate.mask_ratio below 1 needs config.generate.images, a folder to start from")


def generate(program, config: Config, workdir: str) -> None:
    """Write `<output>/images/000000.png` and so on, `samples.npz`, `grid.png` and `strip.png`."""
    task = program.task
    if not hasattr(task, "nets"):
        raise errors.UserError(f"config.task: {program.config.task} draws no images; generate with addp or token_predictor")
    output = config.output or os.path.join(workdir, "generated")
    os.makedirs(os.path.join(output, "images"), exist_ok=True)
    with jax.set_mesh(program.mesh):
        params, frozen = evaluate.load(program, workdir)
        params = gather(program)(params)
        starts = Starts(config, task.config.tokenizer.image_size)
        sample = jax.jit(samplers.per_device(task, config.mask_ratio, program.mesh))
        size = batch_size(config, program.mesh)
        progress = writers.Progress(len(starts), 0, unit="image")
        for first in range(0, len(starts), size):
            images = sample((params, frozen), starts.batch(first, size))
            write_images(output, first, np.asarray(images)[: len(starts) - first])
            progress.update(min(first + size, len(starts)))
        progress.close()
        strips = film_strips(task, params, frozen, starts, config)
    collect(output, len(starts), strips)


def gather(program):
    """Jitted `params -> params`, whole on every device: each samples on its own."""
    return jax.jit(lambda params: evaluate.compact(program, params), out_shardings=partition.replicated(program.mesh))


def batch_size(config: Config, mesh) -> int:
    """`config.batch_size`, or a little more: as many images on each device."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-config.batch_size // shards) * shards


class Starts:
    """What each image starts from: its own key and, where given, the user's image."""

    def __init__(self, config: Config, size: int):
        self.config, self.size = config, size
        self.source = sources.open_folder(config.images, "config.generate.images") if config.images else None
        self.to_size = transforms.eval_image(size)

    def __len__(self) -> int:
        return self.config.num_images if self.source is None else min(self.config.num_images, len(self.source))

    def batch(self, first: int, count: int):
        """`(keys [n], images float32 [n,S,S,3])` of images `first`...; the last batch is padded by repeating."""
        index = np.minimum(np.arange(first, first + count), len(self) - 1)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(self.config.seed), index)
        images = np.zeros((count, self.size, self.size, 3), np.float32)
        if self.source is not None:
            rng = np.random.default_rng(0)
            images = np.stack([self.to_size(self.source[int(i)], rng)["image"] for i in index]) / np.float32(255)
        return keys, images


def film_strips(task, params, frozen, starts: Starts, config: Config):
    """For the first `strips` images, uint8 `[n,<=1+T,H,W,3]`: the user's image, if any, then the image after each step.

    None when no strips are wanted.
    """
    count = min(config.strips, len(starts))
    if not count:
        return None

    @jax.jit
    def run(params, frozen, keys, images):
        nets = task.nets(params, frozen)
        carry = samplers.start(nets, keys, images, config.mask_ratio)
        _, frames = samplers.sample(task.sampler, task.sampler_config, nets, keys, carry, config.mask_ratio, keep_frames=True)
        if config.images:
            frames = jnp.concatenate([images[None], frames])
        return samplers.to_uint8(frames.swapaxes(0, 1))

    return np.asarray(run(params, frozen, *starts.batch(0, count)))


def write_images(output: str, first: int, images: np.ndarray) -> None:
    for index, image in enumerate(images, first):
        Image.fromarray(image).save(os.path.join(output, "images", f"{index:06d}.png"))


def collect(output: str, count: int, strips) -> None:
    """From the written PNGs: `samples.npz` (`arr_0` uint8 [N,H,W,3], as ADM's evaluation reads), `grid.png`, `strip.png`."""
    paths = [os.path.join(output, "images", f"{index:06d}.png") for index in range(count)]
    images = np.stack([np.asarray(Image.open(path)) for path in paths])
    np.savez(os.path.join(output, "samples.npz"), arr_0=images)
    columns = min(8, int(np.ceil(np.sqrt(count))))
    pictures = {"grid": writers.grid(images[: columns * columns], columns=columns)}
    if strips is not None:
        pictures["strip"] = writers.grid(strips.reshape(-1, *strips.shape[2:]), columns=strips.shape[1])
    for path in writers.save_pictures(output, pictures):
        print(path)
    print(os.path.join(output, "samples.npz"))
