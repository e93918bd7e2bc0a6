"""The search of a schedule: it improves what it is told to, goes on after a kill, and writes what the sampler takes."""

import dataclasses
import json

import jax
import numpy as np
import programs
import pytest

from addp_jax import errors, samplers
from addp_jax import program as programs_of_runs
from addp_jax.generation import generate, search
from addp_jax.training import evaluate

BEGIN = {"steps": 3, "schedule": [12, 5, 1], "temperature": [4.0, 2.0, 0.0], "token_temperature": [1.0] * 3, "guidance": [0.0] * 3}
GOAL = {"schedule": [9, 5, 1], "temperature": [4.0, 3.0, 0.0], "token_temperature": [1.4, 1.0, 0.8], "guidance": [0.0, 0.5, 1.0]}


def gap(values: dict) -> float:
    """A stand-in for the distance."""
    return sum(float(np.abs(np.subtract(values[name], GOAL[name])).sum()) for name in GOAL)


def test_the_best_is_never_worse_and_comes_near():
    asked = []
    found = list(search.improve(BEGIN, lambda values: asked.append(values) or gap(values), 6, 16))
    gaps = [gap(values) for values in found]
    assert found[0] == BEGIN and gaps == sorted(gaps, reverse=True) and gaps[-1] < 0.2 * gaps[0]
    assert len(asked) <= 1 + 2 * 6 * 10
    for values in asked:  # each is one that the sampler takes
        samplers.Config(**{name: tuple(row) if isinstance(row, list) else row for name, row in values.items()})


def test_a_move_stays_within_its_neighbours_and_above_0():
    assert search.changed(BEGIN, "schedule", 0, 1.0, 16)["schedule"] == [16, 5, 1]
    assert search.changed(BEGIN, "schedule", 1, -1.0, 16)["schedule"] == [12, 1, 1]
    assert search.changed(BEGIN, "schedule", 1, 0.001, 16)["schedule"] == [12, 6, 1]
    assert search.changed(BEGIN, "guidance", 1, -0.5, 16) == BEGIN


@pytest.fixture(scope="module")
def program(trained, mesh):
    fields = {"model__tokenizer_weights": str(trained / "tokenizer"), "evaluate__features": str(trained / "addp")}
    config = programs.config("demo_addp", **fields, model__sampler__steps=4)
    return programs_of_runs.create(config, mesh)


@pytest.mark.medium
def test_killed_and_resumed_a_search_is_the_undisturbed_one(program, trained, tmp_path, monkeypatch, capsys):
    measured, last = [], [np.inf]

    def measuring(program, networks):
        def distance(values, seed):
            if len(measured) == last[0]:
                raise KeyboardInterrupt
            measured.append(seed)
            return 1 + sum(values["guidance"]) * (0.5 - seed) + sum(values["schedule"]) / 100

        return distance

    monkeypatch.setattr(search, "measuring", measuring)
    run = lambda folder: search.search(program, search.Config(rounds=1, output=str(tmp_path / folder)), str(trained / "addp"))
    run("whole")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    count = len(measured)
    assert result["schedules"] == count - 2 and result["distance"] < result["at_the_start"] and sum(measured) == 2
    measured.clear()
    last[0] = 5
    with pytest.raises(KeyboardInterrupt):
        run("parts")
    last[0] = np.inf
    run("parts")
    assert len(measured) == count  # none was measured twice
    names = ("search.jsonl", "schedule.json", "search.png")
    assert all((tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes() for name in names)
    with pytest.raises(errors.UserError, match=r"search.jsonl is of a search with other settings \(rounds\)"):
        search.search(program, search.Config(rounds=2, output=str(tmp_path / "parts")), str(trained / "addp"))
    changes = {"schedule_file": str(tmp_path / "whole" / "schedule.json")}
    fitted = samplers.with_sampler(program.task, changes)
    assert list(fitted.sampler_config.guidance) == json.loads((tmp_path / "whole" / "schedule.json").read_text())["guidance"]
    assert generate.at_each_step(fitted)["num_masked"][-1] == 1


@pytest.mark.medium
def test_the_distance_is_the_evaluations(program, trained):
    with jax.set_mesh(program.mesh):
        networks = [program.place(part) for part in program.load_for_sampling(str(trained / "addp"))]
        begin = search.initial(program.task, 16)
        listed = samplers.with_sampler(program.task, begin)
        measure = search.measuring(program, networks)
        expected, _ = evaluate.distances(dataclasses.replace(program, task=listed), *networks)
        assert measure(begin, 0) == pytest.approx(expected["frechet_16"], rel=1e-4)
        assert measure(begin, 1) != measure(begin, 0) == measure(begin, 0)


def test_a_search_begins_with_the_values_of_the_config(program):
    begin = search.initial(program.task, 16)
    assert begin == {
        "steps": 4, "schedule": [15, 12, 7, 1], "temperature": [1.5, 1.0, 0.5, 0.0],
        "token_temperature": [1.0] * 4, "guidance": [0.8] * 4,
    }  # fmt: skip
    halton = samplers.with_sampler(program.task, {"order": "halton"})
    assert search.initial(halton, 16).keys() == begin.keys() - {"temperature"}
    many = samplers.with_sampler(program.task, {"steps": 24})  # of which the first reveal nothing
    assert search.initial(many, 16)["schedule"][:2] == [16, 16]


def test_a_search_needs_a_network_that_compares(program, tmp_path):
    config = dataclasses.replace(program.config, evaluate=dataclasses.replace(program.config.evaluate, features=""))
    with pytest.raises(errors.UserError, match="config.evaluate.features: is empty"):
        search.search(dataclasses.replace(program, config=config), search.Config(output=str(tmp_path)), "")


@pytest.mark.parametrize("text", ['[]\n{"distance": 1}\n', '{}\n{"other": 1}\n', '{}\n{"distance": "far"}\n', '{}\n[1]\n', "{\n{}\n"])
def test_a_damaged_log_is_named(tmp_path, text):
    (tmp_path / "search.jsonl").write_text(text)
    with pytest.raises(errors.UserError, match="search.jsonl cannot be read.*config.search.output"):
        search.Log(tmp_path / "search.jsonl", {}, 10, True)
