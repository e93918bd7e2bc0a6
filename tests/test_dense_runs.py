"""Detection and segmentation in real processes: killed and resumed bit for bit; two processes train and evaluate as one."""

import re
import sys

import jax
import numpy as np
import pytest
from flax import traverse_util
from test_processes import NOISE, Launch, records

from addp_jax.weights import checkpoint

pytestmark = pytest.mark.medium

STEPS = 6
FLAGS = (
    f"--config.steps={STEPS}", "--config.model.encoder_weights=", "--config.checkpoint.every=2", "--config.eval_batches=0",
    f"--config.eval_every={STEPS}", "--config.data.num_eval=5",
)  # fmt: skip
# A BatchNorm takes away what the bias before it adds: the bias' gradient is noise, and the running mean follows it.
DRIFTING = re.compile(r"neck/up(4_0|4_1|2)/bias|running_mean")
OWN_FLAGS = {"detection": ("--config.model.score_above=0.0",), "segmentation": ()}


def alone(workdir, config, flags):
    command = (sys.executable, "-m", "addp_jax.main", f"--config={config}", f"--workdir={workdir}", *flags)
    return Launch(*command, JAX_ENABLE_COMPILATION_CACHE="true")


@pytest.fixture(scope="module", params=OWN_FLAGS)
def folders(tmp_path_factory, request):
    """Of an undisturbed run, of one that was killed and went on, and of one of two processes."""
    root = tmp_path_factory.mktemp(request.param)
    run_of = f"configs/demo_{request.param}.py:tiny", FLAGS + OWN_FLAGS[request.param]
    found = {name: str(root / name) for name in ("whole", "killed", "two")}
    with alone(found["whole"], *run_of) as run:
        status, _, problems = run.end()
        assert status == 0, problems
    with alone(found["killed"], *run_of) as run:
        run.until(found["killed"], 3)
    with alone(found["killed"], *run_of) as run:
        assert run.end()[0] == 0
    with Launch("launch/local.sh", "2", run_of[0], found["two"], *run_of[1]) as both:
        status, _, problems = both.end()
        assert status == 0, problems
    return found


def parameters(folder):
    params, info = checkpoint.load_params(folder, ema=False)
    assert info["step"] == STEPS
    return traverse_util.flatten_dict(params, sep="/")


def test_a_killed_run_goes_on_bit_for_bit(folders):
    jax.tree.map(np.testing.assert_array_equal, parameters(folders["killed"]), parameters(folders["whole"]))


def test_two_processes_train_as_one(folders):
    found, expected = parameters(folders["two"]), parameters(folders["whole"])
    assert found.keys() == expected.keys()
    for name in found:
        if not DRIFTING.search(name):
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=NOISE, err_msg=name)
    for one, other in zip(records(folders["two"], "train/"), records(folders["whole"], "train/"), strict=True):
        np.testing.assert_allclose(one["train/loss"], other["train/loss"], rtol=NOISE)


def test_two_processes_evaluate_every_image_once(folders):
    (one,), (other,) = (records(folders[name], "eval/") for name in ("two", "whole"))
    assert one.keys() == other.keys() and one["eval/images"] == one["eval/of"] == 5
    for name in one:
        if name != "time":
            np.testing.assert_allclose(one[name], other[name], atol=1e-3, err_msg=name)
