"""A run killed at random moments, also while it writes a checkpoint, ends as an undisturbed one, bit for bit."""

import random
import time

import jax
import numpy as np
import pytest
import test_main

from addp_jax.weights import checkpoint

pytestmark = pytest.mark.medium

STEPS = 150
KILLS = 10


def arguments(workdir):
    return (
        test_main.TINY, f"--workdir={workdir}", f"--config.steps={STEPS}", "--config.checkpoint.every=3",
        "--config.eval_every=1000", "--config.optim.ema_decay=0.9", "--config.data.threads=2",
    )  # fmt: skip


def parameters(workdir):
    trees = [checkpoint.load_params(workdir, ema=ema) for ema in (False, True)]
    assert all(info["step"] == STEPS for _, info in trees)
    return jax.tree.leaves([tree for tree, _ in trees])


def test_ten_sigkills_change_nothing(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    status, _, problems = test_main.call(*arguments(whole))
    assert status == 0, problems

    moments = random.Random(0)
    resumed_from = set()
    for _ in range(KILLS):
        process = test_main.start(*arguments(killed))
        log = killed / "log.jsonl"
        before = log.stat().st_size if log.exists() else 0
        deadline = time.time() + 120
        # Until it has logged a step of its own, then a moment more: training, saving or hashing.
        while process.poll() is None and time.time() < deadline and not (log.exists() and log.stat().st_size > before):
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 0.4))
        process.kill()
        process.communicate()
        found = [int(folder.name) for folder in (killed / "checkpoints").iterdir() if folder.name.isdecimal()]
        resumed_from.add(max(found, default=0))
    assert len(resumed_from) > 2  # the kills came at different places

    process = test_main.start(*arguments(killed))
    process.stdout.close()  # nobody listens to the last one
    process.stderr.close()
    assert process.wait(timeout=300) == 0 and not list(killed.glob("checkpoints/*.damaged*"))
    for one, other in zip(parameters(whole), parameters(killed), strict=True):
        np.testing.assert_array_equal(one, other)
