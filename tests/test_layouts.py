"""Whole files of the released layouts: recognised, complete, and bit-exact in both directions."""

import functools

import jax
import numpy as np
import pytest
import released
from flax import serialization, traverse_util
from safetensors import numpy as safetensors_numpy

from addp_jax import errors, parameters
from addp_jax.codecs import vqgan
from addp_jax.models import layers, pixel_to_token, token_predictor, vit
from addp_jax.weights import layouts, maskgit, pytorch

NETWORKS = {"pixel_to_token": released.addp_params, "token_predictor": released.predictor_params, "tokenizer": released.tokenizer_params}
HEAD = ("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias")
DEAD = {*pytorch.ADDP_DEAD, *("token_predictor." + name for name in pytorch.PREDICTOR_DEAD)}


def networks(*names) -> dict:
    more = {"classifier": lambda: pytorch.from_torch(finetuned(), pytorch.classifier_rules())}
    return {name: (NETWORKS | more)[name]() for name in names or NETWORKS}


@functools.cache
def official() -> dict:
    """The state dict of the release's model with all names: its frozen tokenizer is there twice."""
    state = released.state_dict()
    again = {"token_predictor." + name: array for name, array in state.items() if name.startswith("vqgan.")}
    return state | again | {"token_predictor.token_emb.position_ids": np.arange(257)[None]}


def finetuned() -> dict:
    """The state dict of the release's classifier, made from its encoder."""
    stems, head = ("cls_token", "pos_embed", "patch_embed.", "blocks."), np.load(released.FOLDER / "finetune.npz")
    return {name: array for name, array in official().items() if name.startswith(stems)} | {name: head[name] for name in HEAD}


def stripped(*prefixes) -> dict:
    return {name: array for name, array in official().items() if not name.startswith(prefixes)}


def part(prefix, state=None) -> dict:
    return {name.removeprefix(prefix): array for name, array in (state or official()).items() if name.startswith(prefix)}


def assert_equal(one, other):
    one, other = parameters.named_leaves(one), parameters.named_leaves(other)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


FILES = {
    "the trainer's": (official, list(NETWORKS)),
    "without frozen parts": (lambda: stripped("vqgan.", "token_predictor."), ["pixel_to_token"]),
    "the tokenizer once": (lambda: stripped("token_predictor.vqgan."), list(NETWORKS)),
    "the tokenizer only in the predictor": (lambda: stripped("vqgan."), list(NETWORKS)),
    "without dead tensors": (lambda: {name: array for name, array in official().items() if name not in DEAD}, list(NETWORKS)),
    "MAGE": (lambda: part("token_predictor.", stripped("token_predictor.vqgan.")), ["token_predictor"]),
    "MAGE with its tokenizer": (lambda: part("token_predictor."), ["token_predictor", "tokenizer"]),
    "VQGAN": (lambda: part("vqgan."), ["tokenizer"]),
    "fine-tuned": (finetuned, ["classifier"]),
    "VQGAN with its losses": (lambda: part("vqgan.") | {"loss.discriminator.main.0.weight": np.zeros(3, np.int64)}, ["tokenizer"]),
}


@pytest.mark.medium
@pytest.mark.parametrize("name", FILES)
def test_every_layout_is_recognised_and_read_bit_for_bit(tmp_path, name):
    state, expected = FILES[name]
    safetensors_numpy.save_file(state(), tmp_path / "a.safetensors")
    found = layouts.read(str(tmp_path / "a.safetensors"))
    assert set(found) == set(expected)
    assert_equal(found, networks(*expected))


@pytest.mark.parametrize("wrapper", ["model", "state_dict", ""])
def test_pytorch_files_are_read_with_and_without_a_dict_around(torch, tmp_path, wrapper):
    state = {name: torch.from_numpy(array) for name, array in part("vqgan.").items()}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "a.ckpt")
    assert_equal(layouts.read(str(tmp_path / "a.ckpt")), networks("tokenizer"))


def test_only_the_wanted_network_is_read(tmp_path):
    """A value that is not finite in another network is not even seen, wrong shapes are."""
    state = dict(official())
    state["norm.bias"] = state["norm.bias"] * np.nan
    safetensors_numpy.save_file(state, tmp_path / "a.safetensors")
    assert_equal(layouts.read(str(tmp_path / "a.safetensors"), ["tokenizer"]), networks("tokenizer"))
    state["norm.bias"] = np.zeros(3, np.float32)
    safetensors_numpy.save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(errors.UserError, match=r"norm.bias is \[3\], expected \[64\]"):
        layouts.read(str(tmp_path / "a.safetensors"), ["tokenizer"])


def test_two_different_tokenizers_in_one_file_are_refused(tmp_path):
    name = "token_predictor.vqgan.quantize.embedding.weight"
    safetensors_numpy.save_file(official() | {name: official()[name] + 1}, tmp_path / "a.safetensors")
    with pytest.raises(errors.UserError, match="two different networks tokenizer"):
        layouts.read(str(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("change", ["norm.bias", "blocks.1.norm1.bias", "token_predictor.norm.bias", "vqgan.encoder.conv_in.weight"])
@pytest.mark.parametrize("what", ["missing", "not expected"])
def test_missing_and_unknown_tensors_are_named(tmp_path, change, what):
    state = dict(official())
    if what == "missing":
        del state[change]
    else:
        change = change + "x"
        state[change] = np.zeros(3, np.float32)
    safetensors_numpy.save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(errors.UserError) as caught:
        layouts.read(str(tmp_path / "a.safetensors"))
    short = change.removeprefix("token_predictor.").removeprefix("vqgan.")
    assert f"{short} " in str(caught.value) and f"is {what}" in str(caught.value)


SIZES = {  # the tensors that sizes are taken from
    "": ("patch_embed.proj.weight", "pos_embed", "token_emb.weight", "decoder_embed.weight", "blocks.0.mlp.fc1.weight"),
    "token_predictor.": ("token_emb.word_embeddings.weight", "token_emb.position_embeddings.weight"),
    "vqgan.": ("encoder.conv_in.weight", "encoder.down.1.block.0.conv1.weight"),
}


@pytest.mark.medium
@pytest.mark.parametrize("prefix", SIZES)
def test_whatever_shape_a_tensor_has_the_file_is_refused_before_anything_is_made(prefix):
    parts = layouts.split(layouts.READABLE["addp"], official())
    network = layouts.READABLE["addp"].parts[prefix]
    for name in SIZES[prefix]:
        shape = parts[prefix][name].shape
        for other in ((), shape[1:], (7, *shape[1:]), (10**9, *shape[1:])):
            with pytest.raises(errors.UserError):
                layouts.check("file", network, parts[prefix] | {name: np.broadcast_to(np.float32(0), other)})


# --- writing --------------------------------------------------------------------------------------

WRITTEN = {
    "addp": (official, list(NETWORKS)),
    "mage": (lambda: part("token_predictor."), ["token_predictor", "tokenizer"]),
    "vqgan": (lambda: part("vqgan."), ["tokenizer"]),
    "finetune": (finetuned, ["classifier"]),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_written_layouts_have_the_official_names_shapes_and_live_values(name):
    """So the official loader finds nothing missing and nothing unexpected."""
    expected, names = WRITTEN[name]
    expected, found = expected(), layouts.arrange(name, networks(*names))
    assert found.keys() == expected.keys()
    dead = DEAD if name == "addp" else pytorch.PREDICTOR_DEAD if name == "mage" else ()
    for key, array in expected.items():
        assert (found[key].shape, found[key].dtype) == (array.shape, array.dtype), key
        assert found[key].flags.c_contiguous
        if key not in dead:
            np.testing.assert_array_equal(found[key], array)
        elif not key.endswith("position_ids"):
            assert not found[key].any()
    assert len([key for key in expected if key in dead]) == {"addp": 14, "mage": 9}.get(name, 0)


def test_mage_can_be_written_without_its_tokenizer():
    found = layouts.arrange("mage", networks("token_predictor"))
    assert found.keys() == part("token_predictor.", stripped("token_predictor.vqgan.")).keys()
    assert found["patch_embed.proj.weight"].shape == (64, 3, 16, 16)


def test_timm_has_the_encoder_under_its_own_names():
    stems = ("cls_token", "pos_embed", "patch_embed.", "tokenizer_norm.", "blocks.", "norm.")
    expected = {name.replace("tokenizer_norm", "norm_pre"): array for name, array in official().items() if name.startswith(stems)}
    found = layouts.arrange("timm", networks("pixel_to_token"))
    assert_equal(found, expected)


def test_a_classifier_that_kept_the_norms_is_not_written_as_one_that_dropped_them():
    params = networks("classifier")["classifier"]
    params["encoder"]["input_norm"] = {"scale": np.ones(64), "bias": np.zeros(64)}
    with pytest.raises(errors.UserError, match="other parameters than the layout has names for: encoder/input_norm/bias"):
        layouts.arrange("finetune", {"classifier": params})


def test_a_network_with_other_parameters_is_not_written():
    params = networks("pixel_to_token")["pixel_to_token"]
    encoder = {name: leaf for name, leaf in params["encoder"].items() if name != "input_norm"}
    for changed in (params | {"encoder": encoder}, params | {"encoder": params["encoder"] | {"more": np.zeros(2)}}):
        with pytest.raises(errors.UserError, match="other parameters than the layout has names for: encoder/"):
            layouts.arrange("timm", {"pixel_to_token": changed})


# --- sizes from names and shapes -------------------------------------------------------------------


@pytest.mark.parametrize("multipliers", [(1,), (2,), (1, 2, 1), (2, 1, 3), (1, 1, 2, 2, 4)])
@pytest.mark.parametrize("each", [1, 2])
def test_the_size_of_a_tokenizer_is_found_from_any_names(multipliers, each):
    config = vqgan.Config(image_size=16, channels=4, multipliers=multipliers, num_res_blocks=each, num_codes=5, code_width=3, num_groups=2)
    shapes = jax.eval_shape(functools.partial(vqgan.init, vqgan.Tokenizer(config)), jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.random.default_rng(0).normal(size=leaf.shape).astype(np.float32), shapes)
    for rules, find in ((pytorch.tokenizer_rules, layouts.vqgan_config), (maskgit.rules, maskgit.config)):
        named = pytorch.to_torch(params, rules(config))
        found = find({name: array.shape for name, array in named.items()})
        assert_equal(pytorch.from_torch(named, rules(found)), params)
    found = layouts.our_tokenizer_config(params)
    assert (found.multipliers, found.num_res_blocks, found.channels) == (multipliers, each, 4)


@pytest.mark.parametrize("depth, decoder_depth, vocabulary", [(12, 8, 2025), (3, 1, 40)])
def test_the_sizes_of_transformers_are_found(depth, decoder_depth, vocabulary):
    encoder, decoder = dict(width=16, depth=depth, heads=1), layers.TransformerConfig(16, decoder_depth, 1, mlp_ratio=2)
    addp = pixel_to_token.Config(vit.Config(image_size=32, patch_size=8, mlp_ratio=3, **encoder), decoder, vocab_size=vocabulary)
    predictor = token_predictor.Config(layers.TransformerConfig(**encoder), decoder, vocab_size=vocabulary, length=9)
    for network, config in ((layouts.ADDP, addp), (layouts.PREDICTOR, predictor)):
        named = pytorch.to_torch(jax.tree.map(lambda leaf: np.zeros(leaf.shape), network.shapes(config)), network.rules(config))
        assert network.config({name: array.shape for name, array in named.items()}) == config


# --- the public MaskGIT tokenizer -------------------------------------------------------------------


def test_maskgit_names_are_those_of_the_public_checkpoint():
    """168 arrays and 54,515,587 parameters; which of them are where, from the checkpoint's documented tree."""
    rules = maskgit.rules(vqgan.Config())
    names = {rule.torch: rule.ours[0] for rule in rules}
    shapes = parameters.named_leaves(layouts.VQGAN.shapes(vqgan.Config()))
    assert sorted(names.values()) == sorted(shapes) and len(names) == 168
    assert sum(leaf.size for leaf in shapes.values()) == 54_515_587
    shortcuts = [name.rsplit("/", 2)[0] for name in names if "ResBlock" in name and name.endswith("Conv_2/kernel")]
    assert sorted(shortcuts) == ["decoder/ResBlock_4", "decoder/ResBlock_8", "encoder/ResBlock_4", "encoder/ResBlock_8"]
    expected = {
        "decoder/Conv_1/kernel": (3, 3, 512, 512), "decoder/Conv_2/bias": (256,), "decoder/Conv_4/kernel": (3, 3, 128, 128),
        "decoder/Conv_5/kernel": (3, 3, 128, 3), "encoder/Conv_1/kernel": (1, 1, 512, 256), "decoder/GroupNorm_0/scale": (128,),
        "encoder/ResBlock_8/Conv_2/kernel": (1, 1, 512, 512), "decoder/ResBlock_8/Conv_0/kernel": (3, 3, 256, 128),
    }  # fmt: skip
    assert {name: shapes[names[name]].shape for name in expected} == expected
    assert names["decoder/ResBlock_2/Conv_0/kernel"] == "decoder/up_4_0/conv1/kernel"
    assert names["decoder/Conv_1/kernel"] == "decoder/upsample_4/kernel"


@pytest.mark.parametrize("name, wrapped", [("tokenizer_imagenet256_checkpoint", True), ("a.msgpack", False)])
def test_a_maskgit_file_is_read_bit_for_bit(tmp_path, name, wrapped):
    flat = pytorch.to_torch(released.tokenizer_params(), maskgit.rules(released.TOKENIZER))
    tree = traverse_util.unflatten_dict(flat, sep="/")
    (tmp_path / name).write_bytes(serialization.msgpack_serialize({"params": tree} if wrapped else tree))
    assert_equal(layouts.read(str(tmp_path / name)), networks("tokenizer"))
