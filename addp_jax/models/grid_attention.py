"""Attention over a grid of tokens: in windows or over the whole grid, with decomposed relative positions (ViTDet).

The logit of the query at (i, j) and the key at (k, l) is scale * q.k + q.Rh[i-k] + q.Rw[j-l], the last two terms with
the query as it is. They are dot products too, so that queries and keys are made longer by the two sides of the grid,

    [scale * q, q.Rh[i-0], q.Rh[i-1], ..., q.Rw[j-0], q.Rw[j-1], ...] . [k, onehot(k), onehot(l)],

and no array but the logits has the size tokens x tokens. A table of the bias would be such an array, and a sum over the
grid's sides would leave a last axis of 14 or 64, which a TPU pads to 128.

Memory: the softmax runs over at most `CHUNK` queries of each image and head at a time, and the backward pass computes
them again. So what lives at once is, per image, heads x CHUNK x tokens float32: 50 MB for 12 heads and 64 x 64 tokens,
where whole maps are 805 MB per block. The batch is not looped over, since it may be divided among devices.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from addp_jax.models import attention
from addp_jax.ops import resize

CHUNK = 256  # queries
KERNEL_INIT = nn.initializers.normal(0.02)  # ViTDet's trunc_normal_ cuts at -2 and 2, not at two deviations


class GridAttention(nn.Module):
    """Multi-head self-attention; softmax in float32.

    Of `rel_pos_h` and `rel_pos_w` [rows, D/N], the first 2*table-1 rows are read, of the distances 1-table ... table-1;
    the others are for other blocks of the same stack.
    """

    heads: int
    rows: int
    table: int  # side of the grid that the relative positions are stored for
    window: int  # side, in tokens; 0 = the whole grid
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens):
        """`tokens` [B,h,w,D] -> [B,h,w,D]. In windows, those beyond the grid are zeros in front of the projections."""
        batch, *grid, width = tokens.shape
        size = (self.window, self.window) if self.window else grid
        head_dim = width // self.heads

        def project(name):
            dense = nn.Dense(width, kernel_init=KERNEL_INIT, dtype=self.dtype, name=name)
            features = dense(tokens)
            if self.window:  # zeros become the bias: cheaper than to project them all
                features = to_windows(features, dense(jnp.zeros((1, width), self.dtype))[0], self.window)
            else:
                features = features.reshape(batch, 1, -1, width)
            return rearrange(features, "b x t (n d) -> b x n t d", n=self.heads)

        query, key, value = project("query"), project("key"), project("value")
        on_grid = query.reshape(*query.shape[:3], *size, head_dim)
        terms = [query.astype(jnp.float32) * head_dim**-0.5]
        for axis, side in zip("hw", size):
            stored = self.param(f"rel_pos_{axis}", nn.initializers.zeros, (self.rows, head_dim))
            between = relative(stored[: 2 * self.table - 1], side).astype(self.dtype)
            product = jnp.einsum(f"bxnhwd,{axis}kd->bxnhwk", on_grid, between, preferred_element_type=jnp.float32)
            terms.append(product.reshape(*query.shape[:4], side))
        query = jnp.concatenate([term.astype(self.dtype) for term in terms], axis=-1)
        places = jnp.broadcast_to(jnp.asarray(places_of(size), self.dtype), (*key.shape[:4], sum(size)))
        out = attend_in_chunks(query, jnp.concatenate([key, places], axis=-1), value)
        out = rearrange(out, "b x n t d -> b x t (n d)")
        out = from_windows(out, grid, self.window) if self.window else out.reshape(batch, *grid, width)
        return nn.Dense(width, kernel_init=KERNEL_INIT, dtype=self.dtype, name="out")(out)


def attend(query, key, value):
    """[...,Q,E], [...,K,E], [...,K,d] -> [...,Q,d]; the queries are scaled."""
    scores = jnp.einsum("...qe,...ke->...qk", query, key, preferred_element_type=jnp.float32)
    return attention.attend(scores, value)


def attend_in_chunks(query, key, value):
    """`attend`, at most `CHUNK` queries at a time; the backward pass computes the weights again."""
    length, dtype = query.shape[-2], query.dtype
    count = -(-length // CHUNK)
    if count == 1:
        return jax.checkpoint(attend)(query, key, value)
    each = -(-length // count)
    query = jnp.pad(query, [(0, 0)] * (query.ndim - 2) + [(0, count * each - length), (0, 0)])
    chunks = rearrange(query, "... (c q) e -> c ... q e", c=count)
    # float32, or the gradients of keys and values would be added up over the chunks in bfloat16
    key, value = key.astype(jnp.float32), value.astype(jnp.float32)
    each_chunk = jax.checkpoint(lambda chunk: attend(chunk, key.astype(dtype), value.astype(dtype)), prevent_cse=False)
    return rearrange(jax.lax.map(each_chunk, chunks), "c ... q d -> ... (c q) d")[..., :length, :]


def to_windows(features, fill, window: int):
    """[B,h,w,D] -> [B,windows,window^2,D]; right and below, `fill` [D] is added up to whole windows."""
    batch, height, width, depth = features.shape
    for axis, size in ((1, height), (2, width)):
        shape = list(features.shape)
        shape[axis] = -size % window
        features = jnp.concatenate([features, jnp.broadcast_to(fill[None, None, None], shape)], axis=axis)
    return rearrange(features, "b (y p) (x q) d -> b (y x) (p q) d", p=window, q=window)


def from_windows(features, grid, window: int):
    """[B,windows,window^2,D] -> [B,h,w,D], without what was added."""
    height, width = grid
    features = rearrange(features, "b (y x) (p q) d -> b (y p) (x q) d", p=window, y=-(-height // window))
    return features[:, :height, :width]


def relative(stored, side: int):
    """Table [2S-1,d] of relative positions -> float32 [side,side,d]: entry (i, k) is the row of the distance i - k.

    For a side other than S the table is interpolated linearly to 2*side-1 rows (half-pixel centres, no antialiasing).
    """
    if len(stored) != 2 * side - 1:
        weights = jnp.asarray(resize.linear_weights(len(stored), 2 * side - 1), jnp.float32)
        stored = jnp.einsum("io,od->id", weights, stored, precision="highest")
    return stored[np.arange(side)[:, None] - np.arange(side)[None] + side - 1]


def places_of(size):
    """float32 [h*w,h+w]: of each token, its row and its column as one-hot vectors."""
    height, width = size
    rows, columns = np.eye(height, dtype=np.float32), np.eye(width, dtype=np.float32)
    return np.concatenate([np.repeat(rows, width, axis=0), np.tile(columns, (height, 1))], axis=1)
