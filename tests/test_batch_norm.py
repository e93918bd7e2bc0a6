"""BatchNorm, and how a training step takes over the running statistics of a task: a small one through the real step."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from addp_jax import errors, optim, parameters, partition, program, tasks
from addp_jax.models import batch_norm
from addp_jax.weights import checkpoint


class Net(nn.Module):
    @nn.compact
    def __call__(self, features, train):
        features = nn.Dense(5, name="first")(features)
        return nn.Dense(1, name="second")(batch_norm.BatchNorm(jnp.float32, name="norm")(features, train))


class Task:
    net, average_for = Net(), ""

    def init(self, rng):
        return {"net": self.net.init(rng, jnp.zeros((2, 3, 3, 4)), False)["params"]}

    def loss(self, params, frozen, batch, rng, train):
        out, measured = self.net.apply({"params": params["net"]}, batch["features"], train, mutable=[batch_norm.COLLECTION])
        loss = jnp.square(out.mean((1, 2, 3)) - batch["target"]).mean()
        return loss, {"loss": loss, tasks.STATISTICS: {"net": measured[batch_norm.COLLECTION]}}


TASK = Task()


def batch():
    rng = np.random.default_rng(0)
    return {"features": rng.normal(2, 3, (8, 3, 3, 4)).astype(np.float32), "target": rng.normal(size=8).astype(np.float32)}


def settings(**changes):
    return program.Config("dummy", None, steps=10, optim=optim.Config(weight_decay=0.5, clip_norm=0.1, **changes))


def run(steps=1, data=None, **changes):
    """`(state before, state after, metrics of the last step)`."""
    config, schedule = settings(**changes), optax.constant_schedule(0.1)
    optimizer = optim.build(config.optim, schedule)
    before = state = jax.jit(program.make_init(TASK, optimizer, config))(jax.random.key(0))
    step = jax.jit(program.make_step(TASK, optimizer, schedule, config))
    for _ in range(steps):
        state, metrics = step(state, {}, data or batch())
    return jax.device_get((before, state, metrics))


def measured(params, data):
    return TASK.loss(params, {}, data, None, True)[1][tasks.STATISTICS]


def assert_equal(found, expected, atol=1e-6):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=0, atol=atol), found, expected)


# --- the module ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [False, True])
def test_numbers_are_pytorchs(torch, train):
    rng = np.random.default_rng(0)
    features = rng.normal(3, 2, (4, 3, 5, 6)).astype(np.float32)
    names = {"scale": "weight", "bias": "bias", "running_mean": "running_mean", "running_var": "running_var"}
    params = {name: rng.uniform(0.5, 2, 6).astype(np.float32) for name in names}
    theirs = torch.nn.BatchNorm2d(6).train(train)
    with torch.no_grad():
        for name, other in names.items():
            getattr(theirs, other).copy_(torch.from_numpy(params[name]))
        expected = theirs(torch.from_numpy(features.transpose(0, 3, 1, 2))).numpy().transpose(0, 2, 3, 1)
    out, state = batch_norm.BatchNorm(jnp.float32).apply({"params": params}, features, train, mutable=[batch_norm.COLLECTION])
    np.testing.assert_allclose(out, expected, rtol=0, atol=5e-6)
    assert (batch_norm.COLLECTION in state) == train
    for name, new in state.get(batch_norm.COLLECTION, {}).items():
        np.testing.assert_allclose(new, getattr(theirs, name).numpy(), rtol=1e-5)


def test_a_single_value_is_refused():
    net = batch_norm.BatchNorm(jnp.float32)
    state = net.init(jax.random.key(0), jnp.zeros((1, 1, 1, 3)), False)
    with pytest.raises(errors.UserError, match="batch_size"):
        net.apply(state, jnp.zeros((1, 1, 1, 3)), True)


def test_bfloat16_is_measured_in_float32():
    features = jnp.full((8, 32, 32, 2), 300.0, jnp.bfloat16)
    net = batch_norm.BatchNorm(jnp.bfloat16)
    state = net.init(jax.random.key(0), features, False)
    out, new = net.apply(state, features, True, mutable=[batch_norm.COLLECTION])
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(new[batch_norm.COLLECTION]["running_mean"], 30, rtol=1e-6)


# --- the training step -----------------------------------------------------------------------------------


def test_a_step_puts_the_new_statistics_in_their_places():
    before, after, metrics = run()
    found = parameters.running(after.params)
    assert set(found["net"]["norm"]) == set(parameters.RUNNING)
    assert_equal(found, measured(before.params, batch()))
    assert metrics.keys() == {"loss", "grad_norm", "param_norm", "learning_rate"}
    assert not np.allclose(after.params["net"]["norm"]["scale"], before.params["net"]["norm"]["scale"])


def test_statistics_go_on_from_step_to_step():
    _, one, _ = run(steps=1)
    _, two, _ = run(steps=2)
    assert_equal(parameters.running(two.params), measured(one.params, batch()))


def test_micro_batches_follow_one_after_another():
    before, after, metrics = run(accumulate=2)
    params = before.params
    for piece in range(2):
        statistics = measured(params, jax.tree.map(lambda leaf: leaf[piece::2], batch()))
        params = parameters.replaced(params, statistics)
    assert_equal(parameters.running(after.params), parameters.running(params))
    assert tasks.STATISTICS not in metrics


@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
def test_the_optimizer_leaves_statistics_alone(optimizer):
    before, after, metrics = run(optimizer=optimizer)
    moments = parameters.named_leaves(after.opt_state)
    running = [leaf for name, leaf in moments.items() if name.endswith(parameters.RUNNING)]
    assert running and not any(leaf.any() for leaf in running)
    gradients = jax.grad(lambda params: TASK.loss(params, {}, batch(), None, True)[0])(before.params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(parameters.running(gradients)))
    assert_equal(parameters.running(after.params), measured(before.params, batch()))
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradients), rtol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_average_holds_the_statistics_as_they_are(accumulate):
    before, after, _ = run(steps=3, ema_decay=0.9, accumulate=accumulate)
    assert_equal(parameters.running(after.ema_params), parameters.running(after.params), atol=0)
    kernel = lambda params: params["net"]["first"]["kernel"]
    assert np.abs(kernel(after.ema_params) - kernel(before.params)).max() < np.abs(kernel(after.params) - kernel(before.params)).max()


def test_statistics_are_those_of_the_batch_on_all_devices():
    _, expected, _ = run()  # of one step: AdamW makes noise of the first bias's gradient, which is zero, into steps
    mesh = partition.make_mesh(partition.Config(), jax.devices()[:2])
    with jax.set_mesh(mesh):
        data = partition.put(batch(), partition.batch_sharding(mesh))
        _, found, _ = run(data=data)
    assert_equal(parameters.running(found.params), parameters.running(expected.params), atol=1e-5)


def test_statistics_are_saved_and_read_with_the_averages(tmp_path):
    _, state, _ = run(ema_decay=0.9)
    checkpointer = checkpoint.Checkpointer(str(tmp_path), checkpoint.Config(), {})
    checkpointer.save(1, state)
    checkpointer.close()
    params, _ = checkpoint.load_params(str(tmp_path), ema=True)
    assert_equal(parameters.running(params), parameters.running(state.params), atol=0)
