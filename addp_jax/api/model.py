"""A trained run as functions from numpy arrays to numpy arrays."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np

from addp_jax import errors, partition, samplers, schema, tasks
from addp_jax.api import inputs
from addp_jax.generation import own_images
from addp_jax.ops import images as pixels
from addp_jax.ops import masks as masks_lib

CACHED = 16  # compiled functions that are kept
MASK_SIZES = 8  # so many sizes of masks are compiled apart: with more tokens known, the decoder has more room


class Objects(NamedTuple):
    """What is found in one image, best first.

    Attributes:
      boxes: float32 [N,4], (x0, y0, x1, y1) in pixels, ends exclusive.
      scores: float32 [N], 0..1.
      names: N names of classes.
      masks: bool [N,H,W].
    """

    boxes: np.ndarray
    scores: np.ndarray
    names: list[str]
    masks: np.ndarray


class Model:
    """The networks of a run on all devices; made by `addp_jax.load`.

    S is the image size of the run. Images are given as one image or a list of them, PIL or uint8 [H,W,3], or as an
    array uint8 [N,H,W,3]. Those of another size are resized until they fill the square, and cropped in the centre.

    Every method takes `batch_size`, the most images that are computed at once, over all devices. The first call of each
    batch size compiles. A batch is padded to a power of two, so that few sizes are compiled.

    A mistake in a call is a ValueError that names the argument. So is a method that the run has no network for.

    Attributes:
      image_size: S.
      classes: names by label; () for a run that names no classes.
    """

    def __init__(self, program, networks, classes: tuple[str, ...] = ()):
        """networks: (parameters, frozen networks), whole on every device of the program's mesh."""
        self._program, self._networks, self.classes = program, networks, classes
        self.image_size = program.task.image_size
        self._drawing = functools.lru_cache(CACHED)(self._make_drawing)
        self._compiled = functools.lru_cache(CACHED)(self._compile)

    def __repr__(self) -> str:
        return f"<addp_jax model: task {self._program.config.task}, {self.image_size} pixels>"

    def sample(self, n: int, *, seed: int = 0, steps: int | None = None, batch_size: int = 64, **sampler) -> np.ndarray:
        """`n` images drawn from nothing: uint8 [n,S,S,3].

        They are those of mode `generate` with the same seed; other batch sizes may round a byte to the next.

        Args:
          seed: 0 to 2^32 - 1. Image i depends on the seed and on i alone.
          steps: of the sampler, at least 1; default: as the config of the run says.
          sampler: more fields of the sampler's config, such as temperature, top_p, order, schedule_file.
        """
        config = self._sampler("sample", steps, sampler)
        numbers = np.arange(inputs.whole_number("n", n, 1), dtype=np.int32)
        return self._over(self._draw(config, None), {"number": numbers}, batch_size, seed_of(seed))

    def edit(
        self, image, mask, *, n: int = 4, seed: int = 0, steps: int | None = None, feather: int = 0,
        batch_size: int = 64, **sampler,
    ) -> np.ndarray:  # fmt: skip
        """`n` results of drawing a part of one image anew: uint8 [n,S,S,3].

        Args:
          mask: bool [H,W], True where the image is drawn anew, or a PIL image, whose white is. It moves with the image.
            A token is drawn anew if any of its pixels is.
          feather: 0 = the result is the decoder's alone. Above: the image's own pixels come back outside the mask,
            blended over so many pixels.
          seed, steps, sampler: see `sample`.
        """
        config, tokenizer = self._sampler("edit", steps, sampler), self._program.task.config.tokenizer
        numbers = np.arange(inputs.whole_number("n", n, 1), dtype=np.int32)
        feather, own = inputs.whole_number("feather", feather, 0), inputs.image("image", image)
        canvas, redrawn = own_images.fit(own, inputs.mask("mask", mask, own.shape[:2]), self.image_size)
        hidden = own_images.to_tokens(redrawn, tokenizer.grid)
        if not hidden.any():
            raise ValueError("mask: outside of the image's central square, of which alone results are made")
        each = max(1, tokenizer.length // MASK_SIZES)
        fewest = max(1, int(hidden.sum()) // each * each)
        image, mask = (np.stack([array] * len(numbers)) for array in (canvas, hidden))
        examples = {"number": numbers, "image": image, "mask": mask}
        drawn = self._over(self._draw(config, fewest), examples, batch_size, seed_of(seed))
        return own_images.blend(drawn, canvas, redrawn, feather) if feather else drawn

    def reconstruct(self, images, *, batch_size: int = 64) -> np.ndarray:
        """What the tokenizer keeps of images: uint8 [N,S,S,3]. Runs that draw images have one, too."""
        self._require("reconstruct", tasks.Autoencoder, tasks.Generator)
        return self._of_images("reconstruct", images, 1.0, batch_size)

    def features(self, images, *, batch_size: int = 64) -> np.ndarray:
        """Features of images: float32 [N,D]."""
        self._require("features", tasks.Recogniser)
        return self._of_images("features", images, self._program.task.crop_pct, batch_size)

    def classify(self, images, *, top: int = 5, batch_size: int = 64) -> list[list[tuple[str, float]]]:
        """The `top` most probable classes of each image, at most all: [[(name, probability), ...], ...]."""
        self._require("classify", tasks.Classifier)
        top = inputs.whole_number("top", top, 1)
        logits = self._of_images("logits", images, self._program.task.crop_pct, batch_size)
        if not np.isfinite(logits).all():
            raise errors.UserError("the network's scores are NaN or infinite; it names nothing")
        probs = np.exp(logits - logits.max(-1, keepdims=True))
        probs /= probs.sum(-1, keepdims=True)
        order = np.argsort(-probs, axis=-1, kind="stable")[:, :top]
        return [[(self.classes[k], float(row[k])) for k in best] for row, best in zip(probs, order)]

    def detect(self, images, *, score_above: float = 0.5, batch_size: int = 8) -> list[Objects]:
        """The objects in each image that score above a limit, best first. Images of any size: they are not cropped."""
        self._require("detect", tasks.Detector)
        fitted = [self._program.task.fit(image) for image in inputs.images("images", images)]
        examples = {name: np.stack([each[name] for each in fitted]) for name in fitted[0]}
        found, probs = self._over(self._compiled("detect"), examples, batch_size)
        objects = []
        for n, scale in enumerate(examples["scale"]):
            one, prob = jax.tree.map(lambda leaf: leaf[n], (found, probs))
            one = one._replace(valid=one.valid & (one.scores > score_above))
            boxes, scores, labels, masks = masks_lib.in_original(one, prob, scale, examples["original_size"][n])
            objects.append(Objects(boxes, scores, [self.classes[k] for k in labels], masks))
        return objects

    def segment(self, images, *, batch_size: int = 0) -> list[np.ndarray]:
        """The class of every pixel, a number in `classes`: uint8 [H,W] of each image, of any size; none is cropped.

        batch_size: windows of an image that are computed at once; 0 = as the config of the run says.
        """
        self._require("segment", tasks.Segmenter)
        batch = inputs.whole_number("batch_size", batch_size, 0)
        given = inputs.images("images", images)
        with jax.set_mesh(self._program.mesh):
            return [self._program.task.segment(*self._networks, image, batch) for image in given]

    def _require(self, method: str, *abilities: type) -> None:
        """Raises ValueError unless the run's task has one of these abilities."""
        if isinstance(self._program.task, abilities):
            return
        able = [name for name in tasks.names() if set(abilities) & set(tasks.load(name).Task.__mro__)]
        task = self._program.config.task
        raise ValueError(f"{method}: a run of the task {task} cannot; load a run of {' or '.join(able)}")

    def _sampler(self, method: str, steps, changes: dict) -> samplers.Config:
        """The sampler's config for one call of `method`. Raises ValueError naming a wrong field."""
        self._require(method, tasks.Generator)
        steps = {} if steps is None else {"steps": inputs.whole_number("steps", steps, 1)}
        try:
            return samplers.with_sampler(self._program.task, changes | steps).sampler_config
        except errors.UserError as error:
            raise ValueError(str(error).replace("config.model.sampler.", "")) from error

    def _of_images(self, what: str, images, crop_pct: float, batch_size: int) -> np.ndarray:
        """See `_compile`."""
        examples = {"image": inputs.squares("images", images, self.image_size, crop_pct)}
        return self._over(self._compiled(what), examples, batch_size)

    def _draw(self, config: samplers.Config, fewest: int | None):
        """See `samplers.drawing`; a program serves all values of the fields that it takes as arrays."""
        compiled = dataclasses.replace(config, **{name: getattr(samplers.Config(), name) for name in samplers.VALUES})
        return functools.partial(self._drawing(compiled, fewest), config=config)

    def _make_drawing(self, config: samplers.Config, fewest: int | None):
        """See `samplers.drawing`; fewest: None for no edit."""
        task = samplers.with_sampler(self._program.task, schema.fields(config))
        return samplers.drawing(task, self._program.mesh, fewest=fewest)

    def _compile(self, what: str):
        """Jitted `((params, frozen), batch) -> [B,...]`: what the method tells of its images."""
        task = self._program.task

        def reconstruct(networks, image):
            image = pixels.to_unit(image)
            own = isinstance(task, tasks.Autoencoder)
            return pixels.to_uint8(
                task.reconstruct(*networks, image) if own else samplers.reconstruct(task.nets(*networks), image)
            )

        functions = {
            "reconstruct": lambda networks, batch: reconstruct(networks, batch["image"]),
            "features": lambda networks, batch: task.features(*networks, batch["image"]),
            "logits": lambda networks, batch: task.logits(*networks, batch["image"]),
            "detect": lambda networks, batch: task.detect(*networks, batch["image"], batch["size"]),
        }
        return jax.jit(partition.per_device(functions[what], self._program.mesh))

    def _over(self, function, examples: dict, batch_size: int, seed: int | None = None):
        """`function` of the arrays `examples`, [N,...] each, batch by batch."""
        mesh, count, results = self._program.mesh, len(next(iter(examples.values()))), []
        most = inputs.whole_number("batch_size", batch_size, 1)
        size = partition.batch_size(min(most, 2 ** (count - 1).bit_length()), mesh)
        with jax.set_mesh(mesh):
            networks = self._networks if seed is None else (*self._networks, jax.random.key(seed))
            for first in range(0, count, size):
                rows = np.minimum(np.arange(first, first + size), count - 1)
                batch = {name: array[rows] for name, array in examples.items()}
                batch = partition.put(batch, partition.batch_sharding(mesh))
                result = partition.whole(function(networks, batch))
                results.append(jax.tree.map(lambda leaf: leaf[: count - first], result))
        return jax.tree.map(lambda *parts: np.concatenate(parts), *results)


def seed_of(value) -> int:
    return inputs.whole_number("seed", value, 0, schema.LARGEST_SEED)
