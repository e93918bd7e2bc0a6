"""The json file of COCO's annotations, checked: what it holds is other people's."""

import array
import collections
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from addp_jax import errors, files
from addp_jax.data import walk

FIELD = "config.data.path"
LARGEST_ID = 2**31 - 1
LARGEST_SIDE = 2**16  # pixels that an image may claim
LONGEST_NUMBER = 7  # characters of one number in a compressed RLE


class Picture(NamedTuple):
    """One image as the file has it."""

    id: int
    name: str  # relative to the folder of the images
    height: int
    width: int


class Annotation(NamedTuple):
    """One object as the file has it."""

    id: int
    image_id: int
    category_id: int
    crowd: bool
    box: list[float]  # x, y, width, height
    area: float  # the file's, or the box's
    segmentation: list | dict  # the file's, or the box as a polygon
    polygons: list[list[float]]  # of it those that detectron2 keeps: x, y, x, y, x, y, ...
    runs: list[int]  # of its RLE: pixels of each run, column by column, the first outside; empty where it is polygons


class Content(NamedTuple):
    """A whole file."""

    pictures: dict[int, Picture]  # by id, rising
    categories: dict[int, str]  # names by id, rising
    annotations: list[Annotation]  # in the file's order


def read(path: str) -> Content:
    """Raises UserError naming the file, and the annotation by its id, where something is missing or does not fit."""
    try:
        content = files.read_json(path)
    except (OSError, ValueError) as error:
        raise errors.UserError(f"{FIELD}: cannot read {path}: {files.reason(error)}") from error
    if not isinstance(content, dict):
        raise _wrong(path, "it is no object with images, annotations and categories")
    pictures = dict(sorted((picture.id, picture) for picture in _rows(content, path, "images", _picture)))
    categories = dict(sorted(_rows(content, path, "categories", _category)))
    if not pictures or not categories:
        raise _wrong(path, f"it lists no {'categories' if pictures else 'images'}")
    read_one = lambda row: _annotation(row, pictures, categories)
    annotations = list(_rows(content, path, "annotations", read_one)) if "annotations" in content else []
    return Content(pictures, categories, annotations)


def _wrong(path: str, what: str) -> errors.UserError:
    return errors.UserError(f"{FIELD}: {path}: {files.printable(what, files.REASON_LENGTH)}")


def _rows(content: dict, path: str, table: str, read_one) -> Iterator:
    """`read_one` of each row of a table. Raises UserError for what it raises, and for an id that comes twice."""
    rows = content.get(table)
    if not isinstance(rows, list):
        raise _wrong(path, f"it has no list {table!r}")
    met = set()
    for number, row in enumerate(rows):
        try:
            if not isinstance(row, dict):
                raise ValueError("it is no object")
            row_id = row.get("id", number + 1) if table == "annotations" else row.get("id")
            if not _is_whole(row_id, LARGEST_ID if table != "annotations" else 2**63 - 1):
                raise ValueError(f"its id {row_id!r} is no whole number from 0 to {LARGEST_ID}")
            if row_id in met:
                raise ValueError("its id comes twice")
            met.add(row_id)
            yield read_one(row | {"id": row_id})
        except ValueError as error:
            name = row["id"] if isinstance(row, dict) and "id" in row else f"number {number}"
            raise _wrong(path, f"{table}, id {name}: {error}") from error


def _is_whole(value, largest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= largest


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and abs(value) < 1e9  # false for what is not finite


def _picture(row: dict) -> Picture:
    name, sides = row.get("file_name"), [row.get("height"), row.get("width")]
    if not isinstance(name, str):
        raise ValueError("it has no file_name")
    files.below("", name)
    if not all(_is_whole(side, LARGEST_SIDE) and side for side in sides):
        raise ValueError(f"its height and width are {sides}; use whole numbers of pixels")
    return Picture(row["id"], name, *sides)


def _category(row: dict) -> tuple[int, str]:
    if not isinstance(row.get("name"), str):
        raise ValueError("it has no name")
    return row["id"], row["name"]


def _annotation(row: dict, pictures: dict[int, Picture], categories: dict[int, str]) -> Annotation:
    image_id, category_id = row.get("image_id"), row.get("category_id")
    if not _is_whole(image_id, LARGEST_ID) or image_id not in pictures:
        raise ValueError(f"there is no image {image_id!r}")
    if not _is_whole(category_id, LARGEST_ID) or category_id not in categories:
        raise ValueError(f"there is no category {category_id!r}")
    picture, box = pictures[image_id], row.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)) or min(box[2:]) < 0:
        raise ValueError(f"its bbox is {box!r}; use x, y, width, height")
    x, y, width, height = box
    if x > picture.width or y > picture.height or x + width < 0 or y + height < 0:
        raise ValueError(f"its bbox {box} lies outside the image of {picture.width}x{picture.height} pixels")
    segmentation = row.get("segmentation") or [[x, y, x + width, y, x + width, y + height, x, y + height]]
    polygons = runs = []
    if isinstance(segmentation, dict):
        runs = _runs(segmentation, picture)
    else:
        polygons = _polygons(segmentation)
    area = row["area"] if _is_number(row.get("area")) else width * height
    crowd = row.get("iscrowd", 0) not in (0, False)
    return Annotation(row["id"], image_id, category_id, crowd, box, area, segmentation, polygons, runs)


def _polygons(segmentation) -> list[list[float]]:
    """Those of three points or more. Raises ValueError."""
    if not isinstance(segmentation, list):
        raise ValueError("its segmentation is neither polygons nor RLE")
    for polygon in segmentation:
        try:
            if not isinstance(polygon, list) or not np.isfinite(array.array("f", polygon)).all():
                raise TypeError
        except (TypeError, OverflowError) as error:
            raise ValueError("a polygon of its segmentation is no list of numbers") from error
    return [polygon for polygon in segmentation if len(polygon) >= 6 and len(polygon) % 2 == 0]


def _runs(segmentation: dict, picture: Picture) -> list[int]:
    """Raises ValueError: another size than the image's, or runs that do not cover it exactly."""
    if segmentation.get("size") != [picture.height, picture.width]:
        size = segmentation.get("size")
        raise ValueError(f"its RLE is for {size!r}, the image has {[picture.height, picture.width]} (height, width)")
    counts = segmentation.get("counts")
    runs = _uncompressed(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(_is_whole(run, picture.height * picture.width) for run in runs):
        raise ValueError("the counts of its RLE are no runs of pixels")
    if sum(runs) != picture.height * picture.width:
        raise ValueError(f"its RLE covers {sum(runs)} of {picture.height * picture.width} pixels")
    return runs


def _uncompressed(counts: str) -> list[int]:
    """The runs in a compressed RLE: five bits a character, from the third run on as differences to the last but one."""
    runs, value, place = [], 0, 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or place == LONGEST_NUMBER:
            raise ValueError("the counts of its RLE are damaged")
        value |= (bits & 0x1F) << 5 * place
        place += 1
        if bits & 0x20:
            continue
        if bits & 0x10:
            value -= 1 << 5 * place
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = place = 0
    if place:
        raise ValueError("the counts of its RLE end in the middle of a number")
    return runs


def objects(content: Content, path: str) -> dict[int, list[Annotation]]:
    """By image, rising: the annotations to train on. Says in one line per kind what is left out."""
    by_image, dropped = {image_id: [] for image_id in content.pictures}, collections.Counter()
    for thing in content.annotations:
        if thing.crowd:
            continue
        if isinstance(thing.segmentation, list) and len(thing.polygons) < len(thing.segmentation):
            dropped["polygons of fewer than three points"] += len(thing.segmentation) - len(thing.polygons)
        if not thing.polygons and not thing.runs:
            dropped["objects without any other polygon"] += 1
        elif not min(thing.box[2:]):
            dropped["objects whose box has no area"] += 1
        else:
            by_image[thing.image_id].append(thing)
    for kind, count in dropped.items():
        walk.announce(f"{path}: left out {count} {kind}")
    return by_image


def ground_truth(path: str) -> dict:
    """The file in COCO's format, crowds too, with what annotations may lack: an id, the area, an outline."""
    content = read(path)
    rows = []
    for thing in content.annotations:
        row = {"id": thing.id, "image_id": thing.image_id, "category_id": thing.category_id, "bbox": thing.box}
        row |= {"area": thing.area, "iscrowd": int(thing.crowd), "segmentation": thing.segmentation}
        rows.append(row)
    pictures = [picture._asdict() for picture in content.pictures.values()]
    categories = [{"id": category_id, "name": name} for category_id, name in content.categories.items()]
    return {"images": pictures, "annotations": rows, "categories": categories}
