"""All comparisons of two sets at once, and the names that keep them apart."""

import numpy as np
import pytest

from addp_jax.metrics import feature_sets, generation

INCEPTION = {
    "fid", "sfid", "is", "is_std", "kid", "kid_std", "precision", "recall", "density", "coverage",
}  # fmt: skip


def features(count, seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(seed, 1, (count, width)).astype(np.float32) for name, width in (("pool", 6), ("logits", 4), ("spatial", 9))}


def gathered(rows, batch_size):
    made = feature_sets.FeatureSet()
    count = len(next(iter(rows.values())))
    for first in range(0, count, batch_size):
        made.add({name: values[first : first + batch_size] for name, values in rows.items()})
    return made


def test_batches_change_nothing():
    real, samples = features(50, 0), features(40, 1)
    one = feature_sets.compare(gathered(real, 50), gathered(samples, 40))
    other = feature_sets.compare(gathered(real, 7), gathered(samples, 9))
    assert set(feature_sets.named(one, "inception", 50_000)) == INCEPTION
    for name, value in one.items():
        np.testing.assert_allclose(other[name], value, rtol=1e-9, err_msg=name)


def test_each_measure_is_given_its_own_features_in_the_right_order():
    real, samples = features(50, 0), features(40, 1)
    found = feature_sets.named(feature_sets.compare(gathered(real, 50), gathered(samples, 40), seed=None), "inception", 50_000)
    assert (found["is"], found["is_std"]) == generation.inception_score(samples["logits"], seed=None)
    assert (found["kid"], found["kid_std"]) == generation.kernel_distance(real["pool"], samples["pool"])
    assert found | generation.neighbourhoods(real["pool"], samples["pool"]) == found
    for name, kind in (("fid", "pool"), ("sfid", "spatial")):
        both = [gathered({"pool": rows[kind]}, 40).gaussians["pool"] for rows in (real, samples)]
        np.testing.assert_allclose(found[name], generation.frechet_distance(*both), rtol=1e-9)


def test_a_network_without_labels_or_maps_has_no_such_measures():
    real, samples = ({"pool": features(30, seed)["pool"]} for seed in (0, 1))
    found = feature_sets.compare(gathered(real, 30), gathered(samples, 30))
    assert set(feature_sets.named(found, "convnet", 50_000)) == INCEPTION - {"fid", "sfid", "is", "is_std", "kid", "kid_std"} | {
        "frechet", "kernel", "kernel_std",
    }  # fmt: skip


@pytest.mark.parametrize("count, name", ((50_000, "fid"), (2000, "fid_2k"), (64, "fid_64"), (1500, "fid_1500"), (10_000, "fid_10k")))
def test_a_small_sample_shows_in_the_name(count, name):
    assert feature_sets.named({"frechet": 1.0}, "inception", count) == {name: 1.0}


def test_one_image_has_no_gaussian():
    with pytest.raises(ValueError, match="1 rows"):
        feature_sets.compare(gathered(features(1, 0), 1), gathered(features(9, 1), 9))


def test_only_figures_of_the_published_protocol_have_the_bare_name():
    assert feature_sets.named({"frechet": 1.0}, "inception", 50_000) == {"fid": 1.0}
    assert feature_sets.named({"frechet": 1.0}, "inception", 50_000, published=False) == {"fid_50k": 1.0}
