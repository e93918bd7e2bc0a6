"""How far apart two sets of images are: `python -m addp_jax.measuring.measure --real=... --samples=...`.

A set is a folder of images or an .npz with `arr_0`; `--real` may also be ADM's VIRTUAL_imagenet256_labeled.npz with its
moments. No config is needed. What is printed and written is one JSON object: the measures, the protocol and where this
run departs from it, the number, size and hash of the images of both sets, and the hash of the weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import sys

import jax
import numpy as np

from addp_jax import errors, files, logs, partition
from addp_jax.measuring import image_set
from addp_jax.metrics import feature_sets, generation
from addp_jax.weights import feature_nets

CACHE = "~/.cache/addp_jax/reference"


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How published figures came about. They differ by more than 2 FID between protocols, for the same images."""

    reference: str
    num_real: int  # images of the reference set that are at hand
    seed: int | None  # of the order in which IS splits the samples; None = as they come
    moments: bool  # whether the reference set comes with its moments


PROTOCOLS = {
    "torch-fidelity": Protocol(
        "50,000 ImageNet validation images, short side resized to 256 (bilinear), central 256x256, as PNG "
        "(python -m addp_jax.data.prepare); the figures of MAGE's and ADDP's releases",
        num_real=50_000, seed=generation.SEED, moments=False,
    ),
    "adm": Protocol(
        "ADM's VIRTUAL_imagenet256_labeled.npz: moments over the ImageNet training set for FID and sFID, its 10,000 "
        "images for precision and recall (ours in float32, ADM's in float16); RCG's figures",
        num_real=10_000, seed=None, moments=True,
    ),
}  # fmt: skip
IMAGE_SIZE = (256, 256)  # pixels, of either protocol
MOMENTS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # arrays of ADM's files and of ours


def measure(real: image_set.ImageSet, samples: image_set.ImageSet, net, name: str, batch_size: int, cache: str) -> dict:
    """Everything that the command prints; see the module. name: of the protocol."""
    protocol = PROTOCOLS[name]
    reference, has_moments = read_reference(real, net, batch_size, cache)
    values = feature_sets.compare(reference, gather(samples, net, batch_size), protocol.seed)
    differences = departures(protocol, real, samples, net, has_moments)
    return {
        **feature_sets.named(values, net.name, len(samples)),
        "protocol": {"name": name, "reference": protocol.reference, "departures": differences},
        "seed": generation.SEED,
        "features": {"network": net.name, "weights": net.weights},
        "real": describe(real),
        "samples": describe(samples),
    }


def departures(protocol: Protocol, real, samples, net, has_moments: bool) -> list[str]:
    """In what this run is not the protocol; only figures without any may stand beside published ones."""
    pairs = {
        "samples": (len(samples), feature_sets.FULL_SIZE),
        "real images": (len(real), protocol.num_real),
        "features": (net.name, feature_nets.INCEPTION),
        "moments in --real": (has_moments, protocol.moments),
        "size of the samples": (samples.size, IMAGE_SIZE),
        "size of the real images": (real.size, IMAGE_SIZE),
    }
    return [f"{name}: {present}, not {other}" for name, (present, other) in pairs.items() if present != other]


def describe(images: image_set.ImageSet) -> dict:
    counts = {"images": len(images), "of": images.of, "size": list(images.size)}
    return {"path": files.printable(images.path)} | counts | {"hash": images.content_hash}


def gather(images: image_set.ImageSet, net, batch_size: int) -> feature_sets.FeatureSet:
    """The features of all images; progress on stderr."""
    gathered = feature_sets.FeatureSet()
    progress = logs.Progress(len(images), 0, unit="image")
    for index, batch in enumerate(images.batches(batch_size)):
        padded = np.concatenate([batch, batch[-1:].repeat(batch_size - len(batch), 0)])  # one shape, one compilation
        gathered.add({name: rows[: len(batch)] for name, rows in net(padded).items()})
        progress.update(index * batch_size + len(batch))
    progress.close()
    return gathered


def read_reference(real: image_set.ImageSet, net, batch_size: int, cache: str):
    """(features of the real images, whether the file came with moments); from the cache when it was made before.

    A cached file is named by the hashes of images and weights, so it can be neither stale nor another network's.
    """
    moments = moments_beside(real)  # a mistake there is said before anything is computed
    if moments and net.name != feature_nets.INCEPTION:
        advice = f"use --features={feature_nets.INCEPTION}"
        raise errors.UserError(f"--real={real.path}: its moments are those of Inception's features; {advice}")
    path = pathlib.Path(files.expand(cache)) / f"{real.content_hash}-{len(real)}-{net.weights}.npz"
    reference = load_cached(path)
    if reference is None:
        reference = gather(real, net, batch_size)
        save_cached(path, reference)
    return (feature_sets.FeatureSet(moments, reference.pool), True) if moments else (reference, False)


def moments_beside(real: image_set.ImageSet) -> dict:
    """The Gaussians that an .npz has beside its images; {} = none. Raises UserError if their shapes disagree."""
    if not real.path.endswith(".npz"):
        return {}
    arrays = image_set.read_arrays(real.path, tuple(itertools.chain(*MOMENTS.values())), real.flag)
    for names in MOMENTS.values():
        present = {name: arrays[name] for name in names if name in arrays}
        shapes = [array.shape for array in present.values()]
        numeric = all(array.dtype.kind == "f" and np.isfinite(array).all() for array in present.values())
        if present and (len(shapes) < 2 or not numeric or len(shapes[0]) != 1 or shapes[1] != shapes[0] * 2):
            raise errors.UserError(
                f"{real.flag}={real.path}: {' and '.join(names)} must be finite, [D] and [D,D]; the file has "
                + ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in present.items())
            )
    return read_moments(arrays)


def read_moments(arrays) -> dict:
    return {
        name: generation.Gaussian(arrays[mean].astype(np.float64), arrays[covariance].astype(np.float64))
        for name, (mean, covariance) in MOMENTS.items()
        if mean in arrays
    }


def load_cached(path: pathlib.Path):
    """A set written by `save_cached`, or None."""
    try:
        with files.open_regular(path) as raw, np.load(raw) as file:
            moments = read_moments(file)
            if "pool" not in moments:
                raise ValueError("it lacks the moments")
            return feature_sets.FeatureSet(moments, file["pool"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # what is no npz makes numpy and zipfile raise nearly anything
        print(f"{files.printable(str(path))} is damaged ({files.reason(error)}); made again", file=sys.stderr)
        return None


def save_cached(path: pathlib.Path, reference: feature_sets.FeatureSet) -> None:
    arrays = {"pool": reference.pool}
    for name, gaussian in reference.gaussians.items():
        mean, covariance = MOMENTS[name]
        arrays |= {mean: gaussian.mean, covariance: gaussian.covariance}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(path, lambda file: np.savez(file, **arrays))
    except OSError as error:  # the figures are worth more than the cache
        print(f"--cache={path.parent}: {files.reason(error)}; the features are not kept", file=sys.stderr)


def run(options) -> dict:
    if options.num < 0 or options.batch_size < 1:
        raise errors.UserError(f"--num={options.num} --batch_size={options.batch_size}: use positive numbers")
    mesh = partition.make_mesh(partition.Config())
    real = image_set.ImageSet(options.real, options.num, "--real")
    samples = image_set.ImageSet(options.samples, options.num, "--samples")
    with jax.set_mesh(mesh):
        net = feature_nets.load(options.features, options.weights, mesh, "--features", "--weights")
        for images in (real, samples):
            name, (height, width) = f"{images.flag}={images.path}", images.size
            if len(images) < 2:
                raise errors.UserError(f"{name}: {len(images)} image; a set to measure needs at least 2")
            if net.size and height != width:
                advice = f"but --features takes squares: {image_set.PREPARE}"
                raise errors.UserError(f"{name}: {width}x{height} pixels, {advice}")
        batch_size = partition.batch_size(options.batch_size, mesh)
        return measure(real, samples, net, options.protocol, batch_size, options.cache)


@files.exit_on_mistake()
def main(argv=None) -> None:
    about = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser("python -m addp_jax.measuring.measure", description=about, allow_abbrev=False)
    add = functools.partial(parser.add_argument, type=files.expand)
    add("--real", required=True, help="folder of images, or .npz")
    add("--samples", required=True, help="folder of images, or .npz")
    add("--features", default=feature_nets.INCEPTION, help="inception, or work directory of a convnet or addp run")
    add("--weights", default="", help="of Inception: pt_inception-2015-12-05-6726825d, .pth or .safetensors")
    add("--protocol", type=str, default="torch-fidelity", choices=PROTOCOLS)
    add("--num", type=int, default=0, help="images of each set, spread evenly; default: all")
    add("--batch_size", type=int, default=64)
    add("--cache", type=str, default=CACHE, help=f"folder for the features of real images (default {CACHE})")
    add("--output", default="", help="also write the JSON to this file")
    options = parser.parse_args(argv)
    if os.path.isdir(options.output):
        raise errors.UserError(f"--output={options.output}: that is a folder; give a file")
    if options.output:
        files.require_writable(os.path.dirname(options.output) or ".", "--output")
    print(text := json.dumps(run(options)))
    if options.output:
        with files.explain(f"--output={options.output}"):
            files.write_text(options.output, text + "\n")


if __name__ == "__main__":
    main()
