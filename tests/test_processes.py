"""Two real processes on this machine: one of them is killed, then both are asked to stop, then one process goes on alone.

What they log, and what they end with, is what a single undisturbed process does.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import launching
import numpy as np
import programs
import pytest
from jax.experimental import multihost_utils

from addp_jax import errors, partition, processes
from addp_jax.weights import checkpoint

pytestmark = pytest.mark.medium

STEPS = 40
FLAGS = (
    f"--config.steps={STEPS}", "--config.model.encoder_weights=", "--config.checkpoint.every=5", "--config.eval_every=20",
    "--config.eval_batches=0", "--config.data.num_eval=13", "--config.optim.ema_decay=0.9", "--config.optim.base_lr=0.01",
)  # fmt: skip
CONFIG = "configs/demo_classification.py:tiny"
NOISE = 1e-5  # of the losses, relative
MINUTE, PATIENCE = 60.0, 600.0  # seconds


class Launch:
    """A started command, with everything that it starts in turn."""

    def __init__(self, *command, **environment):
        # No cache: only process 0 would find its programs there, and must not wait long for the other's compiler.
        settings = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_ENABLE_COMPILATION_CACHE": "false", "PYTHON": sys.executable}
        self.process = subprocess.Popen(
            command, cwd=programs.ROOT, env=os.environ | settings | environment, start_new_session=True,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.communicate()

    def member(self, number: int) -> int:
        """Process id of one of the processes that local.sh has started."""
        children = pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        commands = {child: pathlib.Path(f"/proc/{child}/cmdline").read_text() for child in children}
        return next(int(child) for child, command in commands.items() if f"--process_id={number}\0" in command + "\0")

    def until(self, workdir, step: int):
        """Waits for that step in the log."""
        deadline = time.time() + PATIENCE
        while steps(workdir)[-1:] < [step]:
            if self.process.poll() is not None or time.time() > deadline:
                pytest.fail(f"ended or stuck: {self.end()}")
            time.sleep(0.05)

    def end(self):
        output, problems = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, output, problems


def two(workdir, *flags):
    return Launch("launch/local.sh", "2", CONFIG, workdir, *FLAGS, *flags)


def alone(workdir, *flags):
    return Launch(sys.executable, "-m", "addp_jax.main", f"--config={CONFIG}", f"--workdir={workdir}", *FLAGS, *flags)


def records(workdir, word: str) -> list[dict]:
    path = pathlib.Path(workdir) / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in found if any(name.startswith(word) for name in record)]


def steps(workdir) -> list[int]:
    return [record["step"] for record in records(workdir, "train/")]


def saved(workdir) -> int:
    return checkpoint.load_params(workdir, ema=False)[1]["step"]


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """What happened: {name: (exit status, stdout, stderr)}, the folders, and figures by name."""
    root = tmp_path_factory.mktemp("processes")
    whole, run = str(root / "whole"), str(root / "run")
    told = {"whole": whole, "run": run}
    with alone(whole) as reference:
        with two(run) as both:
            both.process.stdout.readline()  # "2 processes, ..."
            os.kill(both.member(1), signal.SIGTERM)
            told["early"] = both.end()
        with two(run, "--config.mesh.data=1", "--config.mesh.fsdp=2") as both:
            both.until(run, 12)
            os.kill(both.member(1), signal.SIGKILL)
            killed = time.time()
            told["killed"] = both.end()
            told["seconds"] = time.time() - killed
            told["first"] = steps(run)
        with two(run, "--config.mesh.data=1", "--config.mesh.tensor=2") as both:
            both.until(run, 22)
            os.kill(both.member(1), signal.SIGTERM)
            told["stopped"] = both.end()
            told["step"] = saved(run)
        with alone(run) as last:
            told["resumed"] = last.end()
        told["reference"] = reference.end()
    return told


def test_sigterm_to_one_stops_all_also_at_the_start(story):
    status, output, problems = story["early"]
    assert status == 143 and "Traceback" not in problems, problems
    assert "stopped by a signal" in output


def test_when_one_is_killed_the_others_end_within_a_minute_and_say_so(story):
    status, _, problems = story["killed"]
    assert status == 137 and story["seconds"] < MINUTE
    assert "error: process 1 of 2 ended with status 137" in problems
    assert "another process is gone" in problems or "another task died" in problems  # ours, or jax's on its way down
    assert "Traceback" not in problems


def test_sigterm_to_one_saves_and_stops_all_at_one_step(story):
    status, output, problems = story["stopped"]
    assert status == 143, problems
    assert f"stopped by a signal at step {story['step']}; the same command goes on from there" in output
    assert 22 <= story["step"] < STEPS


def test_the_first_alone_speaks(story):
    output, problems = story["stopped"][1:]
    assert output.count("2 processes, 2 devices") == output.count("stopped by a signal") == output.count("task: classification") == 1
    assert len({line.split()[1] for line in problems.splitlines() if line.startswith("step ")}) == problems.count("\nstep ") + problems.startswith("step ")


def test_losses_and_evaluations_are_those_of_one_process(story):
    assert story["resumed"][0] == story["reference"][0] == 0, story["resumed"]
    assert steps(story["run"]) == list(range(1, STEPS + 1))  # each step once, whoever made it
    for word in ("train/", "eval/"):
        found, expected = records(story["run"], word), records(story["whole"], word)
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            assert one.keys() == other.keys()
            np.testing.assert_allclose([one[n] for n in one if n != "time"], [other[n] for n in one if n != "time"], rtol=NOISE, atol=NOISE)


def test_the_parameters_are_those_of_one_process(story):
    found, expected = (checkpoint.load_params(story[name], ema=True)[0] for name in ("run", "whole"))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=NOISE)


@pytest.mark.parametrize("mistaken", [0, 1])
def test_a_mistake_that_one_process_sees_ends_all_at_once(tmp_path, mistaken):
    """One of them lacks the folder of the images."""
    flags = (f"--coordinator=localhost:{launching.free_port()}", "--num_processes=2", "--config.data.source=image_folder", "--config.data.num_train=0")
    folder = tmp_path / "train"
    folder.mkdir()
    programs.photos(folder, {f"{kind}/{number}.png": (48, 48) for kind in range(8) for number in range(2)})
    sound = f"--config.data.path={tmp_path}", "--config.data.eval_split=train"
    with alone(tmp_path / "run", *flags, *sound, f"--process_id={1 - mistaken}") as first:
        with alone(tmp_path / "run", *flags, "--config.data.path=nowhere", f"--process_id={mistaken}") as second:
            for process in first, second:
                status, _, problems = process.end()
                assert status == 2 and "Traceback" not in problems, problems
                assert f"error: process {mistaken} of 2: config.data.path: " in problems and "nowhere" in problems


@pytest.mark.slow
def test_a_process_that_is_paused_comes_back(tmp_path):
    with two(tmp_path, "--config.mesh.data=1", "--config.mesh.fsdp=2") as both:
        both.until(tmp_path, 6)
        os.kill(both.member(1), signal.SIGSTOP)
        time.sleep(40)
        os.kill(both.member(1), signal.SIGCONT)
        status, _, problems = both.end()
    assert status == 0, problems
    assert steps(tmp_path) == list(range(1, STEPS + 1))


# --- without other processes ----------------------------------------------------------------------


@pytest.mark.parametrize("given", [("localhost:1", None, None), (None, 2, None), ("localhost:1", 2, None)])
def test_half_of_an_address_is_refused(given):
    with pytest.raises(errors.UserError, match="belong together"):
        processes.start(*given, interruptible=False)


def test_several_processes_leave_before_the_first_step(monkeypatch):
    """The question at which they stop is counted by themselves: training may begin at any step."""
    asked = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda number: asked.append(number) or number == 3)
    interrupt = processes.Interrupt()
    interrupt.leave()
    assert not interrupt.after()
    with pytest.raises(SystemExit) as left:
        interrupt.leave()
    assert left.value.code == 143 and asked == [1, 2, 3]


def test_a_signal_cuts_long_work_short_and_is_kept_otherwise():
    done = []
    with processes.Interrupt() as interrupt:
        with interrupt.at_once():
            done.append("begun")
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        assert interrupt.cut_short and interrupt.after() and interrupt.requested == signal.SIGTERM
    with processes.Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("went on")
        assert interrupt.after() and not interrupt.cut_short
    assert done == ["begun", "went on"]


def test_rows_of_a_host_whose_devices_are_not_neighbours(monkeypatch):
    """As on a TPU slice, where a host's four chips are a square of the mesh."""
    mesh = partition.make_mesh(partition.Config(2, 4, 1))
    everything = partition.batch_sharding(mesh)
    assert partition.rows(mesh, 16).tolist() == list(range(16))
    host = set(mesh.devices[:, :2].flat)

    class OfHost:
        def addressable_devices_indices_map(self, shape):
            return {device: index for device, index in everything.devices_indices_map(shape).items() if device in host}

    monkeypatch.setattr(partition, "batch_sharding", lambda mesh: OfHost())
    assert partition.rows(mesh, 16).tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
