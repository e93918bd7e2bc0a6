"""Comparing and hashing trees of parameters."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from addp_jax import errors, parameters


def test_match_names_everything_that_does_not_fit():
    loaded = {"encoder": {"kernel": np.zeros((2, 3)), "scale": np.zeros(3)}, "head": {"bias": np.zeros(5)}}
    expected = {"encoder": {"kernel": np.zeros((3, 2))}, "decoder": {"bias": np.zeros(4)}}
    with pytest.raises(errors.UserError) as caught:
        parameters.match(loaded, expected, where="config.init")
    assert str(caught.value).startswith("config.init: ")
    for words in ("encoder/kernel is [2, 3], expected [3, 2]", "encoder/scale [3] is not expected",
                  "head/bias [5] is not expected", "decoder/bias [4] is missing"):
        assert words in str(caught.value)


def test_match_keeps_only_what_is_expected():
    loaded = {"encoder": {"kernel": np.ones((2, 3))}, "head": {"bias": np.zeros(5)}}
    expected = {"encoder": {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32)}, "decoder": {"bias": np.zeros(4)}}
    kept = parameters.match(loaded, expected, where="", allow_missing=["decoder/"], allow_unexpected=["head"])
    jax.tree.map(np.testing.assert_array_equal, kept, {"encoder": {"kernel": np.ones((2, 3))}})
    with pytest.raises(errors.UserError, match="head/bias"):  # a prefix, not a substring
        parameters.match(loaded, expected, where="", allow_missing=["decoder/"], allow_unexpected=["bias"])


def test_match_lists_at_most_eight():
    many = {f"layer{i}": np.zeros(1) for i in range(11)}
    with pytest.raises(errors.UserError, match="and 3 more"):
        parameters.match(many, {}, where="x")


def test_content_hash_sees_names_dtypes_shapes_and_bytes_but_not_key_order():
    base = {"a": np.arange(6, dtype=np.float32), "b": np.float32(0)}
    same = collections.OrderedDict(b=jnp.float32(0), a=jnp.arange(6, dtype=jnp.float32))
    stable = "5b79e8f6c6cd8a24"  # a resume compares it with one computed by an earlier run
    assert parameters.content_hash(base) == parameters.content_hash(same) == stable
    others = [
        {"c": base["a"], "b": base["b"]}, {**base, "a": base["a"].view(np.int32)},
        {**base, "a": base["a"].reshape(2, 3)}, {**base, "b": np.float32(1)}, {**base, "d": np.zeros(0)},
    ]
    assert len({parameters.content_hash(tree) for tree in [base, *others]}) == 1 + len(others)
