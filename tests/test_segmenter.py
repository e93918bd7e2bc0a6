"""The segmenter's networks: mmsegmentation's numbers, and what sizes, dtypes, memory and meshes have to do with them."""

import dataclasses
import functools
import re

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from uper import CONFIG, named, params

from addp_jax import errors, optim, parameters, partition
from addp_jax.models import batch_norm, beit, segmenter, vit
from addp_jax.ops import resize
from addp_jax.ops.segmentation import cross_entropy
from addp_jax.weights import mmsegmentation

pytestmark = pytest.mark.golden

ENCODER = dataclasses.replace(CONFIG.encoder, drop_path=0.0)
NET = segmenter.Segmenter(dataclasses.replace(CONFIG, encoder=ENCODER, dropout=0.0))
BACKBONE, UPERNET = dense.arrays("mae_seg_backbone"), dense.arrays("upernet")
AUXILIARY_WEIGHT = 0.4
# Biases that a norm takes out again; as the third of the keys in qkv.bias they have no gradient but noise.
SHIFTS = ("upsample_4x.0.bias", "upsample_4x.3.bias", "upsample_2x.0.bias")


def encode(params, image, config=ENCODER, train=False, size=None, **more):
    return beit.Encoder(config).apply({"params": params}, image, size, train, **more)


@pytest.fixture
def normalised(monkeypatch):
    """Golden images have values that no image in [0,1] has."""
    monkeypatch.setattr(vit, "normalize", lambda image: image)


def images(count=2):
    side = ENCODER.image_size
    return np.random.default_rng(0).random((count, side, side, 3), np.float32)


def taps():
    return [dense.our_order(UPERNET[f"tap_{index}"]) for index in range(4)]


def labels():
    return np.stack([UPERNET["label_0"], UPERNET["label_1"]])


def exported(part):
    """A part of the tree of parameters by mmsegmentation's names; the rest is zeros."""
    return mmsegmentation.to_mmsegmentation(parameters.replaced(jax.tree.map(np.zeros_like, params()), part), CONFIG)


def assert_table(found, prefix, gold, key):
    for name, expected in zip(gold[f"{key}_names"], gold[f"{key}_checksums"], strict=True):
        if not name.endswith(("attn.qkv.bias", *SHIFTS)):
            rtol = 1e-3 if name.startswith("psp_modules.0.1.conv") else 2e-5  # a norm of two values lets nearly nothing through
            dense.assert_checksum(found[f"{prefix}{name}"], expected, rtol, str(name))
    for name in (name for name in found if name.endswith(SHIFTS)):
        np.testing.assert_allclose(found[name], 0, atol=1e-7)


# --- mmsegmentation's numbers: the backbone ----------------------------------------------------------------


def backbone_loss(params, image, config=ENCODER):
    outputs = encode(params, image, config)
    return sum((out * dense.our_order(dense.cotangent(dense.torch_order(out).shape))).sum() for out in outputs), outputs


def test_taps_and_their_gradients_are_mmsegmentations(normalised):
    image = dense.our_order(BACKBONE["image"])
    gradient = jax.jit(jax.value_and_grad(backbone_loss, has_aux=True))
    (_, outputs), gradients = gradient(params()["encoder"], image)
    for index, out in enumerate(outputs):
        expected = BACKBONE[f"out_{index}"]
        np.testing.assert_allclose(dense.torch_order(out), expected, rtol=0, atol=1e-4, err_msg=str(index))
    found = exported({"encoder": jax.device_get(gradients)})
    assert_table(found, "backbone.", BACKBONE, "grad")
    for name, expected in named(BACKBONE, "grad").items():
        np.testing.assert_allclose(found[f"backbone.{name}"], expected, rtol=0, atol=1e-6, err_msg=name)


def test_pairs_of_tokens_read_the_rows_that_mmsegmentation_reads():
    index = beit.relative_index(ENCODER.grid)
    np.testing.assert_array_equal(index, BACKBONE["relative_position_index"])
    table = jnp.asarray(params()["encoder"]["blocks"]["block"]["attention"]["relative_positions"][0])
    np.testing.assert_array_equal(beit.relative_bias(table, ENCODER.grid), np.moveaxis(np.asarray(table)[index], 2, 0))


@pytest.mark.parametrize("grid", [1, 2, 7])
def test_relative_positions_of_other_grids(grid):
    table = jnp.asarray(np.random.default_rng(0).normal(size=(beit.relative_rows(grid), 2)), jnp.float32)
    expected = np.moveaxis(np.asarray(table)[beit.relative_index(grid)], 2, 0)
    np.testing.assert_array_equal(beit.relative_bias(table, grid), expected)


def test_position_embeddings_are_resized_as_mmsegmentation_does():
    expected = BACKBONE["resize_out"][0]
    found = vit.resize_pos_embed(BACKBONE["resize_in"][0], len(expected) - 1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-5)


@pytest.mark.medium
def test_taps_are_outputs_of_their_blocks():
    """Also where blocks lie behind the last tap, which are not computed."""
    config = dataclasses.replace(ENCODER, depth=8, taps=(0, 1, 2, 3))
    state = beit.Encoder(config).init(jax.random.key(0), images())["params"]
    outputs = {}
    for taps in ((0, 1, 2, 3), (2, 3, 5, 6), (1, 5, 6, 7), (3, 3, 7, 7)):
        for block, out in zip(taps, encode(state, images(), dataclasses.replace(config, taps=taps))):
            np.testing.assert_allclose(out, outputs.setdefault(block, out), rtol=0, atol=1e-5)
    assert not any(np.allclose(outputs[block], outputs[block - 1], atol=1e-2) for block in (1, 2, 3, 6, 7))


# --- mmsegmentation's numbers: neck, heads, losses -----------------------------------------------------------


@pytest.mark.medium
def test_evaluation_is_mmsegmentations():
    net = functools.partial(NET.apply, {"params": params()})
    levels = net(taps(), False, method=lambda net, *args: net.neck(*args))
    for index, level in enumerate(levels):
        expected = UPERNET[f"eval_level_{index}"]
        found = dense.torch_order(level)
        np.testing.assert_allclose(found[0] if expected.ndim == 3 else found, expected, rtol=0, atol=5e-5)
    feature = net(levels, False, method=lambda net, *args: net.head(*args))
    np.testing.assert_allclose(dense.torch_order(feature)[0], UPERNET["eval_feature"], rtol=0, atol=7e-5)
    logits, auxiliary = jax.jit(lambda: net(taps(), method="from_taps"))()
    np.testing.assert_allclose(dense.torch_order(logits), UPERNET["eval_logits"], rtol=0, atol=9e-5)
    np.testing.assert_allclose(dense.torch_order(auxiliary), UPERNET["eval_aux_logits"], rtol=0, atol=3e-5)
    best = resize.bilinear(logits, labels().shape[1:]).argmax(-1)
    assert (best != UPERNET["eval_prediction"]).sum() <= UPERNET["eval_prediction_near"]


@pytest.mark.parametrize("side", segmenter.POOLS)
def test_means_of_overlapping_bins_are_pytorchs(side):
    found = resize.adaptive_mean(jnp.asarray(dense.our_order(UPERNET["eval_level_3"])), side)
    np.testing.assert_allclose(dense.torch_order(found)[0], UPERNET[f"adaptive_pool_{side}"], rtol=0, atol=1e-6)


def training_loss(params, taps, label):
    apply = functools.partial(NET.apply, method="from_taps", mutable=[batch_norm.COLLECTION])
    (logits, auxiliary), measured = apply({"params": params}, taps, True)
    first, second = cross_entropy(logits, label), AUXILIARY_WEIGHT * cross_entropy(auxiliary, label)
    return first + second, (logits, auxiliary, first, second, measured[batch_norm.COLLECTION])


@functools.cache
def trained():
    function = jax.value_and_grad(training_loss, argnums=(0, 1), has_aux=True)
    return jax.device_get(jax.jit(function)(params(), taps(), labels()))


def test_training_is_mmsegmentations():
    (_, (logits, auxiliary, first, second, _)), _ = trained()
    np.testing.assert_allclose(dense.torch_order(logits), UPERNET["train_logits"], rtol=0, atol=6e-5)
    np.testing.assert_allclose(dense.torch_order(auxiliary), UPERNET["train_aux_logits"], rtol=0, atol=4e-5)
    np.testing.assert_allclose([first, second], [UPERNET["loss_ce"], UPERNET["aux_loss_ce"]], rtol=0, atol=6e-7)


def test_running_statistics_are_mmsegmentations():
    (_, (*_, statistics)), _ = trained()
    found, expected = exported(statistics), named(UPERNET, "after")
    assert jax.tree.structure(statistics) == jax.tree.structure(parameters.running(params()))
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=3e-6, err_msg=name)
    assert {name for name in found if "running" in name} == expected.keys()


def test_gradients_of_the_heads_are_mmsegmentations():
    _, (gradients, of_taps) = trained()
    found = exported(gradients)
    for key, prefix in (("neck", "neck"), ("head", "decode_head"), ("aux", "auxiliary_head")):
        assert_table(found, f"{prefix}.", UPERNET, f"{key}_grad")
    for index in (0, 3):
        expected = UPERNET[f"tap_{index}_grad"]
        atol = 2e-5 * np.abs(expected).max()
        np.testing.assert_allclose(dense.torch_order(of_taps[index]), expected, rtol=0, atol=atol)
    assert not any(leaf.any() for leaf in jax.tree.leaves(parameters.running(gradients)))


@pytest.mark.medium
def test_losses_of_counted_pixels_only():
    logits = jnp.asarray(dense.our_order(UPERNET["train_logits"]))
    np.testing.assert_allclose(cross_entropy(logits, labels(), True), UPERNET["loss_ce_non_ignored"], rtol=0, atol=1e-6)
    nothing = np.full_like(labels(), 255)
    assert float(cross_entropy(logits, nothing, True)) == float(cross_entropy(logits, nothing)) == 0
    gradient = jax.grad(lambda logits: cross_entropy(logits, nothing, True))(logits)
    assert not np.asarray(gradient).any()


# --- resizing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(10, 14), (20, 28), (40, 21), (7, 9), (5, 7), (3, 3), (1, 1)])
def test_a_convolution_of_an_enlarged_map_is_computed_on_the_small_one(size):
    rng = np.random.default_rng(0)
    features, kernel = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 5, 7, 6), (3, 3, 6, 4)))
    both = (lambda x, k: resize.enlarged_conv3(x, k, size)), (lambda x, k: resize.conv3(resize.bilinear(x, size), k))
    found, expected = (jax.value_and_grad(lambda *xs: jnp.sin(f(*xs)).sum(), argnums=(0, 1))(features, kernel) for f in both)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4), found, expected)
    np.testing.assert_allclose(both[0](features, kernel), both[1](features, kernel), rtol=0, atol=2e-5)


# --- what must not change a number ------------------------------------------------------------------------------


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient(remat):
    gradient = jax.jit(jax.grad(lambda *args: backbone_loss(*args)[0]), static_argnums=2)
    expected = gradient(params()["encoder"], images(), ENCODER)
    found = gradient(params()["encoder"], images(), dataclasses.replace(ENCODER, remat=remat))
    for name, leaf in parameters.named_leaves(expected).items():
        if not name.endswith("key/bias"):
            other = parameters.named_leaves(found)[name]
            np.testing.assert_allclose(other, leaf, rtol=0, atol=1e-4 * np.abs(leaf).max() + 1e-12, err_msg=name)


def test_the_outputs_of_all_blocks_are_not_kept():
    config = dataclasses.replace(ENCODER, depth=16, taps=(3, 7, 11, 15))
    state = jax.eval_shape(lambda rng: beit.Encoder(config).init(rng, images()), jax.random.key(0))["params"]
    text = str(jax.make_jaxpr(lambda state: encode(state, images(), config))(state))
    tokens = f"{len(images())},{1 + config.length},{config.width}]"
    assert f"f32[4,{tokens}" in text and f"f32[16,{tokens}" not in text


def test_what_lies_beyond_the_picture_is_not_read():
    side = ENCODER.image_size
    size = np.array([[side, side // 2], [side // 3, side]], np.int32)
    other = images().copy()
    other[0, :, side // 2 :], other[1, side // 3 :] = 0.9, 0.1
    one, two = (encode(params()["encoder"], image, size=size) for image in (images(), other))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    whole = np.full((2, 2), side, np.int32)
    jax.tree.map(np.testing.assert_array_equal, encode(params()["encoder"], images(), size=whole), encode(params()["encoder"], images()))


@pytest.mark.medium
def test_bfloat16_is_near_and_logits_are_float32():
    expected = NET.apply({"params": params()}, images(), method="logits")
    found = segmenter.Segmenter(CONFIG, jnp.bfloat16).apply({"params": params()}, images(), method="logits")
    assert found.dtype == jnp.float32
    assert np.abs(found - expected).mean() < 0.05 * np.abs(expected).mean()


def test_logits_are_those_of_both_heads_calls():
    both = NET.apply({"params": params()}, images())
    np.testing.assert_allclose(NET.apply({"params": params()}, images(), method="logits"), both[0], rtol=0, atol=1e-5)


def test_dropout_drops_whole_channels_and_needs_a_key():
    drop = segmenter.Classifier(3, 0.5, 0.01)
    features = jnp.ones((2, 3, 4, 64))
    state = drop.init(jax.random.key(0), features, False)
    logits = drop.apply(state, features, True, rngs={"dropout": jax.random.key(1)})
    assert np.ptp(logits, axis=(1, 2)).max() == 0 and not np.allclose(logits[0], logits[1])


def test_drop_path_and_dropout_depend_on_the_key_alone():
    config = dataclasses.replace(CONFIG, encoder=dataclasses.replace(CONFIG.encoder, drop_path=0.5), dropout=0.5)
    net = segmenter.Segmenter(config)
    draw = jax.jit(lambda seed: segmenter.training_logits(net, params(), images(), None, jax.random.key(seed)))
    (one, _), statistics = draw(0)
    assert np.array_equal(draw(0)[0][0], one) and not np.array_equal(draw(1)[0][0], one)
    assert jax.tree.structure(statistics) == jax.tree.structure(parameters.running(params()))


@pytest.mark.parametrize("sizes", [dict(data=2), dict(data=1, fsdp=2, tensor=2)])
def test_a_mesh_changes_no_number(sizes):
    """The statistics are those of the whole batch."""
    net = segmenter.Segmenter(NET.config)
    function = lambda params, image: segmenter.training_logits(net, params, image, None, jax.random.key(0))
    expected = jax.jit(function)(params(), images(4))
    mesh = partition.make_mesh(partition.Config(**sizes), jax.devices()[: 2 if len(sizes) == 1 else 4])
    with jax.set_mesh(mesh):
        layouts = partition.shardings({"segmenter": params()}, mesh, segmenter.LAYOUT)["segmenter"]
        found = jax.jit(function)(partition.put(params(), layouts), partition.put(images(4), partition.batch_sharding(mesh)))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=0, atol=2e-4), found, jax.device_get(expected))


def test_kernels_are_gathered_and_not_feature_maps():
    net = segmenter.ConvNorm(16, 3, jnp.float32)
    maps = [jax.ShapeDtypeStruct((4, side, side, 16), np.float32) for side in (8, 4, 2)]
    apply = lambda state, maps, train=True: net.apply(state, maps[0], train, maps[1:], mutable=[batch_norm.COLLECTION])[0]
    state = jax.eval_shape(lambda maps: net.init(jax.random.key(0), maps[0], False, maps[1:]), maps)
    mesh = partition.make_mesh(partition.Config(data=1, fsdp=2), jax.devices()[:2])
    with jax.set_mesh(mesh):
        layouts = {"params": partition.shardings({"auxiliary": state["params"]}, mesh, segmenter.LAYOUT)["auxiliary"]}
        layouts = layouts, partition.batch_sharding(mesh)
        gradient = jax.jit(jax.grad(lambda *args: apply(*args).sum(), argnums=(0, 1)), in_shardings=layouts, out_shardings=layouts)
        text = gradient.lower(state, maps).compile().as_text()
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather", text)
    assert gathered and set(gathered) == {"3,3,48,16"} and "all-to-all" not in text


def test_one_value_of_a_channel_is_no_statistic():
    with pytest.raises(errors.UserError, match="batch_size"):
        segmenter.training_logits(NET, params(), images(1), None, jax.random.key(0))


def test_an_input_norm_is_the_pre_trainings():
    config = dataclasses.replace(ENCODER, input_norm=True)
    norm = {"scale": jnp.ones(config.width), "bias": jnp.zeros(config.width)}
    changed = encode(params()["encoder"] | {"input_norm": norm}, images(), config)
    assert not np.allclose(changed[0], encode(params()["encoder"], images())[0], atol=0.1)


# --- beginnings, layouts, learning rates ------------------------------------------------------------------------


@functools.cache
def fresh():
    return jax.device_get(jax.jit(lambda rng: segmenter.init(NET, rng))(jax.random.key(0)))


def test_beginnings_are_mmsegmentations():
    found = parameters.named_leaves(fresh())
    std = lambda name: float(np.std(found[name]))
    block = "encoder/blocks/block"
    assert std(f"{block}/attention/query/kernel") == pytest.approx(0.02, rel=0.05)
    assert std(f"{block}/mlp/fc2/kernel") == pytest.approx(0.02, rel=0.05)
    channels = CONFIG.channels
    assert std("head/fusion/kernel") == pytest.approx((2 / (9 * channels)) ** 0.5, rel=0.05)
    assert std("classifier/logits/kernel") == pytest.approx(0.01, rel=0.3)
    wider = segmenter.Classifier(64, 0.0, 0.3).init(jax.random.key(0), jnp.zeros((1, 2, 2, 16)), False)
    assert np.std(wider["params"]["logits"]["kernel"]) == pytest.approx(0.3, rel=0.1)
    assert not found[f"{block}/attention/relative_positions"].any()
    assert (found[f"{block}/attention_scale"] == 1).all() and (found[f"{block}/mlp_scale"] == 1).all()
    assert not found["head/fusion/norm/running_mean"].any() and (found["head/fusion/norm/running_var"] == 1).all()


def test_every_parameter_has_a_layout():
    mesh = partition.make_mesh(partition.Config(data=2, fsdp=2, tensor=2))
    found = partition.shardings({"segmenter": fresh()}, mesh, segmenter.LAYOUT)["segmenter"]
    for kernel in (found["head"]["fusion"], found["auxiliary"], found["neck"]["up2"]):
        assert kernel["kernel"].spec[3] == "fsdp"
    assert found["encoder"]["blocks"]["block"]["attention"]["relative_positions"].spec[2] == "tensor"


def test_decay_and_learning_rates_are_the_references():
    """No decay of norms, biases, factors and statistics; that of tables, position embeddings and the class token."""
    mask = parameters.named_leaves(optim.decay_mask({"segmenter": fresh()}))
    free = {name for name, decayed in mask.items() if not decayed}
    assert free == {name for name in mask if name.endswith(("bias", "scale", *parameters.RUNNING))}
    scales = optim.layer_scales({"segmenter": fresh()}, 0.5)["segmenter"]
    block = scales["encoder"]["blocks"]["block"]
    np.testing.assert_allclose(block["attention_scale"].reshape(-1), 0.5 ** np.arange(ENCODER.depth, 0, -1))
    assert scales["encoder"]["class_token"] == scales["encoder"]["pos_embed"] == 0.5 ** (ENCODER.depth + 1)
    assert {float(leaf) for part in scales.keys() - {"encoder"} for leaf in jax.tree.leaves(scales[part])} == {1.0}


@pytest.mark.parametrize("change", [dict(taps=(1, 2, 3)), dict(taps=(1, 3, 2, 4)), dict(taps=(3, 5, 7, 12)), dict(image_size=500)])
def test_sizes_that_do_not_fit_are_refused(change):
    with pytest.raises(ValueError, match=list(change)[0]):
        beit.Config(**change)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match="image_size"):
        encode(params()["encoder"], np.zeros((1, ENCODER.image_size, 2 * ENCODER.image_size, 3), np.float32))


@pytest.mark.parametrize("change, taps", [(dict(), (3, 5, 7, 11)), (dict(width=1024, depth=24, heads=16), (7, 11, 15, 23))])
def test_full_sizes(change, taps):
    config = beit.Config(**change, taps=taps)
    assert beit.even_taps(config.depth) == taps
    net = segmenter.Segmenter(segmenter.Config(config, channels=config.width))
    shapes = jax.eval_shape(lambda rng: segmenter.init(net, rng), jax.random.key(0))
    assert shapes["encoder"]["blocks"]["block"]["attention"]["relative_positions"].shape == (config.depth, 3972, config.heads)
    assert shapes["head"]["fusion"]["kernel"].shape == (3, 3, 4 * config.width, config.width)
