"""Floating-point operations of a function, counted in its jaxpr: nothing is compiled and nothing is run."""

from __future__ import annotations

import math

import jax
from jax.extend import core


def count(function, *args) -> int:
    """FLOPs of the matrix products and convolutions of `function(*args)`: two per multiply-add.

    Element-wise work, a hundredth of a transformer's, is left out; so is that a TPU runs a product at
    `precision=HIGHEST` several times. The count is for the whole mesh: what a `shard_map` does, it does on every shard.
    Of a conditional the most expensive branch counts, and a `while_loop`, whose length is not known, counts once.

    Args:
      args: arrays or `jax.ShapeDtypeStruct`s, in any pytrees.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def everything_kept(fields):
    """`fields` of a config, nested dicts, with `remat` none: all FLOPs of the program that they build are useful."""
    if not isinstance(fields, dict):
        return fields
    return {name: "none" if name == "remat" else everything_kept(value) for name, value in fields.items()}


def _count(jaxpr: core.Jaxpr) -> int:
    return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, out_features = equation.invars[1].aval, params["dimension_numbers"].rhs_spec[0]
        # Each output reads a kernel's worth of inputs; the zeros between dilated inputs, as in the gradient of a
        # strided convolution, are no work.
        zeros = math.prod(params["lhs_dilation"])
        return 2 * equation.outvars[0].aval.size * kernel.size // kernel.shape[out_features] // zeros
    leaves = jax.tree.leaves(list(params.values()), is_leaf=lambda leaf: isinstance(leaf, core.ClosedJaxpr))
    closed = [leaf.jaxpr for leaf in leaves if isinstance(leaf, core.ClosedJaxpr)]
    inner = [_count(jaxpr) for jaxpr in closed + [leaf for leaf in leaves if isinstance(leaf, core.Jaxpr)]]
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "shard_map":
        axes = params["newly_manual_axes" if "newly_manual_axes" in params else "manual_axes"]  # before jax 0.10.2
        return math.prod(params["mesh"].shape[axis] for axis in axes) * sum(inner)
    return max(inner) if name == "cond" else sum(inner)
