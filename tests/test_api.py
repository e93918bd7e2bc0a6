"""`addp_jax.load` and the methods of a model, on the tiny runs; what they refuse, and in which words."""

import json
import logging
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import programs
import pytest
from PIL import Image
from safetensors import numpy as safetensors_numpy

import addp_jax
from addp_jax import errors, program
from addp_jax.api import loading
from addp_jax.data import transforms
from addp_jax.generation import generate, own_images
from addp_jax.training import loop
from addp_jax.weights import buckets, convert

S = 16


@pytest.fixture(scope="module")
def model(trained):
    return addp_jax.load(trained / "addp")


@pytest.fixture(scope="module")
def tokenizer(trained):
    return addp_jax.load(trained / "tokenizer")


@pytest.fixture(scope="module")
def classifier(trained):
    loop.train(programs.config("demo_classification", model__encoder_weights=str(trained / "addp")), str(trained / "classifier"))
    return addp_jax.load(trained / "classifier")


def pictures(count, height=S, width=S):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


def left_half(height=S, width=S):
    mask = np.zeros((height, width), bool)
    mask[:, : width // 2] = True
    return mask


def generated(trained, output, **settings):
    """samples.npz of `--mode=generate`."""
    weights = {f"model__{name}_weights": str(trained / name) for name in ("tokenizer", "predictor")}
    run = program.create(programs.config("demo_addp", **weights))
    config = generate.Config(output=str(output), strips=0, **settings)
    generate.generate(run, config, str(trained / "addp"))
    with np.load(output / "samples.npz") as file:
        return file["arr_0"]


# --- images ----------------------------------------------------------------------------------------


def assert_rounded(one, other):
    """The same but for the rounding of another batch size: a byte may be the next one."""
    assert one.shape == other.shape and np.abs(one.astype(int) - other).max() <= 1


def test_samples_are_those_of_generate(model, trained, tmp_path):
    drawn = model.sample(11, seed=3)
    assert drawn.shape == (11, S, S, 3) and drawn.dtype == np.uint8
    np.testing.assert_array_equal(drawn, generated(trained, tmp_path, num_images=11, seed=3, batch_size=16))


def test_an_image_depends_on_its_number_and_the_seed_alone(model):
    drawn = model.sample(11, seed=2**32 - 1)
    assert_rounded(model.sample(3, seed=2**32 - 1), drawn[:3])
    assert_rounded(model.sample(11, seed=2**32 - 1, batch_size=8), drawn)
    np.testing.assert_array_equal(model.sample(11, seed=2**32 - 1), drawn)
    assert (model.sample(11) != drawn).any() and len(np.unique(drawn.reshape(11, -1), axis=0)) > 1


def test_another_seed_compiles_nothing(model, caplog):
    model.sample(3, seed=5)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        model.sample(4, seed=6)
    assert "Finished tracing + transforming" not in caplog.text and "Compiling" not in caplog.text


def test_fields_of_the_sampler_are_arguments(model):
    drawn = model.sample(8, steps=3, temperature=0.0, top_p=0.9)
    np.testing.assert_array_equal(drawn, model.sample(8, steps=3, temperature=0.0, top_p=0.9))
    assert (drawn != model.sample(8)).any()
    assert model.sample(2, name="token_only").shape == (2, S, S, 3)


def test_edits_are_those_of_generate(model, trained, tmp_path):
    """The same as of one own image with its mask, of another size and shape, and its variants."""
    image, mask = pictures(1, 30, 40)[0], left_half(30, 40)
    for name, array in (("images", image), ("masks", mask.astype(np.uint8) * 255)):
        (tmp_path / name).mkdir()
        Image.fromarray(array).save(tmp_path / name / "a.png")
    expected = generated(
        trained, tmp_path / "out", images=str(tmp_path / "images"), masks=str(tmp_path / "masks"),
        variants=3, seed=1, feather=4, batch_size=8,
    )  # fmt: skip
    edited = model.edit(image, mask, n=3, seed=1, feather=4)
    assert edited.shape == (3, S, S, 3) and edited.dtype == np.uint8
    np.testing.assert_array_equal(edited, expected)
    drawn_mask = Image.fromarray(mask.astype(np.uint8) * 255)
    np.testing.assert_array_equal(model.edit(Image.fromarray(image), drawn_mask, n=3, seed=1, feather=4), edited)
    canvas, redrawn = own_images.fit(image, mask, S)
    assert not redrawn[:, 14:].any()
    np.testing.assert_array_equal(edited[:, :, 14:], np.stack([canvas[:, 14:]] * 3))
    raw = model.edit(image, mask, n=3, seed=1)
    assert (raw[:, :, 14:] != canvas[:, 14:]).any() and (raw[0] != raw[1]).any()
    np.testing.assert_array_equal(raw[:, :, :4], edited[:, :, :4])


def test_reconstructions_of_a_tokenizer_and_through_a_generator(model, tokenizer, trained):
    images, predictor = pictures(3), addp_jax.load(trained / "predictor")
    found = tokenizer.reconstruct(images)
    assert found.shape == images.shape and found.dtype == np.uint8
    np.testing.assert_array_equal(model.reconstruct(images), found)
    np.testing.assert_array_equal(predictor.reconstruct(list(images)), found)
    assert predictor.sample(2).shape == predictor.edit(images[0], left_half(), n=2).shape == (2, S, S, 3)


# --- recognition -----------------------------------------------------------------------------------


def test_features_do_not_depend_on_the_batch_and_images_are_cropped_as_in_the_evaluation(model):
    images = pictures(11, 20, 24)
    found = model.features(images)
    assert found.dtype == np.float32 and found.ndim == 2 and len(found) == 11
    np.testing.assert_allclose(model.features(images, batch_size=8), found, rtol=1e-5, atol=1e-6)
    squares = np.stack([transforms.centre_square(image, S, S) for image in images])
    np.testing.assert_array_equal(model.features([Image.fromarray(image) for image in squares]), found)


def test_classes_are_named_as_the_run_names_them(classifier):
    best = classifier.classify(pictures(3), top=4)
    assert [len(row) for row in best] == [4, 4, 4]
    for row in best:
        names, probabilities = zip(*row)
        assert len(set(names)) == 4 and set(names) <= set(classifier.classes) and "class 0" not in classifier.classes
        assert list(probabilities) == sorted(probabilities, reverse=True) and 0 < sum(probabilities) <= 1.00001
    assert sum(p for _, p in classifier.classify(pictures(1)[0], top=100)[0]) == pytest.approx(1)
    assert classifier.features(pictures(2)).shape[0] == 2


def test_a_probe_is_loaded_with_its_encoder(trained, tmp_path):
    weights = {"model__encoder_weights": str(trained / "addp"), "model__cache": str(tmp_path / "cache")}
    loop.train(programs.config("demo_probe", **weights), str(tmp_path / "probe"))
    probe = addp_jax.load(tmp_path / "probe")
    assert len(probe.classify(pictures(2))) == 2 and probe.features(pictures(2)).shape[0] == 2
    with pytest.raises(errors.UserError, match="trained with another encoder"):
        addp_jax.load(tmp_path / "probe", encoder="random")


@pytest.mark.parametrize(
    "value", (lambda one: one, lambda one: Image.fromarray(one), lambda one: [one], lambda one: [Image.fromarray(one)], lambda one: one[None])
)
def test_one_image_is_given_in_any_form(model, value):
    one = pictures(1)[0]
    np.testing.assert_array_equal(model.reconstruct(value(one)), model.reconstruct(one[None]))


def test_grey_and_transparent_images_become_rgb(model):
    grey = pictures(1)[0, :, :, 0]
    expected = model.reconstruct(np.stack([grey] * 3, axis=-1))
    for image in (grey, grey[..., None], Image.fromarray(grey), Image.fromarray(grey.astype(np.uint16) * 257)):
        np.testing.assert_array_equal(model.reconstruct(image), expected)
    rgba = np.dstack([grey, grey, grey, grey])
    np.testing.assert_array_equal(model.reconstruct([rgba, Image.fromarray(rgba)]), np.concatenate([expected] * 2))


# --- what a call refuses ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(n=0), "n: 0; give a whole number of at least 1"),
        (dict(n=2.5), "n: 2.5"),
        (dict(n=True), "n: True"),
        (dict(n=1, steps=0), "steps: 0; give a whole number of at least 1"),
        (dict(n=1, seed=-1), "seed: -1; give a whole number from 0 to 4294967295"),
        (dict(n=1, seed=2**32), "seed: 4294967296"),
        (dict(n=1, batch_size=0), "batch_size: 0"),
        (dict(n=1, top_p=0.0), "top_p: 0.0; use "),
        (dict(n=1, temperature="hot"), "temperature: 'hot'; use a number"),
        (dict(n=1, temprature=1.0), "temprature: no such field; did you mean temperature"),
        (dict(n=1, name="other"), "name: 'other'; use alternating or token_only"),
    ],
)
def test_mistakes_in_sample_name_the_argument(model, arguments, words):
    with pytest.raises(ValueError, match="^" + words.replace("(", r"\(")) as told:
        model.sample(**arguments)
    assert "config." not in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(mask=left_half(8, 8)), r"mask: shape \[8, 8\]; give that of the image, \[16, 16\]"),
        (dict(mask=np.zeros((S, S), bool)), "mask: empty"),
        (dict(mask=Image.new("L", (S, S))), "mask: empty"),
        (dict(mask=np.ones((S, S), np.uint8)), "mask: uint8 values; give bool"),
        (dict(image=pictures(1, 8, 64)[0], mask=np.arange(64)[None].repeat(8, 0) < 2), "mask: outside"),
        (dict(image=pictures(1)[0] / 255), r"image: float64 values; give uint8"),
        (dict(image=pictures(2)), "image: expected a uint8 image"),
        (dict(image=pictures(1)[0].astype(np.int32)), "image: expected a uint8 image"),
        (dict(image=np.zeros((0, 4, 3), np.uint8)), r"image: an image of shape \[0, 4, 3\] has no pixels"),
        (dict(feather=-1), "feather: -1"),
        (dict(n=0), "n: 0"),
        (dict(seed=-1), "seed: -1"),
        (dict(steps=0), "steps: 0"),
    ],
)
def test_mistakes_in_edit_name_the_argument(model, changes, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        model.edit(**(dict(image=pictures(1)[0], mask=left_half()) | changes))


def test_mistakes_in_images_name_the_argument(model, classifier):
    for method in (model.reconstruct, model.features, classifier.classify):
        for value, words in (
            (pictures(2) / np.float32(255), r"images: float32 values; give uint8, of an image in \[0,1\]: np.uint8"),
            ([], "images: there are none"),
            (pictures(0), "images: there are none"),
            (pictures(1)[0].astype(np.int64), "images: expected a uint8 image"),
            (pictures(2)[..., :2], "images: expected a uint8 image"),
            ("photo.png", "images: expected a uint8 image"),
        ):
            with pytest.raises(ValueError, match=f"^{words}"):
                method(value)
    with pytest.raises(ValueError, match="^top: 0"):
        classifier.classify(pictures(1), top=0)


def test_a_run_without_an_ability_says_which_have_it(model, tokenizer, classifier):
    one = pictures(1)[0]
    for call, words in (
        (lambda: tokenizer.sample(1), "sample: a run of the task tokenizer cannot; load a run of addp or token_predictor"),
        (lambda: tokenizer.edit(one, left_half()), "edit: a run of the task tokenizer cannot; load a run of addp or token_predictor"),
        (lambda: tokenizer.features(one), "features: a run of the task tokenizer cannot; load a run of addp or "),
        (lambda: model.classify(one), "classify: a run of the task addp cannot; load a run of classification or "),
        (lambda: classifier.reconstruct(one), "reconstruct: a run of the task classification cannot; load a run of addp or "),
    ):
        with pytest.raises(ValueError, match=words):
            call()


# --- loading ---------------------------------------------------------------------------------------


def copied(trained, folder, *names):
    for name in names:
        shutil.copytree(trained / name, folder / name)
    return folder / names[0]


def test_config_json_has_every_field_of_the_run(trained):
    weights = {f"model__{name}_weights": str(trained / name) for name in ("tokenizer", "predictor")}
    own = programs.config("demo_addp", **weights)
    read = loading.of_run(str(trained / "addp"))
    assert program.create(read).task.config == program.create(own).task.config
    assert {n: getattr(read, n) for n in ("data", "optim", "seed")} == {n: getattr(own, n) for n in ("data", "optim", "seed")}


def test_frozen_networks_are_looked_for_beside_the_run_and_the_predictor_is_not_needed(model, trained, tmp_path):
    run = copied(trained, tmp_path, "addp", "tokenizer")
    fields = json.loads((run / "config.json").read_text())
    fields["model"] |= {"tokenizer_weights": "runs/elsewhere/tokenizer", "predictor_weights": "runs/elsewhere/predictor"}
    (run / "config.json").write_text(json.dumps(fields))
    np.testing.assert_array_equal(addp_jax.load(run).sample(3), model.sample(3))
    shutil.move(tmp_path / "tokenizer", tmp_path / "moved")
    with pytest.raises(errors.UserError, match="^config.model.tokenizer_weights: nothing at .*elsewhere.*; give tokenizer=PATH"):
        addp_jax.load(run)
    np.testing.assert_array_equal(addp_jax.load(run, tokenizer=tmp_path / "moved").sample(3), model.sample(3))


def test_another_tokenizer_and_another_size_are_refused(trained, tmp_path):
    loop.train(programs.config("demo_tokenizer", seed=1), str(tmp_path / "other"))
    with pytest.raises(errors.UserError, match="addp was trained with another tokenizer than the one given"):
        addp_jax.load(trained / "addp", tokenizer=str(tmp_path / "other"))
    with pytest.raises(errors.UserError, match="holds token_predictor, not a tokenizer.*give tokenizer=PATH"):
        addp_jax.load(trained / "addp", tokenizer=str(trained / "predictor"))
    run = copied(trained, tmp_path, "addp")
    fields = json.loads((run / "config.json").read_text())
    fields["model"]["net"]["encoder"]["depth"] += 1
    (run / "config.json").write_text(json.dumps(fields))
    with pytest.raises(errors.UserError, match="trained with other settings .*depth"):
        addp_jax.load(run)


def test_mistakes_in_load(trained, tmp_path):
    run = copied(trained, tmp_path, "tokenizer")
    for arguments, kind, words in (
        (dict(path=tmp_path / "nothing"), errors.UserError, "nothing at .*nothing"),
        (dict(path=run, dtype="float16"), ValueError, "dtype: 'float16'; use float32 or bfloat16"),
        (dict(path=run, size="vith"), ValueError, "size: 'vith'; use vitb or vitl"),
        (dict(path=run, tokenizer="a"), ValueError, "tokenizer: a run of the task tokenizer has no such frozen network"),
        (dict(path=trained / "addp", tokeniser="a"), ValueError, "tokeniser: .*; it has tokenizer and predictor"),
        (dict(path=run, size="vitb"), errors.UserError, "tokenizer"),
    ):
        with pytest.raises(kind, match=words):
            addp_jax.load(**arguments)
    (run / "config.json").write_text('{"task": "tokenizer", "model": {}, "other": 1}')
    with pytest.raises(errors.UserError, match="config.json: config.other: no such field"):
        addp_jax.load(run)
    (run / "config.json").write_text("{")
    with pytest.raises(errors.UserError, match="cannot use .*config.json"):
        addp_jax.load(run)
    (run / "config.json").unlink()
    with pytest.raises(errors.UserError, match="has no config.json: .*the command that trained it writes the file"):
        addp_jax.load(run)


def test_bfloat16_can_be_asked_for(trained):
    assert addp_jax.load(trained / "addp", dtype="bfloat16").sample(2).shape == (2, S, S, 3)


# --- weight files ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "addp.safetensors"
    others = [str(trained / name) for name in ("tokenizer", "predictor")]
    convert.export_weights(str(trained / "addp"), others, str(path), "addp", True, False)
    return path


def with_config(exported, path, text):
    safetensors_numpy.save_file(safetensors_numpy.load_file(exported), path, {"addp_jax": text} if text is not None else None)
    return path


def config_of(exported):
    with open(exported, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(json.loads(file.read(length))["__metadata__"]["addp_jax"])


def test_an_exported_run_needs_nothing_else(model, exported):
    alone = addp_jax.load(exported)
    np.testing.assert_array_equal(alone.sample(3), model.sample(3))
    np.testing.assert_array_equal(alone.features(pictures(2)), model.features(pictures(2)))
    assert sorted(config_of(exported)) == ["model", "task"]


def test_exports_of_other_tasks(trained, tokenizer, classifier, tmp_path):
    convert.export_weights(str(trained / "tokenizer"), [], str(tmp_path / "t.safetensors"), "vqgan", True, False)
    images = pictures(2)
    np.testing.assert_array_equal(addp_jax.load(tmp_path / "t.safetensors").reconstruct(images), tokenizer.reconstruct(images))
    convert.export_weights(str(trained / "predictor"), [], str(tmp_path / "m.safetensors"), "mage", True, False)
    with pytest.raises(errors.UserError, match="config.model.tokenizer_weights: .*m.safetensors holds .*, not a tokenizer.*tokenizer=PATH"):
        addp_jax.load(tmp_path / "m.safetensors")
    assert len(addp_jax.load(tmp_path / "m.safetensors", tokenizer=trained / "tokenizer").sample(2)) == 2


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda f: None, "holds no config: give size="),
        (lambda f: "{", "cannot be used"),
        (lambda f: "[" * 100_000, "cannot be used"),
        (lambda f: "[1, 2]", "cannot be used"),
        (lambda f: json.dumps({"task": "addp"}), "cannot be used: 'model'"),
        (lambda f: json.dumps(f | {"model": 3}), "cannot be used"),
        (lambda f: json.dumps(f | {"task": "os"}), "no task 'os'"),
        (lambda f: json.dumps(f | {"task": ["addp"]}), "config.task: expected str"),
        (lambda f: changed(f, "net", "encoder", width=2**40), "above 16384"),
        (lambda f: changed(f, "net", "encoder", depth=9999), "net.encoder.depth is 9999, that of its tensors"),
        (lambda f: changed(f, "tokenizer", num_res_blocks=9999), "tokenizer.num_res_blocks is 9999"),
        (lambda f: changed(f, "net", "encoder", image_size=8192), "config.model"),
        (lambda f: changed(f, "sampler", steps=-1), "config.model.sampler.steps"),
        (lambda f: changed(f, "sampler", name="../os"), "use alternating or token_only"),
        (lambda f: changed(f, none=1), "config.model.none: no such field"),
    ],
)
def test_the_config_in_a_file_is_not_trusted(exported, tmp_path, change, words):
    path = with_config(exported, tmp_path / "a.safetensors", change(config_of(exported)))
    with pytest.raises(errors.UserError, match=words) as told:
        addp_jax.load(path)
    assert "\n" not in str(told.value)


def changed(fields, *where, **values):
    inner = fields["model"]
    for name in where:
        inner = inner[name]
    inner |= values
    return json.dumps(fields)


def test_a_file_of_another_size_than_the_published_is_refused(exported):
    with pytest.raises(errors.UserError, match="addp.safetensors"):
        addp_jax.load(exported, size="vitb")


@pytest.mark.parametrize("size, width, depth", [("vitb", 768, 12), ("vitl", 1024, 24)])
def test_published_sizes(exported, size, width, depth):
    task = program.create(loading.published(str(exported), size)).task
    assert (task.config.net.encoder.width, task.config.net.encoder.depth, task.config.net.decoder.width) == (width, depth, width)
    assert (task.config.predictor.encoder.depth, task.config.net.decoder.depth, task.config.net.decoder.heads) == (depth, 8, 16)
    if size == "vitb":
        assert task.config == type(task.config)()  # the defaults


def test_a_run_without_a_config_is_exported_without_one(trained, tmp_path):
    run = copied(trained, tmp_path, "tokenizer")
    (run / buckets.CONFIG).unlink()
    convert.export_weights(str(run), [], str(tmp_path / "t.safetensors"), "vqgan", True, False)
    with pytest.raises(errors.UserError, match="holds no config"):
        addp_jax.load(tmp_path / "t.safetensors")


def test_importing_the_package_alone_loads_no_library():
    code = "import sys, addp_jax; addp_jax.load; assert not {'jax', 'numpy', 'flax', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(programs.ROOT)})
