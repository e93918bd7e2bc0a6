"""COCO's annotations: a json file of boxes and outlines, and a folder of images."""

import array
import hashlib
import os

import numpy as np

from addp_jax import errors
from addp_jax.data import coco_json, sources, walk

FIELD = coco_json.FIELD
PREFIX = "instances_"  # of a json file's name; what follows is the name of its images' folder


def open_split(config, split: str, image_size: int) -> sources.Source:
    name = config.train_split if split == "train" else config.eval_split
    return Coco(*_places(sources.require_path(config), name, split), train=split == "train")


def _places(root: str, name: str, split: str) -> tuple[str, str]:
    """(json file, folder of images) of a split."""
    candidates = os.path.join(root, "annotations", f"{name}.json"), os.path.join(root, f"{name}.json")
    for path in candidates:
        if os.path.isfile(path):
            folder = os.path.join(root, name.removeprefix(PREFIX))
            if not os.path.isdir(folder):
                raise errors.UserError(f"{FIELD}: {path} is there, but its images are not: no folder {folder}")
            return path, folder
    raise errors.UserError(
        f"{FIELD}: found neither {candidates[0]} nor {candidates[1]}; "
        f"set config.data.{split}_split to the name of the json file, without its ending"
    )


class Coco(sources.Files):
    """Images with boxes, classes and outlines of their objects.

    Crowds are left out. For training, so are images without any object; for evaluation every image of the file counts.
    Images come in the order of their ids. Classes are numbered by rising category ids, whatever gaps those have.

    `source[i]` is a dict of image, label (-1), index and path, as every source has it, and

      image_id       int32, the file's
      original_size  int32 [2], height and width that the file tells
      classes        int32 [objects]
      boxes          float32 [objects,4], (x0, y0, x1, y1) in pixels, ends exclusive
      outlines       of each object a list of polygons, float32 [P,2] of (x, y), or a bool [height,width]

    Polygons of fewer than three points are dropped, as detectron2 does, and so are objects without any other; an object
    whose box has no area as well. An object without an outline has that of its box. One line says how many.

    Args:
      json_file: the annotations.
      folder: of the images.
      train: as above.

    `category_ids`: the file's, by class.

    Raises:
      UserError: the file cannot be read, holds what does not fit together, or for training no objects.
    """

    has_objects = True

    def __init__(self, json_file: str, folder: str, train: bool):
        self.json_file = json_file
        content = coco_json.read(json_file)
        self.category_ids = tuple(content.categories)
        by_image = coco_json.objects(content, json_file)
        if not any(by_image.values()):
            if train:
                raise errors.UserError(f"{FIELD}: {json_file} holds no annotations of objects; training needs some")
            walk.announce(f"{json_file} holds no annotations of objects: there is nothing to compare results with")
        if train:
            by_image = {image_id: found for image_id, found in by_image.items() if found}
        pictures = [content.pictures[image_id] for image_id in by_image]
        names, labels = [picture.name for picture in pictures], [walk.UNKNOWN] * len(pictures)
        super().__init__(folder, names, labels, tuple(content.categories.values()))
        self.image_ids = np.array(list(by_image), np.int32)
        self.sizes = np.array([(picture.height, picture.width) for picture in pictures], np.int32)
        self._keep(list(by_image.values()))

    def _keep(self, by_image: list[list[coco_json.Annotation]]) -> None:
        """The objects as a few arrays, which pickle quickly."""
        objects = [thing for found in by_image for thing in found]
        polygons = [polygon for thing in objects for polygon in thing.polygons]
        boxes = np.array([thing.box for thing in objects], np.float32).reshape(-1, 4)
        self._boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
        self._classes = np.searchsorted(self.category_ids, [thing.category_id for thing in objects]).astype(np.int32)
        self._coordinates = _joined(polygons, "f").reshape(-1, 2)
        self._runs = _joined([thing.runs for thing in objects], "i")
        # Where each begins and ends: images in objects, objects in polygons and runs, polygons in points.
        self._objects_at = _ends(by_image)
        self._polygons_at = _ends([thing.polygons for thing in objects])
        self._runs_at = _ends([thing.runs for thing in objects])
        self._points_at = _ends(polygons) // 2

    def __getitem__(self, i: int) -> dict:
        first, end = self._objects_at[i], self._objects_at[i + 1]
        return super().__getitem__(i) | {
            "image_id": self.image_ids[i],
            "original_size": self.sizes[i],
            "classes": self._classes[first:end],
            "boxes": self._boxes[first:end],
            "outlines": [self._outline(number, *self.sizes[i]) for number in range(first, end)],
        }

    def _outline(self, number: int, height: int, width: int) -> list[np.ndarray] | np.ndarray:
        runs = self._runs[self._runs_at[number] : self._runs_at[number + 1]]
        if len(runs):
            return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T
        polygons = range(self._polygons_at[number], self._polygons_at[number + 1])
        return [self._coordinates[self._points_at[k] : self._points_at[k + 1]] for k in polygons]

    def fingerprint(self, times: bool = False) -> str:
        """As `Files.fingerprint`; it changes with every object as well."""
        digest = hashlib.blake2b(super().fingerprint(times).encode(), digest_size=8)
        ends = self._objects_at, self._polygons_at, self._runs_at, self._points_at
        for values in (self.image_ids, self.sizes, self._classes, self._boxes, self._coordinates, self._runs, *ends):
            digest.update(values.tobytes())
        return digest.hexdigest()

    def ground_truth(self) -> dict:
        """What results are compared with, read again from the file; see `coco_json.ground_truth`."""
        return coco_json.ground_truth(self.json_file)


def _joined(rows: list[list], kind: str) -> np.ndarray:
    """One array of the numbers of all rows, of the type code `kind`."""
    numbers = array.array(kind)
    for row in rows:
        numbers.extend(row)
    return np.array(numbers)


def _ends(rows: list) -> np.ndarray:
    return np.cumsum([0] + [len(row) for row in rows])
