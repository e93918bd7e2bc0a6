"""Detection in real processes: killed and resumed bit for bit; two processes train and evaluate as one."""

import sys

import jax
import numpy as np
import pytest
from test_processes import NOISE, Launch, records

from addp_jax.weights import checkpoint

pytestmark = pytest.mark.medium

CONFIG = "configs/demo_detection.py:tiny"
STEPS = 6
FLAGS = (
    f"--config.steps={STEPS}", "--config.model.encoder_weights=", "--config.checkpoint.every=2", "--config.eval_batches=0",
    f"--config.eval_every={STEPS}", "--config.data.num_eval=5", "--config.model.score_above=0.0",
)  # fmt: skip


def alone(workdir):
    command = (sys.executable, "-m", "addp_jax.main", f"--config={CONFIG}", f"--workdir={workdir}", *FLAGS)
    return Launch(*command, JAX_ENABLE_COMPILATION_CACHE="true")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of an undisturbed run, of one that was killed and went on, and of one of two processes."""
    root = tmp_path_factory.mktemp("detection")
    found = {name: str(root / name) for name in ("whole", "killed", "two")}
    with alone(found["whole"]) as run:
        assert run.end()[0] == 0
    with alone(found["killed"]) as run:
        run.until(found["killed"], 3)
    with alone(found["killed"]) as run:
        assert run.end()[0] == 0
    with Launch("launch/local.sh", "2", CONFIG, found["two"], *FLAGS) as both:
        status, _, problems = both.end()
        assert status == 0, problems
    return found


def parameters(folder):
    params, info = checkpoint.load_params(folder, ema=False)
    assert info["step"] == STEPS
    return jax.tree.leaves(params)


def test_a_killed_run_goes_on_bit_for_bit(folders):
    for one, other in zip(parameters(folders["killed"]), parameters(folders["whole"]), strict=True):
        np.testing.assert_array_equal(one, other)


def test_two_processes_train_as_one(folders):
    for one, other in zip(parameters(folders["two"]), parameters(folders["whole"]), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=10 * NOISE)
    for one, other in zip(records(folders["two"], "train/"), records(folders["whole"], "train/"), strict=True):
        np.testing.assert_allclose(one["train/loss"], other["train/loss"], rtol=10 * NOISE)


def test_two_processes_evaluate_every_image_once(folders):
    (one,), (other,) = (records(folders[name], "eval/") for name in ("two", "whole"))
    assert one.keys() == other.keys() and one["eval/images"] == one["eval/of"] == 5
    for name in one:
        if name != "time":
            np.testing.assert_allclose(one[name], other[name], atol=1e-3, err_msg=name)
