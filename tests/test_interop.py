"""PyTorch names and layouts: complete, invertible, and loud about what does not fit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest

from addp_jax import errors, parameters, schema, weights
from addp_jax.codecs import vqgan
from addp_jax.models import pixel_to_token, token_predictor
from addp_jax.tasks import addp
from addp_jax.weights import pytorch

NETWORKS = ("pixel_to_token", "token_predictor", "tokenizer")


@functools.cache
def network(name, config="demo_addp", arg="tiny"):
    """`(rules, shapes)` of a network of an ADDP config."""
    fields = programs.fields(config, arg).model.to_dict()
    task = addp.Task(schema.build(addp.Config, fields, "config.model"), jnp.float32)
    parts = {
        "pixel_to_token": (pixel_to_token, task.net, pytorch.addp_rules()),
        "token_predictor": (token_predictor, task.predictor, pytorch.predictor_rules()),
        "tokenizer": (vqgan, task.tokenizer, pytorch.tokenizer_rules(task.tokenizer.config)),
    }
    module, net, rules = parts[name]
    return rules, jax.eval_shape(functools.partial(module.init, net), jax.random.key(0))


@functools.cache
def params(name):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), network(name)[1])


def tensors(name) -> dict:
    return pytorch.to_torch(params(name), network(name)[0])


def assert_every_parameter_has_one_name(rules, shapes):
    ours = [path for rule in rules for path in rule.ours]
    assert sorted(ours) == sorted(parameters.named_leaves(shapes))
    assert len({rule.torch for rule in rules}) == len(rules)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("config", [("vitb", ""), ("vitl", ""), ("demo_addp", ""), ("demo_addp", "tiny")])
def test_every_parameter_has_exactly_one_torch_name(name, config):
    assert_every_parameter_has_one_name(*network(name, *config))


@pytest.mark.parametrize("multipliers", [(1,), (2,), (1, 1, 1), (1, 2, 1), (2, 1, 3), (1, 1, 2, 2, 4)])
def test_tokenizers_of_any_widths_have_names(multipliers):
    config = vqgan.Config(image_size=16, channels=4, multipliers=multipliers, num_res_blocks=2, num_codes=5, code_width=3, num_groups=2)
    shapes = jax.eval_shape(functools.partial(vqgan.init, vqgan.Tokenizer(config)), jax.random.key(0))
    assert_every_parameter_has_one_name(pytorch.tokenizer_rules(config), shapes)


@pytest.mark.parametrize("name", NETWORKS)
def test_there_and_back_is_bit_exact(name):
    back = pytorch.from_torch(tensors(name), network(name)[0])
    assert jax.tree.structure(back) == jax.tree.structure(params(name))
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(params(name)), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.flags.c_contiguous


@pytest.mark.parametrize("name", NETWORKS)
def test_every_missing_tensor_is_named(name):
    """In the last layer as well, where the others alone would make a shorter stack."""
    complete = tensors(name)
    for missing in complete:
        with pytest.raises(errors.UserError) as caught:
            pytorch.from_torch({key: value for key, value in complete.items() if key != missing}, network(name)[0])
        assert missing in str(caught.value)


def test_a_whole_missing_stack_is_named():
    left = {key: value for key, value in tensors("pixel_to_token").items() if not key.startswith("decoder_blocks.")}
    with pytest.raises(errors.UserError, match="no tensor decoder_blocks"):
        pytorch.from_torch(left, network("pixel_to_token")[0])


@pytest.mark.parametrize("extra", ["surprise", "blocks.0.attn.surprise", "xblocks.0.norm1.weight", "blocks.0.norm1.weightx"])
def test_an_unknown_tensor_is_named(extra):
    with pytest.raises(errors.UserError, match=f"1 tensors of no known meaning, among them {extra}"):
        pytorch.from_torch(tensors("pixel_to_token") | {extra: np.zeros(2)}, network("pixel_to_token")[0])


def test_dead_tensors_are_passed_over_and_only_these():
    rules, complete = network("token_predictor")[0], tensors("token_predictor")
    dead = {name: np.zeros(2) for name in pytorch.PREDICTOR_DEAD}
    back = pytorch.from_torch(complete | dead, rules, pytorch.PREDICTOR_DEAD)
    assert jax.tree.structure(back) == jax.tree.structure(params("token_predictor"))
    with pytest.raises(errors.UserError, match=f"{len(dead)} tensors of no known meaning"):
        pytorch.from_torch(complete | dead, rules)


def test_layers_are_stacked_by_number_not_by_spelling():
    names = [f"blocks.{i}.norm1.weight" for i in range(12)]
    shuffled = {name: None for name in sorted(names)}  # 0, 1, 10, 11, 2...
    assert pytorch.layer_names("blocks.{i}.norm1.weight", shuffled) == names
    rule = pytorch.Rule("blocks.{i}.norm1.weight", ("scale",), pytorch.SAME)
    stacked = pytorch.from_torch({name: np.full(2, float(name.split(".")[1])) for name in shuffled}, [rule])["scale"]
    np.testing.assert_array_equal(stacked[:, 0], np.arange(12))


def test_a_gap_in_the_layers_is_a_missing_tensor():
    rule = pytorch.Rule("blocks.{i}.norm1.weight", ("scale",), pytorch.SAME)
    with pytest.raises(errors.UserError, match="no tensor blocks.1.norm1.weight"):
        pytorch.from_torch({f"blocks.{i}.norm1.weight": np.zeros(2) for i in (0, 2)}, [rule])


def test_a_stack_is_not_taken_for_another_whose_name_ends_alike():
    found = {"decoder_blocks.5.norm1.weight": None, "blocks.0.norm1.weight": None}
    assert pytorch.layer_names("blocks.{i}.norm1.weight", found) == ["blocks.0.norm1.weight"]


@pytest.mark.parametrize("name", ["blocks.1.mlp.fc1.weight", "token_emb.weight", "pos_embed", "patch_embed.proj.weight"])
def test_a_tensor_of_another_shape_is_refused_before_it_is_used(name):
    """`from_torch` knows names only; what it returns must be matched with the network's shapes."""
    rules, shapes = network("pixel_to_token")
    changed = tensors("pixel_to_token")
    changed[name] = np.concatenate([changed[name]] * 2, axis=1 if name == "pos_embed" else 0)
    with pytest.raises(errors.UserError):
        parameters.match(pytorch.from_torch(changed, rules), shapes, where="config.init")


# --- weights of another run -----------------------------------------------------------------------


def test_random_weights_have_the_networks_shapes_and_are_always_the_same():
    init = lambda rng: {"kernel": jax.random.normal(rng, (2, 3))}
    one, two = (weights.load("random", "tokenizer", init, None, "config.x") for _ in range(2))
    assert isinstance(one["kernel"], np.ndarray)
    np.testing.assert_array_equal(one["kernel"], two["kernel"])


@pytest.mark.parametrize("path, problem", [("", "is empty"), ("/nowhere/at/all", "nothing at /nowhere/at/all")])
def test_weights_that_are_not_there_name_the_field_and_how_to_get_them(path, problem):
    for name in NETWORKS:
        with pytest.raises(errors.UserError, match=f"^config.model.some_weights.*{problem}.*train one with configs/"):
            weights.load(path, name, None, None, "config.model.some_weights")
