"""The release's fine-tuning in numbers: classifier, position embeddings, learning rate per layer, mixup and CutMix.

finetune.npz was made by the released code and timm 0.9.2 (keys `mix_*`) from the weights in weights.npz.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import released

from addp_jax import optim
from addp_jax.metrics import classification as metrics
from addp_jax.models import heads, layers, vit
from addp_jax.ops import mixup
from addp_jax.weights import pytorch

pytestmark = [pytest.mark.golden, pytest.mark.medium]

NETWORK = 2e-5  # of the largest value
GRADIENT = 2e-4
MIXED = 1e-6
RESIZED = 5e-6  # PyTorch resizes in float32: 1e-6 to 2e-6 off its own float64

SHARE, LABELS = 0.3125, (3, 7)  # of the fine-tuning step
RECIPE = optim.Config(
    betas=(0.9, 0.999), clip_norm=0.0, weight_decay=0.05, layer_decay=0.65,
    not_decayed=("bias", "scale", "class_token", "pos_embed"),
)  # fmt: skip
RULES = pytorch.classifier_rules()


@functools.cache
def gold() -> dict:
    return dict(np.load(released.FOLDER / "finetune.npz"))


@functools.cache
def classifier(size):
    """`(net, params)`: the released encoder without its norms, the golden head."""
    encoder = vit.Config(64, 2, 4, dropout=0.0, image_size=size, input_dropout=0.0, input_norm=False, final_norm=False)
    net = heads.Classifier(heads.Config(encoder, num_classes=10))
    own = {name: leaf for name, leaf in released.addp_params()["encoder"].items() if name not in ("input_norm", "final_norm")}
    own["pos_embed"] = vit.resize_pos_embed(own["pos_embed"], encoder.length)
    head = {name: gold()[name] for name in ("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias")}
    return net, {"encoder": own, **pytorch.from_torch(head, RULES[-4:])}


def images(size):
    edge = (256 - size) // 2
    return released.images()[:, edge : 256 - edge, edge : 256 - edge]


def close(ours, theirs, tolerance=NETWORK):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def test_position_embeddings_are_resized_as_the_release_does():
    ours = vit.resize_pos_embed(released.addp_params()["encoder"]["pos_embed"], 14 * 14)
    close(ours, gold()["pos_embed_224"][0], RESIZED)
    np.testing.assert_array_equal(ours[0], gold()["pos_embed_224"][0, 0])


def test_no_resizing_leaves_position_embeddings_as_they_are():
    own = released.addp_params()["encoder"]["pos_embed"]
    np.testing.assert_array_equal(vit.resize_pos_embed(own, len(own) - 1), own)
    np.testing.assert_allclose(vit.bicubic_weights(5, 9).sum(1), 1, rtol=1e-12)


@pytest.mark.parametrize("size", [224, 256])
def test_classifier_agrees(size):
    net, params = classifier(size)
    logits, state = jax.jit(functools.partial(net.apply, capture_intermediates=True))({"params": params}, images(size))
    close(logits, gold()[f"logits_{size}"])
    state = state["intermediates"]
    close(state["head_norm"]["__call__"][0], gold()[f"prelogits_{size}"])
    if size == 224:
        close(state["encoder"]["blocks"]["__call__"][0][0], gold()["features_224_img0"])


def test_only_the_head_starts_at_random():
    net, params = classifier(224)
    expected = jax.eval_shape(functools.partial(heads.init, net), jax.random.key(0))
    at_random = {name: jax.tree.map(lambda leaf: np.zeros(leaf.shape), expected[name]) for name in expected if name != "encoder"}
    assert set(pytorch.to_torch(at_random, RULES[-4:])) == {str(name) for name in gold()["missing_keys"]}
    assert {"tokenizer_norm", "norm"} <= set(gold()["unexpected_prefixes"])  # dropped by the release, so by default here


def test_a_fine_tuning_step_agrees():
    """Mixed images and targets -> loss, every gradient, and every parameter after a step with its own learning rate."""
    net, params = classifier(224)
    target = mixup.targets(jnp.array(LABELS), SHARE, 0.1, 10)
    np.testing.assert_allclose(target, gold()["ft_targets"], atol=MIXED)
    mixed = mixup.blend(jnp.asarray(images(224)), jnp.full((224, 224), SHARE))

    @jax.jit
    def step(params):
        def loss(params):
            return optax.softmax_cross_entropy(net.apply({"params": params}, mixed), target).mean()

        value, grads = jax.value_and_grad(loss)(params)
        optimizer = optim.build(RECIPE, float(gold()["ft_lr"]))
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return value, grads, optax.apply_updates(params, updates)

    loss, grads, after = step(jax.tree.map(jnp.asarray, params))
    np.testing.assert_allclose(loss, gold()["ft_loss"], rtol=1e-6)
    grads, after = pytorch.to_torch(grads, RULES), pytorch.to_torch(after, RULES)
    names = [str(name) for name in gold()["ft_names"]]
    assert set(names) == set(grads)
    for name, one, two in zip(names, gold()["ft_grad_checksums"], gold()["ft_step_checksums"]):
        if "qkv.bias" in name:  # the key's share is rounding noise
            continue
        np.testing.assert_allclose(released.checksum(grads[name]), one, rtol=0, atol=GRADIENT * one[1])
        np.testing.assert_allclose(released.checksum(after[name]), two, rtol=0, atol=GRADIENT * two[1])
        if f"step1:{name}" in gold():
            before = dict(pytorch.to_torch(params, RULES))[name]
            moved, expected = after[name] - before, gold()[f"step1:{name}"] - before
            assert np.mean(np.abs(moved - expected) <= 0.01 * np.abs(expected).max()) > 0.99  # Adam's first step is lr * sign


def test_learning_rate_and_decay_of_every_parameter_agree():
    _, params = classifier(224)
    scales = optim.layer_scales(params, 0.65)
    whole = jax.tree.map(lambda leaf, scale: np.broadcast_to(scale, leaf.shape), params, scales)
    decayed = optim.decay_mask(params, RECIPE.not_decayed)
    flags = jax.tree.map(lambda leaf, flag: np.full(leaf.shape, 0.05 * flag), params, decayed)
    ours = {name: (np.unique(scale), np.unique(flag)) for (name, scale), flag in zip(
        pytorch.to_torch(whole, RULES).items(), pytorch.to_torch(flags, RULES).values())}  # fmt: skip
    table = zip(gold()["lrd_names"], gold()["lrd_lr_scale"], gold()["lrd_weight_decay"])
    assert len(ours) == len(gold()["lrd_names"])
    for name, scale, decay in table:
        np.testing.assert_allclose(ours[str(name)][0], [scale], rtol=1e-6)
        np.testing.assert_allclose(ours[str(name)][1], [decay])


def test_drop_path_grows_linearly():
    np.testing.assert_allclose(gold()["drop_path_rates"], np.linspace(0, 0.1, 2))
    rates = []
    config = layers.TransformerConfig(8, 2, 2, dropout=0.0, drop_path=0.1)
    tokens = jnp.ones((1, 2, 8))
    blocks = layers.Blocks(config, jnp.float32)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), jax.eval_shape(blocks.init, jax.random.key(0), tokens))

    def record(rng, keep, shape):
        jax.debug.callback(lambda keep: rates.append(1 - float(keep)), keep)
        return jnp.ones(shape, bool)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.random, "bernoulli", record)
        jax.block_until_ready(blocks.apply(params, tokens, train=True, rngs={"dropout": jax.random.key(0)}))
        jax.effects_barrier()
    np.testing.assert_allclose(sorted(set(np.round(rates, 6))), gold()["drop_path_rates"], atol=1e-6)


@pytest.mark.parametrize("case", range(4))
def test_mixup_and_cutmix_agree_given_timms_draw(case):
    image = jnp.asarray(gold()["mix_x"].transpose(0, 2, 3, 1))
    share, cut = gold()[f"mix_case{case}_lam_cutmix"]
    kept = jnp.full(image.shape[1:3], share, jnp.float32)
    if cut:
        top, bottom, left, right, share = gold()[f"mix_case{case}_bbox_lam"]
        kept = jnp.ones(image.shape[1:3]).at[int(top) : int(bottom), int(left) : int(right)].set(0)
    mixed = mixup.blend(image, kept).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(mixed, gold()[f"mix_case{case}_x"], atol=MIXED)
    target = mixup.targets(jnp.asarray(gold()["mix_y"]), share, 0.1, 10)
    np.testing.assert_allclose(target, gold()[f"mix_case{case}_y"], atol=MIXED)


def test_losses_agree():
    logits, target = gold()["mix_loss_logits"], gold()["mix_case3_y"]
    np.testing.assert_allclose(optax.softmax_cross_entropy(logits, target).mean(), gold()["mix_soft_ce"], rtol=1e-6)
    smoothed = mixup.targets(jnp.asarray(gold()["mix_y"]), 1.0, 0.1, 10)
    np.testing.assert_allclose(optax.softmax_cross_entropy(logits, smoothed).mean(), gold()["mix_ls_ce"], rtol=1e-6)
    hard = optax.softmax_cross_entropy_with_integer_labels(logits, gold()["mix_y"])
    np.testing.assert_allclose(metrics.cross_entropy(logits, gold()["mix_y"]), hard, rtol=1e-6)
