"""ROIAlign and mask targets: against detectron2's numbers, and against a plain loop over samples."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from addp_jax.ops import masks, roi_align

pytestmark = pytest.mark.golden
FILE = pathlib.Path(__file__).parent / "golden" / "dense" / "roi_align.npz"
LEVELS = ("p2", "p3", "p4", "p5")


@functools.cache
def golden():
    return dict(np.load(FILE))


def pyramid():
    return [jnp.asarray(golden()[f"in_{level}"].transpose(0, 2, 3, 1)) for level in LEVELS]


def both_boxes():
    return jnp.stack([golden()["boxes_0"], golden()["boxes_1"]])


def pool(features, boxes, bins, canonical_size=56):
    return roi_align.pool(features, boxes, bins, canonical_size=canonical_size)


def plain(features, box, bins, scale):
    """ROIAlign of one box on one level [H, W, C], sample by sample as the reference does."""
    sizes = features.shape[:2]
    start = [box[1] * scale - 0.5, box[0] * scale - 0.5]
    side = [(box[3] - box[1]) * scale / bins, (box[2] - box[0]) * scale / bins]
    counts = [int(np.ceil(part)) for part in side]
    out = np.zeros((bins, bins, features.shape[2]))
    for row, column in np.ndindex(bins, bins):
        for sample in np.ndindex(*(max(count, 0) for count in counts)):
            place = [start[a] + ((row, column)[a] + (sample[a] + 0.5) / counts[a]) * side[a] for a in range(2)]
            if any(p < -1 or p > n for p, n in zip(place, sizes)):
                continue
            place = [min(max(p, 0), n - 1) for p, n in zip(place, sizes)]
            low = [int(p) for p in place]
            high = [min(p + 1, n - 1) for p, n in zip(low, sizes)]
            y, x = (p - q for p, q in zip(place, low))
            out[row, column] += (1 - y) * (1 - x) * features[low[0], low[1]] + (1 - y) * x * features[low[0], high[1]]
            out[row, column] += y * (1 - x) * features[high[0], low[1]] + y * x * features[high[0], high[1]]
    return out / max(counts[0] * counts[1], 1)


@pytest.mark.parametrize("bin_side", [0.001, 0.3, 1, 1.01, 1.2, 1.33, 2.05, 2.5, 9.7])
def test_weights_find_every_sample(bin_side):
    """Bins just above one cell hold the densest samples; starts are at, before and behind the borders."""
    bins, cells, count = 5, 12, int(np.ceil(np.float32(bin_side)))
    start = np.concatenate([np.linspace(-8, 14, 89), [-1, 0]]).astype(np.float32)
    side = np.full_like(start, bin_side * bins)
    span = roi_align.Span(start, side, jnp.full_like(start, cells))
    found = roi_align.axis_weights(span, jnp.broadcast_to(jnp.arange(cells), (len(start), cells)), bins)
    place = start[:, None, None] + (np.arange(bins)[:, None] + (np.arange(count) + 0.5) / count) * bin_side
    tent = np.maximum(1 - np.abs(place.clip(0, cells - 1)[..., None] - np.arange(cells)), 0)
    expected = (tent * ((place >= -1) & (place <= cells))[..., None]).sum(-2) / count
    safe = (np.abs(place[..., None] - [-1, cells]) > 1e-4).all((-1, -2))  # no sample decided by rounding
    np.testing.assert_allclose(np.asarray(found)[safe], expected[safe], atol=2e-5)
    assert safe.mean() > 0.9


def test_levels():
    found = roi_align.levels_of(jnp.asarray(golden()["level_boxes"]))
    np.testing.assert_array_equal(found, golden()["level_index"])
    found = roi_align.levels_of(both_boxes(), canonical_size=56)
    np.testing.assert_array_equal(found.reshape(-1), golden()["pool_level_index"])


def test_pooled():
    pooled = jax.jit(pool, static_argnums=2)(pyramid(), both_boxes(), 7)
    np.testing.assert_allclose(pooled.reshape(18, 7, 7, 4).transpose(0, 3, 1, 2), golden()["pooled7"], atol=2e-5)
    pooled = jax.jit(pool, static_argnums=2)(pyramid(), both_boxes(), 14).reshape(18, 14, 14, 4)[::2]
    np.testing.assert_allclose(pooled.transpose(0, 3, 1, 2), golden()["pooled14"], atol=4e-5)


def test_gradient():
    shape = (18, 4, 7, 7)
    cotangent = (np.cos(0.1 * np.arange(np.prod(shape))) / np.prod(shape)).reshape(shape).transpose(0, 2, 3, 1)

    def total(features, boxes):
        return (pool(features, boxes, 7).reshape(18, 7, 7, 4) * cotangent.astype(np.float32)).sum()

    gradients, to_boxes = jax.jit(jax.grad(total, (0, 1)))(pyramid(), both_boxes())
    for gradient, level in zip(gradients, LEVELS):
        np.testing.assert_allclose(gradient.transpose(0, 3, 1, 2), golden()[f"pooled7_grad_{level}"], atol=1e-8)
    assert not to_boxes.any()


def test_one_level():
    level, boxes = pyramid()[1][:1], both_boxes()[:1]
    pooled = roi_align.pool([level], boxes, 7, strides=(8,))[0]
    np.testing.assert_allclose(pooled.transpose(0, 3, 1, 2), golden()["single_p3_ratio0"], atol=2e-5)


@pytest.mark.parametrize("bins", [7, 14])
def test_long_boxes_read_several_windows(bins):
    """Boxes as long as the image, at its borders, tiny and empty, on a pyramid wider than a window."""
    rng = np.random.default_rng(0)
    sizes = [(96, 128), (48, 64), (24, 32), (12, 16)]
    features = [rng.normal(size=(2, *size, 3)).astype(np.float32) for size in sizes]
    boxes = np.array(
        [
            [3.3, 40.2, 509.1, 63.7], [480.5, 0, 512, 384], [0, 0, 512, 12.3], [200.1, 7.7, 212.9, 381.2], [0, 0, 512, 384],
            [100.2, 100.4, 211.9, 211.8], [0, 0, 0, 0], [5, 5, 5.01, 5.02], [511.9, 383.9, 512, 384], [0.2, 0.1, 1.7, 383.3],
        ], np.float32,
    )  # fmt: skip
    boxes = np.stack([boxes, boxes[::-1]])
    pooled = jax.jit(roi_align.pool, static_argnums=2)(features, boxes, bins)
    levels = np.asarray(roi_align.levels_of(jnp.asarray(boxes)))
    for image, row in np.ndindex(levels.shape):
        level = levels[image, row]
        expected = plain(features[level][image], boxes[image, row].astype(np.float64), bins, 1 / (4, 8, 16, 32)[level])
        np.testing.assert_allclose(pooled[image, row], expected, atol=2e-5, err_msg=str(boxes[image, row]))


def test_many_windows_and_padding(monkeypatch):
    """Windows that fill several trips of the loop; a padded box changes nothing; the gradient is the transpose."""
    monkeypatch.setattr(roi_align, "CHUNK", 4)
    rng = np.random.default_rng(1)
    features = [jnp.asarray(rng.normal(size=(2, 64 >> level, 80 >> level, 2)), jnp.float32) for level in range(4)]
    corner = rng.uniform(0, 150, (2, 11, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(1, 100, (2, 11, 2))], -1).astype(np.float32)
    boxes[0, 3] = 0
    few = jax.jit(lambda levels: roi_align.pool(levels, boxes, 7))(features)
    padded = jnp.pad(jnp.asarray(boxes), ((0, 0), (0, 6), (0, 0)))
    many, backward = jax.vjp(jax.jit(lambda *levels: roi_align.pool(levels, padded, 7)), *features)
    np.testing.assert_array_equal(many[:, :11], few)
    assert not many[:, 11:].any() and not few[0, 3].any()
    monkeypatch.setattr(roi_align, "CHUNK", 128)
    np.testing.assert_allclose(jax.jit(lambda levels: roi_align.pool(levels, boxes, 7))(features), few, atol=1e-6)
    cotangent = jnp.asarray(rng.normal(size=many.shape), jnp.float32)
    products = sum((level * gradient).sum() for level, gradient in zip(features, backward(cotangent)))
    np.testing.assert_allclose(products, (many * cotangent).sum(), rtol=1e-4)


def test_under_vmap_and_in_bfloat16():
    features, boxes = pyramid(), both_boxes()
    whole = jax.jit(pool, static_argnums=2)(features, boxes, 7)

    def single(features, boxes):
        return pool([level[None] for level in features], boxes[None], 7)[0]

    np.testing.assert_allclose(jax.jit(jax.vmap(single))(features, boxes), whole, atol=1e-6)
    half = jax.jit(pool, static_argnums=2)([level.astype(jnp.bfloat16) for level in features], boxes, 7)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), whole, atol=0.05)


# Mask targets


def test_targets_of_whole_bitmasks():
    data = golden()
    soft = roi_align.align(jnp.asarray(data["bitmasks"]), jnp.asarray(data["target_boxes"]), 28)
    np.testing.assert_allclose(soft, data["target_soft"], atol=5e-5)
    clear = np.abs(data["target_soft"] - 0.5) > 1e-4
    np.testing.assert_array_equal((np.asarray(soft) >= 0.5)[clear], data["target_bitmask"][clear])


def polygon_mask(polygons, box, size):
    """The polygons over `box`, sampled at size x size points: even-odd within one, union of several."""
    place = (np.arange(size) + 0.5) / size
    x, y = np.meshgrid(box[0] + place * (box[2] - box[0]), box[1] + place * (box[3] - box[1]))
    mask = np.zeros((size, size), bool)
    for polygon in polygons:
        points = polygon.reshape(-1, 2)
        inside = np.zeros((size, size), bool)
        for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, 0)):
            if y0 != y1:
                inside ^= ((y0 > y) != (y1 > y)) & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
        mask |= inside
    return mask


def test_targets_from_the_objects_own_box():
    data = golden()
    owned = [[data[name] for name in sorted(data) if name.startswith(f"polygon_{i}_")] for i in range(5)]
    packed = np.packbits([polygon_mask(*pair, 112) for pair in zip(owned, data["polygon_boxes"])], axis=-1)
    assert packed.shape == (5, 112, 14)
    found = jax.jit(masks.targets)(packed, data["polygon_boxes"], data["target_boxes"])
    exact = [polygon_mask(*pair, 28) for pair in zip(owned, data["target_boxes"])]
    assert (found == data["target_polygon"]).mean() > 0.98  # the reference's two kinds agree by 97 to 99.5%
    assert (found == np.array(exact)).mean() > 0.995


def test_a_target_in_the_own_box_a_half_and_elsewhere():
    bits = np.zeros((4, 112, 112), np.uint8)
    bits[:, :56] = 1  # the upper half
    objects = np.array([[10.0, 20, 50, 60]] * 3 + [[0, 0, 0, 0]], np.float32)
    given = np.array([[10, 20, 50, 60], [10, 20, 50, 40], [60, 20, 90, 60], [10, 20, 50, 60]], np.float32)
    found = np.asarray(masks.targets(np.packbits(bits, axis=-1), objects, given))
    np.testing.assert_array_equal(found[0], np.arange(28)[:, None].repeat(28, 1) < 14)
    assert found[1].all() and not found[2].any()
