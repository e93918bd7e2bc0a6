"""Weights of UperNet on a vision transformer by mmsegmentation's names, read and written.

The names and sizes of all tensors are those of `configs/mae/mae-base_upernet_8xb2-amp-160k_ade20k-512x512.py` of
mmsegmentation 1.x; all else is refused.
"""

from __future__ import annotations

import math

import jax
import numpy as np

from addp_jax import errors, parameters
from addp_jax.models import beit, segmenter
from addp_jax.weights import pytorch
from addp_jax.weights.pytorch import CONV, POINT, SAME, UP_CONV, Rule, weight_and_bias

NET, NECK, HEAD, AUXILIARY = "backbone", "neck", "decode_head", "auxiliary_head"
INDEX = ".attn.relative_position_index"  # a constant that mmsegmentation keeps beside each table
COUNT = ".num_batches_tracked"  # of a BatchNorm; read by none that has a momentum


def batch_norm(torch: str, ours: str) -> list[Rule]:
    running = [Rule(f"{torch}.{name}", (f"{ours}/{name}",), SAME) for name in parameters.RUNNING]
    return [*pytorch.norm(torch, ours), *running]


def conv_norm(torch: str, ours: str) -> list[Rule]:
    return [Rule(f"{torch}.conv.weight", (f"{ours}/kernel",), CONV), *batch_norm(f"{torch}.bn", f"{ours}/norm")]


def rules(config: segmenter.Config) -> list[Rule]:
    return [*encoder_rules(config.encoder), *head_rules()]


def encoder_rules(config: beit.Config) -> list[Rule]:
    torch, ours = f"{NET}.layers.{{i}}", "encoder/blocks/block"
    qkv = tuple(f"{ours}/attention/{name}/" for name in ("query", "key", "value"))
    found = [
        Rule(f"{NET}.cls_token", ("encoder/class_token",), pytorch.VECTOR),
        Rule(f"{NET}.pos_embed", ("encoder/pos_embed",), pytorch.ROW),
        *weight_and_bias(f"{NET}.patch_embed.projection", "encoder/patch_embed", pytorch.PATCHES),
        *pytorch.norm(f"{torch}.ln1", f"{ours}/norm1"),
        Rule(f"{torch}.attn.qkv.weight", tuple(name + "kernel" for name in qkv), pytorch.QKV),
        Rule(f"{torch}.attn.qkv.bias", tuple(name + "bias" for name in qkv), pytorch.QKV_BIAS),
        *pytorch.linear(f"{torch}.attn.proj", f"{ours}/attention/out"),
        *pytorch.norm(f"{torch}.ln2", f"{ours}/norm2"),
        *pytorch.linear(f"{torch}.ffn.layers.0.0", f"{ours}/mlp/fc1"),
        *pytorch.linear(f"{torch}.ffn.layers.1", f"{ours}/mlp/fc2"),
    ]
    if config.relative_positions:
        table = f"{torch}.attn.relative_position_bias_table"
        found.append(Rule(table, (f"{ours}/attention/relative_positions",), SAME))
    if config.layer_scale:
        found += [
            Rule(f"{torch}.gamma_{index}", (f"{ours}/{name}_scale",), SAME)
            for index, name in ((1, "attention"), (2, "mlp"))
        ]
    return found


def head_rules() -> list[Rule]:
    found = [
        *weight_and_bias(f"{NECK}.upsample_4x.0", "neck/up4_0", UP_CONV),
        *batch_norm(f"{NECK}.upsample_4x.1", "neck/up4_norm"),
        *weight_and_bias(f"{NECK}.upsample_4x.3", "neck/up4_1", UP_CONV),
        *weight_and_bias(f"{NECK}.upsample_2x.0", "neck/up2", UP_CONV),
        *conv_norm(f"{HEAD}.bottleneck", "head/bottleneck"),
        *conv_norm(f"{HEAD}.fpn_bottleneck", "head/fusion"),
        *weight_and_bias(f"{HEAD}.conv_seg", "classifier/logits", POINT),
        *conv_norm(f"{AUXILIARY}.convs.0", "auxiliary"),
        *weight_and_bias(f"{AUXILIARY}.conv_seg", "auxiliary_classifier/logits", POINT),
    ]
    for index, side in enumerate(segmenter.POOLS):
        found += conv_norm(f"{HEAD}.psp_modules.{index}.1", f"head/pool_{side}")
    for index in range(3):
        found += conv_norm(f"{HEAD}.lateral_convs.{index}", f"head/lateral_{index}")
        found += conv_norm(f"{HEAD}.fpn_convs.{index}", f"head/smooth_{index}")
    return found


def from_mmsegmentation(tensors: dict, config: segmenter.Config) -> dict:
    """Parameters of `segmenter.Segmenter` as nested numpy arrays, from arrays by name.

    Raises UserError when a tensor is missing, unknown or of another size than `config` says.
    """
    for name in (name for name in tensors if name.endswith(INDEX)):
        if tensors[name].shape != (1 + config.encoder.length,) * 2:
            raise errors.UserError(f"the weights' {name} is not that of a grid of {config.encoder.grid} patches a side")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith((INDEX, COUNT))}
    expected = jax.eval_shape(lambda rng: segmenter.init(segmenter.Segmenter(config), rng), jax.random.key(0))
    return parameters.match(pytorch.from_torch(tensors, rules(config)), expected, where="weights of mmsegmentation")


def to_mmsegmentation(params: dict, config: segmenter.Config) -> dict[str, np.ndarray]:
    """The inverse of `from_mmsegmentation`; an encoder that mmsegmentation does not have is refused."""
    encoder = config.encoder
    if encoder.input_norm:
        raise errors.UserError("input_norm: mmsegmentation's MAE has no LayerNorm before its blocks; train without it")
    if not (encoder.relative_positions and encoder.layer_scale):
        raise errors.UserError("relative_positions, layer_scale: mmsegmentation's MAE has both; train with them")
    if encoder.taps != beit.even_taps(encoder.depth):
        print(f"mmsegmentation needs out_indices={list(encoder.taps)} in the config of these weights")
    tensors = pytorch.to_torch(params, rules(config))
    index = beit.relative_index(encoder.grid)
    return tensors | {f"{NET}.layers.{block}{INDEX}": index for block in range(encoder.depth)}


def read_config(shapes: dict) -> segmenter.Config:
    """The config that tensors of these shapes belong to; rates of what is dropped are the default's, taps are even.

    Raises what a missing or misshapen tensor raises; `dense.Format.config_of` makes one line of it.
    """
    width, _, patch, _ = shapes[f"{NET}.patch_embed.projection.weight"]
    depth = len(pytorch.layer_names(f"{NET}.layers.{{i}}.gamma_1", shapes))
    rows, heads = shapes[f"{NET}.layers.0.attn.relative_position_bias_table"]
    encoder = beit.Config(
        width=width,
        depth=depth,
        heads=heads,
        mlp_ratio=shapes[f"{NET}.layers.0.ffn.layers.0.0.weight"][0] // width,
        image_size=(math.isqrt(max(0, rows - 3)) + 1) // 2 * patch,
        patch_size=patch,
        taps=beit.even_taps(depth),
    )
    return segmenter.Config(
        encoder,
        channels=shapes[f"{HEAD}.bottleneck.conv.weight"][0],
        auxiliary_channels=shapes[f"{AUXILIARY}.convs.0.conv.weight"][0],
        num_classes=shapes[f"{HEAD}.conv_seg.weight"][0],
    )
