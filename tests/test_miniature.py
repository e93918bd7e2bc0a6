"""launch/miniature.py: its jobs are runs that the configs allow, and what a stopped comparison keeps."""

import importlib.util
import json
import pathlib

import programs
import pytest

from addp_jax import modes

spec = importlib.util.spec_from_file_location("miniature", programs.ROOT / "launch" / "miniature.py")
miniature = importlib.util.module_from_spec(spec)
spec.loader.exec_module(miniature)

OUT = pathlib.Path("out")


@pytest.fixture(scope="module")
def planned():
    return list(miniature.jobs(OUT, list(miniature.ROWS), seeds=2))


def test_every_job_is_a_run_whose_inputs_are_made_before(planned):
    made = set()
    for job in planned:
        fields = {name.replace(".", "__"): value for name, value in job.fields.items()}
        own, _ = modes.split(programs.fields(job.config, "textured", **fields).to_dict())
        assert own.data.shapes == "textured"
        used = {str(value) for value in job.fields.values() if str(value).startswith("out/")} - {"out/features"}
        assert used <= made, job
        made.add(str(OUT / job.name))


def test_every_row_has_every_column_of_each_seed(planned):
    for row in miniature.ROWS:
        columns = [column for job in planned if job.row == row for column in job.figures]
        missing = {"scratch": {"frechet", "class_score", "rank"}, "mage": {"rank"}}.get(row, set())
        expected = set(miniature.COLUMNS) - missing
        assert sorted(columns) == sorted([*expected] * 2)


def run_of(monkeypatch, calls, fails=""):
    def run(job, out, flags):
        calls.append(job.name)
        if job.name == fails:
            raise SystemExit(1)
        return {column: 0.1 + 0.2 * (job.row == "addp") for column in job.figures}

    monkeypatch.setattr(miniature, "run", run)


def test_a_comparison_that_fails_goes_on_with_the_job_that_failed(monkeypatch, tmp_path, capsys):
    arguments, calls, again = ["--out", str(tmp_path), "--rows", "scratch,addp", "--seeds", "2"], [], []
    run_of(monkeypatch, calls, fails="probe_addp_0")
    with pytest.raises(SystemExit):
        miniature.main(arguments)
    assert calls[-1] == "probe_addp_0" and not (tmp_path / "table.md").exists()
    run_of(monkeypatch, again)
    miniature.main(arguments)
    assert again[0] == "probe_addp_0" and not set(again) & set(calls[:-1])
    assert "| addp | 0.30 ± 0.00 | 0.30 ± 0.00 | 30.00 ± 0.00 |" in capsys.readouterr().out
    assert json.loads((tmp_path / "table.json").read_text())["scratch"]["miou"] == [0.1, 0.1]
    assert (tmp_path / "table.png").stat().st_size > 1000


def test_only_the_columns_that_are_asked_for_are_measured(monkeypatch, tmp_path):
    calls = []
    run_of(monkeypatch, calls)
    arguments = ["--out", str(tmp_path), "--rows", "scratch,addp", "--seeds", "1", "--columns", "miou"]
    miniature.main(arguments)
    assert calls == ["judge", "tokenizer", "predictor", "addp_0", "segmentation_scratch_0", "segmentation_addp_0"]
    assert (tmp_path / "table.md").read_text().startswith("| encoder | effective rank | mIoU, % |\n")


@pytest.mark.parametrize(
    "wrong, told",
    [
        (["--rows", "adp"], "--rows: adp; use scratch, mage, addp"),
        (["--columns", "miou,ap"], "--columns: ap; use frechet, class_score, knn"),
        (["--steps=3"], "--steps=3: use --config.FIELD=VALUE"),
    ],
)
def test_a_wrong_argument_is_named(tmp_path, capsys, wrong, told):
    with pytest.raises(SystemExit):
        miniature.main(["--out", str(tmp_path), *wrong])
    assert told in capsys.readouterr().err
