"""Counted FLOPs against closed forms; nothing is compiled."""

import functools

import jax
import jax.numpy as jnp
import pytest

from addp_jax import partition
from addp_jax.models import layers
from addp_jax.planning import flops

ROWS, INNER, COLUMNS = 6, 5, 7
PRODUCT = 2 * ROWS * INNER * COLUMNS
LEFT, RIGHT = jax.ShapeDtypeStruct((ROWS, INNER), jnp.float32), jax.ShapeDtypeStruct((INNER, COLUMNS), jnp.float32)


@jax.custom_vjp
def custom(a, b):
    return a @ b


custom.defvjp(lambda a, b: (a @ b, (a, b)), lambda saved, out: (out @ saved[1].T, saved[0].T @ out))


MESH = partition.make_mesh(partition.Config(1, 2, 2), jax.devices()[:4])


@pytest.mark.parametrize("name, function, products", [
    ("plain", lambda a, b: jnp.tanh(a @ b) + 1, 1),
    ("batched", lambda a, b: jnp.einsum("mk,kn->nm", a, b), 1),
    ("scan", lambda a, b: jax.lax.scan(lambda carry, _: (carry + a @ b, None), jnp.zeros((ROWS, COLUMNS)), length=9), 9),
    ("nested scan", lambda a, b: jax.lax.map(lambda _: jax.lax.map(lambda _: a @ b, jnp.arange(3)), jnp.arange(4)), 12),
    ("jit", lambda a, b: jax.jit(jnp.matmul)(a, jax.jit(jnp.sin)(b)), 1),
    ("most expensive branch", lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: a @ b + a @ (2 * b)), 2),
    # Devices along `tensor` share a slice of the batch and repeat each other's work.
    ("each shard", lambda a, b: partition.per_device(lambda b, a: a @ b, MESH)(b, a), 2),
    ("gradient", lambda a, b: jax.grad(lambda a, b: (a @ b).sum(), (0, 1))(a, b), 3),
    ("gradient of one's own", lambda a, b: jax.grad(lambda a, b: custom(a, b).sum(), (0, 1))(a, b), 3),
    ("recomputed", lambda a, b: jax.grad(jax.checkpoint(lambda a, b: (jnp.sin(a @ b)).sum()), (0, 1))(a, b), 4),
])  # fmt: skip
def test_products_are_counted_as_often_as_they_run(name, function, products):
    with jax.set_mesh(MESH):
        assert flops.count(function, LEFT, RIGHT) == products * PRODUCT


@pytest.mark.parametrize("stride, groups", [(1, 1), (2, 1), (1, 4)])
def test_convolution_and_its_gradient(stride, groups):
    image, kernel = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32), jax.ShapeDtypeStruct((3, 3, 4 // groups, 8), jnp.float32)
    conv = functools.partial(
        jax.lax.conv_general_dilated, window_strides=(stride, stride), padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
    )  # fmt: skip
    out = 2 * (8 // stride) ** 2 * 8
    assert flops.count(conv, image, kernel) == 2 * out * 9 * 4 // groups
    if groups == 1:
        grads = jax.grad(lambda *args: conv(*args).sum(), (0, 1))
        assert flops.count(grads, image, kernel) == 3 * 2 * out * 9 * 4


def test_transformer_block():
    batch, length, width, depth = 2, 10, 8, 3
    blocks = layers.Blocks(layers.TransformerConfig(width=width, depth=depth, heads=2), jnp.float32)
    tokens = jax.ShapeDtypeStruct((batch, length, width), jnp.float32)
    params = jax.eval_shape(blocks.init, jax.random.key(0), tokens)
    per_block = 12 * batch * length * width**2 + 2 * batch * length**2 * width  # multiply-adds
    assert flops.count(blocks.apply, params, tokens) == 2 * depth * per_block
