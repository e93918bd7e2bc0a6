"""Mixup and CutMix on the device; agreement with timm is in test_released_finetune.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from addp_jax.ops import mixup

IMAGE = jnp.broadcast_to(jnp.arange(4.0)[:, None, None, None], (4, 16, 16, 3))  # every image its own grey
LABEL = jnp.arange(4)


@functools.partial(jax.jit, static_argnames=("alpha", "cutmix", "smoothing"))
def mix(seed, alpha=0.8, cutmix=1.0, smoothing=0.0):
    return mixup.mix(jax.random.key(seed), IMAGE, LABEL, mixup=alpha, cutmix=cutmix, smoothing=smoothing, num_classes=5)


@pytest.mark.medium
@pytest.mark.parametrize("alpha, cutmix", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_the_target_is_the_share_of_pixels(alpha, cutmix):
    for seed in range(20):
        image, target = mix(seed, alpha, cutmix)
        share = np.asarray(target)[0, 0]
        mean = np.asarray(image).mean((1, 2, 3))
        np.testing.assert_allclose(mean, share * np.arange(4) + (1 - share) * np.arange(4)[::-1], atol=1e-4)
        np.testing.assert_allclose(np.asarray(target).sum(1), 1, rtol=1e-5)


def test_cutmix_pastes_and_mixup_blends():
    pasted = np.concatenate([np.unique(mix(seed, 0.0, 1.0)[0][0]) for seed in range(10)])
    assert set(pasted) == {0.0, 3.0}
    assert any(0 < value < 3 for seed in range(10) for value in np.unique(mix(seed, 0.8, 0.0)[0][0]))


def test_both_kinds_come_about_equally_often():
    blended = [len(np.unique(mix(seed)[0][0])) == 1 and 0 < float(mix(seed)[0][0, 0, 0, 0]) < 3 for seed in range(200)]
    assert 0.35 < np.mean(blended) < 0.65


def test_switched_off_nothing_is_mixed_but_labels_are_smoothed():
    image, target = mix(0, 0.0, 0.0, 0.1)
    np.testing.assert_array_equal(image, IMAGE)
    np.testing.assert_allclose(target, 0.9 * np.eye(5)[:4] + 0.02, atol=1e-6)


def test_a_box_has_the_area_that_is_not_kept_unless_it_is_cut_off():
    draw = jax.jit(lambda seed, share: mixup.box(jax.random.key(seed), share, 64, 48).mean())
    for share in (0.1, 0.5, 0.9):
        areas = np.array([draw(seed, share) for seed in range(60)])
        assert areas.max() <= 1 - share + 1e-6
        assert (areas > 0.8 * (1 - share)).any() and areas.min() < 0.7 * (1 - share)
