"""Own images to predictions and to features; robustness sets to accuracies."""

import functools
import json

import grain
import jax
import msgpack
import numpy as np
import programs
import pytest
from PIL import Image

from addp_jax import errors
from addp_jax.metrics import classification as metrics
from addp_jax.program import create, create_training
from addp_jax.recognition import own, predict, robustness
from addp_jax.weights import checkpoint

pytestmark = pytest.mark.medium

WNIDS = [f"n{number:08d}" for number in range(8)]


@pytest.fixture(scope="module")
def program():
    config = programs.config("demo_classification", model__encoder_weights="", data__class_names="")
    return create_training(config, num_train=64)


@pytest.fixture(scope="module")
def workdir(program, tmp_path_factory):
    """A run whose head tells images apart."""
    path = tmp_path_factory.mktemp("run")
    with jax.set_mesh(program.mesh):
        params = jax.tree.map(np.asarray, program.init(jax.random.key(0)).params)
    head = params["classifier"]["dense_out"]
    head["kernel"] = np.random.default_rng(0).normal(size=head["kernel"].shape).astype(np.float32)
    checkpoint.save_params(str(path), params, {})
    return str(path)


def photos(folder, names, seed=0):
    rng = np.random.default_rng(seed)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(folder / name)
    return str(folder)


def test_predictions_name_five_classes_and_show_a_sheet(program, workdir, tmp_path):
    images = photos(tmp_path / "own", [f"{n}.png" for n in range(11)])
    predict.predict(program, own.Config(images, str(tmp_path / "out"), batch_size=8), workdir)
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert sorted(line["image"] for line in lines) == sorted(f"{n}.png" for n in range(11))
    for line in lines:
        names, scores = zip(*line["top"])
        assert len(set(names)) == 5 and set(names) <= {f"class {n}" for n in range(8)}
        assert list(scores) == sorted(scores, reverse=True) and 0 < sum(scores) <= 1.001
    assert len({line["top"][0][0] for line in lines}) > 1
    assert np.asarray(Image.open(tmp_path / "out" / "predictions.png")).ndim == 3


def test_features_of_a_folder_are_written_for_other_tools(program, workdir, tmp_path):
    images = photos(tmp_path / "own", ["dog/b.png", "cat/a.png", "dog/deep/c.png"])
    for kind in own.FORMATS:
        predict.write_features(program, own.Config(images, str(tmp_path / "out"), batch_size=8, format=kind), workdir)
    with np.load(tmp_path / "out" / "features.npz") as file:
        arrays = dict(file)
    assert arrays["features"].shape == (3, 16) and arrays["features"].dtype == np.float32
    assert list(arrays["paths"]) == ["cat/a.png", "dog/b.png", "dog/deep/c.png"]
    assert list(arrays["classes"][arrays["labels"]]) == ["cat", "dog", "dog"]
    for n, raw in enumerate(grain.sources.ArrayRecordDataSource([str(tmp_path / "out" / "features.array_record")])):
        record = msgpack.unpackb(raw)
        np.testing.assert_array_equal(np.frombuffer(record["features"], "<f4"), arrays["features"][n])
        assert (record["label"], record["path"]) == (arrays["labels"][n], arrays["paths"][n])


def test_features_of_a_frozen_encoder_need_no_trained_probe(tmp_path):
    program = create_training(programs.config("demo_probe", model__encoder_weights="random"), num_train=256)
    images = photos(tmp_path / "own", ["a.png"])
    predict.write_features(program, own.Config(images, batch_size=8), str(tmp_path / "nothing_here"))
    assert np.load(tmp_path / "nothing_here" / "features" / "features.npz")["features"].shape == (1, 16)


def test_class_names_come_from_a_file_or_the_run_else_are_numbers(program, tmp_path, capsys):
    recorded = {"data": {"classes": [f"kind {n}" for n in range(8)]}}
    assert own.recorded_names(program, recorded, "run") == tuple(recorded["data"]["classes"])
    assert own.recorded_names(program, {}, "run") == tuple(f"class {n}" for n in range(8))
    assert "numbered" in capsys.readouterr().out
    named = functools.partial(programs.config, "demo_classification", model__encoder_weights="")

    def of(text: bytes):
        (tmp_path / "names.txt").write_bytes(text)
        return own.given_names(create(named(data__class_names=str(tmp_path / "names.txt"))))

    eight = [f"own {n}" for n in range(8)]
    assert of("\n".join(eight).encode()) == tuple(eight)
    assert of(b"\xef\xbb\xbf" + "\r\n".join(eight).encode() + b"\r\n\r\n") == tuple(eight)
    for text, message in (
        (b"one\ntwo\n", "has 2 names, but the network has 8 classes"),
        ("\n".join([*eight, "more"]).encode(), "has 9 names"),
        (b"one\n\nthree\n", "line 2: '' is no name"),
        (b"one\ntwo\none\n", "line 3: 'one' stands in line 1"),
        (b"one\x1b[2J\n", "line 1"),
        (b"\xff\xfe", "cannot read"),
    ):
        with pytest.raises(errors.UserError, match=f"config.data.class_names: .*{message}"):
            of(text)
    with pytest.raises(errors.UserError, match="config.data.class_names"):
        own.given_names(create(named(data__class_names=str(tmp_path / "no.txt"))))


@pytest.mark.parametrize("mode", (predict.predict, predict.write_features))
def test_unreadable_images_are_left_out_and_named_at_the_end(program, workdir, tmp_path, mode):
    images = photos(tmp_path / "own", [f"{n}.png" for n in range(10)])
    whole = (tmp_path / "own" / "3.png").read_bytes()
    (tmp_path / "own" / "3.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "own" / "9.png").write_text("<html>")
    with pytest.raises(errors.UserError, match=r"2 of 10 files cannot be read: .*3\.png; .*9\.png"):
        mode(program, own.Config(images, str(tmp_path / "out"), batch_size=8), workdir)
    if mode is predict.predict:
        lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
        assert [json.loads(line)["image"] for line in lines] == [f"{n}.png" for n in range(10) if n not in (3, 9)]
    else:
        arrays = np.load(tmp_path / "out" / "features.npz")
        assert len(arrays["features"]) == 8 and "3.png" not in arrays["paths"]


def test_only_unreadable_images_are_one_line(program, workdir, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a.png").write_text("text")
    with pytest.raises(errors.UserError, match="can be read"):
        predict.predict(program, own.Config(str(tmp_path / "own"), str(tmp_path / "out"), batch_size=8), workdir)


def test_an_output_that_cannot_be_written_or_lies_among_the_images_is_refused_at_once(program, tmp_path):
    images = photos(tmp_path / "own", ["a.png"])
    (tmp_path / "taken").write_text("")
    for output, message in ((tmp_path / "taken" / "out", "cannot write"), (images, "among"), (tmp_path / "own" / "x", "among")):
        with pytest.raises(errors.UserError, match=f"config.predict.output: .*{message}"):
            predict.predict(program, own.Config(images, str(output), batch_size=8), "no run is read")


def test_what_cannot_be_predicted_is_refused(program, workdir, tmp_path):
    with pytest.raises(ValueError, match="format: 'csv'; use npz or array_record"):
        own.Config(format="csv")
    with pytest.raises(errors.UserError, match="config.predict.images is empty"):
        predict.predict(program, own.Config(), workdir)
    with pytest.raises(errors.UserError, match="config.predict.images: no images"):
        predict.predict(program, own.Config(str(tmp_path)), workdir)
    tokenizer = create_training(programs.config("demo_tokenizer"), num_train=64)
    with pytest.raises(errors.UserError, match="config.task: tokenizer does not have features of images; use addp or"):
        predict.write_features(tokenizer, own.Config(str(tmp_path)), workdir)


@pytest.fixture(scope="module")
def named(program, tmp_path_factory):
    """The program with the WNIDs as class names."""
    path = tmp_path_factory.mktemp("names") / "wnids.txt"
    path.write_text("\n".join(WNIDS))
    config = programs.config("demo_classification", model__encoder_weights="", data__class_names=str(path))
    return create_training(config, num_train=64)


def test_subsets_are_matched_by_folder_name_and_only_their_classes_compete(named, workdir, tmp_path, capsys):
    """With one class there is nothing to confuse it with; folders of no known class are left out."""
    alone = photos(tmp_path / "a", [f"{WNIDS[5]}/{n}.png" for n in range(6)] + ["n99999999/x.png"])
    pair = photos(tmp_path / "r", [f"{WNIDS[k]}/{n}.png" for k in (2, 6) for n in range(20)])
    robustness.robustness(named, robustness.Config(imagenet_a=alone, imagenet_r=pair), workdir)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["imagenet_a"] == 1.0
    assert 0.1 < result["imagenet_r"] < 0.9  # a network that has learned nothing, two classes


def test_mce_is_the_mean_error_relative_to_alexnet(tmp_path):
    calls = []
    for name in metrics.ALEXNET:
        for level in range(1, 6):
            (tmp_path / name / str(level)).mkdir(parents=True)

    def top1(folder, field):
        calls.append(folder)
        return 1 - metrics.ALEXNET[folder.split("/")[-2]] / 2

    error = robustness.corruption_errors(top1, str(tmp_path))
    assert len(calls) == 75
    assert metrics.mean_corruption_error(error) == pytest.approx(0.5)
    (tmp_path / "fog" / "3").rmdir()
    with pytest.raises(errors.UserError, match="config.robustness.imagenet_c: no folder .*fog/3"):
        robustness.require_folders(robustness.Config(imagenet_c=str(tmp_path)))


def test_robustness_needs_folders_with_known_classes(named, workdir, tmp_path):
    with pytest.raises(errors.UserError, match="config.robustness: all folders are empty"):
        robustness.robustness(named, robustness.Config(), workdir)
    with pytest.raises(errors.UserError, match="config.robustness.imagenet_c: .*gaussian_noise/1"):
        robustness.robustness(named, robustness.Config(imagenet_c=str(tmp_path)), workdir)
    (tmp_path / "names.txt").write_text("\n".join([*WNIDS, "n99999999"]))
    fields = dict(model__encoder_weights="", data__class_names=str(tmp_path / "names.txt"))
    with pytest.raises(errors.UserError, match="config.data.class_names: .* has 9 names, but the network has 8 classes"):
        more = create_training(programs.config("demo_classification", **fields), num_train=64)
        robustness.robustness(more, robustness.Config(imagenet_a=str(tmp_path)), workdir)
