"""Every shipped config, task and sampler keeps its contract; found by walking the folders."""

import dataclasses
import importlib
import signal

import jax
import numpy as np
import programs
import pytest
from PIL import Image

from addp_jax import optim, processes, program, tasks
from addp_jax.generation import generate
from addp_jax.training import evaluate, log, loop
from addp_jax.weights import checkpoint

DEMO = [name for name in programs.names() if name.startswith("demo")]
# The larger size's :tiny has the same networks.
REAL = [name for name in programs.names() if name not in DEMO and not name.startswith("own") and not name.endswith(":l")]


FILES = ["grid.png", "images", "samples.npz", "settings.json", "steps.gif", "strip.png"]


def leaves(path):
    return jax.tree.leaves(checkpoint.load_params(path, ema=False)[0])


@pytest.mark.parametrize("name", programs.names())
def test_config_states_what_it_trains(name):
    text = (programs.ROOT / "configs" / f"{name.partition(':')[0]}.py").read_text()
    assert text.startswith('"""') and ("python -m addp_jax.main" in text or "launch/demo.sh" in text)


@pytest.mark.medium
@pytest.mark.parametrize("name", REAL)
def test_tiny_run_trains_and_evaluates(name, trained, tmp_path):
    train_whole(programs.config(name, **programs.weights_for(name, trained)), tmp_path / "run")


def train_whole(config, workdir):
    loop.train(config, str(workdir))
    log = (workdir / "log.jsonl").read_text()
    assert '"train/loss"' in log and '"eval/' in log
    assert (workdir / "curves.png").exists() and list((workdir / "pictures").glob("*.png"))


@pytest.mark.medium
@pytest.mark.parametrize("name", DEMO)  # the others' :tiny are the same programs
def test_tiny_run_resumes_bit_exactly_and_evaluates(name, trained, tmp_path):
    config = programs.config(name, **programs.weights_for(name, trained))
    train_whole(config, tmp_path / "whole")
    interrupted = str(tmp_path / "parts")
    stop_after(config, interrupted, 2)
    assert checkpoint.load_params(interrupted, ema=False)[1]["step"] == 2
    loop.train(config, interrupted)
    for one, other in zip(leaves(tmp_path / "whole"), leaves(interrupted), strict=True):
        np.testing.assert_array_equal(one, other)
    evaluate.evaluate(program.create_training(config, num_train=config.batch_size), interrupted)


def test_a_checkpoint_is_due_by_the_clock_where_the_log_is(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    config = programs.config("demo_classification", log_every=5, checkpoint__every_minutes=0.5)
    due = lambda step: loop.overdue(config, step, saved=1000.0)
    assert not due(5)
    now[0] += 31
    assert due(5) and due(10) and not due(7)
    monkeypatch.setattr(processes, "largest", lambda value: max(value, 0))
    assert not loop.overdue(programs.config("demo_classification", log_every=5), 5, 0.0)  # 0 = never
    now[0] = 1000.0
    monkeypatch.setattr(processes, "largest", lambda value: 1)  # another process's clock says so
    assert due(5)


def stop_after(config, workdir, steps):
    """Train as far as `steps`, as if SIGTERM had come then."""
    original, done = log.Log.add, []

    class Stopping(processes.Interrupt):
        def after(self):
            self.requested = signal.SIGTERM if len(done) >= steps else 0
            return bool(self.requested)

    def count(self, step, metrics):
        done.append(step)
        original(self, step, metrics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "Interrupt", Stopping)
        patch.setattr(log.Log, "add", count)
        with pytest.raises(SystemExit) as stopped:
            loop.train(config, workdir)
    assert stopped.value.code == 143


@pytest.mark.medium
@pytest.mark.parametrize("name", [name for name in DEMO if "sampler" in programs.fields(name).model])
def test_generation_writes_its_files_and_depends_on_the_seed_alone(name, trained, tmp_path):
    config = programs.config(name, **programs.weights_for(name, trained))
    loop.train(config, str(tmp_path / "run"))
    run = program.create_training(config, num_train=config.batch_size)
    found = {}
    for label, batch_size, seed in (("a", 4, 0), ("b", 3, 0), ("c", 4, 1)):
        settings = generate.Config(num_images=5, batch_size=batch_size, seed=seed, output=str(tmp_path / label), strips=2)
        generate.generate(run, settings, str(tmp_path / "run"))
        found[label] = np.load(tmp_path / label / "samples.npz")["arr_0"]
        assert sorted(file.name for file in (tmp_path / label).iterdir()) == FILES
    assert found["a"].shape == (5, 16, 16, 3) and found["a"].dtype == np.uint8
    # Another batch size may flip a token where two are level within float noise; not in most images.
    assert (found["a"] == found["b"]).all(axis=(1, 2, 3)).mean() >= 0.8
    assert not np.array_equal(found["a"], found["c"])


@pytest.mark.parametrize("name", REAL)
def test_published_recipe(name):
    """The learning rate and length that the config stands for, at ImageNet's 1,281,167 images."""
    config = programs.config(name, "")
    length = optim.length(
        config.optim, epochs=config.epochs, steps=config.steps, num_train=1_281_167, batch_size=config.batch_size
    )
    peak = float(optim.schedule(config.optim, length, config.batch_size)(length.warmup))
    expected = {
        "tokenizer": (1e-4, 1_000_000), "predictor:b": (2.4e-3, 499_200), "predictor:l": (2.4e-3, 499_200),
        "vitb": (1.6e-3, 499_200), "vitl": (1.6e-3, 249_600),
        "coco:b": (1e-4, 184_375), "coco:l": (1e-4, 184_375), "ade20k:b": (1e-4, 160_000), "ade20k:l": (2e-5, 160_000),
        "in1k:b": (4e-3, 125_100), "in1k:l": (1e-3, 62_550), "probe:b": (1.6, 28_080), "probe:l": (0.8, 28_080),
    }  # fmt: skip
    np.testing.assert_allclose((peak, length.total), expected[name], rtol=1e-5)


@pytest.mark.parametrize("name", sorted(file.stem for file in (programs.ROOT / "addp_jax/samplers").glob("[a-z]*.py")))
def test_sampler_keeps_its_contract(name):
    module = importlib.import_module(f"addp_jax.samplers.{name}")
    config = module.Config()
    assert hash(config) == hash(module.Config()) and dataclasses.fields(config)
    parts = module.segments(config, 16, 1.0)
    steps = np.concatenate([at.step for _, at in parts])
    assert np.all(np.diff(steps) == 1) and steps[-1] == config.steps - 1
    assert {at.num_masked.shape[1:] for _, at in module.segments(config, 16, 1.0, fewest=9)} == {(17,)}
    assert callable(module.step)


@pytest.mark.parametrize("name", tasks.names())
def test_every_task_has_a_config(name):
    assert name in {programs.fields(config).task for config in programs.names()}


@pytest.mark.medium
def test_the_chain_runs_on_a_folder_of_jpegs_of_mixed_sizes(tmp_path):
    """From tokenizer to samples and to variations of the photographs themselves."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for index in range(20):
        height, width = rng.integers(20, 90, 2)
        mode, shape = ("L", (height, width)) if index % 5 == 0 else ("RGB", (height, width, 3))
        Image.fromarray(rng.integers(0, 255, shape, np.uint8)).convert(mode).save(tmp_path / "photos" / f"{index}.jpg")
    data = dict(
        data__source="image_folder", data__path=str(tmp_path / "photos"), data__num_train=0, data__num_eval=0
    )  # fmt: skip
    weights = {}
    for name, run in (("demo_tokenizer", "tokenizer"), ("demo_predictor", "predictor"), ("demo_addp", "addp")):
        config = programs.config(name, **data, **weights)
        loop.train(config, str(tmp_path / run))
        weights[f"model__{run}_weights"] = str(tmp_path / run)
    settings = generate.Config(images=str(tmp_path / "photos"), mask_ratio=0.5, output=str(tmp_path / "out"))
    generate.generate(program.create_training(config, num_train=config.batch_size), settings, str(tmp_path / "addp"))
    assert np.load(tmp_path / "out" / "samples.npz")["arr_0"].shape == (20, 16, 16, 3)
