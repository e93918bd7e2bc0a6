"""Parameters of the feature networks out of PyTorch state dicts: Inception, VGG16, LPIPS."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import numpy as np

from addp_jax.models import inception, perceptual


def entry(arrays: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 entry `name` of a torch state dict. Raises KeyError if it is missing, ValueError if its shape differs."""
    if name not in arrays:
        raise KeyError(f"no entry {name}")
    if tuple(arrays[name].shape) != shape:
        raise ValueError(f"{name} has shape {tuple(arrays[name].shape)}, expected {shape}")
    return np.asarray(arrays[name], np.float32)


def inception_params(arrays: Mapping[str, np.ndarray]) -> dict:
    """Parameters of `Inception` from the state dict of `pt_inception-2015-12-05-6726825d.pth`, as numpy arrays.

    Raises KeyError naming an entry that is missing, ValueError naming one of the wrong shape.
    """

    take = functools.partial(entry, arrays)

    def layer(name, kernel):
        height, width, inputs, outputs = kernel.shape
        weight = take(f"{name}.conv.weight", (outputs, inputs, height, width)).transpose(2, 3, 1, 0)
        scale, shift, mean, var = (
            take(f"{name}.bn.{part}", (outputs,)) for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = scale / np.sqrt(var + inception.BATCH_NORM_EPS)
        return {"kernel": weight * scale, "bias": shift - mean * scale}

    def tree(expected, prefix):
        return {
            name: layer(prefix + name, part["kernel"]) if "kernel" in part else tree(part, f"{prefix}{name}.")
            for name, part in expected.items()
        }

    expected = jax.eval_shape(inception.init, jax.random.key(0))
    fc = expected.pop("fc")["kernel"].shape
    return tree(expected, "") | {"fc": {"kernel": take("fc.weight", fc[::-1]).T}}


def vgg16_params(arrays: Mapping[str, np.ndarray]) -> dict:
    """Parameters of `perceptual.Vgg16` from torchvision's vgg16 state dict (`features.N.weight`, `features.N.bias`).

    Other entries (the classifier) are ignored. Raises KeyError naming an entry that is missing,
    ValueError naming one of the wrong shape.
    """

    params, inputs = {}, 3
    for width, indices in perceptual.STAGES:
        for index in indices:
            kernel = entry(arrays, f"features.{index}.weight", (width, inputs, 3, 3)).transpose(2, 3, 1, 0)
            bias = entry(arrays, f"features.{index}.bias", (width,))
            params[f"conv{index}"] = {"kernel": kernel, "bias": bias}
            inputs = width
    return params


def lpips_weights(arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The learned weight of each stage's channels, from the state dict of LPIPS' v0.1/vgg.pth. Errors as above."""
    names = [f"lin{stage}.model.1.weight" for stage in range(len(perceptual.STAGES))]
    return [entry(arrays, name, (1, width, 1, 1)).reshape(-1) for name, (width, _) in zip(names, perceptual.STAGES)]
