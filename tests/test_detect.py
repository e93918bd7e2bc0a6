"""Objects in own images, by the command line's modes and by the Python API; detection from COCO's files."""

import json
import pathlib

import numpy as np
import programs
import pytest
from PIL import Image
from pycocotools import mask as rle

import addp_jax
from addp_jax import errors, program
from addp_jax.data.sources import shapes
from addp_jax.program import create_training
from addp_jax.recognition import own, predict
from addp_jax.training import evaluate, loop
from addp_jax.weights import convert

pytestmark = pytest.mark.medium

SIZES = {"wide.png": (40, 90), "deep/tall.png": (100, 30), "small.png": (11, 17)}  # height, width


@pytest.fixture(scope="module")
def config():
    changes = dict(model__encoder_weights="", model__score_above=0.0, data__num_eval=11, eval_batches=0)
    changes["model__net__encoder__input_norm"] = False  # as detectron2 has it
    return programs.config("demo_detection", **changes)


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("run"))
    loop.train(config, path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return programs.photos(tmp_path_factory.mktemp("photos"), SIZES)


def test_objects_of_own_images_of_any_size(config, workdir, photos, tmp_path):
    predict.predict(program.create(config), own.Config(str(photos), str(tmp_path / "out"), batch_size=2), workdir)
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert {line["image"] for line in lines} == set(SIZES)
    for line in lines:
        height, width = SIZES[line["image"]]
        assert line["objects"]
        for thing in line["objects"]:
            assert thing["name"] in shapes.CLASSES and 0 <= thing["score"] <= 1
            x0, y0, x1, y1 = thing["box"]
            assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
            assert rle.decode(thing["mask"]).shape == (height, width)
        picture = Image.open(tmp_path / "out" / "pictures" / f"{line['image']}.png")
        assert picture.size == (width, height)


def test_the_api_finds_what_the_mode_finds(config, workdir, photos, tmp_path):
    model = addp_jax.load(workdir)
    images = [Image.open(photos / name) for name in SIZES]
    found = model.detect(images, score_above=0.0, batch_size=2)
    assert len(found) == len(SIZES)
    predict.predict(program.create(config), own.Config(str(photos), str(tmp_path / "out"), batch_size=2), workdir)
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    for name, objects in zip(SIZES, found):
        rows = next(line["objects"] for line in lines if line["image"] == name)
        assert objects.names == [row["name"] for row in rows]
        np.testing.assert_allclose(objects.boxes, [row["box"] for row in rows], rtol=1e-5, atol=1e-4)
        assert objects.masks.shape == (len(rows), *SIZES[name]) and objects.masks.dtype == bool
        assert all(np.array_equal(rle.decode(row["mask"]), mask) for row, mask in zip(rows, objects.masks))
    assert model.detect(images[0], score_above=1.0)[0].boxes.shape == (0, 4)


def test_a_run_that_finds_no_objects_says_which_does(trained):
    with pytest.raises(ValueError, match="detect: a run of the task addp cannot; load a run of detection"):
        addp_jax.load(str(trained / "addp")).detect(np.zeros((8, 8, 3), np.uint8))


def test_evaluation_writes_results_for_cocos_server(config, workdir, capsys):
    evaluate.evaluate(program.create(config), workdir)
    printed = capsys.readouterr().out.splitlines()
    figures = json.loads(printed[-1])
    assert figures["images"] == figures["of"] == 11 and -1 <= figures["bbox_AP"] <= 1 and "segm_ARl" in figures
    assert {f"bbox_AP/{name}" for name in shapes.CLASSES} & set(figures)
    rows = json.loads((files_of := pathlib.Path(workdir) / "evaluation" / "results.json").read_text())
    assert {row["image_id"] for row in rows} == set(range(11)) and str(files_of) in printed
    assert {row["category_id"] for row in rows} <= set(range(1, 9))
    assert Image.open(files_of.parent / "detections.png").size[0] > 2 * config.model["net"]["encoder"]["image_size"]


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_exported_and_imported_again_it_finds_the_same(config, workdir, photos, tmp_path, ending):
    if ending == "pth":
        pytest.importorskip("torch", reason="needs pip install torch")
    file = str(tmp_path / f"detector.{ending}")
    convert.export_weights(workdir, [], file, "detectron2", ema=True, force=False)
    convert.import_weights([file], str(tmp_path / "imported"))
    images = [np.asarray(Image.open(photos / name)) for name in SIZES]
    expected = addp_jax.load(workdir).detect(images, score_above=0.0, batch_size=2)
    (tmp_path / "imported" / "config.json").write_text((pathlib.Path(workdir) / "config.json").read_text())
    sources = [tmp_path / "imported", *([file] if ending == "safetensors" else [])]
    for found in (addp_jax.load(str(path)).detect(images, score_above=0.0, batch_size=2) for path in sources):
        for ours, theirs in zip(found, expected):
            np.testing.assert_array_equal(ours.boxes, theirs.boxes)
            np.testing.assert_array_equal(ours.masks, theirs.masks)


def coco_folder(root, categories=((3, "cat"), (7, "dog"))):
    """Images with two polygons each, as COCO's files have them; ids of categories have a hole."""
    for split, count in (("train", 8), ("val", 3)):
        (root / split).mkdir(parents=True)
        table = {"images": [], "annotations": [], "categories": [{"id": n, "name": name} for n, name in categories]}
        for n in range(count):
            pixels = np.random.default_rng(n).integers(0, 256, (50, 70, 3), np.uint8)
            Image.fromarray(pixels).save(root / split / f"{n}.png")
            table["images"].append({"id": 10 + n, "file_name": f"{n}.png", "height": 50, "width": 70})
            for k, (category, _) in enumerate(categories):
                x, y = 5 + 30 * k, 10 + n
                outline = [x, y, x + 20, y, x + 20, y + 25, x, y + 25]
                row = {"id": 1 + len(table["annotations"]), "image_id": 10 + n, "category_id": category, "iscrowd": 0}
                row |= {"bbox": [x, y, 20, 25], "area": 500, "segmentation": [outline]}
                table["annotations"].append(row)
        (root / f"{split}.json").write_text(json.dumps(table))
    return str(root)


def test_ones_own_coco_files_are_trained_on_and_evaluated(tmp_path, capsys):
    changes = dict(data__source="coco", data__path=coco_folder(tmp_path / "data"), data__train_split="train", data__eval_split="val")
    config = programs.config("demo_detection", model__encoder_weights="", data__num_train=0, data__num_eval=0, steps=2, eval_every=2,
                             model__score_above=0.0, model__net__num_classes=2, **changes)  # fmt: skip
    loop.train(config, str(tmp_path / "run"))
    evaluate.evaluate(program.create(config), str(tmp_path / "run"))
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["images"] == 3 and {"bbox_AP/cat", "segm_AP/dog"} <= set(figures)
    rows = json.loads((tmp_path / "run" / "evaluation" / "results.json").read_text())
    assert {row["image_id"] for row in rows} <= {10, 11, 12} and {row["category_id"] for row in rows} <= {3, 7}
    assert rows


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(data__source="image_folder", data__path="x"), "config.data.source: image_folder has no boxes of objects"),
        (dict(model__net__num_classes=7), "config.model.net.num_classes = 7, but the data has 8 classes"),
        (dict(model__mask_size=20), "config.model.mask_size: 20 is not a multiple of 8"),
        (dict(model__jitter=(2.0, 1.0)), "config.model.jitter"),
        (dict(model__net__encoder__patch_size=6, model__net__encoder__image_size=72), "config.model.net.encoder"),
    ],
)
def test_what_does_not_fit_is_named(changes, message, tmp_path):
    if "data__path" in changes:
        changes = changes | {"data__path": coco_folder(tmp_path / "data"), "data__num_train": 0, "data__num_eval": 0}
    with pytest.raises(errors.UserError, match=message):
        create_training(programs.config("demo_detection", **changes))
