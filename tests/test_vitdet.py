"""The detector's networks: detectron2's numbers, and what padding, sizes, dtypes and memory have to do with them."""

import dataclasses
import functools
import math
import re

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from addp_jax import optim, parameters, partition
from addp_jax.models import detector, grid_attention, vit, vitdet
from addp_jax.weights import detectron2

pytestmark = pytest.mark.golden

CONFIG = dense.CONFIG
NET = detector.Detector(CONFIG)
K_BIAS = "attn.qkv.bias"  # its middle third has no gradient but noise


@functools.cache
def params():
    return detectron2.from_detectron2(dense.arrays("vitdet_params"), CONFIG)


@functools.cache
def batch():
    """Images float32 [2,160,160,3] in [0,1], with noise where no picture is, and the pictures' sizes."""
    gold, side = dense.arrays("vitdet_backbone"), CONFIG.encoder.image_size
    image = np.random.default_rng(0).random((2, side, side, 3), np.float32)
    for index, (height, width) in enumerate(dense.SIZES["true_sizes"]):
        image[index, :height, :width] = gold[f"image_{index}"].transpose(1, 2, 0) / 255
    return image, np.array(dense.SIZES["true_sizes"], np.int32)


def encode(params, image, size=None, config=CONFIG.encoder, train=False, **more):
    return vitdet.Encoder(config).apply({"params": params}, image, size, train, **more)


@functools.cache
def encoder_loss():
    """Features, and gradients of their product with the cotangent, by detectron2's names."""
    image, size = batch()
    weights = dense.our_order(dense.cotangent((2, 64, 10, 10)))

    def loss(params):
        features = encode(params["encoder"], image, size)
        return (features * weights).sum(), features

    (_, features), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params())
    return np.asarray(features), detectron2.to_detectron2(jax.device_get(gradients), CONFIG)


@functools.cache
def pyramid_loss():
    image, size = batch()

    def loss(params):
        levels = NET.apply({"params": params}, image, size, method="features")
        products = [(level * dense.our_order(dense.cotangent(dense.torch_order(level).shape))).sum() for level in levels]
        return sum(products), levels

    (loss, levels), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params())
    return float(loss), [np.asarray(level) for level in levels], detectron2.to_detectron2(jax.device_get(gradients), CONFIG)


def assert_gradients(found, prefix, gold, key, rtol=2e-5):
    for name, expected in zip(gold[f"{key}_names"], gold[f"{key}_checksums"], strict=True):
        if not name.endswith(K_BIAS):
            dense.assert_checksum(found[prefix + str(name)], expected, rtol, str(name))
    for name in (name for name in gold if name.startswith(f"{key}:")):
        one, other = found[prefix + name.partition(":")[2]], gold[name]
        if name.endswith(K_BIAS):
            third = len(other) // 3
            one, other = (np.delete(array, np.s_[third : 2 * third]) for array in (one, other))
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * np.abs(other).max(), err_msg=name)


# --- detectron2's numbers -----------------------------------------------------------------------------


def test_features_are_detectron2s():
    features, _ = encoder_loss()
    np.testing.assert_allclose(dense.torch_order(features), dense.arrays("vitdet_backbone")["last_feat"], rtol=0, atol=5e-5)


@pytest.mark.parametrize("blocks", [2, 4])
def test_features_after_each_group_are_detectron2s(blocks):
    image, size = batch()
    config = dataclasses.replace(CONFIG.encoder, depth=blocks, global_blocks=blocks // 2)
    part = params()["encoder"] | {"blocks": jax.tree.map(lambda leaf: leaf[:blocks], params()["encoder"]["blocks"])}
    expected = dense.arrays("vitdet_backbone")[f"block{blocks - 1}_0"]
    np.testing.assert_allclose(encode(part, image, size, config)[0], expected, rtol=0, atol=5e-5)


def test_gradients_are_detectron2s():
    assert_gradients(encoder_loss()[1], "backbone.net.", dense.arrays("vitdet_backbone"), "vit_grad")


def test_other_grids_than_the_stored_one():
    """9 x 13 tokens: other windows' rims, and the relative positions of global blocks are interpolated."""
    gold = dense.arrays("vitdet_backbone")
    pixels = gold["odd_input_small"].repeat(16, axis=2).repeat(16, axis=3)
    rows, columns = np.arange(144)[:, None], np.arange(208)[None]
    normal = dense.our_order(pixels + 0.5 * np.cos(0.05 * (rows + 2 * columns)))
    with pytest.MonkeyPatch.context() as patch:  # it has values that no image in [0,1] has
        patch.setattr(vitdet.vit, "normalize", lambda image: image)
        features = encode(params()["encoder"], jnp.asarray(normal, jnp.float32))
    np.testing.assert_allclose(dense.torch_order(features), gold["odd_last_feat"], rtol=0, atol=5e-5)


def test_pyramid_is_detectron2s():
    gold, (loss, levels, _) = dense.arrays("vitdet_backbone"), pyramid_loss()
    np.testing.assert_allclose(loss, gold["pyramid_loss"], atol=2e-7)
    for name, level in zip(vitdet.LEVELS, levels, strict=True):
        level = dense.torch_order(level)
        np.testing.assert_allclose(level[0], gold[f"{name}_0"], rtol=0, atol=6e-5, err_msg=name)
        dense.assert_checksum(level[1], gold[f"{name}_1_checksum"], name=name)


def test_gradients_through_the_pyramid_are_detectron2s():
    assert_gradients(pyramid_loss()[2], "backbone.", dense.arrays("vitdet_backbone"), "pyramid_grad")


@pytest.mark.parametrize("case", "abcde")
def test_position_embeddings_are_resized_as_detectron2_does(case):
    gold = dense.arrays("position")
    table, expected = gold[f"abs_{case}_in"][0], gold[f"abs_{case}_out"]
    if round(len(table) ** 0.5) ** 2 != len(table):
        table = table[1:]
    found = vitdet.resize_pos_embed(jnp.asarray(table), expected.shape[:2])
    np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", "abcd")
def test_relative_positions_are_interpolated_as_detectron2_does(case):
    gold = dense.arrays("position")
    table, expected = gold[f"rel_{case}_in"], gold[f"rel_{case}_table"]
    side = (len(expected) + 1) // 2
    found = np.asarray(grid_attention.relative(jnp.asarray(table), side))
    for i, k in np.ndindex(side, side):
        np.testing.assert_allclose(found[i, k], expected[i - k + side - 1], rtol=0, atol=1e-4)


def test_rpn_head_is_detectron2s():
    gold = dense.arrays("rpn")
    names = ("p3", "p4", "p5")
    levels = [jnp.asarray(dense.our_order(gold[f"in_{name}"])) for name in names]
    for name, (logits, deltas) in zip(names, NET.apply({"params": params()}, levels, method="propose"), strict=True):
        raw = gold[f"logits_{name}_raw"]
        np.testing.assert_allclose(logits, dense.our_order(raw).reshape(2, -1), rtol=0, atol=4e-5)
        side = raw.shape[-1]
        planes = np.asarray(deltas).reshape(2, side, side, 12).transpose(0, 3, 1, 2)
        if f"deltas_{name}_raw" in gold:
            np.testing.assert_allclose(planes, gold[f"deltas_{name}_raw"], rtol=0, atol=2e-5)
        else:
            dense.assert_checksum(planes, gold[f"deltas_{name}_checksum"])


def gradients(loss):
    """Of `loss(params, arrays)`, by detectron2's names."""
    gold = {name: jnp.asarray(array) for name, array in dense.arrays("roi_heads").items() if array.dtype.kind in "fib"}
    return detectron2.to_detectron2(jax.device_get(jax.jit(jax.grad(loss))(params(), gold)), CONFIG)


def class_loss(params, gold):
    logits, _ = NET.apply({"params": params}, dense.our_order(gold["box_in"]), method="boxes")
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), gold["gt_classes"][:, None], axis=1).mean()


def test_box_head_is_detectron2s():
    gold = dense.arrays("roi_heads")
    logits, deltas = NET.apply({"params": params()}, jnp.asarray(dense.our_order(gold["box_in"])), method="boxes")
    np.testing.assert_allclose(logits, gold["box_scores"], rtol=0, atol=3e-5)
    np.testing.assert_allclose(np.asarray(deltas).reshape(len(deltas), -1), gold["box_deltas"], rtol=0, atol=3e-5)
    np.testing.assert_allclose(class_loss(params(), gold), gold["loss_cls"], rtol=1e-6)


def test_gradient_of_the_class_loss_is_detectron2s():
    found, gold = gradients(class_loss), dense.arrays("roi_heads")
    expected = gold["box_predictor_grad:cls_score.bias"]
    np.testing.assert_allclose(found["roi_heads.box_predictor.cls_score.bias"], expected, rtol=0, atol=1e-6)
    names = list(gold["box_predictor_grad_names"])
    row = gold["box_predictor_grad_checksums"][names.index("cls_score.weight")]
    dense.assert_checksum(found["roi_heads.box_predictor.cls_score.weight"], row)


def test_mask_head_is_detectron2s():
    gold = dense.arrays("roi_heads")
    logits = NET.apply({"params": params()}, jnp.asarray(dense.our_order(gold["mask_in"])), method="masks")
    dense.assert_checksum(dense.torch_order(logits), gold["mask_logits_checksum"])
    found = detector.of_class(logits, jnp.asarray(gold["mask_classes"]))
    np.testing.assert_allclose(found, gold["mask_logits"], rtol=0, atol=3e-5)


# --- what must not change a number ----------------------------------------------------------------------


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient(remat):
    image, size = batch()
    changed = dataclasses.replace(CONFIG.encoder, remat=remat)
    loss = lambda params, config: (encode(params, image, size, config) ** 2).mean()
    expected = jax.jit(jax.grad(loss), static_argnums=1)(params()["encoder"], CONFIG.encoder)
    found = jax.jit(jax.grad(loss), static_argnums=1)(params()["encoder"], changed)
    assert_close(found, expected)


def assert_close(found, expected, rtol=1e-4):
    found, expected = parameters.named_leaves(found), parameters.named_leaves(expected)
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        if not name.endswith("key/bias"):
            np.testing.assert_allclose(found[name], leaf, rtol=0, atol=rtol * np.abs(leaf).max() + 1e-12, err_msg=name)


@pytest.mark.parametrize("chunk", [7, 64])
def test_chunks_of_queries_change_no_gradient(chunk, monkeypatch):
    rng = np.random.default_rng(1)
    query, key, value = (jnp.asarray(rng.normal(size=(2, 1, 3, 100, size)), jnp.float32) for size in (12, 12, 8))
    loss = lambda function: jax.jit(jax.value_and_grad(lambda *qkv: (function(*qkv) ** 2).sum(), argnums=(0, 1, 2)))
    expected = loss(grid_attention.attend)(query, key, value)
    monkeypatch.setattr(grid_attention, "CHUNK", chunk)
    assert_close(loss(grid_attention.attend_in_chunks)(query, key, value), expected, rtol=1e-5)


def test_no_array_of_global_attention_is_as_large_as_all_its_weights(monkeypatch):
    monkeypatch.setattr(grid_attention, "CHUNK", 16)
    side, heads = 16, 2
    net = grid_attention.GridAttention(heads, 2 * side - 1, side, 0, jnp.float32)
    tokens = jnp.ones((1, side, side, 8))
    state = net.init(jax.random.key(0), tokens)
    text = str(jax.make_jaxpr(jax.grad(lambda state: net.apply(state, tokens).sum()))(state))
    sizes = [math.prod(map(int, shape.split(","))) for shape in jax_shapes(text)]
    assert heads * 16 * side**2 in sizes and max(sizes) < heads * side**4 / 2


def jax_shapes(text):
    return set(re.findall(r"(?:f32|f64|bool)\[([\d,]+)\]", text))


def test_windows_hold_the_fill_and_return_the_grid():
    grid = jnp.arange(5 * 7 * 2, dtype=jnp.float32).reshape(1, 5, 7, 2)
    windows = grid_attention.to_windows(grid, jnp.asarray([-1.0, -2.0]), 4)
    assert windows.shape == (1, 4, 16, 2)
    np.testing.assert_array_equal(windows[0, 3, -1], [-1, -2])
    np.testing.assert_array_equal(grid_attention.from_windows(windows, (5, 7), 4), grid)


def test_what_lies_beyond_the_picture_is_not_read():
    image, size = batch()
    other = np.where(np.asarray(vit.inside(size, image.shape[1:3]))[..., None], image, 0.9)
    one, two = (encode(params()["encoder"], image, size) for image in (image, other.astype(np.float32)))
    np.testing.assert_array_equal(one, two)


@pytest.mark.medium
def test_bfloat16_is_near_and_the_heads_answer_in_float32():
    image, size = batch()
    net = detector.Detector(CONFIG, jnp.bfloat16)
    levels = net.apply({"params": params()}, image, size, method="features")
    assert {level.dtype for level in levels} == {jnp.dtype(jnp.bfloat16)}
    expected = pyramid_loss()[1][2]
    assert np.abs(np.asarray(levels[2], np.float32) - expected).mean() < 0.05 * np.abs(expected).mean()
    proposed = net.apply({"params": params()}, levels, method="propose")
    assert {array.dtype for pair in proposed for array in pair} == {jnp.dtype("float32")}


def test_dropped_paths_scale_the_others_and_need_a_key():
    image, size = batch()
    config = dataclasses.replace(CONFIG.encoder, drop_path=0.5)
    keys = lambda seed: {"dropout": jax.random.key(seed)}
    draw = lambda seed, train: encode(params()["encoder"], image, size, config, train, rngs=keys(seed))
    np.testing.assert_array_equal(draw(0, True), draw(0, True))
    assert not np.array_equal(draw(0, True), draw(1, True))
    np.testing.assert_allclose(draw(0, False), encode(params()["encoder"], image, size), atol=1e-5)


def test_input_norm_is_the_pre_trainings():
    image, size = batch()
    config = dataclasses.replace(CONFIG.encoder, input_norm=True)
    norm = {"scale": jnp.ones(config.width), "bias": jnp.zeros(config.width)}
    changed = encode(params()["encoder"] | {"input_norm": norm}, image, size, config)
    assert np.isfinite(changed).all() and not np.allclose(changed, encode(params()["encoder"], image, size), atol=0.1)


# --- beginnings, layouts, learning rates -----------------------------------------------------------------


@functools.cache
def fresh():
    return jax.device_get(jax.jit(lambda rng: detector.init(NET, rng))(jax.random.key(0)))


def test_beginnings_are_detectron2s():
    found = parameters.named_leaves(fresh())
    std = lambda name: float(np.std(found[name]))
    blocks = "encoder/blocks/block"
    for name in (f"{blocks}/attention/query/kernel", f"{blocks}/mlp/fc1/kernel"):
        assert std(name) == pytest.approx(0.02, rel=0.05)
        assert not np.array_equal(found[name][0], found[name][1])  # each block has its own
    for name in ("rpn/logits/kernel", "rpn/conv_0/kernel", "box/logits/kernel"):
        assert std(name) == pytest.approx(0.01, rel=0.25)
    assert std("box/deltas/kernel") == pytest.approx(0.001, rel=0.1)
    assert std("box/convs/conv_0/kernel") == pytest.approx((2 / (16 * 9)) ** 0.5, rel=0.1)
    assert std("mask/up/kernel") == pytest.approx((2 / (16 * 4)) ** 0.5, rel=0.1)
    assert np.abs(found["pyramid/p4_lateral/kernel"]).max() <= 64**-0.5
    assert np.abs(found["pyramid/p3_up/bias"]).max() <= (32 * 4) ** -0.5 and found["pyramid/p3_up/bias"].any()
    assert not found[f"{blocks}/attention/rel_pos_h"].any() and not found["mask/up/bias"].any()


def test_every_parameter_has_a_layout():
    mesh = partition.make_mesh(partition.Config(data=2, fsdp=2, tensor=2))
    found = partition.shardings({"detector": fresh()}, mesh, detector.LAYOUT)
    assert "fsdp" in found["detector"]["box"]["fc"]["kernel"].spec


def test_a_mesh_changes_no_number():
    image, size = batch()
    expected = np.asarray(encoder_loss()[0])
    mesh = partition.make_mesh(partition.Config(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        layouts = partition.shardings({"encoder": params()["encoder"]}, mesh, detector.LAYOUT)["encoder"]
        placed = partition.put(params()["encoder"], layouts)
        rows = partition.put((image, size), partition.batch_sharding(mesh))
        found = jax.jit(encode)(placed, *rows)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_layers_learn_the_slower_the_deeper_they_lie():
    scales = optim.layer_scales({"detector": fresh()}, 0.5)["detector"]
    attention = scales["encoder"]["blocks"]["block"]["attention"]
    for name in ("rel_pos_h", "rel_pos_w"):
        np.testing.assert_allclose(attention[name].reshape(-1), [1 / 16, 1 / 8, 1 / 4, 1 / 2])
    assert scales["encoder"]["pos_embed"] == scales["encoder"]["patch_embed"]["kernel"] == 0.5**5
    assert {float(scale) for name in ("pyramid", "rpn", "box", "mask") for scale in jax.tree.leaves(scales[name])} == {1.0}


@pytest.mark.parametrize("change", [dict(heads=5), dict(global_blocks=5), dict(image_size=1000), dict(pretrain_size=250)])
def test_sizes_that_do_not_fit_are_refused(change):
    with pytest.raises(ValueError, match=list(change)[0]):
        vitdet.Config(**change)


@pytest.mark.parametrize("change", [dict(), dict(width=1024, depth=24, heads=16)])
def test_full_sizes_have_the_tables_of_vitdet(change):
    config = vitdet.Config(**change)
    net = detector.Detector(detector.Config(config))
    shapes = jax.eval_shape(lambda rng: detector.init(net, rng), jax.random.key(0))
    assert shapes["encoder"]["blocks"]["block"]["attention"]["rel_pos_h"].shape == (config.depth, 127, 64)
