"""RandAugment and random erasing."""

import pickle

import numpy as np
import pytest
import released
from PIL import Image

from addp_jax.data import augment, transforms

GOLDEN = np.load(released.FOLDER / "finetune.npz")  # aug_*: timm 0.9.2, its operations in its order


def noise(height=32, width=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("index", range(len(augment.OPERATIONS)))
def test_every_operation_equals_timms_to_the_last_bit(index):
    picture = Image.fromarray(GOLDEN["aug_image"])
    for magnitude, results in zip(GOLDEN["aug_magnitudes"], GOLDEN["aug_results"][index]):
        for sign, expected in zip((-1, 1), results):
            ours = augment.OPERATIONS[index](picture, magnitude / augment.MOST, sign)
            np.testing.assert_array_equal(np.asarray(ours), expected)


def test_all_operations_are_timms():
    assert len(augment.OPERATIONS) == len(GOLDEN["aug_results"]) == 15


def test_posterize_to_no_bits_leaves_nothing():
    assert not np.asarray(augment._posterize(Image.fromarray(noise()), 1.0, 1)).any()


def test_each_of_two_operations_is_made_half_of_the_time():
    rng, image = np.random.default_rng(0), noise()
    same = [np.array_equal(augment.rand_augment(image, 9.0, 0.5, rng), image) for _ in range(600)]
    assert 0.18 < np.mean(same) < 0.34  # neither in a quarter of them; some operations may change nothing


def test_an_erased_box_has_the_right_size_and_noise():
    rng, image = np.random.default_rng(0), np.zeros((64, 64, 3), np.uint8)
    areas, pixels = [], []
    for _ in range(200):
        changed = augment.erase(image, rng)
        rows, columns = np.nonzero(changed.any(2))
        box = changed[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        areas.append(box.shape[0] * box.shape[1] / 64**2)
        pixels.append(box.reshape(-1, 3))
        assert 0.2 < box.shape[0] / box.shape[1] < 5
    assert 0.015 < min(areas) and max(areas) < 0.35 and 0.12 < np.mean(areas) < 0.2
    pixels = np.concatenate(pixels) / 255
    np.testing.assert_allclose(pixels.mean(0), augment.MEAN, atol=0.01)
    np.testing.assert_allclose(pixels.std(0), augment.STD, atol=0.02)
    assert not image.any()  # the argument stays


def test_an_image_too_small_for_a_box_stays():
    image = noise(1, 1)
    np.testing.assert_array_equal(augment.erase(image, np.random.default_rng(0)), image)


def test_the_transform_is_a_function_of_its_generator_and_pickles():
    crop = transforms.train_image(24, (0.5, 1.0))
    whole = pickle.loads(pickle.dumps(augment.AugmentedImage(crop, augment.Config())))
    example = {"image": noise(40, 50), "label": 3}
    one, two, other = (whole(example, np.random.default_rng(seed))["image"] for seed in (1, 1, 2))
    assert one.shape == (24, 24, 3) and one.dtype == np.uint8
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)
    off = augment.AugmentedImage(crop, augment.Config(magnitude=0.0, erase=0.0))(example, np.random.default_rng(1))
    np.testing.assert_array_equal(off["image"], crop(example, np.random.default_rng(1))["image"])


@pytest.mark.parametrize("change", [dict(magnitude=11.0), dict(magnitude_std=-1.0), dict(erase=1.5)])
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        augment.Config(**change)
