"""Orders, values per step, guidance, remasking and schedule files: neutral values change nothing, others do what they say."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_samplers import CODES, LENGTH, OWN_MASKS, images, jit, stand_ins, tiny

from addp_jax import diffusion, errors, partition, samplers, schema
from addp_jax.ops import unmasking
from addp_jax.samplers import alternating, token_only

LISTED = dict(steps=4, schedule=(12, 8, 3, 1))


def run(sampler, config, start, keys=None, nets=None, mask_ratio=1.0, fewest=None):
    """(carry after each step, the last one)."""
    keys = jax.random.split(jax.random.key(5), 3) if keys is None else keys
    nets = nets or stand_ins()
    draw = lambda start: samplers.sample(sampler, config, nets, keys, start, mask_ratio, fewest, keep=lambda carry: carry)
    end, kept = jit(draw)(start)
    return kept, end


def blank():
    """Three images of which nothing is known."""
    return samplers.Carry(images(3), jnp.zeros((3, LENGTH), jnp.int32), jnp.ones((3, LENGTH), bool))


def own():
    """Three images with 3, 16 and 9 unknown tokens."""
    return samplers.Carry(images(3), stand_ins().encode(images(3)), jnp.asarray(OWN_MASKS))


def same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


# --- neutral values -------------------------------------------------------------------------------


def test_without_options_the_samplers_draw_what_they_always_drew():
    """The last tokens of one image, recorded before there were options."""
    recorded = {
        alternating: [5, 4, 0, 4, 4, 4, 3, 0, 4, 0, 4, 4, 4, 4, 4, 4],
        token_only: [0, 6, 0, 6, 0, 4, 2, 4, 4, 0, 5, 5, 1, 1, 1, 5],
    }
    keys = jax.random.split(jax.random.key(5), 8)[:3]
    for sampler, tokens in recorded.items():
        start = jit(lambda keys: samplers.start(stand_ins(), keys, images(3), 1.0))(keys)
        assert run(sampler, sampler.Config(6), start, keys)[1].token_ids[2].tolist() == tokens


@pytest.mark.parametrize("sampler", [alternating, token_only])
def test_lists_of_neutral_values_change_nothing(sampler):
    neutral = dict(token_temperature=(1.0,) * 5, guidance=(0.0,) * 5, temperature="linear 6 0")
    same(run(sampler, sampler.Config(5), blank()), run(sampler, sampler.Config(5, **neutral), blank()))


def test_a_list_of_a_rules_own_numbers_draws_the_same_images():
    counts = tuple(diffusion.sampling_num_masked("cosine", 5, LENGTH).tolist())
    for start, fewest in ((blank(), None), (own(), 3)):
        rule, listed = (run(alternating, alternating.Config(5, schedule), start, fewest=fewest)[1] for schedule in ("cosine", counts))
        if fewest is None:
            np.testing.assert_array_equal(rule.token_ids, listed.token_ids)
        assert (~np.asarray(listed.mask)).sum(-1).tolist() == [LENGTH - 1] * 3


# --- values per step ------------------------------------------------------------------------------


def test_a_value_is_a_number_a_rule_or_a_list():
    np.testing.assert_array_equal(diffusion.per_step(2, 3), np.float32([2, 2, 2]))
    np.testing.assert_array_equal(diffusion.per_step((3.0, 1.0, 2.0), 3), np.float32([3, 1, 2]))
    np.testing.assert_allclose(diffusion.per_step("linear 0 2", 4), [0.5, 1, 1.5, 2])
    np.testing.assert_allclose(diffusion.per_step("cosine 3 1", 2), [1 + 2 * np.cos(np.pi / 4), 1], rtol=1e-6)


def test_the_arccos_rule_shows_halton_maskgits_numbers():
    left = np.array([256, *diffusion.sampling_num_masked("arccos", 20, 256)])
    assert left[0] - left[1] == 8 and left[-2] == 52


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(token_temperature=(1.0, 2.0)), "token_temperature: 2 numbers; give 4, one for each step"),
        (dict(temperature="cubic 2 0"), "temperature: 'cubic 2 0'; use a number, one for each step, or a rule"),
        (dict(guidance="linear 2"), "guidance: 'linear 2'; use"),
        (dict(guidance="linear 0 -1"), r"guidance: \(-0.25, .*; use at least 0"),
        (dict(remask="linear 3 0"), "remask: .*; use at least 0 and at most 1"),
        (dict(token_temperature=(1.0, -1.0, 1.0, 1.0)), "token_temperature: .*; use at least 0"),
        (dict(guidance="linear 0 nan"), "guidance: .*; use a finite number"),
        (dict(schedule=(9, 4, 1)), "schedule: 3 numbers; give 4"),
        (dict(schedule=(4, 9, 2, 1)), "schedule: .*; use numbers that never rise, the last one 0 or 1"),
        (dict(schedule=(9, 4, 3, 2)), "schedule: .* the last one 0 or 1"),
        (dict(schedule=(9, 4, 3, -1)), "schedule: .*; use at least 0"),
        (dict(order="spiral"), "order: 'spiral'; use confidence or halton or random"),
        (dict(token_temperature=True), "token_temperature: expected float"),
    ],
)
def test_a_mistake_names_its_field(fields, words):
    with pytest.raises(errors.UserError, match=f"config.model.sampler.{words}"):
        schema.build(samplers.Config, {"steps": 4} | fields, "config.model.sampler")


def test_more_masked_tokens_than_an_image_has_are_refused():
    with pytest.raises(errors.UserError, match="config.model.sampler.schedule: 20 masked tokens, but an image has 16"):
        alternating.segments(alternating.Config(2, (20, 1)), LENGTH, 1.0)


@pytest.mark.parametrize("sampler", [alternating, token_only])
def test_a_listed_schedule_is_followed_and_scaled_to_the_unknown_tokens(sampler):
    config, last = sampler.Config(**LISTED), int(sampler is alternating)
    kept, _ = run(sampler, config, blank())
    assert kept.mask.sum(-1).T.tolist() == [[12, 8, 3, last]] * 3
    kept, end = run(sampler, config, own(), fewest=3)
    assert kept.mask.sum(-1).T.tolist() == [[3, 2, 1, last], [12, 8, 3, last], [7, 5, 2, last]]
    np.testing.assert_array_equal(end.token_ids[~OWN_MASKS], own().token_ids[~OWN_MASKS])


def test_a_schedule_that_ends_at_0_leaves_no_soft_token():
    _, end = run(alternating, alternating.Config(2, (5, 0)), blank())
    codes = np.asarray(stand_ins().codebook)[end.token_ids]
    np.testing.assert_array_equal(np.asarray(end.image).reshape(3, LENGTH, 3), codes)


def test_capacities_of_lists_hold_the_known_tokens():
    for static, at in alternating.segments(alternating.Config(**LISTED), LENGTH, 1.0):
        before = np.array([16, 12, 8, 3])[at.step]
        assert static >= (LENGTH - before).max() and (static == 0) == (before == LENGTH).all() and static <= LENGTH


def test_other_values_are_not_compiled_again(mesh, monkeypatch):
    task, params, frozen = tiny()
    traces, nets = [], task.nets
    monkeypatch.setattr(task, "nets", lambda *args: traces.append(1) or nets(*args))
    options = LISTED | dict(guidance=0.5, token_temperature=0.7, remask=0.1)
    task = samplers.with_sampler(task, options)
    draw, drawn = samplers.drawing(task, mesh), []
    batch = partition.put({"number": np.arange(2)}, partition.batch_sharding(mesh))
    for changes in ({}, {"guidance": (0.0, 2.0, 3.0, 1.0)}, {"token_temperature": "linear 3 0"}, {"schedule": (13, 9, 2, 0)}, {}):
        config = samplers.with_sampler(task, changes).sampler_config
        drawn.append(np.asarray(draw((params, frozen, jax.random.key(3)), batch, config)))
    assert len(traces) == 1
    np.testing.assert_array_equal(drawn[0], drawn[-1])
    assert all((drawn[0] != other).any() for other in drawn[1:-1])


def test_tokens_are_drawn_from_the_softmax_of_the_logits_over_the_temperature():
    count, logits = 2000, jnp.asarray([2.0, 0.0, 1.0, -1.0])
    carry = samplers.Carry(None, jnp.zeros((count, 1), jnp.int32), jnp.ones((count, 1), bool))
    noise = jit(samplers.draw_noise, static_argnums=(2, 3))(jax.random.split(jax.random.key(0), count), 0, 1, 4)
    rows = jnp.broadcast_to(logits, (count, 1, 4))
    for temperature, expected in ((2.0, jax.nn.softmax(logits / 2)), (0.0, [1, 0, 0, 0])):
        at = samplers.At(0, 1, 6.0, token_temperature=temperature)
        drawn = samplers.draw_tokens(alternating.Config(), rows, carry, at, noise)
        np.testing.assert_allclose(np.bincount(np.ravel(drawn), minlength=4) / count, expected, atol=0.04)


# --- orders ---------------------------------------------------------------------------------------


def test_the_halton_order_of_16_by_16_is_halton_maskgits():
    places = unmasking.halton_places(16)
    cells = [divmod(int(cell), 16) for cell in np.argsort(places)]
    assert cells[:8] == [(8, 5), (4, 10), (12, 1), (2, 7), (10, 12), (6, 3), (14, 8), (1, 14)]
    assert cells[-2:] == [(13, 6), (11, 6)] and sorted(places) == list(range(256))


@pytest.mark.parametrize("sampler", [alternating, token_only])
def test_halton_reveals_in_its_order_from_a_place_of_each_images_own(sampler):
    order, rolls = np.argsort(unmasking.halton_places(4)), []
    for start, fewest in ((blank(), None), (own(), 3)):
        kept, _ = run(sampler, sampler.Config(5, order="halton"), start, fewest=fewest)
        for row in range(3):
            masks = np.concatenate([np.asarray(start.mask)[None], kept.mask])[:, row][:, order]  # in the order's places
            fits = [roll for roll in range(LENGTH) if all(is_tail(mask, masks[0], roll) for mask in masks)]
            assert fits
            rolls.append(fits[0])
    assert len(set(rolls[:3])) > 1


def is_tail(mask, unknown, roll) -> bool:
    """Whether what is masked are the last ones of the unknown places, counted from `roll`."""
    mask, unknown = np.roll(mask, -roll), np.roll(unknown, -roll)
    return (mask[unknown] == (np.arange(unknown.sum()) >= unknown.sum() - mask.sum())).all()


def test_the_random_order_is_uniform_and_heeds_no_temperature():
    keys = jax.random.split(jax.random.key(1), 600)
    noise = jit(samplers.draw_noise, static_argnums=(2, 3))(keys, 0, LENGTH, CODES)
    carry = samplers.Carry(None, None, jnp.ones((600, LENGTH), bool))
    config, at = alternating.Config(order="random"), samplers.At(0, 4, 0.0)
    mask = samplers.next_mask(config, None, None, carry, at, noise)
    np.testing.assert_allclose(mask.mean(0), 0.25, atol=0.08)


# --- guidance -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [alternating, token_only])
def test_guidance_moves_the_logits_away_from_those_of_nothing_known(sampler):
    """As nets whose logits are guided already; the logits of nothing known are asked for once."""
    nets, weights, calls = stand_ins(), (0.0, 1.0, 2.0, 0.5), []
    prior = nets.predict(images(1), jnp.zeros((1, LENGTH), jnp.int32), jnp.ones((1, LENGTH), bool), 0)
    constant = 2.0

    def counted(*case):
        calls.append(case[0].shape[0])
        return nets.predict(*case)

    def guided(*case):
        logits = nets.predict(*case)
        return logits + constant * (logits - prior)

    by_option = run(sampler, sampler.Config(4, guidance=constant), blank(), nets=nets._replace(predict=counted))
    by_hand = run(sampler, sampler.Config(4), blank(), nets=nets._replace(predict=guided))
    np.testing.assert_array_equal(by_option[1].token_ids, by_hand[1].token_ids)
    np.testing.assert_allclose(by_option[1].image, by_hand[1].image, atol=1e-4)
    assert calls.count(1) == 1
    listed = run(sampler, sampler.Config(4, guidance=weights), blank())
    assert (listed[1].token_ids != by_option[1].token_ids).any()


# --- remasking ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [alternating, token_only])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_remasking_hides_its_share_of_the_drawn_tokens_again_and_never_the_users(sampler, share):
    config, start = sampler.Config(8, "linear", remask=share, order="random"), own()
    kept, end = run(sampler, config, start, fewest=3)
    plain, _ = run(sampler, sampler.Config(8, "linear"), start, fewest=3)
    masks = np.concatenate([OWN_MASKS[None], kept.mask])
    np.testing.assert_array_equal(masks[1:].sum(-1), plain.mask.sum(-1))  # the schedule holds
    assert not masks[:, ~OWN_MASKS].any()
    np.testing.assert_array_equal(end.token_ids[~OWN_MASKS], start.token_ids[~OWN_MASKS])
    hidden_again = (masks[1:] & ~masks[:-1]).sum(-1)
    known = (OWN_MASKS[None] & ~masks[:-1]).sum(-1)
    expected = np.minimum(np.float32(share) * known, masks[1:].sum(-1)).astype(int)
    np.testing.assert_array_equal(hidden_again, expected)
    assert hidden_again.sum() > 0


def test_pixels_hidden_again_are_those_expected_when_nothing_is_known():
    kept, _ = run(alternating, alternating.Config(8, "linear", remask=0.5), blank())
    nets = stand_ins()
    prior = nets.predict(images(1), jnp.zeros((1, LENGTH), jnp.int32), jnp.ones((1, LENGTH), bool), 0)
    expected = np.asarray(jax.nn.softmax(prior) @ nets.codebook)[0]
    masks = np.concatenate([np.ones((1, 3, LENGTH), bool), kept.mask])
    again = masks[1:] & ~masks[:-1]
    found = np.asarray(kept.image).reshape(len(again), 3, LENGTH, 3)
    np.testing.assert_allclose(found[again], np.broadcast_to(expected, found.shape)[again], atol=1e-5)


# --- schedule files -------------------------------------------------------------------------------


def test_a_schedule_file_comes_before_the_fields_and_is_a_matter_of_its_content(tmp_path):
    task, path = tiny()[0], tmp_path / "schedule.json"
    path.write_text(json.dumps(LISTED | {"guidance": [0, 1, 1.5, 2]}))
    config = samplers.with_sampler(task, {"schedule_file": str(path), "steps": 7}).sampler_config
    assert (config.steps, config.schedule, config.guidance) == (4, (12, 8, 3, 1), (0.0, 1.0, 1.5, 2.0))
    assert config.schedule_file == "" and config.top_p == task.sampler_config.top_p


@pytest.mark.parametrize(
    "text, words",
    [
        (None, "config.model.sampler.schedule_file: cannot read .*: No such file"),
        ("{", "config.model.sampler.schedule_file: cannot read"),
        ("[1]", "config.model.sampler.schedule_file: cannot read"),
        ('{"step": 4}', "schedule.json.step: no such field; did you mean"),
        ('{"steps": 4, "schedule": [1, 0]}', "schedule.json.schedule: 2 numbers; give 4"),
    ],
)
def test_a_schedule_file_with_a_mistake_is_named(tmp_path, text, words):
    path = tmp_path / "schedule.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(errors.UserError, match=words):
        samplers.with_sampler(tiny()[0], {"schedule_file": str(path)})
