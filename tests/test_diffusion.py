"""Masks, schedules, latents and the loss: what holds for every draw."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from addp_jax import diffusion

LENGTH = 256
SCHEDULE = diffusion.MaskSchedule()
DRAWS = 4096


@functools.cache
def drawn(group: int = 1, batch: int = DRAWS, max_jump: int = SCHEDULE.max_jump):
    schedule = diffusion.MaskSchedule(group=group, max_jump=max_jump)
    masks = diffusion.draw_nested_masks(jax.random.key(3), schedule, batch, LENGTH)
    return tuple(np.asarray(mask) for mask in masks)


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def case(seed=0, batch=4, length=9, codes=7):
    """`(logits, probs, token_ids, mask)` with about half of each row masked, at least one and never all."""
    rng = np.random.default_rng(seed)
    logits = random(batch, length, codes, seed=seed)
    mask = rng.random((batch, length)) < 0.5
    mask[:, 0], mask[:, 1] = True, False
    return logits, jax.nn.softmax(logits), jnp.asarray(rng.integers(0, codes, (batch, length)), jnp.int32), jnp.asarray(mask)


# --- training masks -------------------------------------------------------------------------------


def test_mask_ratios_rise_within_their_bounds_and_probabilities_sum_to_one():
    schedule = diffusion.MaskSchedule(low=0.3, high=0.8, mean=0.4, std=0.1)
    ratios, probs = diffusion.mask_ratio_grid(schedule)
    assert (np.diff(ratios) > 0).all() and ratios[0] >= 0.3 and ratios[-1] < 0.8
    np.testing.assert_allclose(probs.sum(), 1)
    assert abs(ratios[probs.argmax()] - 0.4) < 0.02


def test_the_cleaner_mask_lies_inside_the_other():
    mask_t, mask_s = drawn()
    assert not (mask_s & ~mask_t).any()


def test_numbers_of_masked_tokens_lie_on_the_grid():
    counts = diffusion.grid_num_masked(SCHEDULE, LENGTH)
    assert counts.min() == 131 and counts.max() == LENGTH
    for mask in drawn():
        assert np.isin(mask.sum(-1), counts).all()


def test_mask_ratios_are_drawn_with_their_probabilities():
    counts, probs = diffusion.grid_num_masked(SCHEDULE, LENGTH), diffusion.mask_ratio_grid(SCHEDULE)[1]
    values, which = np.unique(counts, return_inverse=True)  # several ratios round up to all tokens
    expected = DRAWS * np.bincount(which, probs)
    found = (drawn()[1].sum(-1)[:, None] == values).sum(0)
    freedom = len(values) - 1
    assert ((found - expected) ** 2 / expected).sum() < freedom + 4 * np.sqrt(2 * freedom)


def test_each_place_is_masked_equally_often():
    share = drawn()[1].mean(0)
    spread = np.sqrt(share.mean() * (1 - share.mean()) / DRAWS)
    assert np.abs(share - share.mean()).max() < 5 * spread


@pytest.mark.parametrize("max_jump", [1, 5])
def test_the_masks_are_one_to_max_jump_grid_points_apart(max_jump):
    counts = diffusion.grid_num_masked(SCHEDULE, LENGTH)
    top = len(counts) - 1
    num_t, num_s = (mask.sum(-1) for mask in drawn(max_jump=max_jump))
    allowed = {
        (counts[index], counts[min(index + jump, top)]) for index in range(top + 1) for jump in range(1, max_jump + 1)
    }
    found = set(zip(num_s, num_t))
    assert found <= allowed
    lowest = {pair for pair in allowed if pair[0] == counts[0]}
    assert lowest <= found  # every jump occurs


def test_a_group_shares_its_ratio_and_nothing_else():
    mask_t, mask_s = (mask.reshape(-1, 4, LENGTH) for mask in drawn(4, 64))
    for mask in (mask_t, mask_s):
        counts = mask.sum(-1)
        assert (counts == counts[:, :1]).all() and len(set(counts[:, 0])) > 1
    partial = mask_s[mask_s[:, 0].sum(-1) < LENGTH]
    assert (partial[:, 0] != partial[:, 1]).any(-1).all()


def test_a_group_that_does_not_divide_the_batch_is_refused():
    with pytest.raises(ValueError, match="group of 3 does not divide the batch of 8"):
        diffusion.draw_nested_masks(jax.random.key(0), diffusion.MaskSchedule(group=3), 8, 16)


def test_rank_numbers_the_ascending_order_and_ties_go_by_index():
    scores = jnp.asarray([[2.0, -jnp.inf, 2.0, jnp.inf, 0.0]])
    np.testing.assert_array_equal(diffusion.rank(scores), [[2, 0, 3, 4, 1]])


# --- latents and loss -----------------------------------------------------------------------------


def test_latents_are_codebook_rows_where_known_and_expectations_where_masked():
    _, probs, token_ids, mask = case()
    codebook = random(7, 5, seed=9)
    latents, known = np.asarray(diffusion.mix_latents(probs, token_ids, mask, codebook)), ~np.asarray(mask)
    np.testing.assert_array_equal(latents[known], codebook[token_ids[known]])
    expected = np.asarray(probs, np.float64) @ np.asarray(codebook, np.float64)
    np.testing.assert_allclose(latents[~known], expected[~known], atol=1e-6)
    other_ids = jnp.where(mask, 0, token_ids)
    np.testing.assert_array_equal(latents, diffusion.mix_latents(probs, other_ids, mask, codebook))


def test_corruption_shows_what_the_noisier_mask_tells_and_asks_for_what_the_cleaner_one_tells():
    _, _, token_ids, mask_t = case()
    mask_s = mask_t & (jnp.arange(9) % 2 == 0)[None]
    codebook = random(7, 5)
    teach = lambda mask, rng: jnp.broadcast_to(jax.nn.one_hot(mask.sum(-1) % 7, 7)[:, None], (4, 9, 7))
    latents, target = diffusion.corrupt(teach, token_ids, mask_t, mask_s, codebook, jax.random.key(0))
    np.testing.assert_array_equal(target, teach(mask_s, None))
    np.testing.assert_array_equal(latents, diffusion.mix_latents(teach(mask_t, None), token_ids, mask_s, codebook))
    assert not np.array_equal(teach(mask_s, None), teach(mask_t, None))


def test_without_the_papers_choices_codes_are_drawn_and_the_images_own_tokens_asked_for():
    _, _, token_ids, mask = case()
    codebook, probs = random(7, 5), jnp.tile(jnp.array([0.5, 0, 0, 0.5, 0, 0, 0.0]), (4, 9, 1))
    corrupt = functools.partial(diffusion.corrupt, lambda *_: probs, token_ids, mask, mask, codebook)
    latents, target = corrupt(jax.random.key(0), "drawn", "tokens")
    np.testing.assert_array_equal(target, jax.nn.one_hot(token_ids, 7))
    hidden, known = np.asarray(latents)[np.asarray(mask)], ~np.asarray(mask)
    np.testing.assert_array_equal(np.asarray(latents)[known], codebook[token_ids[known]])
    codes = {int(np.flatnonzero((np.asarray(codebook) == row).all(-1))[0]) for row in hidden}
    assert codes == {0, 3}
    assert not np.array_equal(latents, corrupt(jax.random.key(1), "drawn")[0])


def test_the_two_predictions_of_a_corruption_have_their_own_randomness():
    _, probs, token_ids, mask = case()
    seen = []
    teach = lambda mask, rng: (seen.append(jax.random.key_data(rng)), probs)[1]
    diffusion.corrupt(teach, token_ids, mask, mask, random(7, 5), jax.random.key(0))
    assert len(seen) == 2 and not np.array_equal(*seen)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_soft_cross_entropy_is_its_formula(label_smoothing):
    logits, _, _, mask = case(codes=10)
    _, target, _, _ = case(seed=1)  # 7 codes; 3 more classes are never a target
    full = np.zeros(logits.shape)
    full[..., :7] = target
    full = (1 - label_smoothing) * full + label_smoothing / 10
    log_probs = np.asarray(logits, np.float64) - np.log(np.exp(np.asarray(logits, np.float64)).sum(-1, keepdims=True))
    each = -(full * log_probs).sum(-1)
    expected = [each[row][np.asarray(mask)[row]].mean() for row in range(4)]
    found = diffusion.soft_cross_entropy(target, logits, mask, label_smoothing)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_known_positions_have_no_part_in_the_loss():
    logits, target, _, mask = case()
    gradient = jax.grad(lambda logits: diffusion.soft_cross_entropy(target, logits, mask, 0.1).sum())(logits + 1)
    assert (np.abs(gradient).max(-1) > 0).tolist() == mask.tolist()


def test_the_loss_is_least_at_the_target():
    logits, target, _, mask = case()
    at = lambda logits: float(diffusion.soft_cross_entropy(target, logits, mask, 0.0).mean())
    assert at(logits) < min(at(logits + 0.1 * random(*logits.shape, seed=seed)) for seed in range(1, 9))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_least_loss_is_that_of_logits_that_say_the_smoothed_target(label_smoothing):
    _, target, token_ids, mask = case()
    for target in (target, jax.nn.one_hot(token_ids, target.shape[-1])):
        least = diffusion.least_cross_entropy(target, mask, label_smoothing, 10)
        smoothed = (1 - label_smoothing) * np.pad(target, ((0, 0), (0, 0), (0, 3))) + label_smoothing / 10
        said = np.log(np.maximum(smoothed, 1e-30))
        reached = diffusion.soft_cross_entropy(target, said, mask, label_smoothing)
        np.testing.assert_allclose(least, reached, rtol=1e-6, atol=1e-6)


# --- sampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_masked", [0, 1, 3, 9])
def test_exactly_so_many_stay_masked(num_masked):
    logits, _, token_ids, mask = case()
    after = diffusion.least_confident(logits, token_ids, mask, random(4, 9), num_masked)
    assert (np.asarray(after).sum(-1) == num_masked).all()


def test_known_tokens_are_masked_again_only_when_there_are_too_few_others():
    logits, _, token_ids, mask = case()
    mask = np.asarray(mask)
    noise = 50 * random(4, 9)  # far beyond any log probability
    for num_masked in range(10):
        after = np.asarray(diffusion.least_confident(logits, token_ids, mask, noise, num_masked))
        np.testing.assert_array_equal((after & ~mask).sum(-1), np.maximum(num_masked - mask.sum(-1), 0))


def test_the_least_confident_stay_masked():
    logits, probs, token_ids, mask = case()
    noise = random(4, 9)
    after = np.asarray(diffusion.least_confident(logits, token_ids, mask, noise, 1))
    score = np.log(np.take_along_axis(np.asarray(probs), np.asarray(token_ids)[..., None], -1)[..., 0]) + noise
    np.testing.assert_array_equal(after.argmax(-1), np.where(mask, score, np.inf).argmin(-1))


def test_equal_confidences_still_leave_exactly_so_many():
    after = diffusion.least_confident(jnp.zeros((1, 6, 3)), jnp.zeros((1, 6), jnp.int32), jnp.ones((1, 6), bool), 0.0, 4)
    np.testing.assert_array_equal(after, [[True] * 4 + [False] * 2])


def test_a_nucleus_of_everything_changes_nothing():
    logits = random(3, 4, 5)
    assert diffusion.keep_nucleus(logits, 1.0) is logits


@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.9])
def test_a_nucleus_is_the_fewest_most_probable_codes_that_reach_its_mass(top_p):
    logits = random(50, 12)
    probs, kept = np.asarray(jax.nn.softmax(logits)), np.isfinite(diffusion.keep_nucleus(logits, top_p))
    for row, keep in zip(probs, kept):
        assert keep[row.argmax()] and row[keep].min() >= row[~keep].max(initial=0)
        assert row[keep].sum() >= top_p and (keep.sum() == 1 or row[keep].sum() - row[keep].min() < top_p)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_so_many_most_probable_codes_are_kept_and_all_where_none_are_asked_for(top_k):
    logits = random(3, 4, 5)
    kept = np.isfinite(diffusion.keep_top(logits, top_k))
    np.testing.assert_array_equal(np.argsort(np.argsort(-logits, axis=-1), axis=-1) < top_k, kept)
    assert diffusion.keep_top(logits, 0) is diffusion.keep_top(logits, 5) is logits


def test_schedules_reveal_tokens_as_they_say():
    left = {name: np.array([100, *diffusion.sampling_num_masked(name, 10, 100)]) for name in diffusion.SCHEDULES}
    revealed = {name: -np.diff(counts) for name, counts in left.items()}
    assert (np.abs(revealed["linear"][:-1] - 10) <= 1).all()
    assert (np.diff(revealed["cosine"][:-1]) >= 0).all() and (np.diff(revealed["sqrt"]) <= 1).all()
    shares = left["constant"][1:6] / left["constant"][:5]
    np.testing.assert_allclose(shares, 100**-0.1, atol=0.02)
    assert all(diffusion.sampling_num_masked("constant", 8, length)[-1] == 1 for length in range(1, 300))


def test_the_start_masks_what_the_ratio_says_and_never_less_than_the_first_step():
    assert [diffusion.start_num_masked(256, ratio) for ratio in (1.0, 0.5, 0.25)] == [256, 128, 64]
    for length in (16, 64, 256):
        for ratio in np.linspace(0.05, 1.0, 20):
            start = diffusion.start_num_masked(length, float(ratio))
            after = diffusion.sampling_num_masked("linear", 64, length, float(ratio))
            assert length >= start >= after[0] and abs(start - length * ratio) <= 1


@pytest.mark.parametrize("schedule", diffusion.SCHEDULES)
@pytest.mark.parametrize("steps", [1, 7, 300])
def test_the_number_of_masked_tokens_never_rises_and_ends_at_one(schedule, steps):
    counts = diffusion.sampling_num_masked(schedule, steps, 64)
    assert len(counts) == steps and (np.diff(counts) <= 0).all() and counts[-1] == 1 and counts.max() <= 64


def test_temperature_falls_linearly_to_zero_or_stays():
    np.testing.assert_allclose(diffusion.annealing(6.0, 4, True), [4.5, 3.0, 1.5, 0.0])
    np.testing.assert_array_equal(diffusion.annealing(6.0, 4, False), np.full(4, 6.0, np.float32))


def test_a_random_mask_depends_on_its_own_key_only():
    keys = jax.random.split(jax.random.key(0), 5)
    masks = np.asarray(diffusion.draw_masks(keys, 16, 6))
    assert (masks.sum(-1) == 6).all() and len(np.unique(masks, axis=0)) == 5
    np.testing.assert_array_equal(masks[2:3], diffusion.draw_masks(keys[2:3], 16, 6))
