"""A trained network is used only with what it was trained with, in every mode and along the chain of stages."""

import contextlib
import json
import os
import shutil

import jax
import numpy as np
import programs
import pytest
from PIL import Image

from addp_jax import errors, program, schema, weights
from addp_jax.data import pack
from addp_jax.generation import generate
from addp_jax.training import evaluate, loop
from addp_jax.weights import checkpoint, lock

pytestmark = pytest.mark.medium


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory):
    """A tokenizer of the same size, trained from another seed."""
    workdir = str(tmp_path_factory.mktemp("other") / "tokenizer")
    loop.train(programs.config("demo_tokenizer", seed=5), workdir)
    return workdir


def config(name, trained, **changes):
    stages = {"model__tokenizer_weights": str(trained / "tokenizer"), "model__predictor_weights": str(trained / "predictor")}
    return programs.config(name, **({} if name == "demo_tokenizer" else stages if name == "demo_addp" else {
        "model__tokenizer_weights": stages["model__tokenizer_weights"]}) | changes)  # fmt: skip


def test_evaluation_and_generation_refuse_another_tokenizer(trained, other_tokenizer, tmp_path):
    made = program.create(config("demo_addp", trained, model__tokenizer_weights=other_tokenizer, model__predictor_weights="random"))
    for use in (
        lambda: evaluate.evaluate(made, str(trained / "addp")),
        lambda: generate.generate(made, generate.Config(output=str(tmp_path)), str(trained / "addp")),
    ):
        with pytest.raises(errors.UserError, match="was trained with another tokenizer"):
            use()


def test_evaluation_refuses_another_token_predictor(trained):
    made = program.create(config("demo_addp", trained, model__predictor_weights="random"))
    with pytest.raises(errors.UserError, match="was trained with another token_predictor"):
        evaluate.evaluate(made, str(trained / "addp"))


def test_a_token_predictor_knows_its_tokenizer(trained, other_tokenizer, tmp_path):
    run = config("demo_addp", trained, model__tokenizer_weights=other_tokenizer)
    with pytest.raises(errors.UserError, match="config.model.predictor_weights .* was trained with another tokenizer"):
        loop.train(run, str(tmp_path))
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


@pytest.mark.parametrize(
    "name, run, changes, message",
    [
        ("demo_addp", "addp", {"model__net__encoder__heads": 4}, "net.encoder.heads was 2, is 4"),
        ("demo_predictor", "predictor", {"model__net__class_id": 33}, "net.class_id was"),
        ("demo_tokenizer", "tokenizer", {"model__net__num_groups": 2}, "net.num_groups was 4, is 2"),
        ("demo_predictor", "addp", {}, "task was"),
    ],
)
def test_other_settings_of_a_network_are_refused(trained, name, run, changes, message):
    with pytest.raises(errors.UserError, match=message):
        program.create(config(name, trained, **changes)).read(str(trained / run))


def test_frozen_networks_of_other_settings_are_refused(trained):
    made = program.create(config("demo_predictor", trained, model__tokenizer__num_groups=2))
    with pytest.raises(errors.UserError, match=r"config.model.tokenizer_weights .* \(num_groups was 4, is 2\)"):
        made.task.load_frozen()


def test_what_matters_to_training_only_may_differ(trained):
    changes = {"model__label_smoothing": 0.3, "model__net__encoder__dropout": 0.2, "model__net__encoder__remat": "full"}
    program.create(config("demo_addp", trained, **changes)).load(str(trained / "addp"))


def test_a_run_records_its_classes_and_the_content_of_its_data(trained):
    _, info = checkpoint.load_params(trained / "tokenizer", ema=True)
    data = info["identity"]["data"]
    assert data["classes"][0] and len(data["classes"]) == 8 and data["content"] and "path" not in data
    assert info["identity"]["dtype"] == "float32"


# --- where data lies is not what it is ----------------------------------------------------------------------------------


def write(folder, classes=("apple", "boat", "car"), count=6):
    for name in classes:
        for split, many in (("train", count), ("val", 2)):
            (folder / split / name).mkdir(parents=True)
            for i in range(many):
                pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


def folder_config(path, **changes):
    fields = dict(data__source="image_folder", data__path=str(path), data__num_train=0, data__num_eval=0, model__net__num_classes=3)
    fields |= dict(batch_size=8, steps=2, optim__warmup_steps=0)
    return programs.config("demo_judge", **fields | changes)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    root = tmp_path_factory.mktemp("classifier")
    write(root / "data")
    loop.train(folder_config(root / "data"), str(root / "run"))
    return root


def resume(root, path, tmp_path, **changes):
    shutil.copytree(root / "run", tmp_path / "run")
    loop.train(folder_config(path, steps=3, **changes), str(tmp_path / "run"))


def test_moved_data_goes_on(classifier, tmp_path):
    shutil.copytree(classifier / "data", tmp_path / "elsewhere")
    for number, path in enumerate((tmp_path / "elsewhere", f"{classifier / 'data'}/")):
        (tmp_path / str(number)).mkdir()
        with contextlib.suppress(SystemExit):
            loop.train(folder_config(path), str(classifier / "run"))
    lines = (classifier / "run" / "log.jsonl").read_text().splitlines()
    assert any(json.loads(line)["step"] == 2 for line in lines)


@pytest.mark.parametrize("change", ("removed", "renamed", "other size"))
def test_changed_data_is_refused(classifier, tmp_path, change):
    shutil.copytree(classifier / "data", tmp_path / "data")
    image = tmp_path / "data" / "train" / "apple" / "0.png"
    if change == "removed":
        image.unlink()
    elif change == "renamed":
        image.rename(image.with_name("x.png"))
    else:
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(image)
    with pytest.raises(errors.UserError, match="data.content was"):
        loop.train(folder_config(tmp_path / "data"), str(classifier / "run"))


def test_other_classes_are_named(classifier, tmp_path):
    write(tmp_path / "data", ("apple", "boat", "dog"))
    with pytest.raises(errors.UserError, match="(?s)data.classes.*dog"):
        loop.train(folder_config(tmp_path / "data"), str(classifier / "run"))
    made = program.create(folder_config(tmp_path / "data"))
    with pytest.raises(errors.UserError, match="lacks car, has dog"):
        evaluate.evaluate(made, str(classifier / "run"))


# --- evaluations --------------------------------------------------------------------------------------------------------


def test_a_part_of_the_split_is_spread_and_says_so(classifier, mesh, capsys):
    made = program.create(folder_config(classifier / "data", batch_size=2))
    evaluate.evaluate(made, str(classifier / "run"))
    whole = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (whole["images"], whole["of"]) == (6, 6) and "accuracy" in whole
    run = program.create_training(folder_config(classifier / "data", batch_size=2, eval_batches=2), mesh=mesh)
    with jax.set_mesh(run.mesh), pytest.MonkeyPatch.context() as patch:
        state = run.init(jax.random.key(0))
        scalars, _ = evaluate.run(run, state, {})
        patch.setattr(os, "scandir", lambda path: pytest.fail(f"listed {path} again"))
        assert evaluate.run(run, state, {})[0] == scalars
    assert (scalars["images"], scalars["of"]) == (4, 6) and "part/accuracy" in scalars and "accuracy" not in scalars
    with pytest.raises(errors.UserError, match="lower it|has fewer"):
        program.create(folder_config(classifier / "data", data__num_eval=7)).source("eval")


def test_the_last_evaluation_is_made_after_a_kill_before_it(classifier, tmp_path):
    shutil.copytree(classifier / "run", tmp_path / "run")
    log = tmp_path / "run" / "log.jsonl"
    lines = log.read_text().splitlines()
    evaluations = [line for line in lines if "eval/" in line]
    assert json.loads(evaluations[-1])["step"] == 2
    log.write_text("".join(line + "\n" for line in lines if line not in evaluations))
    loop.train(folder_config(classifier / "data"), str(tmp_path / "run"))
    again = [json.loads(line) for line in log.read_text().splitlines() if "eval/" in line]
    before = json.loads(evaluations[-1])
    assert [{**line, "time": 0} for line in again] == [{**before, "time": 0}]


def test_a_disk_too_small_for_a_checkpoint_is_told_at_once(classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.shutil, "disk_usage", lambda _: type("", (), {"free": 1000})())
    with pytest.raises(errors.UserError, match="a checkpoint takes .* the disk has 0 MB left"):
        loop.train(folder_config(classifier / "data"), str(tmp_path / "new"))


def test_other_modes_do_not_need_the_batch_of_training():
    three = program.create(programs.config("vitl", batch_size=4096), program.partition.make_mesh(program.partition.Config(), jax.devices()[:3]))
    assert three.mesh.size == 3 and schema.identity(three.task.config)


def test_a_second_run_in_a_work_directory_is_refused_and_the_first_goes_on(classifier, tmp_path):
    with lock.hold(tmp_path / "run"):
        with pytest.raises(errors.UserError, match="a run is at work here"):
            loop.train(folder_config(classifier / "data"), str(tmp_path / "run"))
    assert not list((tmp_path / "run").glob("checkpoints/[0-9]*"))
    loop.train(folder_config(classifier / "data"), str(tmp_path / "run"))


def test_shards_of_splits_with_other_classes_are_refused(tmp_path):
    write(tmp_path / "one", ("apple", "boat", "car"))
    write(tmp_path / "two", ("boat", "car"))
    pack.pack(str(tmp_path / "one" / "train"), str(tmp_path / "shards"), "train")
    pack.pack(str(tmp_path / "two" / "val"), str(tmp_path / "shards"), "val")
    with pytest.raises(errors.UserError, match="the training split 3: this data lacks apple"):
        loop.train(folder_config(tmp_path / "shards", data__source="array_record"), str(tmp_path / "run"))


def test_a_disk_too_small_for_the_samples_is_told_before_drawing(trained, tmp_path, monkeypatch):
    made = program.create(config("demo_addp", trained))
    monkeypatch.setattr(generate.shutil, "disk_usage", lambda _: type("", (), {"free": 1000})())
    with pytest.raises(errors.UserError, match="config.generate.output: samples.npz takes"):
        generate.generate(made, generate.Config(output=str(tmp_path)), str(trained / "addp"))


def test_fields_that_a_run_of_an_earlier_version_lacks_are_taken_for_their_defaults(trained, monkeypatch):
    """Only for those: another value than the default is refused."""
    params, info = checkpoint.load_params(str(trained / "addp"), ema=True)
    model = dict(info["identity"]["model"])
    assert model.pop("mapping") == "expected" and model["net"].pop("vocab_size")
    earlier = {"identity": info["identity"] | {"model": model}, "step": info["step"]}
    monkeypatch.setattr(checkpoint, "load_params", lambda *_, **__: (params, earlier))
    with pytest.raises(errors.UserError, match=r"other settings \(model.net.vocab_size was 2025, is 36\)"):
        program.create(config("demo_addp", trained)).read(str(trained / "addp"))
    model["net"]["vocab_size"] = 36
    program.create(config("demo_addp", trained)).read(str(trained / "addp"))
    with pytest.raises(errors.UserError, match=r"other settings \(model.mapping was 'expected', is 'drawn'\)"):
        program.create(config("demo_addp", trained, model__mapping="drawn")).read(str(trained / "addp"))


def test_a_frozen_network_of_an_earlier_version_has_the_defaults_of_the_fields_that_it_lacks(trained, monkeypatch):
    read = weights.read_with_identity

    def earlier(*arguments):
        networks, identity = read(*arguments)
        net = {name: value for name, value in identity["model"]["net"].items() if name != "vocab_size"}
        return networks, identity | {"model": identity["model"] | {"net": net}}

    monkeypatch.setattr(weights, "read_with_identity", earlier)
    with pytest.raises(errors.UserError, match=r"predictor_weights .* other settings \(vocab_size was 2025, is 36\)"):
        program.create(config("demo_addp", trained)).task.load_frozen()
