"""--mode=benchmark, at tiny size."""

import json

import jax
import pytest

import programs
from addp_jax import benchmark, partition

PARTS = {
    "training step": {
        "training step", "Tokenizer.encode", "TokenPredictor.encode", "TokenPredictor.decode", "Tokenizer.decode",
        "PixelToToken.encode", "PixelToToken.decode", "forward", "backward", "optimizer",
    },
    "sampling": {"sampling", "Tokenizer.decode", "PixelToToken.encode", "PixelToToken.decode"},
}  # fmt: skip


@pytest.fixture(scope="module")
def result():
    weights = dict(model__tokenizer_weights="random", model__predictor_weights="random")
    config = programs.config("vitb", **weights, model__sampler__steps=4, mesh__data=1, mesh__fsdp=8)
    with jax.set_mesh(partition.make_mesh(config.mesh)):
        return benchmark.benchmark(config)


def rows(result, table):
    return {row["part"]: row for row in result[table]}


@pytest.mark.parametrize("table", PARTS)
def test_every_part_has_its_row(result, table):
    assert set(rows(result, table)) == PARTS[table] and json.dumps(result)


def test_parts_run_as_often_as_in_the_whole(result):
    assert rows(result, "training step")["TokenPredictor.encode"]["calls"] == 2
    sampling = rows(result, "sampling")
    # Steps 2 to 4 of 4 are run; the image is read in all but the first, which knows nothing.
    assert sampling["Tokenizer.decode"]["calls"] == sampling["PixelToToken.decode"]["calls"] == sampling["PixelToToken.encode"]["calls"] + 1


def test_the_parts_flops_are_the_wholes(result):
    step = rows(result, "training step")
    networks = sum(row["flops"] for name, row in step.items() if "." in name)
    assert networks == pytest.approx(step["forward"]["flops"], rel=0.01)
    assert step["backward"]["flops"] > step["PixelToToken.encode"]["flops"] + step["PixelToToken.decode"]["flops"]
