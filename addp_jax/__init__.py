"""ADDP in JAX: alternating pixel-token diffusion for generation and recognition.

import addp_jax
model = addp_jax.load("shapes")
images = model.sample(16)
"""

from __future__ import annotations

import os
import typing

if typing.TYPE_CHECKING:
    from addp_jax.api.model import Model

__version__ = "0.1.0"


def load(path: str | os.PathLike, *, size: str = "", dtype: str = "", **weights: str) -> Model:
    """The networks of a run, ready for use: see `addp_jax.api.model.Model`.

    Args:
      path: the work directory of a run; a `.safetensors` file that holds the config of its run, as an export writes it;
        with `size`, any other weight file or imported run. "shapes", unless a file has this name: a small ADDP, trained
        on generated shapes, that comes with the package.
      size: "vitb" or "vitl": the published sizes, for the official files, which hold no config.
      dtype: of the computation: "float32" or "bfloat16"; default: as the config of the run says.
      weights: where a frozen network is, if not where the config says or beside the work directory:
        `tokenizer=PATH`, `predictor=PATH`, `encoder=PATH`, each a work directory or a weight file.
    Raises:
      ValueError: an argument is unknown or has an impossible value.
      addp_jax.errors.UserError: a file is missing, damaged, or of another run or size.
    """
    from addp_jax.api import loading  # here: `import addp_jax` alone loads no JAX

    return loading.load(os.fspath(path), size, dtype, weights)
