"""Random streams of one purpose never meet those of another."""

import jax
import numpy as np

from addp_jax.ops import keys


def test_no_two_purposes_share_a_key():
    steps = [jax.random.fold_in(keys.of(0, "training"), step) for step in range(50)]
    splits = [key for purpose in keys.PURPOSES for key in jax.random.split(keys.of(0, purpose), 50)]
    folded = [jax.random.fold_in(jax.random.key(0), step) for step in range(50)]
    data = np.array([jax.random.key_data(key) for key in [*splits, *steps, *folded, *map(lambda p: keys.of(0, p), keys.PURPOSES)]])
    # `split(key)[i]` is `fold_in(key, i)`: the steps are the training stream's own splits, and nobody else's.
    assert len(np.unique(data, axis=0)) == len(splits) + len(folded) + len(keys.PURPOSES)


def test_seeds_give_different_streams():
    assert not np.array_equal(*(jax.random.key_data(keys.of(seed, "training")) for seed in (0, 1)))
