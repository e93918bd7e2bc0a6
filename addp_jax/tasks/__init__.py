"""What the rest of the program knows of a task. Adding a task adds one file here and edits none.

A task file has a frozen dataclass `Config` (the fields of `config.model`) and a class `Task(config, dtype)`, which derives
from `Task` below and from those protocols whose abilities it has. dtype: of the computation; parameters are float32.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from addp_jax import errors, parameters, partition, samplers, schema
from addp_jax.data import pipeline, sources, transforms, walk
from addp_jax.ops import proposals

STATISTICS = "statistics"  # what a loss tells beside its metrics, see `Task.loss`
AVERAGE = "average"  # the averaged parameters among the frozen networks of a loss, see `Task.average_for`


class Results(NamedTuple):
    """Of an evaluation."""

    scalars: dict[str, float]
    images: dict[str, np.ndarray]  # [H,W,3] by name, uint8 or float in [0,1]
    files: dict[str, str] = {}  # text by name, for the mode evaluate


@runtime_checkable
class Task(Protocol):
    """What the training loop, evaluation, plan and benchmark need.

    Attributes:
      config: the task's own frozen Config.
      image_size: pixels along one side, as the network sees it.
      layout: of the trained parameters, see `partition.shardings`.
      whole_images: the images of an evaluation have sizes of their own. `evaluate` gets examples instead of batches,
        numpy arrays with "valid", and each process those of its share.
      compact: names of networks that compute in `dtype` alone: where frozen, their kernels are kept in it.
      average_for: the field for whose sake the loss reads, in training, the averaged parameters (`optim.ema_decay`) as
        `frozen[AVERAGE]`; "" = it does not.
    """

    config: Any
    image_size: int
    layout: partition.Layout
    compact: tuple[str, ...] = ()
    whole_images: bool = False
    average_for: str = ""

    @property
    def example(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What one element of a batch of training holds: shapes without the batch's axis."""
        return image_example(self.image_size)

    @property
    def evaluation_fields(self) -> tuple[str, ...]:
        """Names of what `evaluate` reads of an example."""
        return tuple(self.example)

    def init(self, rng: jax.Array) -> dict:
        """The trained networks' parameters by name. Pure: it is jitted, and traced without running for plans."""
        ...

    def load_frozen(self) -> dict:
        """The networks that are not trained, as numpy arrays by name; reads their weights."""
        return {}

    def load_pretrained(self) -> dict:
        """Parameters that do not start at random: a part of what `init` gives, as numpy arrays."""
        return {}

    def open_source(self, split: str, data: pipeline.Config) -> sources.Source:
        """The examples of the split "train" or "eval". Raises UserError if they do not fit the networks."""
        return pipeline.open_source(data, split, self.image_size)

    def transform(self, split: str, data: pipeline.Config) -> pipeline.Transform:
        """What the input pipeline does with each example of `open_source`."""
        return image_transform(split, data, self.image_size)

    def loss(self, params: dict, frozen: dict, batch: dict, rng: jax.Array, train: bool) -> tuple[jax.Array, dict]:
        """(scalar, {name: scalar}) of a batch, whose images are uint8 [B,H,W,3].

        A task whose parameters hold running statistics (`parameters.RUNNING`) adds, in training, their new values under
        the name `STATISTICS`: all of them, as `parameters.running(params)`. The training step puts them in their places,
        behind the optimizer's update, and into the average as they are. No gradient may reach them.
        """
        ...

    def evaluate(self, params: dict, frozen: dict, batches: Iterable[dict], source: sources.Source) -> Results:
        """Over padded batches of the examples of `source`; they hold "valid" bool [B] beside the fields of an example."""
        ...


@runtime_checkable
class Generator(Task, Protocol):
    """A task whose networks draw images.

    Attributes:
      sampler: how; see `addp_jax.samplers`.
      sampler_config: its Config.
    """

    sampler: samplers.Sampler
    sampler_config: samplers.Config

    def nets(self, params: dict, frozen: dict) -> samplers.Nets:
        """The networks as the sampler's functions."""
        ...

    def load_for_sampling(self) -> dict:
        """Those of `load_frozen` that `nets` reads."""
        return self.load_frozen()


@runtime_checkable
class Autoencoder(Task, Protocol):
    """A task whose network gives images back."""

    def reconstruct(self, params: dict, frozen: dict, image: jax.Array) -> jax.Array:
        """`image` float [B,H,W,3] in [0,1] -> its reconstruction, not clipped."""
        ...


@runtime_checkable
class Recogniser(Task, Protocol):
    """A task whose network has features of images.

    Attributes:
      crop_pct: fraction of the resized short side that the centre crop of an image keeps.
      features_are_frozen: they come from `load_frozen` alone; nothing needs to be trained for them.
    """

    crop_pct: float = 1.0
    features_are_frozen: bool = False

    def features(self, params: dict, frozen: dict, image: jax.Array) -> jax.Array:
        """`image` uint8 [B,H,W,3] -> float32 [B,D]."""
        ...


@runtime_checkable
class KnowsClasses(Task, Protocol):
    """A task whose network tells `num_classes` classes apart."""

    num_classes: int


@runtime_checkable
class Classifier(Recogniser, KnowsClasses, Protocol):
    """A task whose network names a class for each image."""

    @property
    def example(self) -> dict[str, jax.ShapeDtypeStruct]:
        return image_example(self.image_size) | {"label": jax.ShapeDtypeStruct((), np.int32)}

    def logits(self, params: dict, frozen: dict, image: jax.Array) -> jax.Array:
        """`image` uint8 [B,H,W,3] -> float32 [B,C]."""
        ...

    def open_source(self, split: str, data: pipeline.Config) -> sources.Source:
        """As `Task.open_source`. Raises UserError if the classes of the data do not fit the network."""
        source = pipeline.open_source(data, split, self.image_size)
        check_classes(source, self.num_classes)
        return source

    def transform(self, split: str, data: pipeline.Config) -> pipeline.Transform:
        return Labelled(image_transform(split, data, self.image_size, self.crop_pct), self.num_classes)


@runtime_checkable
class Detector(KnowsClasses, Protocol):
    """A task whose network finds objects."""

    def fit(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """An image uint8 [H,W,3] as the network takes it: image uint8 [S,S,3] and size int32 [2] for `detect`; scale
        float32 [2] and original_size int32 [2], see `ops.masks.in_original`."""
        ...

    def detect(self, params: dict, frozen: dict, image: jax.Array, size: jax.Array) -> tuple[proposals.Detections, jax.Array]:
        """`image` uint8 [B,S,S,3] with pictures of `size` int32 [B,2] in the top left corner -> detections in S x S, [B,K]
        each, and their masks float32 [B,K,n,n], probabilities within their boxes."""
        ...


@runtime_checkable
class Segmenter(KnowsClasses, Protocol):
    """A task whose network tells the class of every pixel."""

    def segment(self, params: dict, frozen: dict, image: np.ndarray | None, batch: int = 0) -> np.ndarray | None:
        """`image` uint8 [H,W,3] of any size -> the class of every pixel, uint8 [H,W].

        Several processes each give an image of their own, and must call this equally often; None = no image.

        batch: windows that the network sees at a time, over all devices; 0 = as the config says.
        """
        ...


ABILITIES: dict[type, str] = {
    Generator: "draw images", Autoencoder: "reconstruct images", Recogniser: "have features of images",
    KnowsClasses: "tell classes apart", Classifier: "name classes", Detector: "find objects",
    Segmenter: "segment images",
}  # fmt: skip


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str):
    """The module of the task `name`. Raises UserError on an unknown name."""
    if name not in names():
        raise errors.UserError(f"config.task: no task {name!r}; the tasks are {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")


def create(name: str, fields, dtype) -> Task:
    """The task `name` with `fields` (a mapping, the user's `config.model`). Raises UserError on an unknown name or field."""
    module = load(name)
    return module.Task(schema.build(module.Config, fields, "config.model"), dtype)


def require(task: Task, name: str, protocol: type) -> None:
    """Raises UserError, naming the tasks that would do, unless the task `name` has the abilities of `protocol`."""
    if not isinstance(task, protocol):
        able = [other for other in names() if protocol in load(other).Task.__mro__]
        raise errors.UserError(f"config.task: {name} does not {ABILITIES[protocol]}; use {' or '.join(able)}")


def class_names(task: KnowsClasses, identity: dict) -> tuple[str, ...]:
    """One per class of the network: those that a run has on record in its `identity`, else numbers."""
    return numbered(tuple(identity.get("data", {}).get("classes", ())), task.num_classes)


def numbered(names: tuple[str, ...], count: int) -> tuple[str, ...]:
    """`names` and, up to `count`, numbers."""
    return (*names, *(f"class {n}" for n in range(len(names), count)))


def image_example(image_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {"image": jax.ShapeDtypeStruct((image_size, image_size, 3), np.uint8)}


def image_transform(split: str, data: pipeline.Config, image_size: int, crop_pct: float = 1.0) -> pipeline.Transform:
    """Random resized crop and flip for "train", resize and centre crop for "eval"."""
    if split == "train":
        return transforms.train_image(image_size, data.crop_scale, data.flip)
    return transforms.eval_image(image_size, crop_pct)


def check_classes(
    source: sources.Source, num_classes: int, field: str = "config.model.net.num_classes", of_images: bool = True
) -> None:
    """Raises UserError unless the classes of `source`, where they are known, can be those of a network; says if they are few.

    of_images: each image has a class of its own; else its objects or pixels have.
    """
    count, shown = len(source.classes), parameters.shortened(list(source.classes), walk.SHOWN)
    if count > num_classes:
        raise errors.UserError(f"{field} = {num_classes}, but the data has {count} classes: {shown}")
    if of_images and (not source.labelled or count == 1 < num_classes):
        raise errors.UserError(
            f"config.data.path: {source!r} does not tell the classes of its images (found: {shown}); "
            f"the network has {num_classes}: put the images of each class into a folder of their own, in both splits"
        )
    if 0 < count < num_classes:
        walk.announce(f"{source!r} has {count} classes ({shown}), the network {num_classes}: some are never seen")


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A transform that refuses labels outside 0..num_classes-1: not every source knows its classes beforehand."""

    transform: pipeline.Transform
    num_classes: int

    def __call__(self, example: dict, rng: np.random.Generator) -> dict:
        if not 0 <= example["label"] < self.num_classes:
            where = example.get("path") or f"example {example.get('index', '?')}"
            raise errors.UserError(
                f"{where} has label {example['label']}; config.model.net.num_classes = {self.num_classes} allows "
                f"0..{self.num_classes - 1}"
            )
        return self.transform(example, rng)
