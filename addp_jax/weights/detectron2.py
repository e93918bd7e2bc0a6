"""Weights of ViTDet's Mask R-CNN by detectron2's names, read and written.

The names and sizes of all tensors are those of `configs/common/models/mask_rcnn_vitdet.py` of detectron2, which has one
stage of boxes; all else is refused. Windowed blocks have shorter tables of relative positions there.
"""

from __future__ import annotations

import mmap

import jax
import numpy as np

from addp_jax import errors, files, parameters
from addp_jax.models import detector, vitdet
from addp_jax.weights import numpy_pickles, pytorch, weight_files
from addp_jax.weights.pytorch import CONV, POINT, SAME, UP_CONV, Rule, Transform, weight_and_bias

BACKBONE, NET = "backbone", "backbone.net"
RPN, BOX_HEAD = "proposal_generator.rpn_head", "roi_heads.box_head"
BOX_PREDICTOR, MASK_HEAD = "roi_heads.box_predictor", "roi_heads.mask_head"
TABLES = ("rel_pos_h", "rel_pos_w")


def from_box_pool(weight):
    side = detector.BOX_POOL
    return (weight.reshape(len(weight), -1, side, side).transpose(2, 3, 1, 0).reshape(-1, len(weight)),)


def to_box_pool(kernel):
    side = detector.BOX_POOL
    return kernel.reshape(side, side, -1, kernel.shape[1]).transpose(3, 2, 0, 1).reshape(kernel.shape[1], -1)


FC = Transform(from_box_pool, to_box_pool)  # (F, C*7*7) <-> (7*7*C, F)


def conv_norm(torch: str, conv: str, norm: str) -> list[Rule]:
    return [Rule(f"{torch}.weight", (f"{conv}/kernel",), CONV), *pytorch.norm(f"{torch}.norm", norm)]


def rules() -> list[Rule]:
    return [*encoder_rules(), *pyramid_rules(), *head_rules()]


def encoder_rules() -> list[Rule]:
    tables = [
        Rule(f"{NET}.blocks.{{i}}.attn.{name}", (f"encoder/blocks/block/attention/{name}",), SAME) for name in TABLES
    ]
    return [
        Rule(f"{NET}.pos_embed", ("encoder/pos_embed",), pytorch.ROW),
        *weight_and_bias(f"{NET}.patch_embed.proj", "encoder/patch_embed", pytorch.PATCHES),
        *pytorch.blocks(f"{NET}.blocks", "encoder/blocks"),
        *tables,
    ]


def pyramid_rules() -> list[Rule]:
    """The numbers in detectron2's names count the layers of each level in front of its two convolutions."""
    found = [
        *weight_and_bias(f"{BACKBONE}.simfp_2.0", "pyramid/p2_up_0", UP_CONV),
        *pytorch.norm(f"{BACKBONE}.simfp_2.1", "pyramid/p2_norm"),
        *weight_and_bias(f"{BACKBONE}.simfp_2.3", "pyramid/p2_up_1", UP_CONV),
        *weight_and_bias(f"{BACKBONE}.simfp_3.0", "pyramid/p3_up", UP_CONV),
    ]
    for level, first in ((2, 4), (3, 1), (4, 0), (5, 1)):
        for index, name in enumerate(("lateral", "smooth")):
            ours = f"pyramid/p{level}_{name}"
            found += conv_norm(f"{BACKBONE}.simfp_{level}.{first + index}", ours, f"{ours}_norm")
    return found


def head_rules() -> list[Rule]:
    found = [
        *weight_and_bias(f"{RPN}.conv.conv0", "rpn/conv_0", CONV),
        *weight_and_bias(f"{RPN}.conv.conv1", "rpn/conv_1", CONV),
        *weight_and_bias(f"{RPN}.objectness_logits", "rpn/logits", POINT),
        *weight_and_bias(f"{RPN}.anchor_deltas", "rpn/deltas", POINT),
        *weight_and_bias(f"{BOX_HEAD}.fc1", "box/fc", FC),
        *pytorch.linear(f"{BOX_PREDICTOR}.cls_score", "box/logits"),
        *pytorch.linear(f"{BOX_PREDICTOR}.bbox_pred", "box/deltas"),
        *weight_and_bias(f"{MASK_HEAD}.deconv", "mask/up", UP_CONV),
        *weight_and_bias(f"{MASK_HEAD}.predictor", "mask/logits", POINT),
    ]
    for index in range(4):
        for torch, ours in ((f"{BOX_HEAD}.conv", "box"), (f"{MASK_HEAD}.mask_fcn", "mask")):
            found += conv_norm(f"{torch}{index + 1}", f"{ours}/convs/conv_{index}", f"{ours}/convs/norm_{index}")
    return found


def sides(config: vitdet.Config) -> list[int]:
    """Side of the grid of each block's relative positions."""
    group = config.depth // config.global_blocks
    return [config.window if (block + 1) % group else config.grid for block in range(config.depth)]


def from_detectron2(tensors: dict, config: detector.Config) -> dict:
    """Parameters of `detector.Detector` as nested numpy arrays, from arrays by name.

    Raises UserError when a tensor is missing, unknown or of another size than `config` says.
    """
    tensors = dict(tensors)
    for block, side in enumerate(sides(config.encoder)):
        for name in (f"{NET}.blocks.{block}.attn.{table}" for table in TABLES):
            if name in tensors:
                tensors[name] = longer(name, np.asarray(tensors[name]), 2 * side - 1, config.encoder.rel_pos_rows)
    expected = jax.eval_shape(lambda rng: detector.init(detector.Detector(config), rng), jax.random.key(0))
    return parameters.match(pytorch.from_torch(tensors, rules()), expected, where="weights of detectron2")


def longer(name: str, table, rows: int, padded: int):
    """`table` of `rows` with zeros behind them."""
    if table.ndim != 2 or len(table) != rows:
        advice = "config.encoder's image_size, window and global_blocks must be those of the weights"
        raise errors.UserError(f"the weights' {name} is {list(table.shape)}, expected {rows} rows; {advice}")
    return np.pad(table, ((0, padded - rows), (0, 0)))


def to_detectron2(params: dict, config: detector.Config) -> dict[str, np.ndarray]:
    """The inverse of `from_detectron2`; `input_norm`, which detectron2 does not have, is refused."""
    if config.encoder.input_norm:
        raise errors.UserError("input_norm: detectron2's ViT has no LayerNorm in front of its blocks; train without it")
    tensors = pytorch.to_torch(params, rules())
    for block, side in enumerate(sides(config.encoder)):
        for table in TABLES:
            name = f"{NET}.blocks.{block}.attn.{table}"
            tensors[name] = np.ascontiguousarray(tensors[name][: 2 * side - 1])
    return tensors


def read_config(shapes: dict) -> detector.Config:
    """The config that tensors of these shapes belong to; the rates of dropped paths are the default's.

    Raises what a missing or misshapen tensor raises; `dense.Format.config_of` makes one line of it.
    """
    width, _, patch, _ = shapes[f"{NET}.patch_embed.proj.weight"]
    depth = len(pytorch.layer_names(f"{NET}.blocks.{{i}}.attn.rel_pos_h", shapes))
    tables = [shapes[f"{NET}.blocks.{block}.attn.rel_pos_h"] for block in range(depth)]
    rows = [table[0] for table in tables]
    global_blocks = [block for block in range(depth) if rows[block] == rows[-1]]
    if len(global_blocks) == depth:
        raise ValueError("all blocks have relative positions of the same length, so that no windows are known")
    encoder = vitdet.Config(
        width=width,
        depth=depth,
        heads=width // tables[0][1],
        mlp_ratio=shapes[f"{NET}.blocks.0.mlp.fc1.weight"][0] // width,
        image_size=(rows[-1] + 1) // 2 * patch,
        patch_size=patch,
        pretrain_size=round((shapes[f"{NET}.pos_embed"][1] - 1) ** 0.5) * patch,
        window=(rows[0] + 1) // 2,
        global_blocks=len(global_blocks),
    )
    return detector.Config(
        encoder,
        channels=shapes[f"{RPN}.conv.conv0.weight"][0],
        box_width=shapes[f"{BOX_HEAD}.fc1.weight"][0],
        num_classes=shapes[f"{MASK_HEAD}.predictor.weight"][0],
    )



def read_pickle(path: str) -> dict[str, weight_files.Stored]:
    """The arrays by name in a .pkl of detectron2's model zoo."""
    with files.explain(f"{path} cannot be read", OSError, ValueError):
        with files.open_regular(path) as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        tree = numpy_pickles.load(data)
    found = {}
    for key, value in weight_files.tensors_of(path, tree).items():
        name = weight_files.printable(key)
        if not isinstance(value, np.ndarray):
            raise weight_files.not_a_tensor(f"{path}: {name}", value)
        found[name] = weight_files.Stored(f"{path}: {name}", value.shape, str(value.dtype), lambda value=value: value)
    return found
