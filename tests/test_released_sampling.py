"""Schedules, next masks and whole sampling trajectories agree with the released code's loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import released

from addp_jax import diffusion, samplers
from addp_jax.codecs import vqgan
from addp_jax.models import pixel_to_token
from addp_jax.ops import images
from addp_jax.samplers import alternating

pytestmark = pytest.mark.golden

LOGITS = 1e-4  # relative to the largest; float32 noise grows along a trajectory
CHECKSUM = 2e-5  # of the sum of magnitudes
RUNS = {
    "cosine20": (alternating.Config(20, "cosine"), 1.0),
    "linear8": (alternating.Config(8, "linear"), 1.0),
    "partial4": (alternating.Config(4, "cosine", annealed=False), 0.5),
}


@functools.partial(jax.jit, static_argnums=(1, 2))
def one_step(params, config, capacity, carry, at, score_noise):
    addp = pixel_to_token.PixelToToken(released.ADDP)
    nets = samplers.bind(pixel_to_token.bind(addp, params[0]), vqgan.codec(vqgan.Tokenizer(released.TOKENIZER), params[1]))
    token_noise = jnp.zeros((*carry.mask.shape, released.ADDP.num_codes))  # no noise: the most probable code
    after = alternating.step(nets, config, capacity, carry, at, samplers.Noise(token_noise, score_noise))
    return after, nets.predict(carry.image, carry.token_ids, carry.mask, capacity)


def start(name):
    image, token_ids = released.images(), released.outputs()["token_ids"].astype(np.int32)
    mask = released.masks("partial4_init_masks") if name == "partial4" else np.ones(token_ids.shape, bool)
    return samplers.Carry(jnp.asarray(image), jnp.asarray(token_ids), jnp.asarray(mask))


@pytest.mark.parametrize("name", ["partial4", *(pytest.param(name, marks=pytest.mark.medium) for name in ("cosine20", "linear8"))])
def test_trajectory_agrees(name):
    gold = {key[len(name) + 1 :]: value for key, value in released.outputs().items() if key.startswith(name)}
    config, mask_ratio = RUNS[name]
    params = (released.addp_params(), released.tokenizer_params())
    steps = [
        (capacity, jax.tree.map(lambda entry: entry[index], at))
        for capacity, at in alternating.segments(config, released.ADDP.length, mask_ratio)
        for index in range(len(at.step))
    ]
    carry = start(name)
    for capacity, at in steps:
        index = int(at.step)
        np.testing.assert_array_equal(np.packbits(np.asarray(carry.mask), axis=-1), gold["masks_in"][index])
        carry, logits = one_step(params, config, capacity, carry, at, jnp.asarray(gold["gumbel"][index]))
        assert int(at.num_masked) == gold["mask_len"][index]
        np.testing.assert_array_equal(carry.token_ids, gold["tokens"][index])
        np.testing.assert_array_equal(np.packbits(np.asarray(carry.mask), axis=-1), gold["masks_next"][index])
        decoded = np.asarray(carry.image).transpose(0, 3, 1, 2)
        for row in range(2):
            for ours, theirs in ((logits[row], "logits_checksum"), (decoded[row], "xt_next_checksum")):
                expected = gold[theirs][index, row]
                np.testing.assert_allclose(released.checksum(ours), expected, rtol=0, atol=CHECKSUM * expected[1])
        if name == "cosine20" and index % 6 == 0:
            expected = gold["logits_at_pos"][index // 6]
            found = np.asarray(logits)[:, gold["logits_pos"][:2]]
            assert np.abs(found - expected).max() <= LOGITS * np.abs(expected).max()
    png = np.asarray(images.to_uint8(carry.image))[:, ::4, ::4].astype(int)
    assert np.abs(png - gold["final_png"]).max() <= 1
    assert (png == gold["final_png"]).mean() > 0.999
    assert steps[-1][1].step == config.steps - 1 and len(steps) >= config.steps - 1


def test_leading_steps_that_reveal_nothing_are_left_out():
    (capacity, at), *_ = alternating.segments(alternating.Config(20, "cosine"), 256, 1.0)
    assert capacity == 0 and list(at.step) == [1]  # step 0 of 20 leaves all 256 masked


@pytest.mark.parametrize("case", range(7))
def test_next_masks_agree(case):
    gold = {key[5:]: value for key, value in released.outputs().items() if key.startswith(f"cmn{case}_")}
    step, steps, schedule, strategy, mask_ratio, temperature = (str(value) for value in gold["args"])
    counts = diffusion.sampling_num_masked(schedule, int(steps), 256, float(mask_ratio))
    scale = diffusion.annealing(float(temperature), int(steps), strategy != "static")[int(step)]
    log_probs = np.log(gold["probs"])  # of the drawn tokens; two codes make a distribution with just these
    logits = jnp.stack([log_probs, np.log1p(-np.minimum(gold["probs"], 1 - 1e-7))], axis=-1)
    mask = diffusion.least_confident(
        logits, jnp.zeros(log_probs.shape, jnp.int32), jnp.asarray(gold["mask_in"]) > 0, scale * gold["gumbel"], counts[int(step)]
    )
    np.testing.assert_array_equal(mask, gold["mask_next"])


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.99])
def test_nucleus_agrees(top_p):
    gold = released.outputs()
    kept = diffusion.keep_nucleus(jnp.asarray(gold["nucleus_logits"]), top_p)
    np.testing.assert_array_equal(np.isfinite(kept).sum(-1), gold[f"nucleus_size_p{top_p}"])
    np.testing.assert_array_equal(np.argmax(kept, -1), gold[f"nucleus_argmax_p{top_p}"])
    if top_p == 0.9:
        np.testing.assert_allclose(jax.nn.softmax(kept), gold["nucleus_probs_p0.9"], atol=1e-6)


@pytest.mark.parametrize("case", range(3))
def test_mask_ratio_probabilities_agree(case):
    gold = released.schedules()
    low, high, mean, std = (float(value) for value in gold[f"mr{case}_args"])
    schedule = diffusion.MaskSchedule(low, high, mean, std)
    ratios, probs = diffusion.mask_ratio_grid(schedule)
    np.testing.assert_allclose(ratios, gold[f"mr{case}_ratios"], rtol=2e-6)
    np.testing.assert_allclose(probs, gold[f"mr{case}_probs"], rtol=5e-6)  # a unit in the last place of a float32 ratio, over std
    np.testing.assert_array_equal(diffusion.grid_num_masked(schedule, 256), gold[f"mr{case}_num_masked"])


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("steps", [1, 5, 8, 20, 64, 256])
@pytest.mark.parametrize("mask_ratio", [1.0, 0.6])
def test_number_of_masked_tokens_agrees(schedule, steps, mask_ratio):
    expected = released.schedules()[f"mask_len_{schedule}_{steps}_{mask_ratio}"]
    np.testing.assert_array_equal(diffusion.sampling_num_masked(schedule, steps, 256, mask_ratio), expected)
