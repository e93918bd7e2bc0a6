"""Image tokenizers: images <-> a grid of codebook entries. Adding one adds one file here and edits none.

A codec file has a frozen `Config`, derived from the one below, whose `name` is the file's; a Flax module
`Tokenizer(config, dtype)`; `init(net, rng)`, its parameters; `codec(net, params)`, a `Codec`; and `LAYOUT`, see
`partition.shardings`. To be trained by the task `tokenizer`, the module has the methods of `vqgan.Tokenizer`.
"""

from __future__ import annotations

from typing import Callable, NamedTuple

import jax

from addp_jax import errors, schema


class Codec(NamedTuple):
    """A trained tokenizer as functions."""

    encode: Callable  # image [B,H,W,3] -> token_ids [B,L]
    decode: Callable  # latents [B,L,Z] -> image [B,H,W,3]
    codebook: jax.Array  # [K,Z]


@schema.config
class Config(schema.Named):
    """What every codec has."""

    PACKAGE = __name__

    image_size: int = schema.field(256, least=1, tiny=16)  # pixels
    num_codes: int = schema.field(1024, least=1, tiny=32)  # K
    name: str = "vqgan"  # a file in addp_jax/codecs

    @property
    def patch_size(self) -> int:
        """Pixels per token along one side."""
        raise NotImplementedError

    @property
    def grid(self) -> int:
        """Tokens along one side."""
        return self.image_size // self.patch_size

    @property
    def length(self) -> int:
        return self.grid**2


def create(config: Config, dtype):
    """The Flax module of a codec's config."""
    return schema.module_of(config).Tokenizer(config, dtype)


def init(net, rng):
    """Parameters of `net`; pure."""
    return schema.module_of(net.config).init(net, rng)


def bind(net, params) -> Codec:
    """`net` with its parameters."""
    return schema.module_of(net.config).codec(net, params)


def check_pair(config: Config, length: int, num_codes: int, where: str) -> None:
    """Raises UserError unless a network for `length` tokens of `num_codes` codes fits this tokenizer."""
    if (length, num_codes) != (config.length, config.num_codes):
        raise errors.UserError(
            f"{where} is for {length} tokens of {num_codes} codes, config.model.tokenizer makes "
            f"{config.length} tokens of {config.num_codes} codes"
        )
