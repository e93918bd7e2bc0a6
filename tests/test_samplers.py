"""Both samplers: what holds at every step, for every image, on any number of devices."""

import functools
import itertools
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest

from addp_jax import diffusion, partition, samplers, schema
from addp_jax.codecs import vqgan
from addp_jax.models import pixel_to_token
from addp_jax.samplers import alternating, token_only
from addp_jax.tasks import addp

ROUNDING = 1e-5
MARGIN = 1e-4  # of logits
LENGTH, CODES = 16, 8
RUNS = {
    "cosine": (alternating, alternating.Config(6), 1.0),
    "linear": (alternating, alternating.Config(5, "linear"), 1.0),
    "many steps": (alternating, alternating.Config(24), 1.0),
    "one step": (alternating, alternating.Config(1), 1.0),
    "constant noise, nucleus": (alternating, alternating.Config(4, annealed=False, top_p=0.5), 1.0),
    "own image": (alternating, alternating.Config(4), 0.5),
    "halton": (alternating, alternating.Config(6, order="halton"), 1.0),
    "guided": (alternating, alternating.Config(6, order="random", token_temperature="cosine 2 0.5", guidance="linear 0 1"), 1.0),
    "tokens": (token_only, token_only.Config(6), 1.0),
    "tokens, linear": (token_only, token_only.Config(5, "linear"), 1.0),
    "tokens, many steps": (token_only, token_only.Config(20), 1.0),
    "tokens, one step": (token_only, token_only.Config(1), 1.0),
    "tokens, own image": (token_only, token_only.Config(4), 0.5),
    "tokens, halton": (token_only, token_only.Config(6, order="halton", guidance=1.0), 0.5),
}
ALTERNATING, TOKEN_ONLY = ([name for name, run in RUNS.items() if run[0] is sampler] for sampler in (alternating, token_only))
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time


def stand_ins() -> samplers.Nets:
    """Cheap nets: logits from each image's known tokens and pixels, one pixel per token."""
    rng = np.random.default_rng(0)
    codebook, table = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((CODES, 3), (CODES, LENGTH * CODES)))

    def predict(image, token_ids, mask, capacity):
        known = 0.2 * jax.nn.one_hot(token_ids, CODES) * ~mask[..., None]
        logits = (known.sum(1) @ table).reshape(-1, LENGTH, CODES)
        return logits + (image.reshape(-1, LENGTH, 3) @ codebook.T if capacity else 0)

    grid = lambda latents: latents.reshape(-1, 4, 4, 3)
    return samplers.Nets(lambda image: jnp.argmax(image.reshape(-1, LENGTH, 3) @ codebook.T, -1), predict, grid, codebook)


def images(count, size=4):
    return jax.random.uniform(jax.random.key(7), (8, size, size, 3))[:count]


class History(NamedTuple):
    """A run of three images, step by step."""

    image: np.ndarray  # after each step, [T,B,L,3]
    masks: np.ndarray  # at the start and after each step, [T+1,B,L]
    token_ids: np.ndarray  # the same
    plan: list  # of each step: what is compiled in (the decoder's capacity), and its number


@functools.cache
def history(name) -> History:
    sampler, config, mask_ratio = RUNS[name]
    nets, keys = stand_ins(), jax.random.split(jax.random.key(5), 8)[:3]

    @jit
    def run(keys):
        start = samplers.start(nets, keys, images(3), mask_ratio)
        return start, *samplers.sample(sampler, config, nets, keys, start, mask_ratio, keep=lambda carry: carry)

    start, end, kept = run(keys)
    np.testing.assert_array_equal(kept.image[-1], end.image)
    masks, token_ids = (
        np.concatenate([getattr(start, name)[None], getattr(kept, name)]) for name in ("mask", "token_ids")
    )
    plan = [(static, int(number)) for static, at in sampler.segments(config, LENGTH, mask_ratio) for number in at.step]
    return History(np.asarray(kept.image).reshape(-1, 3, LENGTH, 3), masks, token_ids, plan)


def test_with_drawn_codes_every_image_shows_codes_of_the_codebook():
    nets, keys = stand_ins()._replace(mapping="drawn"), jax.random.split(jax.random.key(5), 3)
    config, keep = alternating.Config(6), lambda carry: (carry.image, carry.token_ids, carry.mask)

    @jit
    def run(keys):
        return samplers.sample(alternating, config, nets, keys, samplers.start(nets, keys, images(3), 1.0), 1.0, keep=keep)

    _, (image, token_ids, mask) = run(keys)
    assert np.asarray(mask)[0].any()
    np.testing.assert_array_equal(image.reshape(-1, 3), nets.codebook[np.ravel(token_ids)])


@pytest.mark.medium
@pytest.mark.parametrize("name", RUNS)
def test_known_tokens_never_change_and_are_never_masked_again(name):
    _, masks, token_ids, _ = history(name)
    for before, after in itertools.pairwise(range(len(masks))):
        assert not (masks[after] & ~masks[before]).any()
        known = ~masks[before]
        np.testing.assert_array_equal(token_ids[after][known], token_ids[before][known])


@pytest.mark.parametrize("name", RUNS)
def test_the_start_hides_what_the_mask_ratio_says(name):
    _, masks, token_ids, _ = history(name)
    mask_ratio = RUNS[name][2]
    assert (masks[0].sum(-1) == diffusion.start_num_masked(LENGTH, mask_ratio)).all()
    if mask_ratio < 1:
        np.testing.assert_array_equal(token_ids[0], stand_ins().encode(images(3)))
        assert len(np.unique(masks[0], axis=0)) == 3  # each image its own


@pytest.mark.parametrize("name", RUNS)
def test_at_the_end_every_token_is_known_but_one_soft_one_of_the_alternating_sampler(name):
    masks = history(name).masks
    assert (masks[-1].sum(-1) == (1 if name in ALTERNATING else 0)).all()


@pytest.mark.parametrize("name", RUNS)
def test_segments_cover_the_steps_in_order(name):
    sampler, config, mask_ratio = RUNS[name]
    plan = history(name).plan
    numbers = [number for _, number in plan]
    first = config.steps - len(numbers)
    assert numbers == list(range(first, config.steps))
    if name in ALTERNATING:  # the steps left out reveal nothing
        after = diffusion.sampling_num_masked(config.schedule, config.steps, LENGTH, mask_ratio)
        assert (after[:first] == LENGTH).all() and after[first] < LENGTH
        assert len(sampler.segments(config, LENGTH, mask_ratio)) <= alternating.MAX_SEGMENTS
    else:
        assert first == 0


@pytest.mark.parametrize("name", ALTERNATING)
def test_capacity_holds_the_known_tokens_of_every_step_and_is_zero_where_there_are_none(name):
    _, masks, _, plan = history(name)
    known = (~masks).sum(-1)
    for (capacity, _), before in zip(plan, known[:-1], strict=True):
        assert capacity >= before.max() and (capacity == 0) == (before.max() == 0)


@pytest.mark.parametrize("name", TOKEN_ONLY)
def test_token_only_reveals_at_least_one_token_per_step_while_two_are_left(name):
    counts = history(name).masks.sum(-1)
    for before, after in itertools.pairwise(counts):
        assert (after <= np.maximum(before - 1, 1)).all()


def test_token_only_counts_are_mages():
    after = token_only.num_masked_after(token_only.Config(20), 256)
    mage = [255, 252, 248, 243, 236, 228, 218, 207, 194, 181, 166, 150, 133, 116, 97, 79, 59, 40, 20]
    assert after.tolist() == mage + [0]  # the last one is revealed as well


@pytest.mark.medium
@pytest.mark.parametrize("name", ["cosine", "own image", "tokens", "tokens, own image"])
def test_an_image_does_not_depend_on_its_batch_or_its_place_in_it_and_is_the_last_frame(name):
    sampler, config, mask_ratio = RUNS[name]
    order = np.array([4, 2, 0, 3, 1])
    nets, keys = stand_ins(), jax.random.split(jax.random.key(5), 8)[order]

    @jit
    def run(keys, image):
        start = samplers.start(nets, keys, image, mask_ratio)
        return samplers.sample(sampler, config, nets, keys, start, mask_ratio)

    (end, frames), three, places = run(keys, images(5)[order]), history(name), np.argsort(order)[:3]
    assert frames is None
    np.testing.assert_array_equal(end.token_ids[places], three.token_ids[-1])
    np.testing.assert_allclose(end.image[places].reshape(3, LENGTH, 3), three.image[-1], atol=ROUNDING)
    assert len(np.unique(end.token_ids, axis=0)) == 5  # each key gives its own image


@pytest.mark.parametrize("name", RUNS)
def test_the_image_is_made_of_the_codes_of_the_known_tokens(name):
    image, masks, token_ids, _ = history(name)
    codes = np.asarray(stand_ins().codebook)[token_ids[-1]]
    np.testing.assert_array_equal(image[-1][~masks[-1]], codes[~masks[-1]])
    assert (np.abs(image[-1] - codes).max(-1) > 1e-3)[masks[-1]].all()


def test_a_start_from_nothing_ignores_the_image():
    nets, keys = stand_ins(), jax.random.split(jax.random.key(5), 3)
    config = alternating.Config(4)

    @jit
    def run(image):
        return samplers.sample(alternating, config, nets, keys, samplers.start(nets, keys, image, 1.0), 1.0)[0].image

    np.testing.assert_array_equal(run(images(3)), run(1 - images(3)))


OWN_MASKS = np.arange(LENGTH) >= LENGTH - np.array([[3], [16], [9]])  # 3, 16 and 9 unknown tokens


@functools.cache
def given(sampler, config, fewest, rows=(0, 1, 2)):
    """`(carry after each step, end)` of images that bring their own masks."""
    keys, image = jax.random.split(jax.random.key(5), 8)[:3], images(3)

    @jit
    def run(keys, image, mask):
        start = samplers.start_with(stand_ins(), image, mask)
        return samplers.sample(sampler, config, stand_ins(), keys, start, 1.0, fewest, keep=lambda carry: carry)

    end, kept = run(keys[list(rows),], image[list(rows),], OWN_MASKS[list(rows)])
    return kept, end


@pytest.mark.medium
@pytest.mark.parametrize("sampler", [alternating, token_only])
def test_of_given_masks_each_image_follows_its_own_schedule_and_keeps_its_known_tokens(sampler):
    config = samplers.Config(5)
    kept, end = given(sampler, config, 3)
    for row, unknown in enumerate(OWN_MASKS.sum(-1)):
        if sampler is alternating:
            expected = diffusion.sampling_num_masked("cosine", 5, unknown)
        else:
            expected = token_only.num_masked_after(config, unknown)
        assert kept.mask[:, row].sum(-1).tolist() == expected.tolist()
    known = ~OWN_MASKS
    assert not np.asarray(kept.mask)[:, known].any()
    np.testing.assert_array_equal(end.token_ids[known], stand_ins().encode(images(3))[known])
    capacities = [static for static, _ in sampler.segments(config, LENGTH, 1.0, 3)]
    assert sampler is token_only or (capacities == sorted(capacities) and capacities[0] >= LENGTH - 3)


def test_an_image_of_a_given_mask_does_not_depend_on_the_masks_beside_it():
    (_, three), (_, alone) = given(alternating, samplers.Config(5), 3), given(alternating, samplers.Config(5), 9, (2,))
    np.testing.assert_array_equal(three.token_ids[2], alone.token_ids[0])
    np.testing.assert_allclose(three.image[2], alone.image[0], atol=ROUNDING)


def test_the_pixels_under_a_given_mask_are_hidden():
    mask = OWN_MASKS[:1]
    start = jit(functools.partial(samplers.start_with, stand_ins()))
    other = jnp.where(mask.reshape(1, 4, 4, 1), 0.5, images(1))
    np.testing.assert_array_equal(start(images(1), mask).image, start(other, mask).image)
    assert (start(images(1), ~mask).image != start(other, ~mask).image).any()


def test_of_a_power_of_two_tokens_the_schedule_of_a_mask_ratio_is_that_of_its_number_of_unknown_tokens():
    for schedule in diffusion.SCHEDULES.keys() - {"constant"}:  # it counts the tokens
        for unknown in (1, 3, 8, 11, 16):
            expected = diffusion.sampling_num_masked(schedule, 7, 16, unknown / 16)
            np.testing.assert_array_equal(diffusion.num_masked_by_start(schedule, 7, 16)[:, unknown], expected)


@pytest.mark.parametrize(
    "field, value", [("steps", 0), ("schedule", "cubic"), ("temperature", -1.0), ("top_p", 0.0), ("top_k", -1)]
)
def test_a_choice_that_no_sampler_can_use_names_its_field(field, value):
    with pytest.raises(ValueError, match=f"{field}: {value!r}"):
        samplers.Config(**{field: value})


def test_each_step_has_its_own_noise_and_so_has_each_image():
    draw = jit(samplers.draw_noise, static_argnums=(2, 3))
    keys = jax.random.split(jax.random.key(0), 2)
    one, two = draw(keys, 0, LENGTH, CODES), draw(keys, 1, LENGTH, CODES)
    for array in (np.concatenate([one.tokens, two.tokens]), np.concatenate([one.confidence, two.confidence])):
        assert len(np.unique(array.reshape(4, -1), axis=0)) == 4
    np.testing.assert_array_equal(draw(keys[1:], 1, LENGTH, CODES).tokens[0], two.tokens[1])


def test_tokens_are_drawn_from_the_softmax_of_the_logits():
    count = 2000
    logits = jnp.asarray([2.0, 0.0, 1.0, -1.0])
    nets = samplers.Nets(None, lambda *_: jnp.broadcast_to(logits, (count, 1, 4)), lambda latents: latents, jnp.eye(4))
    start = samplers.Carry(jnp.zeros((count, 1, 4)), jnp.zeros((count, 1), jnp.int32), jnp.ones((count, 1), bool))
    noise = jit(samplers.draw_noise, static_argnums=(2, 3))(jax.random.split(jax.random.key(0), count), 0, 1, 4)
    end = jit(lambda noise: alternating.step(nets, alternating.Config(), 0, start, alternating.At(0, 1, 6.0), noise))(noise)
    share = np.bincount(np.ravel(end.token_ids), minlength=4) / count
    np.testing.assert_allclose(share, jax.nn.softmax(logits), atol=0.04)


# --- with the real networks -----------------------------------------------------------------------


@functools.cache
def tiny():
    """`(task, params, frozen)` of ADDP with a sampler of 3 steps, parameters of size 0.3."""
    fields = programs.fields("demo_addp", model__sampler__steps=3).model.to_dict()
    task = addp.Task(schema.build(addp.Config, fields, "config.model"), jnp.float32)
    rng = np.random.default_rng(2)
    inits = {"net": functools.partial(pixel_to_token.init, task.net), "tokenizer": functools.partial(vqgan.init, task.tokenizer)}
    params = {
        name: jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), jax.eval_shape(init, jax.random.key(0)))
        for name, init in inits.items()
    }
    return task, {"pixel_to_token": params["net"]}, {"tokenizer": params["tokenizer"]}


@pytest.mark.medium
def test_with_everything_masked_one_row_of_logits_serves_all_and_no_pixel_is_read():
    task, params, frozen = tiny()
    masked, token_ids = np.ones((3, LENGTH), bool), np.arange(3 * LENGTH).reshape(3, LENGTH) % 32
    predict = jit(lambda nets_of, *case: task.nets(*nets_of).predict(*case), static_argnums=4)
    shared, full = (predict((params, frozen), images(3, 16), token_ids, masked, capacity) for capacity in (0, 5))
    np.testing.assert_allclose(shared, full, atol=ROUNDING)


def every_step(config, length, mask_ratio, fewest):
    """`alternating.segments` without its savings: all steps, also those that reveal nothing, in one scan, with room for all."""
    counts = diffusion.sampling_num_masked(config.schedule, config.steps, length, mask_ratio)
    noise = diffusion.annealing(config.temperature, config.steps, config.annealed)
    return [(length, alternating.At(np.arange(config.steps), counts, noise))]


@pytest.mark.medium
def test_what_saves_work_changes_nothing_nor_does_the_batch():
    """Segments, their capacities and the shared first steps, in a batch of 7; without them in a batch of 3. Logits that
    differ by much more than float noise lead to the same tokens, so no choice is a close one."""
    task, params, frozen = tiny()
    nets, keys, config = task.nets(*jax.tree.map(jnp.asarray, (params, frozen))), jax.random.split(jax.random.key(3), 7), samplers.Config(8)

    def run(sampler, nets, count):
        start = samplers.start(nets, keys[:count], jnp.zeros((count, 16, 16, 3)), 1.0)
        return jit(lambda start: samplers.sample(sampler, config, nets, keys[:count], start, 1.0)[0])(start)

    ripple = MARGIN * jnp.cos(jnp.arange(32.0))
    disturbed = nets._replace(predict=lambda *case: nets.predict(*case) + ripple[None, None])
    saving = run(alternating, nets, 7)
    plain = run(types.SimpleNamespace(segments=every_step, step=alternating.step), disturbed, 3)
    assert len(alternating.segments(config, LENGTH, 1.0)) == 4 and alternating.segments(config, LENGTH, 1.0)[0][0] == 0
    np.testing.assert_array_equal(saving.token_ids[:3], plain.token_ids)
    np.testing.assert_allclose(saving.image[:3], plain.image, atol=100 * MARGIN)


@pytest.mark.medium
def test_eight_devices_make_the_images_of_one():
    """Each device samples its own image; alone or side by side, it is the same image."""
    task, params, frozen = tiny()
    found = []
    for count in (1, 8):
        mesh = partition.make_mesh(partition.Config(), jax.devices()[:count])
        with jax.set_mesh(mesh):
            batch = partition.put({"number": np.arange(8)}, partition.batch_sharding(mesh))
            draw = samplers.drawing(task, mesh)
            found.append(np.asarray(draw((params, frozen, jax.random.key(3)), batch)).astype(int))
    assert np.abs(found[0] - found[1]).max() <= 1 and len(np.unique(found[0], axis=0)) == 8


def test_another_sampler_by_its_name_is_another_module_with_its_own_fields():
    task, *_ = tiny()
    other = samplers.with_sampler(task, {"name": "token_only", "steps": 5})
    assert (other.sampler, type(other.sampler_config), other.sampler_config.steps) == (token_only, token_only.Config, 5)
    assert task.sampler is alternating and task.sampler_config.steps == 3
