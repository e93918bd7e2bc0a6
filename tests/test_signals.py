"""SIGTERM in each phase of a training run: it ends at once, with status 143, and the same command loses nothing.

Of several processes jax's service keeps the signal until all of them ask for it. A stand-in for it is asked here;
`test_processes` has the real one.
"""

import os
import signal

import jax
import numpy as np
import programs
import pytest
import test_logs
from jax.experimental import multihost_utils

from addp_jax.training import evaluate, log, loop
from addp_jax.weights import checkpoint

pytestmark = pytest.mark.medium

STEPS = 6
# One run is stopped in one phase after the other: what is called there, for the how manieth time, and the step that is
# saved then. Before the first step a signal ends a process that is alone as if there were no handler.
PHASES = [
    (loop, "preflight", 1, None), (loop, "require_room", 1, None), (checkpoint.Checkpointer, "restore_latest", 1, None),
    (log.Log, "add", 1, 1), (log.Log, "add", 2, 3), (evaluate, "task_results", 1, 4), (evaluate, "task_results", 1, 4),
    (checkpoint.Checkpointer, "save", 1, 6), (evaluate, "task_results", 1, 6),
]  # fmt: skip


class Service:
    """Stands for jax's: every process asks under rising numbers, and stops at the one after the highest that it has heard."""

    asked, agreed = 0, None

    def notice(self):
        self.agreed = self.asked + 1

    def reached(self, number):
        self.asked = number
        return number == self.agreed


@pytest.fixture(scope="module")
def config():
    return programs.config(
        "demo_classification", steps=STEPS, eval_every=4, checkpoint__every=2, log_every=1, model__encoder_weights="",
        data__num_eval=40,
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    loop.train(config, str(folder))
    return folder


def stopped(config, workdir, owner, name, count, several, monkeypatch):
    """Trains until `owner.name` is called for the `count`th time, when the signal comes."""
    original, calls, service = getattr(owner, name), [], Service()
    send = service.notice if several else lambda: os.kill(os.getpid(), signal.SIGTERM)

    def call(*args, **kwargs):
        calls.append(name)
        if len(calls) == count:
            send()
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(owner, name, call)
        patch.setattr(jax.distributed, "is_initialized", lambda: several)
        patch.setattr(multihost_utils, "reached_preemption_sync_point", service.reached)
        loop.train(config, str(workdir))
    assert ended.value.code == 128 + signal.SIGTERM and len(calls) == count


def values(workdir) -> list[dict]:
    """The log without its times."""
    return [line | {"time": 0} for line in test_logs.log(workdir) if not any(name.startswith("pace/") for name in line)]


def saved(workdir) -> int | None:
    return max((int(folder.name) for folder in workdir.glob("checkpoints/[0-9]*")), default=None)


def evaluated(workdir) -> set[int]:
    lines = values(workdir) if (workdir / "log.jsonl").exists() else []
    return {line["step"] for line in lines if any(name.startswith("eval/") for name in line)}


@pytest.mark.parametrize("several", [False, True])
def test_a_run_that_is_stopped_in_each_phase_ends_as_an_undisturbed_one(several, config, undisturbed, tmp_path, monkeypatch):
    for owner, name, count, step in PHASES if several else PHASES[3::2]:
        stopped(config, tmp_path, owner, name, count, several, monkeypatch)
        assert saved(tmp_path) == step
        assert not evaluated(tmp_path) & {step}
    loop.train(config, str(tmp_path))
    assert values(tmp_path) == values(undisturbed) and evaluated(tmp_path) == {4, STEPS}
    for one, other in zip(*(jax.tree.leaves(checkpoint.load_params(path, ema=False)[0]) for path in (tmp_path, undisturbed)), strict=True):
        np.testing.assert_array_equal(one, other)
