"""Where the time of a run goes."""

import math

import pytest

from addp_jax import processes
from addp_jax.training import pace


class Time:
    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def time(monkeypatch):
    clock = Time()
    monkeypatch.setattr(pace, "time", clock)
    return clock


def ten_steps(clock, time, wait):
    for _ in range(10):
        clock.to("data")
        time.now += wait
        clock.to("train")
        time.now += 0.5 - wait
    clock.to("train")


def test_the_phases_add_up_and_the_rate_leaves_evaluations_out(time, tmp_path):
    clock = pace.Clock()
    time.now += 7
    clock.to("compile")
    time.now += 3
    own = pace.Pace(clock, str(tmp_path), 20)
    ten_steps(clock, time, wait=0.1)
    clock.to("evaluate")
    time.now += 5
    clock.to("data")
    figures = own.at(30)
    assert math.isclose(figures["steps_per_second"], 2) and math.isclose(figures["data_wait"], 0.1)
    named = {name.removeprefix("seconds/"): value for name, value in figures.items() if name.startswith("seconds/")}
    assert named == pytest.approx({"start": 7, "restore": 0, "compile": 3, "train": 4, "data": 1, "save": 0, "evaluate": 5})
    assert math.isclose(figures["goodput"], 4 / 20) and figures["free_gib"] > 0 and figures["peak_memory_gib"] > 0
    assert "worst_process" not in figures
    ten_steps(clock, time, wait=0.25)
    assert math.isclose(own.at(40)["data_wait"], 0.25)  # of these ten alone


@pytest.mark.parametrize("wait, named", [(0.3, True), (0.05, False)])
def test_the_process_that_waits_longest_is_named(time, tmp_path, monkeypatch, capsys, wait, named):
    other = {"data_wait": wait, "host": "host-7", "peak_memory_gib": 1e6, "free_gib": 0.5}
    monkeypatch.setattr(processes, "gathered", lambda own: own | {"7": other})
    clock = pace.Clock()
    own = pace.Pace(clock, str(tmp_path), 0)
    ten_steps(clock, time, wait=0.0)
    figures = own.at(10)
    assert (figures["worst_process"], figures["data_wait"]) == (7, wait)
    assert (figures["peak_memory_gib"], figures["free_gib"]) == (1e6, 0.5)
    assert ("process 7 (host-7) waits 0.30 of 0.50 s a step for data" in capsys.readouterr().out) == named
