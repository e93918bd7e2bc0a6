"""The features of the network in training, watched at every evaluation."""

import json

import jax
import numpy as np
import programs
import pytest

from addp_jax import errors, partition, program
from addp_jax.metrics import probes
from addp_jax.training import loop, watch

pytestmark = pytest.mark.medium

RANDOM = {"model__tokenizer_weights": "random", "model__predictor_weights": "random", "model__sampler__steps": 2}
NAMES = {"features_rank", "features_knn", "features_probe"}
SAME = 1e-4  # relative; float32 features of the same images in other batches


def build(devices=1, **changes):
    mesh = partition.make_mesh(partition.Config(), jax.devices()[:devices])
    run = program.create_training(programs.config("demo_addp", **RANDOM | changes), num_train=64, mesh=mesh)
    return run, jax.device_get(jax.jit(run.task.init)(jax.random.key(0)))


def test_nothing_is_watched_unless_asked_for():
    run, params = build()
    assert watch.measure(run, params, {}) == {}


def test_the_figures_are_those_of_the_tasks_features_on_any_number_of_devices():
    (run, params), (many, _) = (build(devices, evaluate__watch_features=13) for devices in (1, 8))
    found = watch.measure(run, params, {})
    images, labels = {}, {}
    for split, source in watch.prepare(run).items():
        examples = [run.task.transform("eval", run.config.data)(source[i], None) for i in range(13)]
        images[split], labels[split] = (np.stack([example[name] for example in examples]) for name in ("image", "label"))
    rows = {split: np.asarray(run.task.features(params, {}, images[split])) for split in images}
    arrays = rows["train"], labels["train"], rows["eval"], labels["eval"]
    assert found["features_rank"] == pytest.approx(probes.effective_rank(rows["eval"]), rel=SAME)
    assert found["features_knn"] == probes.knn_accuracy(*arrays)
    assert found["features_probe"] == probes.probe_accuracy(*arrays)
    with jax.set_mesh(many.mesh):
        on_eight = watch.measure(many, params, {})
    assert on_eight == pytest.approx(found, rel=SAME) and found.keys() == NAMES


def test_every_evaluation_logs_them_and_no_random_number_changes(tmp_path):
    lines = {}
    for count in (0, 16):
        config = programs.config("demo_addp", **RANDOM, evaluate__watch_features=count, eval_every=2)
        loop.train(config, str(tmp_path / str(count)))
        text = (tmp_path / str(count) / "log.jsonl").read_text()
        lines[count] = [line for line in map(json.loads, text.splitlines()) if any(name.startswith("eval/") for name in line)]
    names = {f"eval/{name}" for name in NAMES}
    assert [line["step"] for line in lines[16] if names <= line.keys()] == [2, 4]
    for off, on in zip(*lines.values(), strict=True):
        assert {**off, "time": 0} == {name: value for name, value in on.items() if name not in names} | {"time": 0}


def test_without_labels_there_is_the_rank_alone(tmp_path):
    (tmp_path / "photos").mkdir()
    programs.photos(tmp_path / "photos", {f"{i}.png": (16, 20 + i) for i in range(40)})
    data = dict(data__source="image_folder", data__path=str(tmp_path / "photos"), data__num_train=0, data__num_eval=0)
    run, params = build(evaluate__watch_features=2, **data)
    assert watch.measure(run, params, {}).keys() == {"features_rank"}


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("demo_addp", {"evaluate__watch_features": 17}, "watch_features: 17, but the eval split has 16 images; lower it"),
        ("demo_tokenizer", {"evaluate__watch_features": 8}, "watch_features: this task trains no features of images"),
    ],
)
def test_mistakes_are_told_before_the_first_step(tmp_path, name, changes, message):
    changes |= RANDOM if name == "demo_addp" else {}
    with pytest.raises(errors.UserError, match=f"config.evaluate.{message}"):
        loop.train(programs.config(name, **changes), str(tmp_path))
    assert not (tmp_path / "checkpoints").exists()
