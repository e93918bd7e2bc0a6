"""Weights by detectron2's names: bit-exact in both directions, from every kind of file; what does not fit is refused."""

import collections
import dataclasses
import functools
import io
import pickle

import dense
import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from addp_jax import errors, parameters, weights
from addp_jax.models import detector, vitdet
from addp_jax.weights import dense as formats
from addp_jax.weights import detectron2, encoder, numpy_pickles, pickles, weight_files

CONFIG, FORMAT = dense.CONFIG, formats.FORMATS["detectron2"]
WEIGHTS = dense.arrays("vitdet_params")
BLOCK = "backbone.net.blocks.1.attn.rel_pos_h"


def read(path):
    """`(config, parameters)` of a file that is taken for one of this format."""
    return FORMAT.parse(path, formats.open_file(path)[1])



@functools.cache
def params():
    return detectron2.from_detectron2(WEIGHTS, CONFIG)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_every_name_is_read_and_written_bit_for_bit():
    assert_same(detectron2.to_detectron2(params(), CONFIG), WEIGHTS)


def test_rows_beyond_a_windows_table_are_zeros():
    tables = params()["encoder"]["blocks"]["block"]["attention"]["rel_pos_h"]
    assert tables.shape == (4, 19, 16) and not tables[::2, 7:].any() and tables[1::2].all()


def test_the_config_is_read_off_the_shapes():
    found = FORMAT.config_of({name: array.shape for name, array in WEIGHTS.items()})
    assert dataclasses.replace(found, encoder=dataclasses.replace(found.encoder, drop_path=0.0)) == CONFIG


def save_pickle(protocol):
    def save(path):
        model = collections.OrderedDict(WEIGHTS)
        path.write_bytes(pickle.dumps({"model": model, "__author__": "someone", "matching_heuristics": True}, protocol))

    return save


def save_torch(path):
    torch = pytest.importorskip("torch", reason="needs pip install torch")
    torch.save({"model": {name: torch.from_numpy(array) for name, array in WEIGHTS.items()}, "iteration": 7}, path)


FILES = {
    "2.pkl": save_pickle(2), "4.pkl": save_pickle(4), "5.pkl": save_pickle(5), "a.pth": save_torch,
    "a.safetensors": lambda path: safetensors_numpy.save_file(WEIGHTS, path),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_are_read(name, tmp_path):
    FILES[name](tmp_path / name)
    config, found = read(str(tmp_path / name))
    assert config.encoder.window == 4 and config.num_classes == 5
    assert_same(parameters.named_leaves(found), parameters.named_leaves(params()))


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_files_are_written_and_read_again(name, tmp_path):
    if name.endswith(".pth"):
        pytest.importorskip("torch", reason="needs pip install torch")
    weight_files.write(str(tmp_path / name), detectron2.to_detectron2(params(), CONFIG), "model")
    assert_same(parameters.named_leaves(read(str(tmp_path / name))[1]), parameters.named_leaves(params()))


def without(name):
    return {key: array for key, array in WEIGHTS.items() if key != name}


DAMAGED = {
    "missing": (without("roi_heads.mask_head.deconv.bias"), "mask_head.deconv.bias"),
    "unknown": (WEIGHTS | {"backbone.net.norm.weight": np.ones(64, np.float32)}, "backbone.net.norm.weight"),
    "another size": (WEIGHTS | {"roi_heads.box_head.fc1.bias": np.ones(31, np.float32)}, "box/fc/bias"),
    "another table": (WEIGHTS | {BLOCK: np.ones((17, 16), np.float32)}, BLOCK),
    "a table that is a vector": (WEIGHTS | {BLOCK: np.ones(19, np.float32)}, BLOCK),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_does_not_fit_is_named(name):
    tensors, what = DAMAGED[name]
    with pytest.raises(errors.UserError) as caught:
        detectron2.from_detectron2(tensors, CONFIG)
    assert what in str(caught.value) and "\n" not in str(caught.value)


OTHERS = {
    "nothing": {},
    "another network": {"conv.weight": np.ones((3, 3))},
    "tables of one length": WEIGHTS | {name: np.ones((19, 16), np.float32) for name in WEIGHTS if "rel_pos_h" in name},
    "no block": {name: array for name, array in WEIGHTS.items() if ".blocks." not in name},
    "global blocks not spread": WEIGHTS | {"backbone.net.blocks.2.attn.rel_pos_h": np.ones((19, 16), np.float32)},
    "a scalar": WEIGHTS | {BLOCK: np.float32(1)},
    "a head of no width": WEIGHTS | {"backbone.net.blocks.0.attn.rel_pos_h": np.ones((7, 0), np.float32)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_weights_of_other_networks_are_refused_in_one_line(name):
    with pytest.raises(errors.UserError) as caught:
        FORMAT.config_of({key: np.shape(array) for key, array in OTHERS[name].items()})
    assert "ViTDet" in str(caught.value) and "\n" not in str(caught.value)


def test_an_input_norm_is_not_dropped_in_silence():
    config = dataclasses.replace(CONFIG, encoder=dataclasses.replace(CONFIG.encoder, input_norm=True))
    with pytest.raises(errors.UserError, match="input_norm"):
        detectron2.to_detectron2(params(), config)


# --- pickles of arrays ----------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("array", [
    np.arange(6, dtype=np.float32).reshape(2, 3), np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.zeros((0, 3), np.float16),
    np.array(3, np.float32), np.arange(300, dtype=np.uint8), np.array([True, False]),
])  # fmt: skip
def test_arrays_of_every_protocol(protocol, array):
    found = numpy_pickles.load(io.BytesIO(pickle.dumps({"a": {"b": array}}, protocol)))["a"]["b"]
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


class Call:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def array_with(**change):
    """The pickle of a small array, its text changed."""
    content = pickle.dumps(np.arange(6, dtype=np.float32), 2)
    for old, new in change.values():
        assert old in content
        content = content.replace(old, new)
    return content


HOSTILE = {
    "a shape larger than its bytes": array_with(shape=(b"K\x06\x85", b"K\x07\x85")),
    "objects": pickle.dumps(np.array([{}, {}], object)),
    "big-endian": pickle.dumps(np.arange(3, dtype=">f4")),
    "no state": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R.",
    "cut short": pickle.dumps(np.arange(6.0))[:-9],
    "no pickle": b"hello",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_arrays_that_are_not_whole_are_refused(name, tmp_path):
    with pytest.raises(ValueError):
        numpy_pickles.load(io.BytesIO(HOSTILE[name]))
    (tmp_path / "a.pkl").write_bytes(HOSTILE[name])
    with pytest.raises(errors.UserError, match="a.pkl"):
        read(str(tmp_path / "a.pkl"))


def test_no_code_of_a_pickle_runs(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": {"a": Call(exec, f"open({str(tmp_path / 'ran')!r}, 'w')")}}))
    with pytest.raises(errors.UserError, match="not a tensor"):
        read(str(tmp_path / "a.pkl"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["missing.pkl", "empty.pkl"])
def test_files_that_hold_nothing_are_named(name, tmp_path):
    (tmp_path / "empty.pkl").touch()
    with pytest.raises(errors.UserError, match=name):
        read(str(tmp_path / name))


def test_what_a_pickle_sets_on_an_object_is_kept_as_data():
    made, _ = pickles.load(io.BytesIO(pickle.dumps(dense.pathlib.PurePosixPath("a"), 2)))
    assert isinstance(made, pickles.Made)


# --- the encoder of a run -------------------------------------------------------------------------------


@pytest.mark.parametrize("input_norm", [False, True])
def test_an_encoder_of_addp_fits_the_backbone(trained, input_norm):
    config = vitdet.Config(
        width=16, depth=2, heads=2, image_size=32, patch_size=4, pretrain_size=16, window=3, global_blocks=1, input_norm=input_norm
    )
    net = detector.Detector(detector.Config(config, channels=8, box_width=16, num_classes=3))
    init = lambda rng: detector.init(net, rng)
    loaded = encoder.load(str(trained / "addp"), lambda rng: init(rng)["encoder"], config, "config.model.encoder_weights")
    fresh = jax.device_get(jax.jit(init)(jax.random.key(0)))
    left = fresh["encoder"].keys() - loaded.keys()
    assert not left and ("input_norm" in loaded) == input_norm
    assert set(loaded["blocks"]["block"]["attention"]) == {"query", "key", "value", "out"}
    whole = fresh | {"encoder": parameters.replaced(fresh["encoder"], loaded)}
    assert jax.tree.map(np.shape, whole) == jax.tree.map(np.shape, fresh)
    levels = net.apply({"params": whole}, np.zeros((1, 32, 32, 3), np.float32), method="features")
    assert all(np.isfinite(level).all() for level in levels)
    trained_one = weights.read(str(trained / "addp"))["pixel_to_token"]["encoder"]
    fc1 = lambda encoder: encoder["blocks"]["block"]["mlp"]["fc1"]["kernel"]
    np.testing.assert_array_equal(fc1(loaded), fc1(trained_one))


def mae_file(path, more=()):
    """An encoder of the network's size under MAE's names, at another image size; with a decoder's tensors."""
    from addp_jax.models import vit
    from addp_jax.weights import layouts, pytorch

    encoder = CONFIG.encoder
    config = vit.Config(encoder.width, encoder.depth, encoder.heads, mlp_ratio=encoder.mlp_ratio, image_size=96, input_norm=False)
    shapes, rng = layouts.encoder_shapes(config), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), shapes)
    tensors = pytorch.to_torch(params, pytorch.mae_rules()) | {name: np.ones(3, np.float32) for name in more}
    safetensors_numpy.save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, path)
    return params["encoder"]


def test_an_encoder_of_mae_is_taken_over(tmp_path):
    own = mae_file(tmp_path / "mae.safetensors", more=("mask_token", "decoder_pred.bias", "decoder_blocks.0.norm1.bias"))
    init = lambda rng: detector.init(detector.Detector(CONFIG), rng)["encoder"]
    found = encoder.load(str(tmp_path / "mae.safetensors"), init, CONFIG.encoder, "config.model.encoder_weights")
    np.testing.assert_array_equal(found["blocks"]["block"]["mlp"]["fc1"]["kernel"], own["blocks"]["block"]["mlp"]["fc1"]["kernel"])
    assert found["pos_embed"].shape == (1 + CONFIG.encoder.length, CONFIG.encoder.width)
    with pytest.raises(errors.UserError, match="does not fit a vit: .*other.bias"):
        mae_file(tmp_path / "odd.safetensors", more=("other.bias",))
        encoder.load(str(tmp_path / "odd.safetensors"), init, CONFIG.encoder, "config.model.encoder_weights")
