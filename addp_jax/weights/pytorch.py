"""Names and layouts of the PyTorch releases: one table per network, read in both directions.

A rule says which torch tensor becomes which of our parameters. `{i}` counts transformer layers: those
tensors are stacked on a leading axis, as our blocks are scanned. Everything not in a table is an error,
except the names listed as dead, which no forward pass reads.
"""

from __future__ import annotations

import math
import re
from typing import Callable, NamedTuple

import numpy as np
from flax import traverse_util

from addp_jax import errors
from addp_jax.codecs import vqgan

LEVELS, BLOCKS = 16, 128  # of a tokenizer, at most; a hostile file may claim more, and building them takes for ever


class Transform(NamedTuple):
    """`to_jax`: one torch array -> tuple of ours; `to_torch`: the inverse."""

    to_jax: Callable
    to_torch: Callable


class Rule(NamedTuple):
    torch: str
    ours: tuple[str, ...]
    transform: Transform


def to_patch_conv(kernel):
    patch = math.isqrt(len(kernel) // 3)
    return kernel.reshape(patch, patch, 3, -1).transpose(3, 2, 0, 1)


SAME = Transform(lambda array: (array,), lambda array: array)
LINEAR = Transform(lambda weight: (weight.T,), lambda kernel: kernel.T)
CONV = Transform(lambda weight: (weight.transpose(2, 3, 1, 0),), lambda kernel: kernel.transpose(3, 2, 0, 1))
ROW = Transform(lambda array: (array[0],), lambda array: array[None])  # (1,N,D) <-> (N,D)
VECTOR = Transform(lambda array: (array[0, 0],), lambda array: array[None, None])  # (1,1,D) <-> (D,)
QKV = Transform(lambda weight: tuple(np.split(weight.T, 3, axis=1)), lambda *qkv: np.concatenate(qkv, axis=1).T)
PATCHES = Transform(  # (D,3,p,p) convolution over patches <-> (p*p*3, D) matrix
    lambda weight: (weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0]),), to_patch_conv
)
QKV_BIAS = Transform(lambda bias: tuple(np.split(bias, 3)), lambda *qkv: np.concatenate(qkv))


UP_CONV = Transform(lambda weight: (weight.transpose(2, 3, 0, 1),), lambda kernel: kernel.transpose(2, 3, 0, 1))
POINT = Transform(lambda weight: (weight[:, :, 0, 0].T,), lambda kernel: kernel.T[:, :, None, None])  # 1x1 <-> matrix


def weight_and_bias(torch: str, ours: str, transform: Transform) -> list[Rule]:
    return [Rule(f"{torch}.weight", (f"{ours}/kernel",), transform), Rule(f"{torch}.bias", (f"{ours}/bias",), SAME)]


def linear(torch: str, ours: str) -> list[Rule]:
    return weight_and_bias(torch, ours, LINEAR)


def norm(torch: str, ours: str) -> list[Rule]:
    return [Rule(f"{torch}.weight", (f"{ours}/scale",), SAME), Rule(f"{torch}.bias", (f"{ours}/bias",), SAME)]


def blocks(torch: str, ours: str) -> list[Rule]:
    qkv = tuple(f"{ours}/block/attention/{name}/" for name in ("query", "key", "value"))
    torch, ours = torch + ".{i}", ours + "/block"
    return [
        *norm(f"{torch}.norm1", f"{ours}/norm1"),
        Rule(f"{torch}.attn.qkv.weight", tuple(name + "kernel" for name in qkv), QKV),
        Rule(f"{torch}.attn.qkv.bias", tuple(name + "bias" for name in qkv), QKV_BIAS),
        *linear(f"{torch}.attn.proj", f"{ours}/attention/out"),
        *norm(f"{torch}.norm2", f"{ours}/norm2"),
        *linear(f"{torch}.mlp.fc1", f"{ours}/mlp/fc1"),
        *linear(f"{torch}.mlp.fc2", f"{ours}/mlp/fc2"),
    ]


def decoder_side() -> list[Rule]:
    return [
        *linear("decoder_embed", "decoder_embed"),
        *blocks("decoder_blocks", "decoder"),
        *norm("decoder_norm", "decoder_norm"),
        *linear("mlm_layer.fc", "head/fc"),
        *norm("mlm_layer.ln", "head/norm"),
        Rule("mlm_layer.bias", ("head/bias",), VECTOR),
    ]


def embeddings(ours: str) -> list[Rule]:
    return [
        Rule("patch_embed.proj.weight", (f"{ours}/patch_embed/kernel",), PATCHES),
        Rule("patch_embed.proj.bias", (f"{ours}/patch_embed/bias",), SAME),
        Rule("cls_token", (f"{ours}/class_token",), VECTOR),
        Rule("pos_embed", (f"{ours}/pos_embed",), ROW),
    ]


def encoder_rules(input_norm: str, ours: str) -> list[Rule]:
    """A vision transformer; the release and timm differ in the name of the LayerNorm before the first block."""
    return [
        *embeddings(ours),
        *norm(input_norm, f"{ours}/input_norm"),
        *blocks("blocks", f"{ours}/blocks"),
        *norm("norm", f"{ours}/final_norm"),
    ]


def mae_rules() -> list[Rule]:
    """MAE's pre-trained encoder."""
    return [*embeddings("encoder"), *blocks("blocks", "encoder/blocks"), *norm("norm", "encoder/final_norm")]


MAE_DEAD = ("mask_token", "decoder_*")


def addp_rules() -> list[Rule]:
    """The ADDP network (`addp-vit-*.pth` without its frozen parts)."""
    return [
        *encoder_rules("tokenizer_norm", "encoder"),
        Rule("mask_token", ("mask_token",), VECTOR),
        Rule("token_emb.weight", ("token_embed",), SAME),
        Rule("decoder_pos_embed_learned", ("pos_visible",), ROW),
        Rule("decoder_pos_mask_embed", ("pos_masked",), ROW),
        Rule("decoder_pos_token_embed", ("pos_token",), ROW),
        *decoder_side(),
    ]


ADDP_DEAD = ("decoder_pos_embed", "pos_token_embed", "pos_mask_embed", "decoder_pred.weight", "decoder_pred.bias")


def predictor_rules() -> list[Rule]:
    """The token predictor (MAGE's layout)."""
    return [
        Rule("token_emb.word_embeddings.weight", ("token_embed",), SAME),
        Rule("token_emb.position_embeddings.weight", ("pos_embed",), SAME),
        *norm("token_emb.LayerNorm", "embed_norm"),
        *blocks("blocks", "encoder"),
        *norm("norm", "encoder_norm"),
        Rule("decoder_pos_embed_learned", ("decoder_pos",), ROW),
        *decoder_side(),
    ]


PREDICTOR_DEAD = (
    "cls_token", "pos_embed", "mask_token", "decoder_pos_embed", "token_emb.position_ids", "patch_embed.proj.weight",
    "patch_embed.proj.bias", "decoder_pred.weight", "decoder_pred.bias",
)  # fmt: skip


def classifier_rules() -> list[Rule]:
    """The release's fine-tuned classifier: the encoder without its norms, a norm of the pooled features, the head."""
    return [
        *embeddings("encoder"),
        *blocks("blocks", "encoder/blocks"),
        *norm("fc_norm", "head_norm"),
        *linear("head", "dense_out"),
    ]


def shortcuts(config: vqgan.Config, level: int) -> tuple[bool, bool]:
    """Whether the first block of a level changes the width: in the encoder, in the decoder."""
    width, top = config.multipliers[level], len(config.multipliers) - 1
    before = config.multipliers[level - 1] if level else 1  # the encoder starts from `channels`
    return width != before, width != config.multipliers[min(level + 1, top)]


def tokenizer_config(channels: int, widths, num_res_blocks: int, codebook) -> vqgan.Config:
    """The Config that parameter names and shapes depend on; `widths` per level, `codebook` (K,Z).

    Raises ValueError if there are more than `LEVELS` levels or `BLOCKS` blocks.
    """
    if len(widths) > LEVELS or len(widths) * num_res_blocks > BLOCKS:
        raise ValueError(f"{len(widths)} levels of {num_res_blocks} blocks")
    multipliers = tuple(width // channels for width in widths)
    sizes = dict(image_size=2 ** (len(multipliers) - 1), num_groups=1)  # no parameter depends on these
    return vqgan.Config(
        **sizes, channels=channels, multipliers=multipliers, num_res_blocks=num_res_blocks,
        num_codes=codebook[0], code_width=codebook[1],
    )  # fmt: skip


def tokenizer_rules(config: vqgan.Config) -> list[Rule]:
    """The VQGAN. Torch counts decoder levels from full resolution, as `up_{level}` does here."""

    def conv(torch, ours, bias):
        rules = [Rule(f"{torch}.weight", (f"{ours}/kernel",), CONV)]
        return rules + ([Rule(f"{torch}.bias", (f"{ours}/bias",), SAME)] if bias else [])

    def res_block(torch, ours, shortcut=False):
        return [
            *norm(f"{torch}.norm1", f"{ours}/norm1/norm"),
            *conv(f"{torch}.conv1", f"{ours}/conv1", False),
            *norm(f"{torch}.norm2", f"{ours}/norm2/norm"),
            *conv(f"{torch}.conv2", f"{ours}/conv2", False),
            *(conv(f"{torch}.nin_shortcut", f"{ours}/shortcut", False) if shortcut else []),
        ]

    top = len(config.multipliers) - 1
    rules = conv("encoder.conv_in", "encoder/conv_in", False) + conv("decoder.conv_in", "decoder/conv_in", True)
    for level in range(top + 1):
        down_changes, up_changes = shortcuts(config, level)
        for index in range(config.num_res_blocks):
            down, up = f"down.{level}.block.{index}", f"up.{level}.block.{index}"
            rules += res_block(f"encoder.{down}", f"encoder/down_{level}_{index}", down_changes and index == 0)
            rules += res_block(f"decoder.{up}", f"decoder/up_{level}_{index}", up_changes and index == 0)
        if level:
            rules += conv(f"decoder.up.{level}.upsample.conv", f"decoder/upsample_{level}", True)
    for side in ("encoder", "decoder"):
        for index in range(2):
            rules += res_block(f"{side}.mid.block_{index + 1}", f"{side}/mid_{index}")
        rules += norm(f"{side}.norm_out", f"{side}/norm_out/norm")
        rules += conv(f"{side}.conv_out", f"{side}/conv_out", True)
    return rules + [Rule("quantize.embedding.weight", ("codebook",), SAME)]


TOKENIZER_DEAD = ("loss.*",)  # what a VQGAN was trained with


def from_torch(tensors: dict[str, np.ndarray], rules: list[Rule], dead: tuple[str, ...] = ()) -> dict:
    """Our nested parameter dict from a flat torch state dict (numpy arrays).

    Raises UserError when a tensor is missing, or when one is neither in the rules nor dead.
    """
    params, used = {}, set(dead)  # params by paths with slashes
    for rule in rules:
        names = layer_names(rule.torch, tensors)
        missing = [name for name in names if name not in tensors]
        if missing or not names:
            raise errors.UserError(f"the weights have no tensor {(missing or [rule.torch])[0]}")
        used.update(names)
        parts = [rule.transform.to_jax(np.asarray(tensors[name])) for name in names]
        for path, arrays in zip(rule.ours, zip(*parts)):
            if len(shapes := {array.shape for array in arrays}) > 1:
                raise errors.UserError(f"the weights' {rule.torch} have different shapes: {sorted(shapes)}")
            params[path] = np.ascontiguousarray(np.stack(arrays) if "{i}" in rule.torch else arrays[0])
    unknown = sorted(set(tensors) - used)
    if unknown:
        raise errors.UserError(f"the weights have {len(unknown)} tensors of no known meaning, among them {unknown[0]}")
    return traverse_util.unflatten_dict(params, sep="/")


def to_torch(params: dict, rules: list[Rule]) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`, without the dead tensors."""
    return {name: np.ascontiguousarray(array) for name, array in each_to_torch(params, rules)}


def each_to_torch(params: dict, rules: list[Rule]):
    """`(name, array)` of `to_torch` one by one, views of `params` where possible."""
    flat = traverse_util.flatten_dict(params, sep="/")
    for rule in rules:
        arrays = [np.asarray(flat[path]) for path in rule.ours]
        if "{i}" not in rule.torch:
            yield rule.torch, rule.transform.to_torch(*arrays)
            continue
        for i in range(len(arrays[0])):
            yield rule.torch.replace("{i}", str(i)), rule.transform.to_torch(*(array[i] for array in arrays))


def layer_names(template: str, tensors) -> list[str]:
    """The names a template stands for; `{i}` runs from 0 to the highest layer of the stack that has any tensor."""
    if "{i}" not in template:
        return [template]
    pattern = re.compile(re.escape(template.split("{i}")[0]) + r"(\d{1,9})\.")
    layers = [int(match[1]) for match in map(pattern.match, tensors) if match]
    count = min(max(layers, default=-1) + 1, len(tensors) + 1)  # a higher number leaves a gap among these
    return [template.replace("{i}", str(i)) for i in range(count)]
