"""Learning rates, weight decay and the length of a run."""

import jax
import numpy as np
import pytest
import released

from addp_jax import errors, optim, schema


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


OUT_OF_RANGE = (
    ("layer_decay", 0.0), ("layer_decay", 1.5), ("ema_decay", 1.5), ("ema_decay", 1.0), ("betas", (0.9, 1.0)), ("eps", 0.0),
    ("weight_decay", -0.1), ("min_lr", -1.0), ("warmup_steps", -1), ("warmup_epochs", -1.0), ("base_lr", 0.0), ("clip_norm", -1.0),
    ("accumulate", 0), ("base_lr", float("nan")),
)  # fmt: skip


@pytest.mark.parametrize("change", [dict(optimizer="sgd"), *({name: value} for name, value in OUT_OF_RANGE)])
def test_unknown_optimizers_and_layer_decays_out_of_range_are_refused(change):
    with pytest.raises(errors.UserError, match=f"config.optim.{list(change)[0]}"):
        schema.build(optim.Config, change, "config.optim")


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
