"""The judge of generated images."""

import functools
import json
import math

import numpy as np
import pytest
from PIL import Image

from addp_jax import errors, optim, partition, program
from addp_jax.data import pipeline
from addp_jax.data.sources import shapes
from addp_jax.measuring import judge
from addp_jax.training import loop
from addp_jax.weights import checkpoint

NET = dict(image_size=16, channels=8, multipliers=(1, 2), num_groups=4, num_classes=8)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of two steps: what a judge sees in images does not matter here."""
    path = str(tmp_path_factory.mktemp("judge"))
    loop.train(
        program.Config(
            task="convnet", model={"net": NET}, seed=0, batch_size=8, epochs=0.0, steps=2, dtype="float32",
            log_every=1, eval_every=2, eval_batches=1, data=pipeline.Config(num_train=64, num_eval=24, threads=0),
            optim=optim.Config(warmup_steps=1), mesh=partition.Config(), checkpoint=checkpoint.Config(every=2),
        ),
        path,
    )  # fmt: skip
    return path


@functools.cache
def pictures(count=5, size=16):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def save(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def test_summary_counts_what_is_above_the_threshold():
    probs = np.array([[0.9, 0.1], [0.7, 0.3], [0.05, 0.95], [0.81, 0.19]])
    found = judge.summary(probs, ("cat", "dog"))
    assert found["named"] == 0.75 and found["classes"] == {"cat": 3, "dog": 1}
    assert found["confidence"] == pytest.approx((0.9 + 0.7 + 0.95 + 0.81) / 4)
    assert found["entropy"] == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert judge.summary(probs[:2], ("cat", "dog"))["entropy"] == 0.0


def test_what_is_seen_in_an_image_does_not_depend_on_its_batch(workdir):
    jury = judge.Judge(workdir)
    many = np.concatenate([pictures(), pictures(judge.BATCH_SIZE)])
    probs = jury.probabilities(many)
    assert probs.shape == (5 + judge.BATCH_SIZE, 8)
    np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(jury.probabilities(pictures()), probs[:5], rtol=1e-4)


def test_larger_images_are_resized(workdir):
    large = pictures().repeat(2, axis=1).repeat(2, axis=2)
    small = np.stack([np.asarray(Image.fromarray(one).resize((16, 16), Image.Resampling.BICUBIC)) for one in large])
    jury = judge.Judge(workdir)
    np.testing.assert_array_equal(jury.probabilities(large), jury.probabilities(small))


def test_command_prints_one_json_line_and_draws_a_sheet(workdir, tmp_path, capsys):
    samples = save(tmp_path / "samples.npz", arr_0=pictures(size=32))
    judge.main([f"--judge={workdir}", f"--samples={samples}"])
    (line,) = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert result["samples"] == 5 == sum(result["classes"].values())
    assert set(result["classes"]) == set(shapes.CLASSES)
    assert result["real"]["images"] == 24 and f"{result['real']['accuracy']:.1%}" in result["protocol"]
    sheet = np.asarray(Image.open(tmp_path / "judged.png"))
    assert any((sheet[2:34, left : left + 32] == pictures(size=32)[0]).all() for left in range(4))


def error_line(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        judge.main(list(arguments))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("content", (None, b"", b"no zip", b"PK\x03\x04 torn"))
def test_a_file_that_is_no_npz_is_one_line(workdir, tmp_path, capsys, content):
    path = tmp_path / "samples.npz"
    if content is not None:
        path.write_bytes(content)
    assert "error: --samples=" in error_line(capsys, f"--judge={workdir}", f"--samples={path}")


@pytest.mark.parametrize(
    "arrays",
    (
        {"other": np.zeros((2, 16, 16, 3), np.uint8)},
        {"arr_0": np.zeros((2, 16, 16, 3), np.float32)},
        {"arr_0": np.zeros((16, 16, 3), np.uint8)},
        {"arr_0": np.zeros((0, 16, 16, 3), np.uint8)},
        {"arr_0": np.array([{}])},
    ),
)
def test_an_npz_without_images_is_refused(tmp_path, arrays):
    with pytest.raises(errors.UserError, match="--samples=.*samples.npz"):
        judge.read_samples(save(tmp_path / "samples.npz", **arrays))


def test_an_array_file_is_no_npz(tmp_path):
    np.save(tmp_path / "samples.npy", pictures())
    with pytest.raises(errors.UserError, match="--samples=.*samples.npy"):
        judge.read_samples(str(tmp_path / "samples.npy"))


def test_another_tasks_run_is_no_judge(tmp_path, capsys):
    samples = save(tmp_path / "samples.npz", arr_0=pictures())
    checkpoint.save_params(tmp_path / "run", {"tokenizer": {"codebook": np.zeros((2, 2), np.float32)}}, {})
    assert "no run of the task convnet" in error_line(capsys, f"--judge={tmp_path / 'run'}", f"--samples={samples}")
    assert "no checkpoint in" in error_line(capsys, f"--judge={tmp_path / 'none'}", f"--samples={samples}")


def test_a_sheet_that_cannot_be_written_is_one_line(workdir, tmp_path, capsys):
    samples = save(tmp_path / "samples.npz", arr_0=pictures())
    (tmp_path / "file").write_text("")
    given = f"--judge={workdir}", f"--samples={samples}"
    assert "--output=" in error_line(capsys, *given, f"--output={tmp_path / 'sheet.jpg'}")
    assert "--output: cannot write" in error_line(capsys, *given, f"--output={tmp_path / 'file' / 'sheet.png'}")
