"""Losses on the encoder's features: what they read, what they train, what they leave as it was."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest

from addp_jax import diffusion, errors, parameters, partition, program, tasks, weights
from addp_jax.models import alignment, heads
from addp_jax.ops import images, keys
from addp_jax.training import loop
from addp_jax.weights import checkpoint, convert, layouts

pytestmark = pytest.mark.medium

FROZEN = ("tokenizer", "token_predictor")
KEY = jax.random.key(3)
ROUNDING = 1e-5  # relative, of float32 sums in another order
RANDOM = {"model__tokenizer_weights": "random", "model__predictor_weights": "random"}
ON = {"model__alignment__weight": 0.5, "model__alignment__dispersive_weight": 0.25, "optim__ema_decay": 0.5}
SPLIT = partition.Config(data=2, fsdp=2)


@functools.cache
def build(devices=1, **changes):
    """`(training program, frozen networks)` of the tiny ADDP config."""
    mesh = partition.make_mesh(SPLIT if devices > 1 else partition.Config(), jax.devices()[:devices])
    run = program.create_training(programs.config("demo_addp", **RANDOM, **changes), num_train=64, mesh=mesh)
    return run, run.task.load_frozen()


@functools.cache
def init(**changes):
    return jax.jit(build(**changes)[0].task.init)(jax.random.key(0))


def other(params):
    """Parameters unlike `params`, as an average's."""
    return jax.tree.map(lambda leaf: leaf + 0.05 * jnp.cos(jnp.arange(leaf.size, dtype=jnp.float32)).reshape(leaf.shape), params)


def batch(size=8):
    return {"image": np.random.default_rng(0).integers(0, 256, (size, 16, 16, 3), np.uint8)}


@functools.cache
def losses(**changes):
    """Jitted `(params, frozen, average, key) -> ((loss, metrics), gradient)` on one batch."""
    run, _ = build(**changes)

    def loss(params, frozen, average, key):
        return run.task.loss(params, program.with_average(run.task, frozen, average), batch(), key, True)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


# --- off --------------------------------------------------------------------------------------------------------------


def plain_loss(task, params, frozen, rng):
    """The published loss."""
    mask_key, teacher_key, dropout_key = jax.random.split(rng, 3)
    codec = task.codec(frozen)
    token_ids = codec.encode(images.to_unit(batch()["image"]))
    mask_t, mask_s = diffusion.draw_nested_masks(mask_key, task.config.masks, *token_ids.shape)
    teach = functools.partial(task._teach, frozen["token_predictor"], token_ids, False)
    latents, target = diffusion.corrupt(teach, token_ids, mask_t, mask_s, codec.codebook, teacher_key)
    arguments = codec.decode(latents), token_ids, mask_s, task.capacity, True
    logits = task.net.apply({"params": params["pixel_to_token"]}, *arguments, rngs={"dropout": dropout_key})
    return diffusion.soft_cross_entropy(target, logits, mask_s, task.config.label_smoothing).mean()


def test_weight_0_is_the_published_loss_bit_for_bit():
    (run, frozen), params = build(), init()
    assert params.keys() == {"pixel_to_token"} and not run.task.average_for
    (loss, metrics), gradient = losses()(params, frozen, params, KEY)
    plain = jax.jit(jax.value_and_grad(lambda params, frozen: plain_loss(run.task, params, frozen, KEY)))
    expected, expected_gradient = plain(params, frozen)
    assert loss == metrics["loss"] == expected and metrics.keys() == {"loss"}
    jax.tree.map(np.testing.assert_array_equal, gradient, expected_gradient)


def test_with_weights_the_network_starts_and_is_corrupted_as_without():
    off, on = init(), init(**ON)
    jax.tree.map(np.testing.assert_array_equal, off["pixel_to_token"], on["pixel_to_token"])
    (loss, _), _ = losses()(off, build()[1], off, KEY)
    (_, metrics), _ = losses(**ON)(on, build(**ON)[1], on, KEY)
    assert metrics["loss"] == loss


# --- on ---------------------------------------------------------------------------------------------------------------


def test_the_head_predicts_the_averages_features_of_the_clean_image():
    changes = ON | {"model__net__encoder__dropout": 0.0, "model__net__encoder__input_dropout": 0.0}
    (run, frozen), params = build(**changes), init(**ON)
    average = other(params)
    (loss, metrics), _ = losses(**changes)(params, frozen, average, KEY)
    _, (image, corrupted, *_), _ = run.task._per_example(params, jax.tree.map(jnp.asarray, frozen), batch(), KEY, True)
    tokens = lambda tree, *inputs: heads.block_tokens(run.task.config.net.encoder, tree["pixel_to_token"]["encoder"], *inputs)[:, 1:]
    features, target, head = jax.device_get((tokens(params, corrupted, 1), tokens(average, image, 2), params["alignment"]))
    hidden = features @ head["fc1"]["kernel"] + head["fc1"]["bias"]
    predicted = hidden / (1 + np.exp(-hidden)) @ head["fc2"]["kernel"] + head["fc2"]["bias"]
    cosine = (predicted * target).sum(-1) / np.linalg.norm(predicted, axis=-1) / np.linalg.norm(target, axis=-1)
    np.testing.assert_allclose(metrics["alignment"], 1 - cosine.mean(), rtol=ROUNDING)
    np.testing.assert_allclose(metrics["dispersion"], alignment.dispersion(features), rtol=ROUNDING)
    total = metrics["loss"] + 0.5 * metrics["alignment"] + 0.25 * metrics["dispersion"]
    np.testing.assert_allclose(loss, total, rtol=ROUNDING)


def norms(tree) -> dict:
    return {name: float(jnp.abs(leaf).max()) for name, leaf in parameters.named_leaves(tree).items()}


@pytest.mark.parametrize("term", ("alignment", "dispersion"))
def test_the_gradient_reaches_the_head_and_the_blocks_below_alone(term):
    (run, frozen), params = build(**ON), init(**ON)

    def loss(params, average, frozen):
        frozen_and_average = program.with_average(run.task, frozen, average)
        return run.task.loss(params, frozen_and_average, batch(), KEY, True)[1][term]

    gradient, into_target = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, other(params), frozen)
    assert not any(norms(into_target).values())
    blocks = gradient["pixel_to_token"]["encoder"].pop("blocks")
    first, last = (norms(jax.tree.map(lambda leaf: leaf[number], blocks)) for number in (0, 1))
    assert first["block/mlp/fc1/kernel"] and not any(last.values())
    assert all(norms(gradient["alignment"]).values()) == (term == "alignment")
    assert norms(gradient)["pixel_to_token/encoder/patch_embed/kernel"]
    assert not any(value for name, value in norms(gradient).items() if "decoder" in name or "final_norm" in name)


def stepped(average_of, **changes):
    """Metrics of the first step, on four devices, if the average of the parameters was `average_of` them."""
    run, frozen = build(4, **ON | changes)
    with jax.set_mesh(run.mesh):
        state = jax.device_get(run.init(jax.random.key(0)))
        state = state.replace(ema_params=jax.device_get(average_of(state.params)))
        average = state.params, state.ema_params
        state = partition.put(state, jax.tree.map(lambda leaf: leaf.sharding, run.state))
        return average, jax.device_get(run.step(state, run.place(frozen), batch())[1])


def test_the_step_hands_over_the_average_on_a_mesh_and_to_micro_batches():
    (params, average), metrics = stepped(other)
    key = jax.random.fold_in(keys.of(0, "training"), 0)
    (_, expected), _ = losses(**ON)(params, build(**ON)[1], average, key)
    for name in expected:
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-4)
    pieces = [stepped(average_of, optim__accumulate=2)[1]["alignment"] for average_of in (other, lambda params: params)]
    assert np.isfinite(pieces).all() and pieces[0] != pieces[1]


def test_an_average_is_needed():
    with pytest.raises(errors.UserError, match="config.optim.ema_decay: 0, but config.model.alignment.weight needs"):
        build(**ON | {"optim__ema_decay": 0.0})
    build(**ON | {"optim__ema_decay": 0.0, "model__alignment__weight": 0.0})


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("block", 3, "config.model.alignment.block: 3; the encoder has 2 blocks"),
        ("target_block", 3, "config.model.alignment.target_block: 3; the target has 2"),
        ("loss", "l2", "config.model.alignment.loss: 'l2'; use cosine or smooth_l1"),
    ],
)
def test_mistakes_name_their_field(field, value, message):
    with pytest.raises(errors.UserError, match=message):
        build(**ON | {f"model__alignment__{field}": value})


# --- the terms --------------------------------------------------------------------------------------------------------


def features(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_distances_are_0_for_equal_features_and_those_of_their_formulas():
    one, two = features(0, 2, 5, 8), features(1, 2, 5, 8) / 20
    for kind in ("cosine", "smooth_l1"):
        assert abs(float(alignment.distance(one, one, kind))) < 1e-6
    assert float(alignment.distance(one, -3 * one, "cosine")) == pytest.approx(2)
    error = np.abs(two)
    expected = np.where(error < 0.05, error**2 / 0.1, error - 0.025).mean()
    np.testing.assert_allclose(alignment.distance(np.zeros_like(two), two, "smooth_l1"), expected, rtol=ROUNDING)


def test_the_dispersion_is_that_of_all_pairs_and_falls_as_images_part():
    rows = features(2, 6, 5, 8)
    pooled = rows.mean(1, dtype=np.float64)
    pairs = ((pooled[:, None] - pooled[None]) ** 2).mean(-1)
    np.testing.assert_allclose(alignment.dispersion(rows), np.log(np.exp(-pairs).mean()), rtol=1e-4)
    np.testing.assert_allclose(alignment.dispersion(rows + 1000), alignment.dispersion(rows), atol=1e-3)
    assert abs(float(alignment.dispersion(np.ones((6, 5, 8), np.float32)))) < 1e-6
    assert alignment.dispersion(2 * rows) < alignment.dispersion(rows)


# --- a run ------------------------------------------------------------------------------------------------------------


def steps(run, state, frozen, first, last):
    for number in range(first, last):
        state, _ = run.step(state, frozen, {"image": np.roll(batch()["image"], number, axis=1)})
    return state


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`(folder, state after four steps)`: `addp` in it is a run's checkpoint after two, beside its frozen networks."""
    root, (run, networks) = tmp_path_factory.mktemp("alignment"), build(4, **ON)
    for network, params in networks.items():
        checkpoint.save_params(root / network, {network: params}, {})
    with jax.set_mesh(run.mesh):
        frozen = run.place(networks)
        state = steps(run, run.init(jax.random.key(0)), frozen, 0, 2)
        with contextlib.closing(checkpoint.Checkpointer(root / "addp", run.config.checkpoint, {})) as saver:
            saver.save(2, state)
        loop.write_config(run, str(root / "addp"))
        return root, jax.device_get(steps(run, state, frozen, 2, 4))


def test_a_run_goes_on_bit_for_bit_with_its_head(saved):
    (root, expected), (run, networks) = saved, build(4, **ON)
    with jax.set_mesh(run.mesh):
        with contextlib.closing(checkpoint.Checkpointer(root / "addp", run.config.checkpoint, {})) as saver:
            state, start = saver.restore_latest(run.state)
        found = jax.device_get(steps(run, state, run.place(networks), start, 4))
    assert start == 2 and {"fc1", "fc2"} == found.params["alignment"].keys() == found.ema_params["alignment"].keys()
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_the_head_is_left_out_of_the_releases_layout_and_need_not_be_there(saved, tmp_path):
    root, output = saved[0], str(tmp_path / "addp.safetensors")
    convert.export_weights(str(root / "addp"), [str(root / name) for name in FROZEN], output, "addp", True, False)
    networks, params = layouts.read(output), checkpoint.load_params(root / "addp", ema=True)[0]
    assert "alignment" not in networks and "alignment" in params
    jax.tree.map(np.testing.assert_array_equal, networks["pixel_to_token"], params["pixel_to_token"])
    program.create(programs.config("demo_addp", **RANDOM)).read(str(root / "addp"))  # by a config without the losses
    run, _ = build(4, **ON)
    assert weights.fit(networks, run.state.params, output).keys() == {"pixel_to_token"}  # the start of a run with them


def test_a_frozen_network_is_the_target(saved):
    root, on = saved[0], {"model__alignment__weight": 0.5, "model__alignment__target": "network"}
    on |= {"model__alignment__network__input_norm": True}
    task = program.create(programs.config("demo_addp", **RANDOM, **on)).task
    with pytest.raises(errors.UserError, match="config.model.target_weights: nothing at"):
        task.load_frozen()
    task = program.create(programs.config("demo_addp", **RANDOM, **on, model__target_weights=str(root / "addp"))).task
    frozen, params = task.load_frozen(), checkpoint.load_params(root / "addp", ema=True)[0]
    jax.tree.map(np.testing.assert_array_equal, frozen["target"], params["pixel_to_token"]["encoder"])
    image = images.to_unit(batch()["image"])
    expected = build(**ON)[0].task._targets({tasks.AVERAGE: params}, image)
    np.testing.assert_array_equal(task._targets(frozen, image), expected)
    assert not task.average_for and {"pixel_to_token", "alignment"} == jax.eval_shape(task.init, KEY).keys()
