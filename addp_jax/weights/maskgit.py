"""Names of the public MaskGIT tokenizer (flax msgpack): modules are numbered in the order of their calls."""

from __future__ import annotations

from addp_jax.codecs import vqgan
from addp_jax.weights import pytorch


def config(shapes: dict) -> vqgan.Config:
    """Size of the network from `{name: shape}`. Raises KeyError with the name of a tensor that is missing."""
    levels = sum(name.startswith("decoder/Conv_") and name.endswith("/kernel") for name in shapes) - 1
    blocks = {name.split("/")[1] for name in shapes if name.startswith("encoder/ResBlock_")}
    per_level = (len(blocks) - 2) // max(levels, 1)
    firsts = [f"encoder/ResBlock_{level * per_level}/Conv_0/kernel" for level in range(max(levels, 1))]
    channels, widths = shapes["encoder/Conv_0/kernel"][-1], [shapes[name][-1] for name in firsts]
    return pytorch.tokenizer_config(channels, widths, per_level, shapes["quantizer/codebook"])


def rules(config: vqgan.Config) -> list[pytorch.Rule]:
    """Kernels are laid out as ours. A block whose width changes has a third convolution, the shortcut."""

    def same(theirs, ours, *names):
        return [pytorch.Rule(f"{theirs}/{name}", (f"{ours}/{name}",), pytorch.SAME) for name in names]

    def conv(theirs, ours, bias):
        return same(theirs, ours, "kernel", *["bias"] * bias)

    def norm(theirs, ours):
        return same(theirs, f"{ours}/norm", "scale", "bias")

    def block(theirs, ours, shortcut):
        table = [*norm(f"{theirs}/GroupNorm_0", f"{ours}/norm1"), *conv(f"{theirs}/Conv_0", f"{ours}/conv1", False)]
        table += [*norm(f"{theirs}/GroupNorm_1", f"{ours}/norm2"), *conv(f"{theirs}/Conv_1", f"{ours}/conv2", False)]
        return table + (conv(f"{theirs}/Conv_2", f"{ours}/shortcut", False) if shortcut else [])

    def level_blocks(side, level):
        changes = pytorch.shortcuts(config, level)[side == "up"]
        return [(f"{side}_{level}_{index}", changes and not index) for index in range(config.num_res_blocks)]

    top, middle = len(config.multipliers) - 1, [("mid_0", False), ("mid_1", False)]
    down = [block for level in range(top + 1) for block in level_blocks("down", level)]
    up = [block for level in range(top, -1, -1) for block in level_blocks("up", level)]
    table = conv("encoder/Conv_0", "encoder/conv_in", False) + conv("decoder/Conv_0", "decoder/conv_in", True)
    for side, order in (("encoder", down + middle), ("decoder", middle + up)):
        for number, (name, shortcut) in enumerate(order):
            table += block(f"{side}/ResBlock_{number}", f"{side}/{name}", shortcut)
        table += norm(f"{side}/GroupNorm_0", f"{side}/norm_out")
    for number, level in enumerate(range(top, 0, -1), 1):
        table += conv(f"decoder/Conv_{number}", f"decoder/upsample_{level}", True)
    table += conv("encoder/Conv_1", "encoder/conv_out", True)
    table += conv(f"decoder/Conv_{top + 1}", "decoder/conv_out", True)
    return table + [pytorch.Rule("quantizer/codebook", ("codebook",), pytorch.SAME)]
