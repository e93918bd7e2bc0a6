"""What the config files share: a run with all its fields, networks that fit together, the argument behind the colon.

The fields, with defaults, units and sources, are those of the dataclasses: `Config` in addp_jax/program.py and what it
holds, that of the task in addp_jax/tasks, and those of the modes in addp_jax/modes.py (SECTIONS). A config file says what
differs. The defaults are the published pre-training's (ADDP, ICLR 2024; its PyTorch release).
"""

import dataclasses

from ml_collections import ConfigDict, FieldReference

from addp_jax import modes, samplers
from addp_jax.api import loading
from addp_jax.codecs import vqgan
from addp_jax.models import layers, pixel_to_token, token_predictor, vit
from addp_jax.models.heads import Config as ClassifierConfig

SIZES = {name.removeprefix("vit"): sizes for name, sizes in loading.SIZES.items()}  # b, l
TINY = "tiny"


@dataclasses.dataclass(frozen=True)
class Networks:
    """The networks of one resolution, one codebook and one size: the only place where these are set."""

    tokenizer: vqgan.Config = vqgan.Config()
    width: int = 768  # of the encoders and the decoders
    depth: int = 12  # of the encoders
    heads: int = 12
    decoder_depth: int = loading.DECODER["depth"]
    decoder_heads: int = loading.DECODER["heads"]
    dropout: float = 0.1
    token_std: float = 0.02
    pos_std: float = 0.02  # of the encoder, as colour_scale
    colour_scale: float = 1.0
    unused: int = 1000  # rows of the vocabularies between the codes and the mask token, as the released weights have them

    def encoder(self, **changes) -> vit.Config:
        """The recognition encoder, as it is pre-trained."""
        image_size, patch_size = self.tokenizer.image_size, self.tokenizer.patch_size
        fields = dict(dropout=self.dropout, input_dropout=self.dropout, image_size=image_size, patch_size=patch_size)
        fields |= dict(pos_std=self.pos_std, colour_scale=self.colour_scale)
        return vit.Config(self.width, self.depth, self.heads, **(fields | changes))

    def decoder(self) -> layers.TransformerConfig:
        return layers.TransformerConfig(self.width, self.decoder_depth, self.decoder_heads, dropout=self.dropout)

    def vocabulary(self) -> dict:
        num_codes = self.tokenizer.num_codes
        return dict(num_codes=num_codes, vocab_size=num_codes + self.unused + 1, token_std=self.token_std)

    def predictor(self) -> token_predictor.Config:
        encoder = layers.TransformerConfig(self.width, self.depth, self.heads, dropout=self.dropout)
        class_id = self.tokenizer.num_codes + min(76, self.unused - 1)
        fields = dict(class_id=class_id, length=self.tokenizer.length, **self.vocabulary())
        return token_predictor.Config(encoder, self.decoder(), **fields)

    def pixel_to_token(self) -> pixel_to_token.Config:
        return pixel_to_token.Config(self.encoder(), self.decoder(), **self.vocabulary())

    def classifier(self, num_classes: int, **changes) -> ClassifierConfig:
        """The release fine-tunes without dropout and without the encoder's own norms."""
        fields = dict(dropout=0.0, input_dropout=0.0, input_norm=False, final_norm=False)
        return ClassifierConfig(self.encoder(**(fields | changes)), num_classes)


def published(arg: str) -> Networks:
    """Of the size that the argument names: "b" (also without one) or "l"."""
    return Networks(**SIZES[size(arg)])


def size(arg: str) -> str:
    return next((part for part in arg.split(",") if part in SIZES), "b")


def run(task: str, model, **changes) -> ConfigDict:
    """All fields of a run of `task` on ImageNet; `model`: the task's Config."""
    config = to_config_dict(modes.fields(task, model))
    config.data.update(source="image_folder", path="data/imagenet", threads=16, reads=128)
    config.update(changes)
    return config


def for_pods(config: ConfigDict) -> ConfigDict:
    """Large models on many devices: parameters divided among 16, matrix products kept for the backward pass, the rest made again."""
    config.mesh.fsdp = -16
    for name in {"net", "predictor"} & set(config.model):
        config.model[name].encoder.remat = config.model[name].decoder.remat = "dots"
    return config


def sized(config: ConfigDict, arg: str, allowed=("",)) -> ConfigDict:
    """`config` as it is, or with "tiny" in the argument as every field says for a run of seconds on generated images."""
    parts = arg.split(",")
    if unknown := [part for part in parts if part not in (*allowed, TINY)]:
        raise ValueError(f"config argument {unknown[0]!r}: use {', '.join(part or 'none' for part in (*allowed, TINY))}")
    return to_config_dict(modes.tiny(config.to_dict())) if TINY in parts else config


def to_config_dict(fields: dict) -> ConfigDict:
    """`fields` whose values keep their types, but those of the sampler that may be a number, a text or a list."""
    config = ConfigDict(fields)
    if "sampler" in config.model:
        for name in samplers.PER_STEP:
            config.model.sampler[name] = FieldReference(config.model.sampler[name], field_type=object)
    return config
