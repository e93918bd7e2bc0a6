"""What a recognition task's encoder reads: an image's pixels or, as MAGE's does, its tokens by a frozen tokenizer."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp

from addp_jax import codecs, errors, schema, weights
from addp_jax.codecs import vqgan
from addp_jax.models import vit


@schema.config
class Config:
    """Fields that the configs of the recognition tasks begin with."""

    net: Any = None  # with an `encoder`
    # Run folder or weight file of ADDP, for tokens of MAGE; "" = train from scratch. Its content matters, not its path.
    encoder_weights: str = schema.field("", matters=schema.NOTHING)
    # What the encoder reads: pixels | tokens, as MAGE's does. The parameters tell one from the other.
    input: str = schema.field("pixels", choices=("pixels", "tokens"), matters=schema.NOTHING)
    # Of the tokens, and its run folder or weight file. Its content matters.
    tokenizer: codecs.Config = schema.field(vqgan.Config(), matters=schema.NOTHING)
    tokenizer_weights: str = schema.frozen_weights()


class Input:
    """Of a task's `config`.

    The tokenizer, a convolutional network, sees images of the task's size, whatever the size that it was trained on.
    Raises UserError if its tokens are not as large as the encoder's patches.
    """

    def __init__(self, config: Config, encoder, dtype):
        """encoder: its config. dtype: of the tokenizer's computation."""
        self.config = config
        self.num_codes = config.tokenizer.num_codes if config.input == "tokens" else 0  # see `vit.Embedding`
        if not self.num_codes:
            return
        if config.tokenizer.patch_size != encoder.patch_size:
            raise errors.UserError(
                f"config.model.net.encoder.patch_size: {encoder.patch_size}, but config.model.tokenizer makes a token "
                f"of {config.tokenizer.patch_size} pixels a side"
            )
        self.tokenizer = codecs.create(dataclasses.replace(config.tokenizer, image_size=encoder.image_size), dtype)

    @functools.cached_property
    def frozen(self) -> dict:
        """What the task's `load_frozen` gives; reads the weights once."""
        if not self.num_codes:
            return {}
        path, field = self.config.tokenizer_weights, "config.model.tokenizer_weights"
        init = functools.partial(codecs.init, self.tokenizer)
        return {"tokenizer": weights.load(path, "tokenizer", init, self.config.tokenizer, field)}

    def __call__(self, frozen: dict, image, size=None):
        """`image` [B,S,S,3] in [0,1] -> itself, or its token ids int32 [B,h,w]. No gradient reaches the tokenizer.

        size: of the pictures, int32 [B,2], top left; beyond it the tokenizer sees the mean colour. None = they fill it.
        """
        if not self.num_codes:
            return image
        if size is not None:
            beyond = ~vit.inside(size, image.shape[1:3])[..., None]
            image = jnp.where(beyond, vit.IMAGENET_MEAN[None, None, None], image)
        token_ids = codecs.bind(self.tokenizer, frozen["tokenizer"]).encode(image)
        return token_ids.reshape(-1, self.tokenizer.config.grid, self.tokenizer.config.grid)
