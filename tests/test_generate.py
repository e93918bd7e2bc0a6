"""Generation and editing to files: nothing is drawn twice, own pixels stay, mistakes are told."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import programs
import pytest
from PIL import Image

from addp_jax import errors, samplers
from addp_jax.generation import generate, sweep
from addp_jax.ops import images
from addp_jax.program import create_training
from addp_jax.training import evaluate

pytestmark = pytest.mark.medium

S = 16
STEPS = {"model__sampler__steps": 3}
KILLS = (30, 90)  # images after which the process is killed
NUM_IMAGES = 200


@pytest.fixture(scope="module")
def weights(trained):
    return {"model__tokenizer_weights": str(trained / "tokenizer")}  # sampling needs no token predictor


@pytest.fixture(scope="module")
def program(weights, mesh):
    return create_training(programs.config("demo_addp", **weights, **STEPS), num_train=8, mesh=mesh)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Four files: of the right size, wide, tall, damaged."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name, shape in (("a", (S, S, 3)), ("b", (20, 40, 3)), ("d", (40, 20, 3))):
        Image.fromarray(rng.integers(0, 255, shape, np.uint8)).save(folder / f"{name}.png")
    (folder / "c.png").write_bytes((folder / "a.png").read_bytes()[:400])
    return folder


@pytest.fixture(scope="module")
def mask(tmp_path_factory):
    path = tmp_path_factory.mktemp("masks") / "left.png"
    Image.fromarray(np.where(np.arange(S) < 5, 255, 0).astype(np.uint8)[None].repeat(S, 0)).save(path)
    return str(path)


def run(program, trained, output, **fields):
    generate.generate(program, generate.Config(batch_size=4, output=str(output), **fields), str(trained / "addp"))


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_inpainting_keeps_the_own_pixels_skips_what_is_unreadable_and_says_so(program, trained, photos, mask, tmp_path, capsys):
    """In two goes: what is there is not drawn again, not even another variant's."""
    names = ["000000_a", "000001_b", "000003_d", "000004_a", "000005_b", "000007_d"]
    times = []
    for variants in (1, 2):
        with pytest.raises(errors.UserError, match=r"1 of 4 files skipped: .*c.png \("):
            run(program, trained, tmp_path, images=str(photos), masks=mask, feather=4, variants=variants, strips=2)
        files = sorted((tmp_path / "images").iterdir())
        assert [file.stem for file in files] == names[: 3 * variants]
        times.append([file.stat().st_mtime_ns for file in files])
        assert "4 images; 2 resized to 16 pixels, 2 cropped in the middle" in capsys.readouterr().out
    assert times[1][:3] == times[0]
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "edits.png", "grid.png", "images", "samples.npz", "settings.json", "steps.gif", "strip.png",
    ]  # fmt: skip
    one, other = (pixels(tmp_path / "images" / f"{name}.png") for name in ("000000_a", "000004_a"))
    own = pixels(photos / "a.png")
    for result in (one, other):
        np.testing.assert_array_equal(result[:, 9:], own[:, 9:])
        assert (result[:, :5] != own[:, :5]).any()
    assert (one[:, :5] != other[:, :5]).any()
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (6, S, S, 3)
    with Image.open(tmp_path / "steps.gif") as film:
        assert film.n_frames == 2 + 3  # own, hidden, three steps


def test_a_mask_ratio_of_0_is_the_tokenizers_reconstruction(program, trained, photos, tmp_path):
    with pytest.raises(errors.UserError, match="1 of 4"):
        run(program, trained, tmp_path, images=str(photos), mask_ratio=0.0, strips=0)
    params, frozen = (program.place(entry) for entry in program.load_for_sampling(str(trained / "addp")))
    nets = program.task.nets(params, frozen)
    own = pixels(photos / "a.png")[None] / np.float32(255)
    expected = np.asarray(jax.jit(lambda image: images.to_uint8(samplers.reconstruct(nets, image)))(own)).astype(int)
    assert np.abs(pixels(tmp_path / "images" / "000000_a.png") - expected[0]).max() <= 1


def test_a_sweep_is_one_sheet_with_a_row_and_a_line_for_each_setting(program, trained, tmp_path, monkeypatch):
    asked = []

    def distances(changed, params, frozen):
        asked.append(dataclasses.asdict(changed.task.sampler_config))
        return {"fid_16": float(len(asked))}, {}

    monkeypatch.setattr(evaluate, "distances", distances)
    config = generate.Config(num_images=2, output=str(tmp_path), sweep="steps=1,2;schedule=sqrt")
    sweep.sweep(program, config, str(trained / "addp"))
    assert [tuple(entry.values())[:3] for entry in asked] == [(1, "sqrt", 2.0), (2, "sqrt", 2.0)]
    lines = [json.loads(line) for line in (tmp_path / "sweep.jsonl").read_text().splitlines()]
    schedules = [line.pop("at each step") for line in lines]
    assert [schedule["num_masked"] for schedule in schedules] == [[1], [5, 1]] and schedules[1]["temperature"] == [1.0, 0.0]
    assert lines == [{"steps": 1, "schedule": "sqrt", "fid_16": 1.0}, {"steps": 2, "schedule": "sqrt", "fid_16": 2.0}]
    sheet = pixels(tmp_path / "sweep.png")
    assert len(sheet) == 2 * (16 + S + 4)  # caption, images and their border
    assert program.task.sampler_config.steps == 3


def test_a_sweep_takes_lists_and_texts():
    found = sweep.settings("guidance=0,(0,0,1);temperature=linear 2 0;order=halton,random")
    assert len(found) == 4 and found[2] == {"guidance": (0, 0, 1), "temperature": "linear 2 0", "order": "halton"}


@pytest.mark.parametrize("text", ["steps", "steps=", "=8", "steps=8;steps=9", ""])
def test_a_sweep_that_is_not_understood(text):
    with pytest.raises(errors.UserError, match="config.generate.sweep: .* is not understood"):
        sweep.settings(text)


def test_a_sweep_of_what_the_sampler_has_not(program):
    for changes, words in (
        ({"step": 8}, "did you mean config.model.sampler.steps"),
        ({"steps": 0.5}, "steps: expected int"),
        ({"top_k": -1}, "config.model.sampler.top_k"),
    ):  # fmt: skip
        with pytest.raises(errors.UserError, match=words):
            samplers.with_sampler(program.task, changes)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"mask_ratio": 1.5, "images": "x"}, "mask_ratio: 1.5; use at least 0 and at most 1"),
        ({"mask_ratio": -0.1, "images": "x"}, "mask_ratio: -0.1"),
        ({"mask_ratio": 0.5}, "mask_ratio: needs images"),
        ({"masks": "m"}, "masks: needs images"),
        ({"images": "x"}, "images: needs what is drawn anew"),
        ({"images": "x", "masks": "m", "mask_ratio": 0.5}, "mask_ratio: what is drawn anew is already said"),
        ({"images": "x", "mask_ratio": 0.5, "feather": 4}, "feather: needs"),
        ({"variants": 0}, "variants: 0"),
        ({"feather": -1}, "feather: -1"),
        ({"num_images": 0}, "num_images: 0"),
    ],
)
def test_fields_that_do_not_fit_together_are_named(fields, words):
    with pytest.raises(ValueError, match=words):
        generate.Config(**fields)


def contents(folder: pathlib.Path) -> dict:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_killed_and_stopped_and_resumed_a_generation_is_byte_identical_and_two_processes_make_the_same(trained, weights, tmp_path):
    fields = {"generate__num_images": NUM_IMAGES, "generate__batch_size": 7, "generate__strips": 0} | weights | STEPS
    flags = ["--mode=generate", *(f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items())]
    config, workdir = "configs/demo_addp.py:tiny", str(trained / "addp")
    alone = [sys.executable, "-m", "addp_jax.main", f"--config={config}", f"--workdir={workdir}"]
    settings = {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    settings["PYTHON"] = sys.executable

    def start(folder, command=alone):
        return subprocess.Popen(
            [*command, *flags, f"--config.generate.output={tmp_path / folder}"], cwd=programs.ROOT, env=os.environ | settings,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    for kill, number in zip(KILLS, (signal.SIGKILL, signal.SIGTERM)):
        process = start("killed")
        while len(list((tmp_path / "killed" / "images").glob("*.png"))) < kill and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(number)
        assert process.wait() == -number, process.communicate()[1]
        assert len(list((tmp_path / "killed" / "images").glob("*.png"))) < NUM_IMAGES
    for folder, command in (("killed", alone), ("undisturbed", alone), ("two", ["launch/local.sh", "2", config, workdir])):
        process = start(folder, command)
        _, problems = process.communicate(timeout=300)
        assert process.returncode == 0, problems
    killed, undisturbed, two = (contents(tmp_path / folder) for folder in ("killed", "undisturbed", "two"))
    assert len(undisturbed) == NUM_IMAGES + 3  # settings, grid, npz
    assert killed == undisturbed
    assert set(two) == set(undisturbed)
    one_device, two_devices = (np.load(tmp_path / folder / "samples.npz")["arr_0"].astype(int) for folder in ("undisturbed", "two"))
    assert np.abs(one_device - two_devices).max() <= 1  # batches of other sizes: float noise now and then crosses a rounding


def test_a_folder_of_damaged_images_is_one_line(program, trained, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for n in range(2):
        Image.fromarray(np.random.default_rng(n).integers(0, 256, (64, 64, 3), np.uint8)).save(images / f"{n}.jpg")
        data = (images / f"{n}.jpg").read_bytes()
        (images / f"{n}.jpg").write_bytes(data[: len(data) // 2])  # the header is whole
    config = generate.Config(images=str(images), mask_ratio=0.5, output=str(tmp_path / "out"), batch_size=8)
    with pytest.raises(errors.UserError, match="2 of 2 files skipped: .*0.jpg.*1.jpg"):
        generate.generate(program, config, str(trained / "addp"))
    assert not (tmp_path / "out" / "grid.png").exists()


def test_names_too_long_for_the_disk_are_left_out(program, trained, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (16, 16)).save(images / ("é" * 124 + ".png"))
    config = generate.Config(images=str(images), mask_ratio=0.5, output=str(tmp_path / "out"), batch_size=8)
    generate.generate(program, config, str(trained / "addp"))
    assert [path.name for path in (tmp_path / "out" / "images").iterdir()] == ["000000.png"]


def test_another_dtype_does_not_continue_a_folder(program, trained, tmp_path):
    config = generate.Config(num_images=1, output=str(tmp_path), batch_size=8, strips=0)
    generate.generate(program, config, str(trained / "addp"))
    half = dataclasses.replace(program, config=dataclasses.replace(program.config, dtype="bfloat16"))
    with pytest.raises(errors.UserError, match="dtype float32, now bfloat16"):
        generate.generate(half, config, str(trained / "addp"))


def test_a_sweep_leaves_out_damaged_images_and_says_so(program, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "distances", lambda *_: ({}, {}))
    photos, output, file = tmp_path / "photos", tmp_path / "out", tmp_path / "file"
    photos.mkdir()
    file.write_text("")
    pixels = np.random.default_rng(0).integers(0, 255, (2 * S, 2 * S, 3), np.uint8)
    Image.fromarray(pixels).save(photos / "a.png")
    (photos / "b.png").write_bytes((photos / "a.png").read_bytes()[:1500])
    fields = dict(images=str(photos), mask_ratio=0.5, sweep="steps=1")
    with pytest.raises(errors.UserError, match=r"1 of 2 files skipped: .*b.png"):
        sweep.sweep(program, generate.Config(output=str(output), **fields), str(trained / "addp"))
    assert sorted(path.name for path in output.iterdir()) == ["sweep.jsonl", "sweep.png"]
    (photos / "a.png").unlink()
    with pytest.raises(errors.UserError, match=r"1 of 1 files skipped: .*b.png"):
        sweep.sweep(program, generate.Config(output=str(tmp_path / "none"), **fields), str(trained / "addp"))
    monkeypatch.setattr(generate, "make_starts", lambda *_: pytest.fail("the folder comes first"))
    with pytest.raises(errors.UserError, match="config.generate.output: cannot write to"):
        sweep.sweep(program, generate.Config(output=str(file), **fields), str(trained / "addp"))
