"""--mode=benchmark, at tiny size."""

import json

import jax
import programs
import pytest

from addp_jax import errors, partition, program
from addp_jax.planning import benchmark, flops

pytestmark = pytest.mark.medium

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
    config = programs.config("vitb", **weights, model__sampler__steps=2, model__net__encoder__remat="full", mesh__data=1, mesh__fsdp=8)
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
    # The image is read in all steps but the first, which knows nothing.
    assert sampling["Tokenizer.decode"]["calls"] == sampling["PixelToToken.decode"]["calls"] == sampling["PixelToToken.encode"]["calls"] + 1


def test_the_parts_flops_are_the_wholes(result):
    step = rows(result, "training step")
    networks = sum(row["flops"] for name, row in step.items() if "." in name)
    assert networks == pytest.approx(step["forward"]["flops"], rel=0.01)
    assert step["backward"]["flops"] > step["PixelToToken.encode"]["flops"] + step["PixelToToken.decode"]["flops"]


def test_what_is_computed_again_is_executed_and_not_useful(result):
    """The encoder's blocks are computed again for the backward pass."""
    step = rows(result, "training step")
    again = step["training step"]["flops"] - step["training step"]["useful_flops"]
    assert 0.3 * step["PixelToToken.encode"]["flops"] < again <= step["PixelToToken.encode"]["flops"]
    assert step["backward"]["flops"] - step["backward"]["useful_flops"] == pytest.approx(again)
    others = [row for table in PARTS for name, row in rows(result, table).items() if name not in ("training step", "backward")]
    assert all(row["useful_flops"] == row["flops"] for row in others)


def test_the_table_has_both_utilisations(capsys):
    benchmark.report("a step", [benchmark.Row("training step", 2.0, 8e9, 6e9)], 4, 10e9)
    heading, row = capsys.readouterr().out.strip().splitlines()[-2:]
    assert heading.split() == ["runs", "seconds", "GFLOP", "useful", "GFLOP/s", "images/s", "HFU", "MFU", "x", "floor", "MiB"]
    assert row.split()[2:] == ["1", "2.000", "8.0", "6.0", "4.0", "2.000", "40.0%", "30.0%", "3.33", "0"]


def kept(tmp_path, result):
    path = tmp_path / "earlier.json"
    path.write_text(json.dumps(result))
    return str(path)


def test_a_regression_is_named(result, tmp_path, capsys):
    earlier = benchmark.read(kept(tmp_path, result))
    benchmark.compare(result, earlier)
    assert capsys.readouterr().out.endswith("slower by more than 5%: nothing\n")
    earlier["sampling"]["Tokenizer.decode"] /= 1.06
    earlier["training step"]["optimizer"] /= 1.04
    benchmark.compare(result, earlier | {"dtype": "bfloat16"})
    printed = capsys.readouterr().out
    assert printed.endswith("slower by more than 5%: Tokenizer.decode\n")
    assert "warning: the baseline's dtype is bfloat16, of this run float32" in printed


@pytest.mark.parametrize("text", ["{", "[1]", "{}", '{"device": 1, "devices": 1, "dtype": 1, "batch_size": 1, "sampling": [{}]}'])
def test_a_baseline_that_is_none_is_named(tmp_path, text):
    (tmp_path / "earlier.json").write_text(text)
    with pytest.raises(errors.UserError, match=r"^baseline .*earlier.json: not a result of --mode=benchmark"):
        benchmark.read(str(tmp_path / "earlier.json"))


def test_keeping_everything_changes_nothing_but_what_is_computed_again():
    fields = {"net": {"encoder": {"remat": "dots", "depth": 2}, "decoder": {"remat": "full"}}, "remat": "full", "name": "remat"}
    kept = {"net": {"encoder": {"remat": "none", "depth": 2}, "decoder": {"remat": "none"}}, "remat": "none", "name": "remat"}
    assert flops.everything_kept(fields) == kept and fields["remat"] == "full"


def test_a_network_that_reads_one_image_as_well_as_the_batch_is_measured_on_the_batch():
    """With guidance, on one device: each step also asks the decoder about one hidden image, the first asks nothing else."""
    weights = dict(model__tokenizer_weights="random", model__predictor_weights="random")
    config = programs.config("demo_addp", **weights, model__sampler__steps=2, model__sampler__guidance=0.5, batch_size=2)
    run = program.create_training(config, 2, partition.make_mesh(config.mesh, jax.devices()[:1]))
    with jax.set_mesh(run.mesh):
        frozen = run.place(run.task.load_frozen())
        _, *parts = benchmark.sampling(run, frozen, config.batch_size)
    assert {row.part: row.calls for row in parts} == {"Tokenizer.decode": 2, "PixelToToken.encode": 1, "PixelToToken.decode": 3}
