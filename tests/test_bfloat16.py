"""Every task's loss and gradients computed in bfloat16, beside those in float32."""

import contextlib

import jax
import jax.numpy as jnp
import optax
import programs
import pytest

from addp_jax import program, tasks
from addp_jax.data import pipeline

pytestmark = [pytest.mark.medium, pytest.mark.golden]
NAMES = [name for name in programs.names() if name.startswith("demo")]
FARTHEST = {"demo_tokenizer": 0.25}  # convolutions upon convolutions; and some of its tokens are others


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_those_of_float32_but_for_rounding(name, trained, mesh):
    config = programs.config(name, **programs.weights_for(name, trained))
    run = program.create(config, mesh)
    batches = pipeline.train_batches(
        run.source("train"), run.task.transform("train", config.data), seed=0, batch_size=config.batch_size, start_step=0,
        config=config.data, fields=run.task.example,
    )  # fmt: skip
    with contextlib.closing(batches):
        batch = next(batches)
    frozen, key = run.place(run.task.load_frozen()), jax.random.key(0)
    params = run.task.init(key)

    def both(dtype):
        loss = tasks.create(config.task, config.model, dtype).loss
        return jax.jit(jax.value_and_grad(lambda params: loss(params, frozen, batch, key, False)[0]))(params)

    (loss, gradient), (narrow_loss, narrow_gradient) = both(jnp.float32), both(jnp.bfloat16)
    away = optax.tree.norm(optax.tree.sub(narrow_gradient, gradient)) / optax.tree.norm(gradient)
    assert abs(narrow_loss - loss) < 0.005 * abs(loss)
    assert away < FARTHEST.get(name, 0.04)
