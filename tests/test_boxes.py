"""Boxes, matching, sampling, NMS, proposals, detections and pasting: properties, and detectron2's numbers."""

import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from addp_jax.ops import boxes, masks, matching, nms, proposals

pytestmark = pytest.mark.golden
FOLDER = pathlib.Path(__file__).parent / "golden" / "dense"
GRIDS, STRIDES, SIZES = [(40, 40), (20, 20), (10, 10), (5, 5), (3, 3)], (4, 8, 16, 32, 64), (8, 16, 32, 64, 128)


@functools.cache
def golden(name):
    return dict(np.load(FOLDER / f"{name}.npz"))


def checksum4(array):
    flat = np.asarray(array, np.float64).ravel()
    wave = np.cos(0.1 * np.arange(flat.size))
    return np.array([flat.sum(), np.abs(flat).sum(), np.sqrt((flat**2).sum()), (flat * wave).sum()])


def random_boxes(rng, num, size=100, side=40):
    corner = rng.uniform(0, size - side, (num, 2))
    return np.concatenate([corner, corner + rng.uniform(1, side, (num, 2))], 1).astype(np.float32)


def overlap(one, other):
    """IoU of two boxes, by hand."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(width, 0) * max(height, 0)
    return both / ((one[2] - one[0]) * (one[3] - one[1]) + (other[2] - other[0]) * (other[3] - other[1]) - both)


# Boxes and anchors


def test_anchors():
    data = golden("anchors_boxes")
    levels = boxes.anchors(GRIDS, STRIDES, SIZES)
    assert [len(level) for level in levels] == [4800, 1200, 300, 75, 27]
    np.testing.assert_allclose([boxes.cell_anchors(size) for size in SIZES], data["cell_anchors"], atol=1e-5)
    coco = [boxes.cell_anchors(size) for size in (32, 64, 128, 256, 512)]
    np.testing.assert_allclose(coco, data["cell_anchors_coco"], atol=3e-5)
    for level, name in zip(levels[1:], ("p3", "p4", "p5", "p6")):
        np.testing.assert_allclose(level, data[f"anchors_{name}"], atol=5e-5)
    np.testing.assert_allclose(checksum4(levels[0]), data["anchors_p2_checksum"], atol=2e-2)
    np.testing.assert_allclose(boxes.anchors([(3, 5)], (32,), (256,))[0], data["anchors_coco_p5"], atol=1e-4)
    full = boxes.anchors([(side, side) for side in (256, 128, 64, 32, 16)])
    assert sum(map(len, full)) == 261_888


@pytest.mark.parametrize("name, weights", [("rpn", boxes.RPN_WEIGHTS), ("roi", boxes.ROI_WEIGHTS)])
def test_deltas(name, weights):
    data = golden("anchors_boxes")
    source, deltas = data["coding_source"], data["coding_deltas"] * np.float32(weights)
    encoded = boxes.encode(jnp.asarray(source), jnp.asarray(data["coding_target"]), weights)
    np.testing.assert_allclose(encoded, data[f"encoded_{name}"], atol=5e-6 * max(weights))
    np.testing.assert_allclose(boxes.decode(jnp.asarray(source), deltas, weights), data[f"decoded_{name}"], atol=1e-3)
    back = boxes.decode(jnp.asarray(source), encoded, weights)
    np.testing.assert_allclose(back, data["coding_target"], atol=2e-3)


def test_class_specific_deltas():
    data = golden("anchors_boxes")
    decoded = boxes.decode(
        jnp.asarray(data["coding_source"])[:, None], data["coding_deltas_3class"].reshape(24, 3, 4), boxes.ROI_WEIGHTS
    )
    np.testing.assert_allclose(decoded.reshape(24, 12), data["decoded_roi_3class"], atol=1e-4)


def test_clip_area_and_empty():
    given = jnp.array([[-5.0, 2, 30, 90], [10, 10, 10, 20], [25, 3, 40, 8]])
    cut = boxes.clip(given, jnp.array([50, 20]))
    np.testing.assert_array_equal(cut, [[0, 2, 20, 50], [10, 10, 10, 20], [20, 3, 20, 8]])
    np.testing.assert_array_equal(boxes.nonempty(cut), [True, False, False])
    np.testing.assert_array_equal(boxes.area(cut), [960, 0, 0])


# Matching and sampling


def padded_objects(objects, num):
    valid = np.arange(num) < len(objects)
    return jnp.pad(jnp.asarray(objects), ((0, num - len(objects)), (0, 0))), jnp.asarray(valid)


@pytest.mark.parametrize("num", [6, 20])
def test_matching(num):
    data = golden("anchors_boxes")
    anchors = jnp.asarray(data["match_anchors"])
    objects, valid = padded_objects(data["match_gt"], num)
    np.testing.assert_allclose(boxes.iou(objects, anchors)[:6], data["match_iou"], atol=5e-7)
    found = jax.jit(matching.match_anchors)(anchors, objects, valid)
    np.testing.assert_array_equal(found.index, data["match_rpn_index"])
    np.testing.assert_array_equal(found.label, data["match_rpn_label"])
    found = jax.jit(matching.match_proposals)(anchors, jnp.ones(220, bool), objects, valid)
    np.testing.assert_array_equal(found.index, data["match_roi_index"])
    np.testing.assert_array_equal(found.label, data["match_roi_label"])
    far, valid = padded_objects(data["match_far_gt"], num)
    np.testing.assert_array_equal(matching.match_anchors(anchors, far, valid).label, data["match_far_label"])
    none = matching.match_anchors(anchors, far, jnp.zeros(num, bool))
    np.testing.assert_array_equal(none.label, data["match_none_label"])
    assert not none.index.any()


def test_padded_proposals_are_ignored():
    data = golden("anchors_boxes")
    valid = jnp.arange(220) < 100
    found = matching.match_proposals(jnp.asarray(data["match_anchors"]), valid, *padded_objects(data["match_gt"], 6))
    np.testing.assert_array_equal(found.label[:100], data["match_roi_label"][:100])
    assert (np.asarray(found.label[100:]) == matching.IGNORED).all()


def test_sample_counts():
    data = golden("anchors_boxes")
    for (positive, negative, ignored, num, fraction), counts in zip(data["sample_cases"], data["sample_counts"]):
        label = np.repeat([1, 0, -1], [int(positive), int(negative), int(ignored)]).astype(np.int8)
        label = np.random.default_rng(0).permutation(label)
        priority = matching.random_priority(jax.random.key(0), len(label))
        drawn = matching.sample(jnp.asarray(label), priority, num=int(num), positive_fraction=float(fraction))
        index, valid, positives = map(np.asarray, drawn)
        assert index.shape == (int(num),)
        assert (positives.sum(), (valid & ~positives).sum()) == tuple(counts)
        assert (label[index[positives]] == 1).all() and (label[index[valid & ~positives]] == 0).all()
        assert len(set(index[valid])) == valid.sum()


def test_every_sample_is_equally_likely():
    label = jnp.array([1, 0, 1, -1, 0, 1, 0, 0], jnp.int8)

    def draw(key):
        return matching.sample(label, matching.random_priority(key, 8), num=4, positive_fraction=0.5).index

    drawn = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 6000)))
    positives = [tuple(sorted(row)) for row in drawn[:, :2]]
    negatives = [tuple(sorted(row)) for row in drawn[:, 2:]]
    assert set(positives) == set(itertools.combinations((0, 2, 5), 2))
    assert set(negatives) == set(itertools.combinations((1, 4, 6, 7), 2))
    for sets, kinds in ((positives, 3), (negatives, 6)):
        counts = np.unique(sets, axis=0, return_counts=True)[1]
        assert ((counts - 6000 / kinds) ** 2 / (6000 / kinds)).sum() < 25  # chi squared of at most 5 degrees of freedom


def test_labels_of_the_rpn():
    data = golden("rpn")
    anchors = jnp.concatenate(boxes.anchors(GRIDS[1:4], STRIDES[1:4], SIZES[1:4]))
    for image in range(2):
        objects, valid = padded_objects(data[f"gt_boxes_{image}"], 7)
        match = matching.match_anchors(anchors, objects, valid)
        drawn = matching.sample(match.label, matching.first_priority(len(anchors)), num=48, positive_fraction=0.5)
        index, chosen, positive = map(np.asarray, drawn)
        label = np.full(len(anchors), -1, np.int8)
        label[index[chosen]] = positive[chosen]
        np.testing.assert_array_equal(label, data["labels"][image])
        target = np.where((label == 1)[:, None], np.asarray(objects)[match.index], 0)
        np.testing.assert_array_equal(target, data["matched_gt_boxes"][image])


# NMS, proposals, detections


def greedy(given, valid, threshold):
    keep = []
    for index in np.flatnonzero(valid):
        if all(overlap(given[other], given[index]) <= threshold for other in keep):
            keep.append(index)
    return np.isin(np.arange(len(given)), keep)


@pytest.mark.parametrize("seed", range(5))
def test_nms_is_the_greedy_one(seed):
    rng = np.random.default_rng(seed)
    given, valid = random_boxes(rng, 120), rng.random(120) < 0.8
    keep = jax.jit(functools.partial(nms.keep_best, threshold=0.4))(given, valid)
    np.testing.assert_array_equal(keep, greedy(given, valid, 0.4))
    assert 5 < keep.sum() < valid.sum()


def test_nms_of_a_long_chain_and_of_equal_overlap():
    chain = np.array([[x, 0, x + 10, 10] for x in range(0, 150, 3)], np.float32)  # neighbours overlap by 7/13
    keep = nms.keep_best(jnp.asarray(chain), jnp.ones(50, bool), threshold=0.5)
    np.testing.assert_array_equal(keep, np.arange(50) % 2 == 0)
    equal = jnp.array([[0.0, 0, 10, 10], [0, 0, 10, 5]])  # IoU exactly 0.5: not above the threshold
    assert nms.keep_best(equal, jnp.ones(2, bool), threshold=0.5).all()
    assert not nms.keep_best(equal, jnp.zeros(2, bool), threshold=0.5).any()


def given_levels(image):
    data = golden("rpn")
    names = ("p3", "p4", "p5")
    anchors = boxes.anchors(GRIDS[1:4], STRIDES[1:4], SIZES[1:4])
    logits, deltas = ([data[f"given_{kind}_{name}"][image] for name in names] for kind in ("logits", "deltas"))
    return anchors, logits, deltas, jnp.asarray(data["image_sizes"][image])


@pytest.mark.parametrize("image", range(2))
@pytest.mark.parametrize("split, per_level, num", [("train", 200, 60), ("test", 100, 40)])
def test_proposals(split, per_level, num, image):
    data = golden("rpn")
    propose = jax.jit(functools.partial(proposals.propose, per_level=per_level, num=num))
    found = propose(*given_levels(image))
    assert found.valid.all()
    np.testing.assert_array_equal(found.logits, data[f"proposal_logits_{split}_{image}"])
    np.testing.assert_allclose(found.boxes, data[f"proposals_{split}_{image}"], atol=1e-4)


def test_padded_proposals_are_marked_and_levels_may_be_small():
    anchors, logits, deltas, size = given_levels(0)
    propose = jax.jit(functools.partial(proposals.propose, num=400), static_argnames="per_level")
    found, best = (propose(anchors[1:], logits[1:], deltas[1:], size, per_level=count) for count in (500, 300))
    jax.tree.map(np.testing.assert_array_equal, found, best)
    count = int(found.valid.sum())
    assert 20 < count < 375
    assert found.valid[:count].all() and not found.boxes[count:].any() and (found.logits[count:] == -np.inf).all()
    assert (np.diff(found.logits[:count]) <= 0).all()


def test_proposals_have_no_gradient_and_skip_what_is_not_finite():
    anchors, logits, deltas, size = given_levels(0)

    propose = jax.jit(functools.partial(proposals.propose, per_level=50, num=40))

    def total(logits, deltas):
        found = propose(anchors, logits, deltas, size)
        return found.boxes.sum() + found.logits.sum()

    logits, deltas = list(map(jnp.asarray, logits)), list(map(jnp.asarray, deltas))
    assert not any(leaf.any() for leaf in jax.tree.leaves(jax.grad(total, (0, 1))(logits, deltas)))
    broken = [deltas[0].at[logits[0].argmax()].set(jnp.nan), *deltas[1:]]
    found = propose(anchors, logits, broken, size)
    assert found.valid.all() and jnp.isfinite(found.boxes).all() and found.logits[0] < logits[0].max()


@pytest.mark.parametrize("num", [100, 12])
def test_detections(num):
    data = golden("detections")
    deltas = jnp.pad(data["deltas"].reshape(70, 5, 4), ((0, 10), (0, 0), (0, 0)))
    logits = jnp.pad(data["scores"], ((0, 10), (0, 0)), constant_values=3)  # padding never shows
    given, size = jnp.pad(data["proposals"], ((0, 10), (0, 0))), jnp.array([90, 120])
    detect = jax.jit(functools.partial(proposals.detect, num=num))
    found = detect(logits, deltas, given, jnp.arange(80) < 70, size)
    count = int(found.valid.sum())
    assert count == len(data[f"det{num}_rows"]) and found.valid[:count].all()
    np.testing.assert_array_equal(found.classes[:count], data[f"det{num}_classes"])
    np.testing.assert_array_equal(found.rows[:count], data[f"det{num}_rows"])
    np.testing.assert_allclose(found.scores[:count], data[f"det{num}_scores"], atol=1e-6)
    np.testing.assert_allclose(found.boxes[:count], data[f"det{num}_boxes"], atol=1e-4)
    assert (found.classes[count:] == -1).all() and not found.scores[count:].any() and not found.boxes[count:].any()


def test_detections_of_fewer_pairs_than_wanted():
    given = jnp.array([[0.0, 0, 10, 10]])
    logits, deltas = jnp.array([[2.0, 0, 0]]), jnp.zeros((1, 2, 4))
    found = jax.jit(proposals.detect)(logits, deltas, given, jnp.ones(1, bool), jnp.array([9, 9]))
    assert found.boxes.shape == (100, 4) and found.valid.sum() == 2
    np.testing.assert_allclose(found.boxes[:2], [[0, 0, 9, 9]] * 2)


# Pasting


def test_paste():
    data = golden("detections")
    pasted = masks.paste(data["paste_masks"], data["paste_boxes"], 60, 80)
    expected = np.unpackbits(data["paste_binary"], axis=-1).astype(bool)
    assert (pasted != expected).sum() <= data["paste_near_half"]
    for threshold in (0.1, 0.9):  # where the soft values are not close to it
        soft = data["paste_soft"]
        clear = np.abs(soft - threshold) > 1e-5
        cut = masks.paste(data["paste_masks"][:4], data["paste_boxes"][:4], 60, 80, threshold)
        np.testing.assert_array_equal(cut[clear], (soft >= threshold)[clear])


def test_boxes_and_masks_in_the_original_image():
    data = golden("detections")
    scale = np.array([60 / 93, 80 / 121])
    moved, full = masks.to_original(data["post_boxes_in"], scale, np.array([93, 121]))
    np.testing.assert_allclose(moved[full], data["post_boxes"], atol=1e-4)
    np.testing.assert_array_equal(np.flatnonzero(full), data["post_classes"])
    pasted = masks.paste(data["paste_masks"][full], moved[full], 93, 121)
    expected = np.unpackbits(data["post_masks"], axis=-1)[:, :, :121].astype(bool)
    assert (pasted != expected).sum() <= 2
