"""The command line: every mistake is one line that names its cause, with a non-zero exit, and destroys nothing."""

import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import programs
import pytest
from PIL import Image

from addp_jax import main
from addp_jax.weights import checkpoint

pytestmark = pytest.mark.medium

TINY = "--config=configs/demo_tokenizer.py:tiny"
FOLDER = ("--config.data.source=image_folder", "--config.data.num_train=0", "--config.data.num_eval=0")


def start(*arguments, **settings):
    command = [sys.executable, "-m", "addp_jax.main", *map(str, arguments)]
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}
    return subprocess.Popen(
        command, cwd=programs.ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **settings
    )


def call(*arguments, **settings):
    process = start(*arguments, **settings)
    output, problems = process.communicate(timeout=300)
    return process.returncode, output, problems


def assert_refused(*arguments, names: tuple[str, ...], **settings):
    """Exit status 2 and one line on stderr that holds all of `names`."""
    status, _, problems = call(*arguments, **settings)
    lines = [line for line in problems.splitlines() if line.strip()]
    assert status == 2, problems
    assert len(lines) == 1 and lines[0].startswith("error: "), problems
    for name in names:
        assert name in lines[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished tiny run."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    status, output, problems = call(TINY, f"--workdir={workdir}")
    assert status == 0, problems
    assert "step 4/4" in problems and "ETA" in problems  # the console says how far and how long
    return workdir


def test_the_config_is_missing():
    assert_refused("--workdir=x", names=("--config",))


@pytest.mark.parametrize(
    "argument, names",
    [
        ("configs/vitbb.py", ("--config=configs/vitbb.py", "no such file")),
        ("configs/vitb", ("no such file", "configs/vitb.py")),
        ("configs/vitb.py:small", (":small",)),
        ("configs", ("not a file",)),
        ("README.md", ("ends in .py",)),
    ],
)
def test_a_mistyped_config_file_is_one_line(argument, names):
    assert_refused(f"--config={argument}", "--workdir=x", names=names)


def test_a_config_file_with_a_mistake_is_one_line(tmp_path):
    for text, name in (("def get_config(:", "SyntaxError"), ("import nothing_at_all", "nothing_at_all"), ("x = 1", "get_config")):
        (tmp_path / "own.py").write_text(text)
        assert_refused(f"--config={tmp_path / 'own.py'}", "--workdir=x", names=(name,))


@pytest.mark.parametrize("argument", ("--help", "--helpshort"))
def test_a_request_for_help_is_no_failure(argument):
    status, output, _ = call(argument)
    assert status == 0 and "--config" in output


@pytest.mark.parametrize(
    "config, flag, names",
    [
        ("demo_classification", "--config.model.net.encoder.image_size=18", ("18", "patch_size=4")),
        ("demo_tokenizer", "--config.seed=-1", ("config.seed", "-1")),
        ("demo_tokenizer", "--config.optim.base_lr=nan", ("config.optim.base_lr", "finite")),
        ("demo_tokenizer", "--config.eval_batches=-1", ("config.eval_batches",)),
        ("demo_tokenizer", "--config.batch_size=0", ("config.batch_size",)),
        ("demo_predictor", "--config.model.num_samples=0", ("config.model.num_samples",)),
        ("demo_addp", "--config.model.masks.group=0", ("config.model.masks.group",)),
        ("demo_addp", "--config.model.net.encoder.dropout=1.0", ("config.model.net.encoder.dropout",)),
    ],
)
def test_values_out_of_range_are_one_line(tmp_path, config, flag, names):
    assert_refused(f"--config=configs/{config}.py:tiny", f"--workdir={tmp_path / 'run'}", flag, names=names)
    assert not (tmp_path / "run").exists()


def test_a_missing_evaluation_split_is_told_before_the_first_step(tmp_path):
    write_images(tmp_path / "data" / "train" / "a", 20)
    folder = f"--config.data.path={tmp_path / 'data'}"
    assert_refused(TINY, f"--workdir={tmp_path / 'run'}", *FOLDER, folder, names=("val", "config.data.eval_split"))


def test_the_home_folder_is_meant_by_a_tilde(tmp_path):
    status, _, problems = call("--mode=export", "--workdir=~/run", "--layout=vqgan", "--output=x.safetensors")
    assert status == 2 and os.path.expanduser("~/run") in problems


def test_a_misspelt_field_is_named(tmp_path):
    assert_refused(TINY, f"--workdir={tmp_path}", "--config.data.sorce=shapes", names=("error: --config.data.sorce: no such field; did you mean source?",))
    assert_refused(TINY, f"--workdir={tmp_path}", "--config.data.plain=True", names=("error: --config.data.plain: no such field",))
    assert_refused(TINY, f"--workdir={tmp_path}", "--config.dat.source", "shapes", names=("error: --config.dat.source: no such field",))


def test_a_missing_data_folder_is_named(tmp_path):
    nowhere = tmp_path / "nowhere"
    assert_refused(TINY, f"--workdir={tmp_path}", *FOLDER, f"--config.data.path={nowhere}", names=(str(nowhere), "config.data.path"))


def test_an_empty_data_folder_is_named(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert_refused(TINY, f"--workdir={tmp_path / 'run'}", *FOLDER, f"--config.data.path={empty}", names=(str(empty),))


def write_images(folder, count, size=(40, 30)):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(count):
        Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), np.uint8)).save(folder / f"{index}.jpg")


def test_fewer_images_than_a_batch(tmp_path):
    write_images(tmp_path / "data", 5)
    assert_refused(
        TINY, f"--workdir={tmp_path / 'run'}", *FOLDER, f"--config.data.path={tmp_path / 'data'}",
        "--config.data.hold_out=False",
        names=("config.batch_size", "lower"),
    )  # fmt: skip


def test_a_file_that_is_no_image_is_named(tmp_path):
    write_images(tmp_path / "data", 20)
    (tmp_path / "data" / "broken.jpg").write_bytes(b"this is text")
    status, _, problems = call(
        TINY, f"--workdir={tmp_path / 'run'}", *FOLDER, f"--config.data.path={tmp_path / 'data'}", "--config.steps=20"
    )
    assert status == 2 and "broken.jpg" in problems.splitlines()[-1] and "Traceback" not in problems


def test_missing_frozen_weights_say_which_field_and_what_to_train(tmp_path):
    predictor = "--config=configs/demo_predictor.py:tiny"
    assert_refused(predictor, f"--workdir={tmp_path}", names=("config.model.tokenizer_weights", "configs/demo_tokenizer.py"))
    nowhere = tmp_path / "nowhere"
    assert_refused(
        predictor, f"--workdir={tmp_path}", f"--config.model.tokenizer_weights={nowhere}",
        names=("config.model.tokenizer_weights", str(nowhere)),
    )  # fmt: skip


def test_a_work_directory_of_another_config_is_refused(finished):
    before = sorted(path.stat().st_mtime_ns for path in (finished / "checkpoints").rglob("*"))
    assert_refused(TINY, f"--workdir={finished}", "--config.optim.base_lr=0.5", names=("optim.base_lr", "another workdir"))
    assert sorted(path.stat().st_mtime_ns for path in (finished / "checkpoints").rglob("*")) == before


def test_an_unwritable_work_directory_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    assert_refused(TINY, f"--workdir={blocked / 'run'}", names=(str(blocked), "--workdir"))


def test_a_finished_run_says_so(finished):
    status, output, _ = call(TINY, f"--workdir={finished}")
    assert status == 0 and "already trained to step 4 of 4" in output


def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(finished):
    newest = finished / "checkpoints" / "4"
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    status, _, problems = call(TINY, f"--workdir={finished}")
    assert status == 0 and "is damaged" in problems and "going on from step 2" in problems
    assert (finished / "checkpoints" / "4").is_dir() and (finished / "checkpoints" / "4.damaged").is_dir()


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    status, _, problems = call(
        TINY, f"--workdir={tmp_path}", "--config.optim.base_lr=1e38", "--config.optim.clip_norm=0.0",
        "--config.steps=40", "--config.checkpoint.every=1", "--config.optim.warmup_steps=10",
    )  # fmt: skip
    last = problems.splitlines()[-1]
    assert status == 2 and "loss" in last and "the last good checkpoint is step 1;" in last and "config.optim.base_lr" in last
    params, _ = checkpoint.load_params(tmp_path, ema=False)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("number, expected", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_stops(tmp_path, number, expected):
    process = start(TINY, f"--workdir={tmp_path}", "--config.steps=100000", "--config.checkpoint.every=100000", "--config.eval_every=100000")
    log = tmp_path / "log.jsonl"
    deadline = time.time() + 200
    while not (log.exists() and log.read_text().count("\n") > 3) and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    output, problems = process.communicate(timeout=120)
    assert process.returncode == expected and "goes on from there" in output and "Traceback" not in problems, problems
    assert any(path.name.isdigit() for path in (tmp_path / "checkpoints").iterdir())


def test_the_tpu_compilers_stack_is_enlarged_and_other_arguments_stay(monkeypatch):
    monkeypatch.setattr(main.app, "run", lambda *_, **__: None)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--other=1")
    monkeypatch.setenv(main.CACHE, "elsewhere")
    main.entry()
    main.entry()
    assert os.environ["LIBTPU_INIT_ARGS"] == "--other=1 --fibers_default_thread_stack_size=1048576"


def test_compiled_programs_are_kept_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(main.CACHE, "elsewhere")
    main.keep_programs()
    assert os.environ[main.CACHE] == "elsewhere" and not any(tmp_path.iterdir())
    monkeypatch.delenv(main.CACHE)
    main.keep_programs()
    (folder,) = (tmp_path / "addp_jax").iterdir()
    assert os.environ[main.CACHE] == str(folder)


def test_without_a_folder_to_write_to_no_program_is_kept(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(main.CACHE, raising=False)
    for root in (str(tmp_path / "file"), "~/.cache"):  # what a user without a home has
        monkeypatch.setenv("XDG_CACHE_HOME", root)
        main.keep_programs()
        assert main.CACHE not in os.environ and [path.name for path in tmp_path.iterdir()] == ["file"]
