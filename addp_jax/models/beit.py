"""The segmenter's backbone: a vision transformer with BEiT's relative positions and LayerScale, read at four depths.

As mmsegmentation's `MAE`: the whole image is attended over, the class token stays in the sequence, no norm at the end.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from addp_jax import partition, schema
from addp_jax.models import attention, layers, vit
from addp_jax.models.grid_attention import KERNEL_INIT

LAYOUT = (
    (r".*/relative_positions", ("layers", "replicated", "heads")),
    (r".*/block/(attention|mlp)_scale", ("layers", "replicated")),
    *vit.LAYOUT,
)


@schema.config
class Config(layers.BlockConfig):
    """The vision transformer. Its images are squares of `image_size`: positions are stored for this grid alone."""

    image_size: int = schema.field(512, least=1, tiny=32)  # pixels
    patch_size: int = schema.field(16, least=1, tiny=4)  # pixels
    taps: tuple[int, ...] = schema.field((3, 5, 7, 11), least=0, tiny=(0, 0, 1, 1))  # blocks whose outputs are read
    relative_positions: bool = True  # BEiT's: a bias of each pair of tokens, head and block
    layer_scale: bool = True  # a factor for each channel of each residual branch, 1 at the start
    input_norm: bool = False  # LayerNorm between the embeddings and the first block: ADDP's pre-training has it
    # Of the last block; grows linearly from 0 at the first.
    drop_path: float = schema.field(0.1, least=0, below=1, matters=schema.TRAINING)
    # What the backward pass computes again beside the attention weights: none | dots (all but matmul outputs) | full.
    remat: str = schema.field("none", choices=("none", *layers.REMAT_POLICIES), matters=schema.NOTHING, tiny="none")

    def __post_init__(self):
        layers.BlockConfig.__post_init__(self)
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size: {self.image_size} is not a multiple of patch_size={self.patch_size}")
        if len(self.taps) != 4 or sorted(self.taps) != list(self.taps) or self.taps[-1] >= self.depth:
            raise ValueError(f"taps: {self.taps}; use four numbers below depth={self.depth}, none below the one before")

    @property
    def grid(self) -> int:
        """Side of the grid of an image, in tokens."""
        return self.image_size // self.patch_size

    @property
    def length(self) -> int:
        """Position embeddings, without the class token's."""
        return self.grid**2


def even_taps(depth: int) -> tuple[int, ...]:
    """Those that mmsegmentation reads of 12 and 24 blocks: 1/3, 1/2, 2/3 and 1 of the depth; else ends of quarters."""
    if depth % 6 == 0:
        return tuple(depth * sixths // 6 - 1 for sixths in (2, 3, 4, 6))
    return tuple(-(-depth * quarters // 4) - 1 for quarters in (1, 2, 3, 4))


class Encoder(vit.Embedding):
    """Image, or its token ids -> features of its patches, after each block of `taps`."""

    @nn.compact
    def __call__(self, image, size=None, train: bool = False):
        """`image` [B,S,S,3] in [0,1], `size` int32 [B,2], or see `embed` -> tuple of four [B,h,w,D].

        size: height and width of the picture, top left in `image`; beyond it the mean colour is read, whatever is
        there. None = the pictures fill their images. S is `image_size`: ValueError if not.
        """
        config = self.config
        side, unit = (config.grid, "tokens") if self.num_codes else (config.image_size, "pixels")
        if image.shape[1:3] != (side, side):
            raise ValueError(f"images of {image.shape[1]} x {image.shape[2]} {unit}; image_size is {config.image_size}")
        tokens, _ = self.embed(image, size, nn.initializers.he_normal())
        tokens = self.norm(self.place(tokens, nn.initializers.zeros))
        taps = Blocks(config, self.dtype, name="blocks")(tokens, train)
        return tuple(rearrange(tap[:, 1:], "b (h w) d -> b h w d", h=config.grid) for tap in taps)


class Blocks(nn.Module):
    """`depth` blocks, their parameters stacked on a leading axis."""

    config: Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens, train: bool):
        """`tokens` [B,1+L,D] -> tuple of four [B,1+L,D]: the outputs of the blocks `taps`."""
        config = self.config
        block = Block(config, self.dtype, parent=None)

        def init(rng):
            one = lambda key: block.init(key, jnp.zeros((1, 1 + config.length, config.width)), 0.0, False)["params"]
            return jax.vmap(one)(jax.random.split(rng, config.depth))

        params = self.param("block", init)
        rates = jnp.asarray(np.linspace(0, config.drop_path, config.depth), jnp.float32)
        keys = jax.random.split(self.make_rng("dropout"), config.depth) if train and config.drop_path else None

        def apply(tokens, params, rate, key):
            rngs = {} if key is None else {"dropout": key}
            return block.apply({"params": params}, tokens, rate, train, rngs=rngs)

        if config.remat != "none":
            apply = jax.checkpoint(apply, prevent_cse=False, policy=layers.REMAT_POLICIES[config.remat])

        def step(carry, layer):
            tokens, taps = carry
            slot, *layer = layer
            tokens = apply(tokens, *layer)
            return (tokens, jax.lax.dynamic_update_index_in_dim(taps, tokens, slot, 0)), None

        tokens = partition.constrain(tokens, "batch", "length", "embed")
        # A block writes where the next tap will stand, which the tap then overwrites: four outputs live, not all.
        read = sorted(set(config.taps))
        slots = jnp.asarray(np.searchsorted(read, np.arange(config.depth)), jnp.int32)
        layers_used = jax.tree.map(lambda leaf: leaf[: read[-1] + 1], (slots, params, rates, keys))
        taps = jnp.broadcast_to(tokens[None], (len(read), *tokens.shape))
        (_, taps), _ = jax.lax.scan(step, (tokens, taps), layers_used)
        return tuple(taps[read.index(block)] for block in config.taps)


class Block(nn.Module):
    """Pre-norm transformer block: attention and MLP, each with a factor for each channel and a residual."""

    config: Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens, drop_path, train: bool):
        config = self.config

        def add(tokens, branch, name):
            if config.layer_scale:
                branch *= self.param(name, nn.initializers.ones, (config.width,))[None, None].astype(self.dtype)
            if config.drop_path and train:
                branch = layers.DropPath()(branch, drop_path)
            return partition.constrain(tokens + branch, "batch", "length", "embed")

        grid = config.grid if config.relative_positions else 0
        attention = Attention(config.heads, grid, self.dtype, name="attention")
        tokens = add(tokens, attention(layers.layer_norm("norm1", dtype=self.dtype)(tokens)), "attention_scale")
        mlp = layers.Mlp(config.mlp_ratio, 0.0, self.dtype, KERNEL_INIT, name="mlp")
        return add(tokens, mlp(layers.layer_norm("norm2", dtype=self.dtype)(tokens), train), "mlp_scale")


class Attention(nn.Module):
    """Multi-head self-attention; softmax in float32. The backward pass computes its weights again."""

    heads: int
    grid: int  # side of the grid of relative positions; 0 = there are none
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens):
        """`tokens` [B,1+L,D], class token first -> [B,1+L,D]."""
        width = tokens.shape[-1]

        def project(name):
            out = nn.Dense(width, kernel_init=KERNEL_INIT, dtype=self.dtype, name=name)(tokens)
            return rearrange(out, "b t (n d) -> b n t d", n=self.heads)

        query, key, value = project("query"), project("key"), project("value")
        table = None
        if self.grid:
            shape = (relative_rows(self.grid), self.heads)
            table = self.param("relative_positions", nn.initializers.zeros, shape)
        out = jax.checkpoint(attend, static_argnums=4)(query, key, value, table, self.grid)
        out = rearrange(out, "b n t d -> b t (n d)")
        return nn.Dense(width, kernel_init=KERNEL_INIT, dtype=self.dtype, name="out")(out)


def attend(query, key, value, table, grid: int):
    """[B,N,T,d] three times, `table` [rows,N] or None -> [B,N,T,d]."""
    scores = jnp.einsum("bnqd,bnkd->bnqk", query, key, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5
    if table is not None:
        scores += relative_bias(table, grid)[None]
    return attention.attend(scores, value)


def relative_rows(grid: int) -> int:
    """Of a table: one for each difference of two places, then of class to patch, patch to class, class to class."""
    return (2 * grid - 1) ** 2 + 3


def relative_index(grid: int) -> np.ndarray:
    """int64 [1+L,1+L]: the row of the table for each query and key; token 0 is the class token."""
    rows, columns = np.divmod(np.arange(grid**2), grid)
    down, right = (place[:, None] - place[None] + grid - 1 for place in (rows, columns))
    index = np.empty((1 + grid**2,) * 2, np.int64)
    index[1:, 1:] = down * (2 * grid - 1) + right
    index[0], index[:, 0], index[0, 0] = relative_rows(grid) - np.arange(3, 0, -1)
    return index


def relative_bias(table, grid: int):
    """`table` [rows,N] -> float32 [N,1+L,1+L]: the row `relative_index` of each pair.

    By copies of the table that are cut anew, since a gather's gradient, a scatter, is slow on a TPU.
    """
    side = 2 * grid - 1
    patches, (to_patch, to_class, to_itself) = table[: side**2].reshape(side, side, -1), table[side**2 :]
    patches = differences(jnp.moveaxis(differences(patches), 2, 0))  # columns of query and key, then rows
    patches = rearrange(patches, "j l i k n -> n (i j) (k l)")
    patches = jnp.concatenate([jnp.broadcast_to(to_class[:, None, None], (*patches.shape[:2], 1)), patches], axis=2)
    first = jnp.broadcast_to(to_patch[:, None, None], (len(patches), 1, patches.shape[1]))
    first = jnp.concatenate([to_itself[:, None, None], first], axis=2)
    return jnp.concatenate([first, patches], axis=1).astype(jnp.float32)


def differences(rows):
    """[2S-1,...] -> [S,S,...]: entry (i, k) is the row i - k + S - 1."""
    side = (len(rows) + 1) // 2
    padded = jnp.concatenate([rows[::-1], rows[:1]])  # [2S,...]; the last one is not read
    copies = jnp.broadcast_to(padded[None], (side, *padded.shape)).reshape(2 * side * side, *rows.shape[1:])
    # Rows shorter by one than the copies begin one place earlier each time.
    return copies[: side * (2 * side - 1)].reshape(side, 2 * side - 1, *rows.shape[1:])[:, side - 1 :]
