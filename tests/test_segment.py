"""The class of every pixel in own images, by the command line's modes and by the Python API; own label maps."""

import json

import numpy as np
import programs
import pytest
from PIL import Image

import addp_jax
from addp_jax import errors, program
from addp_jax.data import segmentation
from addp_jax.data.sources import shapes
from addp_jax.program import create_training
from addp_jax.recognition import own, predict
from addp_jax.training import evaluate, loop

pytestmark = pytest.mark.medium

SIZES = {"wide.png": (40, 90), "deep/tall.png": (100, 30), "small.png": (11, 17)}  # height, width
CLASSES = ("background", *shapes.CLASSES)


@pytest.fixture(scope="module")
def config():
    return programs.config("demo_segmentation", model__encoder_weights="", data__num_eval=5, eval_batches=0)


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("run"))
    loop.train(config, path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return programs.photos(tmp_path_factory.mktemp("photos"), SIZES)


def test_own_images_of_any_size_and_the_api(config, workdir, photos, tmp_path, capsys):
    predict.predict(program.create(config), own.Config(str(photos), str(tmp_path / "out")), workdir)
    assert str(tmp_path / "out" / "labels") in capsys.readouterr().out
    assert (tmp_path / "out" / "classes.txt").read_text().splitlines() == list(CLASSES)
    model = addp_jax.load(workdir)
    assert model.classes == CLASSES
    found = model.segment([Image.open(photos / name) for name in SIZES], batch_size=3)
    for name, label in zip(SIZES, found):
        assert label.shape == SIZES[name] and label.dtype == np.uint8 and label.max() < len(CLASSES)
        path = tmp_path / "out" / "labels" / name
        np.testing.assert_array_equal(segmentation.decode(path.read_bytes(), str(path)), label)
        picture = Image.open(tmp_path / "out" / "pictures" / name)
        assert picture.size[0] == SIZES[name][1] and picture.size[1] > SIZES[name][0]


def test_images_that_cannot_be_read_or_would_share_a_file_are_named(config, workdir, photos, tmp_path):
    (tmp_path / "photos").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "photos" / name).write_bytes((photos / "wide.png").read_bytes())
    (tmp_path / "photos" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    settings = own.Config(str(tmp_path / "photos"), str(tmp_path / "out"))
    with pytest.raises(errors.UserError, match="config.predict.images: 1 of 2 files cannot be read: .*a.png"):
        predict.predict(program.create(config), settings, workdir)
    assert (tmp_path / "out" / "labels" / "b.png").exists()
    (tmp_path / "photos" / "b.jpg").write_bytes((photos / "wide.png").read_bytes())
    with pytest.raises(errors.UserError, match="config.predict.images: b.jpg and b.png would share a label map"):
        predict.predict(program.create(config), settings, workdir)


def test_a_run_that_segments_nothing_says_which_does(trained):
    with pytest.raises(ValueError, match="segment: a run of the task addp cannot; load a run of segmentation"):
        addp_jax.load(str(trained / "addp")).segment(np.zeros((8, 8, 3), np.uint8))


def test_evaluation_writes_the_table_of_classes(config, workdir, capsys):
    evaluate.evaluate(program.create(config), workdir)
    printed = capsys.readouterr().out.splitlines()
    figures = json.loads(printed[-1])
    assert figures["images"] == figures["of"] == 5 and 0 <= figures["mIoU"] <= figures["mAcc"] <= 1
    assert "IoU/background" in figures
    table = programs.pathlib.Path(workdir) / "evaluation" / "IoU.json"
    rows = json.loads(table.read_text())
    assert [row["class"] for row in rows] == list(CLASSES) and str(table) in printed
    side = config.model["net"]["encoder"]["image_size"]
    assert sum(row["pixels"] for row in rows) == 5 * side**2
    assert Image.open(table.parent / "segmentation.png").size[0] >= 2 * side


def label_maps(root, classes=3):
    """ADE20k's layout, images of differing sizes; 0 = other."""
    for split, count in (("training", 8), ("validation", 3)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for n in range(count):
            height, width = 30 + 11 * n, 90 - 7 * n
            rng = np.random.default_rng(n)
            Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(root / "images" / split / f"{n}.png")
            label = np.kron(rng.integers(0, 1 + classes, (2, 2), np.uint8), np.ones((60, 60), np.uint8))[:height, :width]
            Image.fromarray(label).save(root / "annotations" / split / f"{n}.png")
    return str(root)


def test_ones_own_label_maps_are_trained_on_evaluated_and_written(photos, tmp_path, capsys):
    changes = dict(data__path=label_maps(tmp_path / "data"), data__source="label_maps", data__train_split="training")
    config = programs.config("ade20k", **changes, data__eval_split="validation", data__num_train=0, data__num_eval=0,
                             steps=2, eval_every=2, model__net__num_classes=3, eval_batches=0)  # fmt: skip
    loop.train(config, str(tmp_path / "run"))
    evaluate.evaluate(program.create(config), str(tmp_path / "run"))
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["images"] == 3 and 0 <= figures["aAcc"] <= 1
    predict.predict(program.create(config), own.Config(str(photos), str(tmp_path / "out")), str(tmp_path / "run"))
    label = np.asarray(Image.open(tmp_path / "out" / "labels" / "wide.png"))
    assert label.shape == SIZES["wide.png"] and 1 <= label.min() <= label.max() <= 3  # as the data counts
    assert "classes are numbered" in capsys.readouterr().out
    (tmp_path / "data" / "annotations" / "validation" / "1.png").unlink()
    with pytest.raises(errors.UserError, match="config.data.path: no label map .*validation/1.png"):
        evaluate.evaluate(program.create(config), str(tmp_path / "run"))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(data__source="image_folder"), "config.data.source: image_folder has no label maps; use label_maps or shapes"),
        (dict(model__net__num_classes=8), "config.model.net.num_classes = 8, but the data has 9 classes: .*background"),
        (dict(model__net__num_classes=256), "config.model.*num_classes: 256"),
        (dict(model__scale=(2.0, 1.0)), "config.model.*scale"),
        (dict(model__windows__mode="whole"), "config.model.*windows.mode"),
        (dict(model__windows__batch=0), "config.model.windows.batch: 0"),
        (dict(model__net__encoder__image_size=33), "config.model.net.encoder"),
        (dict(model__encoder_weights="nowhere"), "config.model.encoder_weights: nothing at 'nowhere'"),
    ],
)
def test_what_does_not_fit_is_named(changes, message, tmp_path):
    if "data__source" in changes:
        images = f"{label_maps(tmp_path / 'data')}/images/training"
        changes = changes | {"data__path": images, "data__num_train": 0, "data__num_eval": 0}
    changes = {"model__encoder_weights": ""} | changes
    with pytest.raises(errors.UserError, match=message) as caught:
        create_training(programs.config("demo_segmentation", **changes), num_train=0).task.load_pretrained()
    assert "\n" not in str(caught.value) and "--" not in str(caught.value)
