"""Names of accelerators."""

import pytest

from addp_jax import errors
from addp_jax.planning import topologies


@pytest.mark.parametrize("text, kind, shape", [
    ("v5e:16x16", "v5e", (16, 16)), ("v5e-256", "v5e", (16, 16)), ("V5litepod-8", "v5e", (2, 4)), ("v5e-1", "v5e", (1, 1)),
    ("v4:4x4x8", "v4", (4, 4, 8)), ("v4-256", "v4", (4, 4, 8)), ("v4-128", "v4", (4, 4, 4)), ("v5p-8", "v5p", (2, 2, 1)),
    ("v5p-16", "v5p", (2, 2, 2)), ("v5:2x2x2", "v5p", (2, 2, 2)), ("v6e-32", "v6e", (4, 8)), ("ironwood-64", "tpu7x", (2, 4, 4)),
    ("tpu7x:4x4x4", "tpu7x", (4, 4, 4)), ("h100x8", "h100", (1, 8)), ("h200x1", "h200", (1, 1)), ("h100x64", "h100", (8, 8)),
])  # fmt: skip
def test_names(text, kind, shape):
    found = topologies.parse(text)
    assert (found.kind, found.shape, found.slices) == (kind, shape, 1)
    assert topologies.parse(str(found)) == found


def test_slices_multiply_the_chips():
    found = topologies.parse("v5e-256", 2)
    assert found.chips == 512 and str(found) == "v5e:16x16 x 2 slices"


@pytest.mark.parametrize("text", ["", "v9:2x2", "v5e", "v5e:3", "v5e-12", "v4-7", "v5e:0x4", "v4:4x4", "h100x12", "h100:8x8", "v5e:2x2x2"])
def test_a_name_that_is_none_says_what_would_be(text):
    with pytest.raises(errors.UserError, match=f"topology={text}: "):
        topologies.parse(text)
    with pytest.raises(errors.UserError):
        topologies.parse("v5e:2x2", 0)
