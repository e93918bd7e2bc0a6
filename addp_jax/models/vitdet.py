"""The detector's backbone: a plain vision transformer with windows, and the simple feature pyramid (ViTDet).

Of the blocks, `global_blocks` attend over the whole image, evenly spread: 3, 6, 9 and 12 of 12. So the stack is a row
of equal groups, in each of which all blocks but the last have windows. It is scanned over the groups, and inside over
the windowed blocks. The parameters are those of one stack of `depth` blocks, as in `vit`, for layer-wise learning
rates and for the weights of a pre-trained encoder. The tables of relative positions are longer in global blocks: all
blocks have them that long, and a windowed block reads the first rows only. The others stay zero.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from addp_jax import partition, schema
from addp_jax.models import grid_attention, layers, vit

LEVELS = ("p2", "p3", "p4", "p5", "p6")
STRIDES = (4, 8, 16, 32, 64)  # of the levels, in pixels, for patches of 16
TORCH_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # of convolutions in PyTorch
LAYOUT = (
    (r".*rel_pos_[hw]", ("layers", "replicated", "replicated")),
    (r".*(up|lateral|smooth)(_\d)?/kernel", ("replicated", "replicated", "replicated", "channels")),
    *(rule for rule in vit.LAYOUT if "class_token" not in rule[0]),
)


@schema.config
class Config(layers.BlockConfig):
    """The vision transformer; `image_size` / `patch_size` gives the grid of the relative positions."""

    image_size: int = schema.field(1024, least=1, tiny=64)  # pixels; side of the padded images
    patch_size: int = schema.field(16, least=1, tiny=4)  # pixels
    pretrain_size: int = schema.field(256, least=1, tiny=16)  # pixels; position embeddings are stored for it
    window: int = schema.field(14, least=1, tiny=6)  # tokens; side of a window
    global_blocks: int = schema.field(4, least=1, tiny=1)  # evenly spread; the last block is one
    input_norm: bool = False  # LayerNorm between the embeddings and the first block: ADDP's pre-training has it
    # Of the last block; grows linearly from 0 at the first.
    drop_path: float = schema.field(0.1, least=0, below=1, matters=schema.TRAINING)
    # What the backward pass computes again beside the attention weights: none | dots (all but matmul outputs) | full.
    remat: str = schema.field("none", choices=("none", *layers.REMAT_POLICIES), matters=schema.NOTHING, tiny="none")

    def __post_init__(self):
        layers.BlockConfig.__post_init__(self)
        if self.depth % self.global_blocks:
            raise ValueError(f"global_blocks: {self.global_blocks} does not divide depth={self.depth}")
        for name in ("image_size", "pretrain_size"):
            if getattr(self, name) % self.patch_size:
                raise ValueError(f"{name}: {getattr(self, name)} is not a multiple of patch_size={self.patch_size}")

    @property
    def length(self) -> int:
        """Stored position embeddings, without the class token's."""
        return (self.pretrain_size // self.patch_size) ** 2

    @property
    def grid(self) -> int:
        """Side of the grid of a padded image, in tokens."""
        return self.image_size // self.patch_size

    @property
    def rel_pos_rows(self) -> int:
        return 2 * max(self.grid, self.window) - 1


class Encoder(vit.Embedding):
    """Image, or its token ids -> features of its patches."""

    @nn.compact
    def __call__(self, image, size=None, train: bool = False):
        """`image` [B,H,W,3] in [0,1], `size` int32 [B,2], or see `embed` -> [B,h,w,D], no LayerNorm at the end.

        size: height and width of the picture, top left in `image`; beyond it the mean colour is read, whatever is
        there. None = the pictures fill their images. H and W are multiples of the patch size.
        """
        config = self.config
        tokens, grid = self.embed(image, size)
        # The first row, of the class token, is not read. It stays for the weights of an encoder, here and elsewhere.
        pos_embed = self.param("pos_embed", layers.EMBEDDING_INIT, (1 + config.length, config.width))
        tokens = self.norm(tokens + resize_pos_embed(pos_embed[1:], grid)[None].astype(tokens.dtype))
        tokens = Blocks(config, self.dtype, name="blocks")(tokens, grid, train)
        return tokens.reshape(len(tokens), *grid, config.width)


class Blocks(nn.Module):
    """`depth` blocks, their parameters stacked on a leading axis."""

    config: Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens, grid: tuple[int, int], train: bool):
        """`tokens` [B,h*w,D], `grid` (h, w) -> [B,h*w,D]."""
        config = self.config
        params = self.param("block", self.init_blocks)
        rates = jnp.asarray(np.linspace(0, config.drop_path, config.depth), jnp.float32)
        keys = jax.random.split(self.make_rng("dropout"), config.depth) if train and config.drop_path else None
        grouped = jax.tree.map(
            lambda leaf: leaf.reshape(config.global_blocks, -1, *leaf.shape[1:]), (params, rates, keys)
        )

        def apply(window):
            block = Block(config, self.dtype, grid, window, parent=None)

            def one(tokens, layer):
                params, rate, key = layer
                rngs = {} if key is None else {"dropout": key}
                return block.apply({"params": params}, tokens, rate, train, rngs=rngs), None

            if config.remat == "none":
                return one
            return jax.checkpoint(one, prevent_cse=False, policy=layers.REMAT_POLICIES[config.remat])

        def group(tokens, layers):
            first, last = (jax.tree.map(lambda leaf: leaf[part], layers) for part in (slice(-1), -1))
            tokens, _ = jax.lax.scan(apply(config.window), tokens, first)
            return apply(0)(tokens, last)

        tokens = partition.constrain(tokens, "batch", "length", "embed")
        return jax.lax.scan(group, tokens, grouped)[0]

    def init_blocks(self, rng):
        """Parameters of all blocks; they do not depend on the grid, and those of both kinds of block are alike."""
        config = self.config
        block = Block(config, self.dtype, (1, 1), 0, parent=None)
        init = lambda key: block.init(key, jnp.zeros((1, 1, config.width), self.dtype), 0.0, False)["params"]
        return jax.vmap(init)(jax.random.split(rng, config.depth))


class Block(nn.Module):
    """Pre-norm transformer block on a grid of tokens: attention and MLP, each with a residual."""

    config: Config
    dtype: jnp.dtype
    grid: tuple[int, int]
    window: int  # 0 = attention over the whole grid

    @nn.compact
    def __call__(self, tokens, drop_path, train: bool):
        config = self.config

        def add(tokens, branch):
            if config.drop_path and train:
                branch = layers.DropPath()(branch, drop_path)
            return partition.constrain(tokens + branch, "batch", "length", "embed")

        attention = grid_attention.GridAttention(
            config.heads, config.rel_pos_rows, self.window or config.grid, self.window, self.dtype, name="attention"
        )
        normed = layers.layer_norm("norm1", dtype=self.dtype)(tokens)
        branch = attention(normed.reshape(len(tokens), *self.grid, config.width))
        tokens = add(tokens, branch.reshape(tokens.shape))
        mlp = layers.Mlp(config.mlp_ratio, 0.0, self.dtype, grid_attention.KERNEL_INIT, name="mlp")
        return add(tokens, mlp(layers.layer_norm("norm2", dtype=self.dtype)(tokens), train))


class Pyramid(nn.Module):
    """Feature maps of five sizes out of the encoder's one."""

    channels: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, features):
        """`features` [B,h,w,D] -> tuple of [B,.,.,channels] of `LEVELS`: 4, 2, 1, 1/2 and 1/4 times h and w."""
        width = features.shape[-1]
        double = UpConv(width // 2, self.dtype, name="p2_up_0")(features)
        double = jax.nn.gelu(layers.layer_norm("p2_norm", dtype=self.dtype)(double), approximate=False)
        maps = {
            "p2": UpConv(width // 4, self.dtype, name="p2_up_1")(double),
            "p3": UpConv(width // 2, self.dtype, name="p3_up")(features),
            "p4": features,
            "p5": half(features),
        }
        levels = [self._level(name, hidden) for name, hidden in maps.items()]
        return (*levels, levels[-1][:, ::2, ::2])

    def _level(self, name: str, hidden):
        for part, size in (("lateral", 1), ("smooth", 3)):
            settings = dict(use_bias=False, kernel_init=TORCH_INIT, dtype=self.dtype, name=f"{name}_{part}")
            hidden = nn.Conv(self.channels, (size, size), **settings)(hidden)
            hidden = layers.layer_norm(f"{name}_{part}_norm", dtype=self.dtype)(hidden)
        return partition.constrain(hidden, "batch", None, None, "embed")


def up_conv_uniform(key, shape, dtype=jnp.float32):
    """PyTorch's start of transposed convolutions; its fan counts the outputs."""
    bound = (4 * shape[-1]) ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class UpConv(nn.Module):
    """Transposed convolution 2x2 of stride 2: each cell becomes four, none of which overlap."""

    channels: int
    dtype: jnp.dtype
    kernel_init: nn.initializers.Initializer = up_conv_uniform
    bias_init: nn.initializers.Initializer = up_conv_uniform

    @nn.compact
    def __call__(self, features):
        """[B,h,w,D] -> [B,2h,2w,channels]."""
        kernel = self.param("kernel", self.kernel_init, (2, 2, features.shape[-1], self.channels)).astype(self.dtype)
        bias = self.param("bias", self.bias_init, (self.channels,)).astype(self.dtype)
        cells = jnp.einsum("bhwd,pqdc->bhwpqc", features.astype(self.dtype), kernel)
        return rearrange(cells, "b h w p q c -> b (h p) (w q) c") + bias[None, None, None]


def half(features):
    """[B,h,w,D] -> [B,h//2,w//2,D]: the largest of each four cells; of equal ones the first has the gradient."""
    return nn.max_pool(features, (2, 2), strides=(2, 2))


def resize_pos_embed(pos_embed, grid):
    """Position embeddings [L,D] of a square grid -> [h*w,D]: `vit.resize_pos_embed` for gradients, of any grid."""
    side = round(len(pos_embed) ** 0.5)
    if (side, side) == tuple(grid):
        return pos_embed
    rows, columns = (jnp.asarray(vit.bicubic_weights(side, new), jnp.float32) for new in grid)
    pos_embed = pos_embed.reshape(side, side, -1)
    return jnp.einsum("ip,jq,pqd->ijd", rows, columns, pos_embed, precision="highest").reshape(grid[0] * grid[1], -1)
