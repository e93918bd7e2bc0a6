"""COCO's annotations as a source, and the transforms of detection."""

import copy
import json
import pathlib
import pickle

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from addp_jax import errors
from addp_jax.data import coco, coco_json, part, pipeline, sources, walk
from addp_jax.data.sources import shapes

GOLDEN = pathlib.Path(__file__).parent / "golden" / "dense"
pytestmark = pytest.mark.golden


def outline(centre, radius, points=9, seed=0):
    """A wavy polygon: x, y, x, y, ..."""
    rng = np.random.default_rng(seed)
    angles = np.arange(points) / points * 2 * np.pi
    reach = radius * rng.uniform(0.6, 1, points)
    return np.stack([centre[0] + reach * np.cos(angles), centre[1] + reach * np.sin(angles)], 1).round(2).reshape(-1).tolist()


def annotation(number, image_id, category_id, polygon, **more):
    points = np.reshape(polygon, (-1, 2))
    low, high = points.min(0), points.max(0)
    row = {"id": number, "image_id": image_id, "category_id": category_id, "bbox": [*low.tolist(), *(high - low).tolist()]}
    return row | {"segmentation": [polygon], "area": 1.0, "iscrowd": 0} | more


def encoded(mask):
    found = rle.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(mask.shape), "counts": found["counts"].decode()}


BLOCK = np.zeros((40, 60), bool)
BLOCK[10:20, 30:45] = True
CONTENT = {
    "images": [
        {"id": 9, "file_name": "nine.png", "height": 40, "width": 60},
        {"id": 4, "file_name": "four.png", "height": 50, "width": 30},
        {"id": 7, "file_name": "seven.png", "height": 40, "width": 60},
    ],
    "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}],
    "annotations": [
        annotation(1, 9, 18, outline((20, 20), 12)),
        annotation(2, 9, 3, [30, 10, 45, 10, 45, 20, 30, 20], segmentation=encoded(BLOCK)),
        annotation(3, 4, 3, outline((15, 25), 10)),
        annotation(4, 7, 3, [0, 0, 60, 0, 60, 40, 0, 40], segmentation=encoded(~BLOCK), iscrowd=1),
    ],
}


def write_set(root, content=CONTENT, name="annotations/instances_tiny"):
    (root / "annotations").mkdir(exist_ok=True)
    (root / "tiny").mkdir(exist_ok=True)
    (root / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    for n, row in enumerate(CONTENT["images"]):
        pixels = np.random.default_rng(n).integers(0, 256, (row["height"], row["width"], 3), np.uint8)
        Image.fromarray(pixels).save(root / "tiny" / row["file_name"])
    return root


def open_set(root, split="eval", name="instances_tiny"):
    config = pipeline.Config(source="coco", path=str(root), train_split=name, eval_split=name)
    return sources.open_split(config, split, 64)


def unpacked(masks):
    return np.unpackbits(masks, axis=-1).astype(bool)


def changed(table, position, **values):
    """CONTENT with one row changed; a value None takes the field away."""
    content = copy.deepcopy(CONTENT)
    row = content[table][position]
    row.update(values)
    content[table][position] = {key: value for key, value in row.items() if value is not None}
    return content


def test_classes_are_numbered_without_holes_and_images_sorted(tmp_path):
    source = open_set(write_set(tmp_path))
    assert source.classes == ("car", "dog") and source.category_ids == (3, 18) and not source.labelled
    assert source.image_ids.tolist() == [4, 7, 9] and isinstance(source, sources.Source)
    example = source[2]
    assert example["classes"].tolist() == [1, 0] and example["original_size"].tolist() == [40, 60]
    np.testing.assert_array_equal(example["boxes"][1], [30, 10, 45, 20])
    np.testing.assert_allclose(example["outlines"][0][0].reshape(-1), CONTENT["annotations"][0]["segmentation"][0], rtol=1e-6)
    np.testing.assert_array_equal(example["outlines"][1], BLOCK)
    assert source[1]["outlines"] == [] and source[1]["label"] == -1


def test_training_drops_crowds_and_images_without_objects(tmp_path):
    source = open_set(write_set(tmp_path), "train")
    assert source.image_ids.tolist() == [4, 9]
    assert [len(source[i]["classes"]) for i in range(2)] == [1, 2]


def test_both_layouts_of_folders_are_understood(tmp_path):
    assert len(open_set(write_set(tmp_path, name="tiny"), name="tiny")) == 3
    with pytest.raises(errors.UserError, match="neither .*annotations/other.json nor .*other.json"):
        open_set(tmp_path, name="other")
    (tmp_path / "alone.json").write_text("{}")
    with pytest.raises(errors.UserError, match="no folder .*alone"):
        open_set(tmp_path, name="alone")


def test_a_source_pickles_and_its_fingerprint_tells_its_objects(tmp_path):
    source = open_set(write_set(tmp_path))
    copied = pickle.loads(pickle.dumps(source))
    assert copied.fingerprint() == source.fingerprint() and copied[0]["image_id"] == 4
    write_set(tmp_path, changed("annotations", 0, category_id=3))
    assert open_set(tmp_path).fingerprint() != source.fingerprint()
    assert len(part.Part(source, 2)) == 2


WRONG = {
    "broken": ('{"images": [', "cannot read"),
    "nested": ("[" * 100_000, "cannot read"),
    "list": ([1], "no object with images"),
    "no images": ({"categories": [], "annotations": []}, "no list 'images'"),
    "no pictures": (CONTENT | {"images": []}, "lists no images"),
    "no categories": (CONTENT | {"categories": []}, "lists no categories"),
    "row": (CONTENT | {"images": [3]}, "it is no object"),
    "twice": (CONTENT | {"images": CONTENT["images"][:1] * 2}, "id 9: its id comes twice"),
    "text id": (changed("images", 0, id="9"), "its id '9' is no whole number"),
    "name": (changed("images", 0, file_name="../../etc/passwd"), "leads out of the folder"),
    "no name": (changed("images", 0, file_name=None), "no file_name"),
    "size": (changed("images", 0, height=-1), "height and width"),
    "category name": (changed("categories", 0, name=None), "no name"),
    "no box": (changed("annotations", 0, bbox=None), "annotations, id 1: its bbox is None"),
    "box of text": (changed("annotations", 0, bbox=[1, 2, 3, "4"]), "its bbox is"),
    "infinite": (changed("annotations", 0, bbox=[1, 2, 3, float("inf")]), "its bbox is"),
    "outside": (changed("annotations", 0, bbox=[100, 100, 5, 5]), "lies outside the image of 60x40"),
    "category": (changed("annotations", 0, category_id=5), "there is no category 5"),
    "list category": (changed("annotations", 0, category_id=[5]), "there is no category"),
    "image": (changed("annotations", 0, image_id=5), "there is no image 5"),
    "polygon": (changed("annotations", 0, segmentation=[[1, 2, "3", 4, 5, 6]]), "no list of numbers"),
    "huge": (changed("annotations", 0, segmentation=[[1, 2, 10**400, 4, 5, 6]]), "no list of numbers"),
    "nan": (changed("annotations", 0, segmentation=[[1, 2, float("nan"), 4, 5, 6]]), "no list of numbers"),
    "number": (changed("annotations", 0, segmentation=5), "neither polygons nor RLE"),
    "RLE size": (changed("annotations", 1, segmentation=encoded(BLOCK[:30])), "RLE is for \\[30, 60\\]"),
    "RLE short": (changed("annotations", 1, segmentation={"size": [40, 60], "counts": [5, 6]}), "covers 11 of 2400"),
    "RLE minus": (changed("annotations", 1, segmentation={"size": [40, 60], "counts": [2401, -1]}), "no runs of pixels"),
    "RLE text": (changed("annotations", 1, segmentation={"size": [40, 60], "counts": "\u20ac"}), "damaged"),
    "RLE long": (changed("annotations", 1, segmentation={"size": [40, 60], "counts": "o" * 99}), "damaged"),
    "RLE cut": (changed("annotations", 1, segmentation={"size": [40, 60], "counts": "o"}), "middle of a number"),
}


@pytest.mark.parametrize("content, message", WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_refused_in_one_line(tmp_path, content, message):
    with pytest.raises(errors.UserError, match=message) as caught:
        open_set(write_set(tmp_path, content))
    assert "\n" not in str(caught.value) and "instances_tiny.json" in str(caught.value)


def test_no_annotations_are_refused_in_training_and_said_in_evaluation(tmp_path, capsys):
    write_set(tmp_path, {key: value for key, value in CONTENT.items() if key != "annotations"})
    with pytest.raises(errors.UserError, match="no annotations of objects"):
        open_set(tmp_path, "train")
    walk._announced.clear()
    assert len(open_set(tmp_path)) == 3 and "nothing to compare" in capsys.readouterr().err


def test_what_is_left_out_is_said_once(tmp_path, capsys):
    content = copy.deepcopy(CONTENT)
    content["annotations"][0]["segmentation"].append([1, 2, 3, 4])
    content["annotations"][1]["segmentation"] = [[1, 2, 3, 4], [1, 2, 3, 4, 5]]
    content["annotations"][2]["bbox"][2] = 0
    walk._announced.clear()
    source = open_set(write_set(tmp_path, content))
    open_set(tmp_path)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and "3 polygons of fewer" in said[0]
    assert [len(source[i]["classes"]) for i in range(3)] == [0, 0, 1] and len(source[2]["outlines"][0]) == 1


def test_an_object_without_outline_has_that_of_its_box(tmp_path):
    source = open_set(write_set(tmp_path, changed("annotations", 2, segmentation=None, bbox=[5, 6, 7, 8])))
    np.testing.assert_array_equal(source[0]["outlines"][0], [[[5, 6], [12, 6], [12, 14], [5, 14]]])


def test_images_are_checked_when_they_are_read(tmp_path):
    source, rng = open_set(write_set(tmp_path)), np.random.default_rng(0)
    Image.new("RGB", (30, 51)).save(tmp_path / "tiny" / "four.png")
    with pytest.raises(errors.Unreadable, match="four.png has 30x51 pixels, but its annotations are for 30x50"):
        coco.EvalDetection(64)(source[0], rng)
    (tmp_path / "tiny" / "four.png").unlink()
    with pytest.raises(errors.Unreadable, match="cannot read .*four.png"):
        source[0]


def test_ground_truth_is_the_file_with_crowds_and_what_was_missing(tmp_path):
    content = changed("annotations", 2, area=None, iscrowd=None, id=None)
    truth = open_set(write_set(tmp_path, content)).ground_truth()
    assert [row["iscrowd"] for row in truth["annotations"]] == [0, 0, 0, 1]
    assert truth["annotations"][2]["id"] == 3 and truth["annotations"][2]["area"] > 100
    assert [row["id"] for row in truth["categories"]] == [3, 18]


# --- against detectron2 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", range(6))
def test_jitter_is_detectron2s(case):
    golden = np.load(GOLDEN / "augment.npz")
    scale, flip, at = golden["cases"][case]
    placement = coco.jittered((60, 84), 64, bool(flip), scale, at)
    polygons = [[golden[f"polygon_{n}"].reshape(-1, 2)] for n in range(3)]
    image, expected = coco.place_image(golden["image"], placement, 64), golden[f"case{case}_image"]
    assert placement.size == expected.shape[:2]
    np.testing.assert_array_equal(image[: placement.size[0], : placement.size[1]], expected)
    assert (image[placement.size[0] :] == coco.PADDING).all() and (image[:, placement.size[1] :] == coco.PADDING).all()
    placed = {n: coco.place_outline(polygon, placement) for n, polygon in enumerate(polygons)}
    placed = {n: found for n, found in placed.items() if found}
    assert list(placed) == golden[f"case{case}_polygon_classes"].tolist()
    boxes = np.array([box for box, _ in placed.values()])
    np.testing.assert_allclose(boxes, golden[f"case{case}_polygon_boxes"], atol=4e-6)
    if scale > 0.3:  # below, an object has a handful of pixels
        bitmasks = np.unpackbits(golden[f"case{case}_bitmasks"], axis=-1)[:, :, : placement.size[1]].astype(bool)
        for (box, draw), bitmask in zip(placed.values(), bitmasks):
            assert iou(resampled(draw(112), box, grid(placement.size)), bitmask) > 0.85


def test_evaluation_sizes_are_detectron2s():
    for height, width, *resized in np.load(GOLDEN / "augment.npz")["test_resize"].tolist():
        assert list(coco.fitted((height, width), 1024).resized) == resized


def iou(one, other):
    return (one & other).sum() / (one | other).sum()


def grid(size):
    """Centres (y, x) of the pixels of an image."""
    return tuple(np.arange(side) + 0.5 for side in size)


def resampled(mask, box, centres):
    """The object at rows and columns `centres` (y, x): bilinear in its mask within its box, 0 outside, at least 1/2."""
    side = len(mask)
    weights = []
    for axis in (1, 0):
        at = (centres[1 - axis] - box[axis]) / (box[axis + 2] - box[axis]) * side - 0.5
        weights.append(np.maximum(0, 1 - np.abs(at[:, None] - np.arange(side))))
    return weights[0] @ mask @ weights[1].T >= 0.5


def target(polygons, box):
    """detectron2's mask target: `rasterize_polygons_within_box` at 28."""
    stretch = 28 / np.maximum(box[2:] - box[:2], 0.1)
    flat = [((polygon - box[:2]) * stretch).reshape(-1).tolist() for polygon in polygons]
    return rle.decode(rle.merge(rle.frPyObjects(flat, 28, 28))).astype(bool)


def test_mask_targets_follow_from_packed_masks():
    """Of proposals that overlap an object by half and more."""
    rng, overlaps = np.random.default_rng(0), []
    for n in range(100):
        polygon = np.reshape(outline((300, 300), rng.uniform(15, 280), rng.integers(5, 40), n), (-1, 2))
        box, draw = coco.place_outline([polygon], coco.jittered((600, 600), 600, False, 1.0, 0.0))
        mask = unpacked(np.packbits(draw(112), axis=-1))
        sides = np.tile(box[2:] - box[:2], 2)
        for shift in rng.uniform(-0.15, 0.15, (4, 4)):
            proposal = box + shift * sides
            cells = (np.arange(28) + 0.5) / 28
            centres = [proposal[axis] + cells * (proposal[axis + 2] - proposal[axis]) for axis in (1, 0)]
            overlaps.append(iou(resampled(mask, box, centres), target([polygon], proposal)))
    assert np.mean(overlaps) >= 0.97, np.mean(overlaps)


# --- geometry ---------------------------------------------------------------------------------------------------------------


def painted(polygon, size, fine=8):
    """bool [size * fine]^2, whether centres of small cells lie within a polygon: even-odd, by itself."""
    y, x = np.meshgrid(*[(np.arange(side * fine) + 0.5) / fine for side in size], indexing="ij")
    inside = np.zeros(y.shape, bool)
    for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, 0)):
        if y0 != y1:
            inside ^= ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) / (y1 - y0) * (x1 - x0))
    return inside


@pytest.mark.parametrize("seed", range(30))
def test_boxes_hold_what_is_left_of_polygons(seed):
    rng = np.random.default_rng(seed)
    polygon = np.reshape(outline(rng.uniform(-5, 35, 2), rng.uniform(5, 40), 12, seed), (-1, 2))
    left = painted(polygon, (30, 30))
    placed = coco.place_outline([polygon], coco.Placement(False, (30, 30), (30, 30), (0, 0), (30, 30)))
    if left.sum() < 2:
        return
    box, draw = placed
    rows, columns = np.flatnonzero(left.any(1)), np.flatnonzero(left.any(0))
    seen = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / 8
    assert (box[:2] <= seen[:2] + 0.13).all() and (box[2:] >= seen[2:] - 0.13).all()  # a cell has 0.125
    assert np.abs(box - seen).max() < 1  # a sharp tip may lie between the centres of cells
    assert iou(resampled(draw(112), box, [np.arange(240) / 8 + 1 / 16] * 2), left) > 0.9


def test_a_polygon_that_falls_apart_reaches_no_corner_by_its_bridge():
    """A bracket around the left top corner enters the picture with its lower arm; an arch with its right foot."""
    bracket = np.array([[-10, -10], [20, -10], [20, -5], [-5, -5], [-5, 5], [20, 5], [20, 10], [-10, 10]], float)
    box, draw = coco.place_outline([bracket], coco.Placement(False, (30, 30), (30, 30), (0, 0), (30, 30)))
    np.testing.assert_array_equal(box, [0, 5, 20, 10])
    assert draw(16).all()
    arch = np.array([[-10, 20], [-10, -10], [20, -10], [20, 5], [15, 5], [15, -5], [-5, -5], [-5, 20]], float)
    box, draw = coco.place_outline([arch], coco.Placement(False, (30, 30), (30, 30), (0, 0), (30, 30)))
    np.testing.assert_array_equal(box, [15, 0, 20, 5])
    assert draw(16).all()
    around = np.array([[-9, -9], [40, -9], [40, 40], [35, 40], [35, -5], [-5, -5], [-5, 40], [-9, 40]], float)
    assert coco.place_outline([around], coco.Placement(False, (30, 30), (30, 30), (0, 0), (30, 30))) is None
    whole = np.array([[-9, -9], [40, -9], [40, 40], [-9, 40]], float)
    exact = np.array([[0, 0], [30, 0], [30, 20], [0, 20]], float)
    diamond = np.array([[-10, 10], [15, -15], [40, 10], [15, 35]], float)  # its sides pass through the corners
    for polygon in (whole, exact, exact[::-1], diamond):
        box, draw = coco.place_outline([polygon], coco.Placement(False, (20, 30), (20, 30), (0, 0), (20, 30)))
        np.testing.assert_array_equal(box, [0, 0, 30, 20])
        assert draw(16).all()


def test_polygons_and_bitmaps_are_moved_alike():
    polygon = [np.array([[30, 10], [45, 10], [45, 20], [30, 20]], float)]
    for seed in range(20):
        rng = np.random.default_rng(seed)
        placement = coco.jittered((40, 60), 48, seed % 2 == 0, rng.uniform(0.3, 2), rng.random())
        one, other = (coco.place_outline(shape, placement) for shape in (polygon, BLOCK))
        assert (one is None) == (other is None)
        if one:
            np.testing.assert_allclose(one[0], other[0], atol=1e-9)
            np.testing.assert_array_equal(one[1](32), other[1](32))


def test_a_sliver_of_a_long_object_is_drawn_in_little_memory():
    """Its box is thin, so that its polygon would be stretched to a million cells."""
    placement = coco.Placement(False, (600, 600), (600, 600), (0, 0), (600, 600))
    box, draw = coco.place_outline([np.array([[-500, 0], [1e-4, 0], [1e-4, 600], [-500, 600]], float)], placement)
    assert box[2] == 1e-4 and draw(112).all()


def test_the_narrowest_picture_keeps_a_pixel():
    assert coco.jittered((3, 4000), 64, False, 0.1, 0.5).resized == (1, 6)
    assert coco.fitted((4000, 1), 64).resized == (64, 1)


# --- transforms -------------------------------------------------------------------------------------------------------------

SHAPES = {"image": (64, 64, 3), "size": (2,), "boxes": (5, 4), "classes": (5,), "masks": (5, 32, 4), "index": ()}


def test_transforms_give_fixed_shapes(tmp_path):
    source = open_set(write_set(tmp_path))
    for transform in (coco.TrainDetection(64, 5, 32), coco.EvalDetection(64, 5, 32)):
        for i in range(3):
            example = transform(source[i], np.random.default_rng(i))
            assert {name: example[name].shape for name in SHAPES} == SHAPES
            count = (example["classes"] >= 0).sum()
            assert (example["classes"][count:] == -1).all() and not example["boxes"][count:].any()
            assert unpacked(example["masks"])[:count].any((1, 2)).all() and not example["masks"][count:].any()
            height, width = example["size"]
            assert (example["boxes"] <= [width, height, width, height]).all()
    assert example["image_id"] == 9 and example["original_size"].tolist() == [40, 60]
    np.testing.assert_allclose(example["scale"], [43 / 40, 64 / 60], rtol=1e-6)
    assert example["image"].dtype == np.uint8 and example["boxes"].dtype == np.float32


def test_masks_of_the_evaluation_lie_over_their_objects(tmp_path):
    example = coco.EvalDetection(60, 5, 112)(open_set(write_set(tmp_path))[2], None)
    box, mask = example["boxes"][1], unpacked(example["masks"])[1]
    np.testing.assert_array_equal(box, [30, 10, 45, 20])
    np.testing.assert_array_equal(resampled(mask, box, grid((40, 60))), BLOCK)


def test_the_largest_objects_are_kept_in_their_order(tmp_path, capsys):
    content = copy.deepcopy(CONTENT)
    radii = (4, 12, 3, 9, 2)
    content["annotations"] = [annotation(n + 1, 9, (3, 18)[n % 2], outline((20, 20), r, seed=5)) for n, r in enumerate(radii)]
    source = open_set(write_set(tmp_path, content))
    walk._announced.clear()
    transform = coco.EvalDetection(60, 2, 32)
    for _ in range(2):
        boxes = transform(source[2], None)["boxes"]
    assert boxes[0, 2] - boxes[0, 0] > boxes[1, 2] - boxes[1, 0] > 9
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_training_is_a_function_of_the_generator(tmp_path):
    source, transform = open_set(write_set(tmp_path), "train"), coco.TrainDetection(64, 5, 32)
    one, other, third = (transform(source[1], np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert not np.array_equal(one["image"], third["image"])


def test_generated_shapes_pass_the_same_transforms():
    source = shapes.Shapes(4, 0, 48, max_objects=3)
    for i in range(4):
        example = source[i]
        found = coco.EvalDetection(48, 5, 112)(example, None)
        count = (example["classes"] >= 0).sum()
        assert found["classes"].tolist() == example["classes"][:count].tolist() + [-1] * (5 - count)
        np.testing.assert_array_equal(found["boxes"][:count], example["boxes"][:count][:, [1, 0, 3, 2]])
        for n in range(count):
            again = resampled(unpacked(found["masks"])[n], found["boxes"][n], grid((48, 48)))
            np.testing.assert_array_equal(again, example["masks"][n])
        coco.TrainDetection(32, 5, 32)(example, np.random.default_rng(i))


def test_batches_of_a_set_are_made_in_worker_processes_too(tmp_path):
    source, transform = open_set(write_set(tmp_path)), coco.EvalDetection(64, 5, 32)
    rows = []
    for workers in (0, 1):
        config = pipeline.Config(workers=workers)
        with pipeline.eval_batches(source, transform, batch_size=2, config=config) as batches:
            rows.append(list(batches))
    assert rows[0][0]["masks"].shape == (2, 5, 32, 4) and rows[0][1]["valid"].tolist() == [True, False]
    assert all(np.array_equal(one[name], other[name]) for one, other in zip(*rows) for name in one)


def test_compressed_runs_are_pycocotools():
    rng = np.random.default_rng(0)
    for n in range(50):
        mask = rng.random((rng.integers(1, 90), rng.integers(1, 90))) < rng.choice([0, 0.02, 0.5, 1])
        found = encoded(mask)
        runs = coco_json._runs(found, coco_json.Picture(1, "x", *mask.shape))
        assert np.array_equal(np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(mask.shape[::-1]).T, mask)


def test_bytes_that_are_no_image_are_named(tmp_path):
    source = open_set(write_set(tmp_path))
    (tmp_path / "tiny" / "four.png").write_bytes(b"no image")
    with pytest.raises(errors.Unreadable, match="cannot decode .*four.png"):
        coco.TrainDetection(64)(source[0], np.random.default_rng(0))
