"""What each generated image starts from: nothing, or one of the user's images of which a part is drawn anew."""

from __future__ import annotations

import os

import numpy as np

from addp_jax import errors
from addp_jax.generation import own_images

GREY = 128  # of what is hidden, in pictures
LONGEST_NAME = 250  # bytes that a disk takes, less the ending; longer names are left out


class FromNothing:
    """Images that start from nothing but their number, which gives each its own random draws."""

    mask_ratio, fewest, skipped = 1.0, None, {}

    def __init__(self, config):
        self.count = config.num_images

    def __len__(self) -> int:
        return self.count

    def name(self, i: int) -> str:
        return f"{i:06d}"

    def readable(self, i: int) -> bool:
        return True

    def settings(self) -> dict:
        """What the images depend on, as JSON."""
        return {}

    def batch(self, numbers) -> dict:
        """Arrays with a row for each of `numbers`: "number", and for an own image "image" and "mask"."""
        return {"number": np.asarray(numbers, np.int32)}

    def finished(self, i: int, drawn, batch, row: int):
        """What is shown for the sampler's image `drawn`, uint8 [...,S,S,3]."""
        return drawn

    def before(self, batch, row: int) -> list:
        """Pictures of the start, uint8 [S,S,3]: the own image, and what is hidden of it."""
        return []


class FromImages:
    """As `FromNothing`; the first results of all own images come first, then the second ones."""

    def __init__(self, config, size: int, grid: int):
        self.own = own_images.OwnImages(config.images, size, config.masks, config.margins, config.whole)
        self.skipped = self.own.skipped
        self.config, self.grid, self.mask_ratio, self.fewest = config, grid, config.mask_ratio, None
        if config.mask_ratio == 1:  # what is drawn anew is given
            unknown = [int(self.mask(i).sum()) for i, shape in enumerate(self.own.shapes) if shape]
            self.fewest = min(unknown)
            if not max(unknown):
                advice = "none of them has a part to be drawn anew; set masks or margins"
                raise errors.UserError(f"config.generate.images: {advice}")
        print(self.own.summary())

    def __len__(self) -> int:
        return len(self.own) * self.config.variants

    def name(self, i: int) -> str:
        name = f"{i:06d}_{self.own.name(i % len(self.own))}"
        return name if len(os.fsencode(name)) <= LONGEST_NAME else f"{i:06d}"

    def readable(self, i: int) -> bool:
        return self.own.files.path(i % len(self.own)) not in self.skipped

    def settings(self) -> dict:
        names = ("mask_ratio", "margins", "whole", "feather")
        return {"images": self.own.fingerprint(), **{name: getattr(self.config, name) for name in names}}

    def mask(self, i: int):
        return own_images.to_tokens(self.own.redrawn(i % len(self.own)), self.grid)

    def batch(self, numbers) -> dict:
        files = [int(i) % len(self.own) for i in numbers]
        images = {i: self.own.image(i) for i in dict.fromkeys(files)}
        nothing = np.zeros((self.own.size, self.own.size, 3), np.uint8)
        batch = {"number": np.asarray(numbers, np.int32)}
        batch["image"] = np.stack([nothing if images[i] is None else images[i] for i in files])
        if self.fewest is not None:
            unknown = np.ones(self.grid**2, bool)
            batch["mask"] = np.stack([unknown if images[i] is None else self.mask(i) for i in files])
        return batch

    def finished(self, i: int, drawn, batch, row: int):
        if not self.config.feather:
            return drawn
        return own_images.blend(drawn, batch["image"][row], self.own.redrawn(i % len(self.own)), self.config.feather)

    def before(self, batch, row: int) -> list:
        own = batch["image"][row]
        if "mask" not in batch:
            return [own]
        patch = self.own.size // self.grid
        hidden = batch["mask"][row].reshape(self.grid, self.grid).repeat(patch, 0).repeat(patch, 1)
        return [own] * bool(self.config.masks) + [np.where(hidden[..., None], np.uint8(GREY), own)]
