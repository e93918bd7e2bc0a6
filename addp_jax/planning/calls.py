"""Which networks a function runs, found by tracing it: the parts that a benchmark times one by one."""

from __future__ import annotations

import dataclasses
from typing import Any, Callable

import flax.linen as nn
import jax

PARTS = ("encode", "decode")  # methods that count by themselves, instead of the one that calls them


@dataclasses.dataclass(frozen=True)
class Call:
    """One run of a network."""

    name: str  # "Tokenizer.encode"
    function: Callable  # (variables, arrays, rng) -> output
    variables: Any  # shapes
    arrays: list  # shapes of the arguments that are arrays; the others are bound in `function`


def record(function, *args) -> list[Call]:
    """The runs of whole networks in `function(*args)`, in order. What a loop runs counts once. Nothing is computed."""
    runs, inside = [], []

    def note(run, args, kwargs, context):
        module, method = context.module, context.method_name
        counts = method != "setup" and not inside or (method in PARTS and not set(inside) & set(PARTS))
        if not counts or module.scope is None or module.scope.path:
            return run(*args, **kwargs)
        before = len(runs)
        inside.append(method)
        out = run(*args, **kwargs)
        inside.pop()
        if len(runs) == before:
            runs.append(_call(module, method, (args, kwargs)))
        return out

    with nn.intercept_methods(note):
        jax.eval_shape(function, *args)
    return runs


def _call(module, method: str, arguments) -> Call:
    (leaves, tree), net = jax.tree.flatten(arguments), module.clone(parent=None)

    def run(variables, arrays, rng):
        rest = iter(arrays)
        inputs = [next(rest) if isinstance(leaf, jax.Array) else leaf for leaf in leaves]
        args, kwargs = jax.tree.unflatten(tree, inputs)
        return net.apply(variables, *args, method=method, rngs={"dropout": rng}, **kwargs)

    shapes = [_shape(leaf) for leaf in leaves if isinstance(leaf, jax.Array)]
    return Call(f"{type(module).__name__}.{method}", run, jax.tree.map(_shape, module.variables), shapes)


def _shape(array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)
