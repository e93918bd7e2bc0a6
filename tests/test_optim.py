"""Learning rates, weight decay and the length of a run."""

import jax
import numpy as np
import pytest
import released

from addp_jax import errors, optim, parameters, program
from addp_jax.models import heads

pytestmark = pytest.mark.golden


@pytest.mark.parametrize("name", ["pre_base", "pre_large", "ft_base", "ft_large"])
def test_learning_rate_is_the_releases_at_its_fractional_epochs(name):
    recipes = {"pre_base": (1.6e-3, 40, 0.0, 1600), "pre_large": (1.6e-3, 40, 0.0, 800),
               "ft_base": (4e-3, 20, 1e-6, 100), "ft_large": (1e-3, 5, 1e-6, 50)}  # fmt: skip
    peak, warmup, least, epochs = recipes[name]
    per_epoch = 1000  # steps; fractional epochs become whole steps
    config = optim.Config(base_lr=peak * 256 / 4096, min_lr=least)
    learning_rate = optim.schedule(config, optim.Length(epochs * per_epoch, warmup * per_epoch), batch_size=4096)
    gold = released.schedules()
    for epoch, expected in zip(gold[f"lr_{name}_epochs"], gold[f"lr_{name}"]):
        np.testing.assert_allclose(learning_rate(round(epoch * per_epoch)), expected, rtol=2e-4, atol=2e-9)


def test_epochs_drop_the_last_incomplete_batch():
    length = optim.length(optim.Config(), epochs=1600, steps=0, num_train=1_281_167, batch_size=4096)
    assert length == optim.Length(1600 * 312, 40 * 312)


@pytest.mark.parametrize("epochs, steps", [(0, 0), (1, 1)])
def test_exactly_one_of_epochs_and_steps(epochs, steps):
    with pytest.raises(errors.UserError, match="config.epochs and config.steps"):
        optim.length(optim.Config(), epochs=epochs, steps=steps, num_train=10, batch_size=1)


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(errors.UserError, match="config.optim"):
        optim.schedule(optim.Config(), optim.Length(10, 10), 256)


def test_decay_skips_biases_and_norm_scales_only():
    params = {"fc1": {"kernel": 1, "bias": 1}, "norm": {"scale": 1}, "class_token": 1, "token_embed": 1, "codebook": 1}
    decayed = optim.decay_mask(params)
    assert decayed["fc1"] == {"kernel": True, "bias": False}
    assert not decayed["norm"]["scale"]
    assert decayed["class_token"] and decayed["token_embed"]


def test_clipping_bounds_the_gradient_norm_that_adam_sees():
    optimizer = optim.build(optim.Config(clip_norm=1.0), 1e-3)
    params = {"kernel": np.zeros(4, np.float32)}
    grads = {"kernel": np.full(4, 10.0, np.float32)}
    _, state = optimizer.update(grads, optimizer.init(params), params)
    first_moment = next(leaf for leaf in jax.tree.leaves(state) if np.shape(leaf) == (4,))
    np.testing.assert_allclose(np.linalg.norm(first_moment), 0.1, rtol=1e-5)  # (1 - beta1) * 1.0


@pytest.mark.parametrize("change", [dict(optimizer="sgd"), dict(layer_decay=0.0), dict(layer_decay=1.5)])
def test_unknown_optimizers_and_layer_decays_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match=list(change)[0]):
        optim.Config(**change)


def test_layers_learn_the_slower_the_deeper_they_lie():
    """Of equal gradients, Adam's first step is the learning rate itself."""
    blocks = {"block": {"norm1": {"scale": np.ones((3, 4), np.float32)}}}
    encoder = {"pos_embed": np.ones((2, 4), np.float32), "blocks": blocks}
    params = {"encoder": encoder, "dense_out": {"kernel": np.ones((4, 2), np.float32)}}
    optimizer = optim.build(optim.Config(layer_decay=0.5, weight_decay=0.0), 1e-3)
    updates, _ = optimizer.update(jax.tree.map(np.ones_like, params), optimizer.init(params), params)
    sizes = jax.tree.map(lambda update: -np.asarray(update)[..., 0] / 1e-3, updates)
    np.testing.assert_allclose(sizes["dense_out"]["kernel"], 1, rtol=1e-4)
    np.testing.assert_allclose(sizes["encoder"]["blocks"]["block"]["norm1"]["scale"], [0.125, 0.25, 0.5], rtol=1e-4)
    np.testing.assert_allclose(sizes["encoder"]["pos_embed"], 0.0625, rtol=1e-4)


def test_without_layer_decay_nothing_is_scaled():
    params = {"encoder": {"pos_embed": np.ones(4, np.float32)}}
    optimizer = optim.build(optim.Config(weight_decay=0.0), 1e-3)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    np.testing.assert_allclose(updates["encoder"]["pos_embed"], -1e-3, rtol=1e-4)


NUMBERS = ("base_lr", "min_lr", "warmup_epochs", "eps", "weight_decay", "layer_decay", "clip_norm", "ema_decay")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1.0])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_is_not_finite_or_negative_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}: .*; use "):
        optim.Config(**{name: value})


@pytest.mark.parametrize("change", [
    dict(ema_decay=1.5), dict(ema_decay=1.0), dict(base_lr=0.0), dict(eps=0.0), dict(layer_decay=0.0), dict(accumulate=0), dict(warmup_steps=-1),
    dict(betas=(1.0, 0.9)), dict(betas=(0.9, 1.5)), dict(betas=(-0.1, 0.9)), dict(betas=(0.9, float("nan"))),
])  # fmt: skip
def test_a_number_out_of_its_range_is_refused(change):
    with pytest.raises(ValueError, match=f"{list(change)[0]}: ") as caught:
        optim.Config(**change)
    assert "\n" not in str(caught.value)


def test_the_ends_of_the_ranges_are_accepted():
    optim.Config(min_lr=0.0, warmup_epochs=0.0, betas=(0.0, 0.0), weight_decay=0.0, clip_norm=0.0, ema_decay=0.0, layer_decay=1.0)
    optim.Config(ema_decay=0.9999, betas=(0.999, 0.9999), layer_decay=0.01)


def test_a_minimum_above_the_learning_rate_is_refused():
    config = optim.Config(base_lr=1e-3, min_lr=2e-3)
    optim.schedule(config, optim.Length(10, 1), batch_size=512)
    with pytest.raises(errors.UserError, match="config.optim.min_lr: 0.002 is above the learning rate 0.001"):
        optim.schedule(config, optim.Length(10, 1), batch_size=256)


@pytest.mark.parametrize("epochs, steps", [(5, 0), (0, 100), (0, 0)])
@pytest.mark.parametrize("warmup", [0.0, 40.0])
def test_fewer_examples_than_a_batch_are_told_before_anything_else(epochs, steps, warmup):
    config = optim.Config(warmup_epochs=warmup)
    with pytest.raises(errors.UserError, match="9 examples, fewer than config.batch_size = 16"):
        optim.length(config, epochs=epochs, steps=steps, num_train=9, batch_size=16)


@pytest.mark.parametrize("field, value", [("epochs", -1.0), ("epochs", float("nan")), ("epochs", float("inf")), ("steps", -5)])
def test_a_length_out_of_range_is_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}: "):
        program.Config("addp", {}, **{field: value})


def test_a_length_of_no_step_is_refused():
    with pytest.raises(errors.UserError, match="config.epochs: "):
        optim.length(optim.Config(), epochs=0.01, steps=0, num_train=100, batch_size=10)


@pytest.mark.medium
@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
@pytest.mark.parametrize("not_decayed", [(), ("bias", "scale"), ("kernel",)])
def test_measured_statistics_stay_as_they_are(optimizer, not_decayed):
    net = heads.LinearProbe(3)
    params = net.init(jax.random.key(0), np.zeros((1, 4), np.float32))["params"] | {"norm_bias": np.full(4, 2, np.float32)}
    grads = jax.grad(lambda params: net.apply({"params": params}, np.ones((2, 4), np.float32)).var())(params)
    config = optim.Config(optimizer, weight_decay=0.5, not_decayed=not_decayed, clip_norm=0.0)
    updates, _ = (chain := optim.build(config, 0.1)).update(grads, chain.init(params), params)
    for name in parameters.FOLDED:
        assert not np.asarray(updates[name]).any()
    assert np.asarray(updates["dense_out"]["kernel"]).any()
