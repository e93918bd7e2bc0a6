"""Weights by mmsegmentation's names: bit-exact in both directions, from every kind of file; what does not fit is refused."""

import dataclasses

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy
from uper import CONFIG, FORMAT, WEIGHTS, params

from addp_jax import errors, parameters, weights
from addp_jax.models import beit, segmenter
from addp_jax.weights import dense as formats
from addp_jax.weights import encoder, mmsegmentation, weight_files


def read(path):
    """`(config, parameters)` of a file that is taken for one of this format."""
    return FORMAT.parse(path, formats.open_file(path)[1])


TABLE = "backbone.layers.1.attn.relative_position_bias_table"
INDEX = "backbone.layers.1.attn.relative_position_index"


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_every_name_is_read_and_written_bit_for_bit():
    found = mmsegmentation.to_mmsegmentation(params(), CONFIG)
    indices = {name for name in found if name.endswith("relative_position_index")}
    assert len(indices) == CONFIG.encoder.depth and not indices & WEIGHTS.keys()
    assert_same({name: array for name, array in found.items() if name not in indices}, WEIGHTS)
    assert_same(*(parameters.named_leaves(tree) for tree in (mmsegmentation.from_mmsegmentation(found, CONFIG), params())))


def test_the_config_is_read_off_the_shapes():
    encoder = CONFIG.encoder
    assert (encoder.width, encoder.depth, encoder.image_size, encoder.taps) == (32, 4, 80, (0, 1, 2, 3))
    assert (CONFIG.channels, CONFIG.auxiliary_channels, CONFIG.num_classes) == (16, 8, 7)


def as_trained():
    """With what mmsegmentation's own files hold beside the parameters."""
    index = beit.relative_index(CONFIG.encoder.grid)
    counts = {name.replace("running_var", "num_batches_tracked"): np.array(7) for name in WEIGHTS if "running_var" in name}
    return WEIGHTS | counts | {f"backbone.layers.{i}.attn.relative_position_index": index for i in range(CONFIG.encoder.depth)}


def save_torch(path):
    torch = pytest.importorskip("torch", reason="needs pip install torch")
    tensors = {name: torch.from_numpy(np.asarray(array)) for name, array in as_trained().items()}
    torch.save({"state_dict": tensors, "meta": {"epoch": 1}, "message_hub": {}}, path)


FILES = {"a.pth": save_torch, "a.safetensors": lambda path: safetensors_numpy.save_file(as_trained(), path)}


@pytest.mark.parametrize("name", FILES)
def test_files_are_read(name, tmp_path):
    FILES[name](tmp_path / name)
    config, found = read(str(tmp_path / name))
    assert config == CONFIG
    assert_same(parameters.named_leaves(found), parameters.named_leaves(params()))


@pytest.mark.parametrize("name", FILES)
def test_files_are_written_and_read_again(name, tmp_path):
    if name.endswith(".pth"):
        pytest.importorskip("torch", reason="needs pip install torch")
    weight_files.write(str(tmp_path / name), mmsegmentation.to_mmsegmentation(params(), CONFIG), "state_dict")
    assert_same(parameters.named_leaves(read(str(tmp_path / name))[1]), parameters.named_leaves(params()))


def without(name):
    return {key: array for key, array in WEIGHTS.items() if key != name}


DAMAGED = {
    "missing": (without("decode_head.fpn_bottleneck.bn.running_var"), "decode_head.fpn_bottleneck.bn.running_var"),
    "missing in one block": (without(TABLE), TABLE),
    "unknown": (WEIGHTS | {"backbone.norm.weight": np.ones(32, np.float32)}, "backbone.norm.weight"),
    "another size": (WEIGHTS | {"auxiliary_head.conv_seg.bias": np.ones(6, np.float32)}, "auxiliary_classifier/logits/bias"),
    "an index of another size": (WEIGHTS | {INDEX: np.zeros((3, 3), np.int64)}, INDEX),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_does_not_fit_is_named(name):
    tensors, what = DAMAGED[name]
    with pytest.raises(errors.UserError) as caught:
        mmsegmentation.from_mmsegmentation(tensors, CONFIG)
    assert what in str(caught.value) and "\n" not in str(caught.value)


FIRST = TABLE.replace("layers.1", "layers.0")
OTHERS = {
    "nothing": {},
    "another network": {"conv.weight": np.ones((3, 3))},
    "no block": {name: array for name, array in WEIGHTS.items() if ".layers." not in name},
    "a table that is a vector": WEIGHTS | {FIRST: np.ones(84, np.float32)},
    "a scalar": WEIGHTS | {FIRST: np.float32(1)},
    "an empty table": WEIGHTS | {FIRST: np.ones((0, 0), np.float32)},
    "a patch of no size": WEIGHTS | {"backbone.patch_embed.projection.weight": np.ones((32, 3, 0, 0), np.float32)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_weights_of_other_networks_are_refused_in_one_line(name):
    with pytest.raises(errors.UserError) as caught:
        FORMAT.config_of({key: np.shape(array) for key, array in OTHERS[name].items()})
    assert "mmsegmentation" in str(caught.value) and "\n" not in str(caught.value)


def test_files_of_other_networks_are_named(tmp_path):
    safetensors_numpy.save_file({"a": np.ones(3, np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(errors.UserError, match="a.safetensors"):
        read(str(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("change", [dict(input_norm=True), dict(relative_positions=False), dict(layer_scale=False)])
def test_what_mmsegmentation_lacks_is_not_dropped_in_silence(change):
    config = dataclasses.replace(CONFIG, encoder=dataclasses.replace(CONFIG.encoder, **change))
    with pytest.raises(errors.UserError, match=list(change)[0]):
        mmsegmentation.to_mmsegmentation(params(), config)


def test_other_taps_are_told(capsys):
    config = dataclasses.replace(CONFIG, encoder=dataclasses.replace(CONFIG.encoder, depth=5))
    deeper = parameters.replaced(params(), {"encoder": {"blocks": jax.tree.map(lambda a: a[[0, 1, 2, 3, 3]], params()["encoder"]["blocks"])}})
    mmsegmentation.to_mmsegmentation(deeper, config)
    assert "out_indices=[0, 1, 2, 3]" in capsys.readouterr().out


# --- the encoder of a run -------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [dict(), dict(input_norm=True), dict(relative_positions=False, layer_scale=False)])
def test_an_encoder_of_addp_fits_the_backbone(trained, change):
    config = beit.Config(width=16, depth=2, heads=2, image_size=32, patch_size=4, taps=(0, 0, 1, 1), **change)
    net = segmenter.Segmenter(segmenter.Config(config, channels=8, auxiliary_channels=8, num_classes=3))
    init = lambda rng: segmenter.init(net, rng)
    fresh = jax.device_get(jax.jit(init)(jax.random.key(0)))
    loaded = encoder.load(str(trained / "addp"), lambda rng: init(rng)["encoder"], config, "config.model.encoder_weights")
    assert loaded["pos_embed"].shape == (65, 16) and fresh["encoder"].keys() == loaded.keys()
    assert set(loaded["blocks"]["block"]) == {"norm1", "attention", "norm2", "mlp"}
    whole = fresh | {"encoder": parameters.replaced(fresh["encoder"], loaded)}
    assert jax.tree.map(np.shape, whole) == jax.tree.map(np.shape, fresh)
    assert np.isfinite(net.apply({"params": whole}, np.zeros((1, 32, 32, 3), np.float32), method="logits")).all()
    held = weights.read(str(trained / "addp"))["pixel_to_token"]["encoder"]
    np.testing.assert_array_equal(loaded["class_token"], held["class_token"])
    np.testing.assert_array_equal(loaded["blocks"]["block"]["mlp"]["fc1"]["kernel"], held["blocks"]["block"]["mlp"]["fc1"]["kernel"])
