"""Names and layouts of the PyTorch releases: one table per network, read in both directions.

A rule says which torch tensor becomes which of our parameters. `{i}` counts transformer layers: those
tensors are stacked on a leading axis, as our blocks are scanned. Everything not in a table is an error,
except the names listed as dead, which no forward pass reads.
"""

from __future__ import annotations

import re
from typing import Callable, NamedTuple

import numpy as np

from addp_jax import errors
from addp_jax.models import pixel_to_token, token_predictor, tokenizer


class Transform(NamedTuple):
    """`to_jax`: one torch array -> tuple of ours; `to_torch`: the inverse."""

    to_jax: Callable
    to_torch: Callable


class Rule(NamedTuple):
    torch: str
    ours: tuple[str, ...]
    transform: Transform


def patches(patch: int) -> Transform:
    """(D,3,p,p) convolution over patches <-> (p*p*3, D) matrix."""
    return Transform(
        lambda weight: (weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0]),),
        lambda kernel: kernel.reshape(patch, patch, 3, -1).transpose(3, 2, 0, 1),
    )


SAME = Transform(lambda array: (array,), lambda array: array)
LINEAR = Transform(lambda weight: (weight.T,), lambda kernel: kernel.T)
CONV = Transform(lambda weight: (weight.transpose(2, 3, 1, 0),), lambda kernel: kernel.transpose(3, 2, 0, 1))
ROW = Transform(lambda array: (array[0],), lambda array: array[None])  # (1,N,D) <-> (N,D)
VECTOR = Transform(lambda array: (array[0, 0],), lambda array: array[None, None])  # (1,1,D) <-> (D,)
QKV = Transform(lambda weight: tuple(np.split(weight.T, 3, axis=1)), lambda *qkv: np.concatenate(qkv, axis=1).T)
QKV_BIAS = Transform(lambda bias: tuple(np.split(bias, 3)), lambda *qkv: np.concatenate(qkv))


def linear(torch: str, ours: str) -> list[Rule]:
    return [Rule(f"{torch}.weight", (f"{ours}/kernel",), LINEAR), Rule(f"{torch}.bias", (f"{ours}/bias",), SAME)]


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


def head() -> list[Rule]:
    return [
        *linear("mlm_layer.fc", "head/fc"),
        *norm("mlm_layer.ln", "head/norm"),
        Rule("mlm_layer.bias", ("head/bias",), VECTOR),
    ]


def decoder_side() -> list[Rule]:
    return [
        *linear("decoder_embed", "decoder_embed"),
        *blocks("decoder_blocks", "decoder"),
        *norm("decoder_norm", "decoder_norm"),
        *head(),
    ]


def addp_rules(config: pixel_to_token.Config) -> list[Rule]:
    """The ADDP network (`addp-vit-*.pth` without its frozen parts)."""
    return [
        Rule("patch_embed.proj.weight", ("encoder/patch_embed/kernel",), patches(config.encoder.patch_size)),
        Rule("patch_embed.proj.bias", ("encoder/patch_embed/bias",), SAME),
        Rule("cls_token", ("encoder/class_token",), VECTOR),
        Rule("pos_embed", ("encoder/pos_embed",), ROW),
        *norm("tokenizer_norm", "encoder/input_norm"),
        *blocks("blocks", "encoder/blocks"),
        *norm("norm", "encoder/final_norm"),
        Rule("mask_token", ("mask_token",), VECTOR),
        Rule("token_emb.weight", ("token_embed",), SAME),
        Rule("decoder_pos_embed_learned", ("pos_visible",), ROW),
        Rule("decoder_pos_mask_embed", ("pos_masked",), ROW),
        Rule("decoder_pos_token_embed", ("pos_token",), ROW),
        *decoder_side(),
    ]


ADDP_DEAD = ("decoder_pos_embed", "pos_token_embed", "pos_mask_embed", "decoder_pred.weight", "decoder_pred.bias")


def predictor_rules(config: token_predictor.Config) -> list[Rule]:
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
    "cls_token",
    "pos_embed",
    "mask_token",
    "decoder_pos_embed",
    "token_emb.position_ids",
    "patch_embed.proj.weight",
    "patch_embed.proj.bias",
    "decoder_pred.weight",
    "decoder_pred.bias",
)


def tokenizer_rules(config: tokenizer.Config) -> list[Rule]:
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

    multipliers, top = config.multipliers, len(config.multipliers) - 1
    rules = conv("encoder.conv_in", "encoder/conv_in", False) + conv("decoder.conv_in", "decoder/conv_in", True)
    for level in range(top + 1):
        below, above = multipliers[max(level - 1, 0)], multipliers[min(level + 1, top)]
        wider = 1 if level == 0 else below  # the encoder starts from `channels`
        for index in range(config.num_res_blocks):
            down, up = f"down.{level}.block.{index}", f"up.{level}.block.{index}"
            changes = (index == 0 and multipliers[level] != wider, index == 0 and multipliers[level] != above)
            rules += res_block(f"encoder.{down}", f"encoder/down_{level}_{index}", changes[0])
            rules += res_block(f"decoder.{up}", f"decoder/up_{level}_{index}", changes[1])
        if level:
            rules += conv(f"decoder.up.{level}.upsample.conv", f"decoder/upsample_{level}", True)
    for side in ("encoder", "decoder"):
        for index in range(2):
            rules += res_block(f"{side}.mid.block_{index + 1}", f"{side}/mid_{index}")
        rules += norm(f"{side}.norm_out", f"{side}/norm_out/norm")
        rules += conv(f"{side}.conv_out", f"{side}/conv_out", True)
    return rules + [Rule("quantize.embedding.weight", ("codebook",), SAME)]


def from_torch(tensors: dict[str, np.ndarray], rules: list[Rule], dead: tuple[str, ...] = ()) -> dict:
    """Our nested parameter dict from a flat torch state dict (numpy arrays).

    Raises UserError when a tensor is missing, or when one is neither in the rules nor dead.
    """
    params, used = {}, set(dead)
    for rule in rules:
        names = layer_names(rule.torch, tensors)
        missing = [name for name in names if name not in tensors]
        if missing or not names:
            raise errors.UserError(f"the weights have no tensor {(missing or [rule.torch])[0]}")
        used.update(names)
        parts = [rule.transform.to_jax(np.asarray(tensors[name])) for name in names]
        for path, arrays in zip(rule.ours, zip(*parts)):
            if len({array.shape for array in arrays}) > 1:
                raise errors.UserError(f"the weights' {rule.torch} have different shapes: {sorted({a.shape for a in arrays})}")
            stacked = np.stack(arrays) if "{i}" in rule.torch else arrays[0]
            set_path(params, path, np.ascontiguousarray(stacked))
    unknown = sorted(set(tensors) - used)
    if unknown:
        raise errors.UserError(f"the weights have {len(unknown)} tensors of no known meaning, among them {unknown[0]}")
    return params


def to_torch(params: dict, rules: list[Rule]) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`, without the dead tensors."""
    tensors = {}
    for rule in rules:
        arrays = [np.asarray(get_path(params, path)) for path in rule.ours]
        if "{i}" in rule.torch:
            for i in range(len(arrays[0])):
                layer = rule.transform.to_torch(*(array[i] for array in arrays))
                tensors[rule.torch.replace("{i}", str(i))] = np.ascontiguousarray(layer)
        else:
            tensors[rule.torch] = np.ascontiguousarray(rule.transform.to_torch(*arrays))
    return tensors


def layer_names(template: str, tensors) -> list[str]:
    """The names a template stands for; `{i}` runs from 0 to the highest layer of the stack that has any tensor."""
    if "{i}" not in template:
        return [template]
    pattern = re.compile(re.escape(template.split("{i}")[0]) + r"(\d+)\.")
    layers = [int(match[1]) for match in map(pattern.match, tensors) if match]
    return [template.replace("{i}", str(i)) for i in range(max(layers, default=-1) + 1)]


def get_path(params: dict, path: str):
    for name in path.split("/"):
        params = params[name]
    return params


def set_path(params: dict, path: str, value) -> None:
    *parents, last = path.split("/")
    for name in parents:
        params = params.setdefault(name, {})
    params[last] = value
