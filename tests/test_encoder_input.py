"""Recognition from tokens, as MAGE's encoder reads them: what the encoder sees, where it comes from, whole runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest

import addp_jax
from addp_jax import codecs, errors, parameters, program, schema, tasks
from addp_jax.models import heads, layers, token_predictor
from addp_jax.ops import mixup
from addp_jax.training import loop
from addp_jax.weights import checkpoint, convert, layouts, weight_files

DEMOS = ("classification", "detection", "segmentation")
NETWORKS = {"classification": "classifier", "detection": "detector", "segmentation": "segmenter"}
PREDICTOR = schema.build(token_predictor.Config, programs.fields("demo_predictor").model.net.to_dict())
FIELD = "config.model.encoder_weights"
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def settings(name: str, **changes):
    """Of a demo's tiny run; the tokenizer is random."""
    tokens = {"model__input": "tokens", "model__tokenizer_weights": "random", "model__encoder_weights": ""}
    return programs.config(f"demo_{name}", **(tokens | changes))


def make(name: str, **changes):
    config = settings(name, **changes)
    return tasks.create(config.task, config.model, jnp.float32)


@pytest.fixture(scope="module")
def task():
    """Classification without mixing, of an encoder that is not pre-trained."""
    return make("classification")


@pytest.fixture(scope="module")
def predictor():
    """(network, parameters); a norm that does nothing would hide that it is missing."""
    net = token_predictor.TokenPredictor(PREDICTOR)
    params = jit(functools.partial(token_predictor.init, net))(jax.random.key(3))
    scales = {name: {"scale": np.linspace(0.5, 2, 16, dtype=np.float32)} for name in ("embed_norm", "encoder_norm")}
    return net, jax.tree.map(np.asarray, parameters.replaced(params, scales))


def save(path, params: dict, tokenizer: str) -> str:
    """The work directory of a run of a predictor; tokenizer: the hash of its frozen one."""
    net = schema.identity(PREDICTOR)
    checkpoint.save_params(str(path), {"token_predictor": params}, {"frozen": {"tokenizer": tokenizer}, "model": {"net": net}})
    return str(path)


@pytest.fixture(scope="module")
def run(predictor, task, tmp_path_factory):
    return save(tmp_path_factory.mktemp("predictor"), predictor[1], parameters.content_hash(task.load_frozen()["tokenizer"]))


def pictures(task, count: int = 3):
    return np.random.default_rng(0).integers(0, 256, (count, task.image_size, task.image_size, 3), np.uint8)


def started(task):
    """All its parameters, those of the pre-trained encoder in their places."""
    return parameters.replaced(jit(task.init)(jax.random.key(0)), task.load_pretrained())


def test_features_are_those_of_mages_encoder(predictor, run):
    """With its LayerNorm in front of the blocks, which the recipes for ADDP's encoder leave out."""
    task, (net, weights) = make("classification", model__encoder_weights=run, model__net__encoder__input_norm=False), predictor
    frozen, image = task.load_frozen(), pictures(task)
    token_ids = codecs.bind(task.input.tokenizer, frozen["tokenizer"]).encode(image / np.float32(255))
    encode = jit(lambda params, ids: net.apply({"params": params}, ids, jnp.zeros(ids.shape, bool), method="encode"))
    encoded = encode(weights, token_ids)
    pooled = np.asarray(heads.pool(encoded, "mean"))
    expected = (pooled - pooled.mean(-1, keepdims=True)) / pooled.std(-1, keepdims=True)  # the head's norm is new
    found = jit(task.features)(started(task), frozen, image)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.unique(token_ids).size > 3 and np.abs(found[0] - found[1]).max() > 1e-2


def test_the_class_slot_is_pre_trainings(predictor, run):
    loaded = make("classification", model__encoder_weights=run).load_pretrained()["classifier"]["encoder"]
    table = predictor[1]["token_embed"]
    np.testing.assert_array_equal(loaded["class_token"], table[PREDICTOR.class_id])
    np.testing.assert_array_equal(loaded["token_embed"], table[: PREDICTOR.num_codes])


def normed(params, tokens):
    return layers.layer_norm().apply({"params": params}, tokens)


def test_the_segmenters_encoder_is_mages(predictor, run):
    """At its size of images, relative positions and factors being those of the start."""
    small = dict(model__net__encoder__image_size=16, model__net__encoder__input_norm=False, model__encoder_weights=run)
    task, (net, weights) = make("segmentation", **small), predictor
    token_ids = np.random.default_rng(0).integers(0, PREDICTOR.num_codes, (2, 4, 4))
    encode = jit(lambda params, ids: task.net.apply({"params": params}, ids, method=lambda net, ids: net.encoder(ids)))
    found = normed(weights["encoder_norm"], encode(started(task)["segmenter"], token_ids)[-1])
    mage = jit(lambda params, ids: net.apply({"params": params}, ids, jnp.zeros(ids.shape, bool), method="encode"))
    np.testing.assert_allclose(found.reshape(2, 16, 16), mage(weights, token_ids.reshape(2, 16))[:, 1:], atol=1e-5)


def test_the_detectors_encoder_is_mages_without_the_class_slot(predictor, run):
    """Where a window is as large as the image."""
    small = dict(model__net__encoder__image_size=16, model__net__encoder__window=4, model__net__encoder__input_norm=False)
    task, weights = make("detection", **small, model__encoder_weights=run), predictor[1]
    token_ids = np.random.default_rng(0).integers(0, PREDICTOR.num_codes, (2, 4, 4))
    encode = jit(lambda params, ids: task.net.apply({"params": params}, ids, method=lambda net, ids: net.encoder(ids)))
    found = encode(started(task)["detector"], token_ids)
    tokens = normed(weights["embed_norm"], weights["token_embed"][token_ids.reshape(2, 16)] + weights["pos_embed"][None, 1:])
    expected = jit(layers.Blocks(PREDICTOR.encoder, jnp.float32).apply)({"params": weights["encoder"]}, tokens)
    np.testing.assert_allclose(found.reshape(2, 16, 16), expected, atol=1e-5)


@pytest.mark.parametrize("name", ("detection", "segmentation"))
def test_dense_encoders_start_from_the_predictor(name, predictor, run):
    """At their own size of images; what the predictor lacks starts new."""
    task, weights = make(name, model__encoder_weights=run), predictor[1]
    loaded = task.load_pretrained()[NETWORKS[name]]["encoder"]
    np.testing.assert_array_equal(loaded["input_norm"]["scale"], weights["embed_norm"]["scale"])
    kernel = lambda tree: tree["block"]["attention"]["query"]["kernel"]
    np.testing.assert_array_equal(kernel(loaded["blocks"]), kernel(weights["encoder"]))
    assert len(loaded["pos_embed"]) == 1 + task.config.net.encoder.length
    started(task)


def test_gradients_reach_the_codes_that_are_seen(task):
    params, frozen, image = jit(task.init)(jax.random.key(0)), task.load_frozen(), pictures(task)
    params["classifier"]["dense_out"]["kernel"] = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    batch = {"image": image, "label": np.arange(3, dtype=np.int32)}
    loss = lambda params: task.loss(params, frozen, batch, jax.random.key(0), True)[0]
    gradient = jit(jax.grad(loss))(params)["classifier"]["encoder"]
    seen = np.unique(task.input(frozen, image / np.float32(255)))
    assert 0 < len(seen) < PREDICTOR.num_codes
    np.testing.assert_array_equal(np.flatnonzero(np.abs(gradient["token_embed"]).sum(-1)), seen)
    assert np.abs(gradient["class_token"]).max() > 0 and "tokenizer" not in params


def test_images_are_mixed_before_they_become_tokens(task, monkeypatch):
    params, frozen, image = jit(task.init)(jax.random.key(0)), task.load_frozen(), pictures(task)
    params["classifier"]["dense_out"]["kernel"] = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    batch = {"image": image, "label": np.zeros(3, np.int32)}
    loss = lambda batch: jit(lambda batch: task.loss(params, frozen, batch, jax.random.key(0), True)[0])(batch)
    before, black = loss(batch), loss(batch | {"image": np.zeros_like(image)})
    target = jnp.eye(8)[batch["label"]] * 0.9 + 0.1 / 8  # smoothed as the demo's
    monkeypatch.setattr(mixup, "mix", lambda key, image, label, **kwargs: (jnp.zeros_like(image), target))
    np.testing.assert_allclose(loss(batch), black, rtol=1e-6)
    assert abs(before - black) > 1e-3


def test_tokens_do_not_depend_on_what_lies_beyond_the_picture():
    task = make("segmentation")
    frozen, image, size = task.load_frozen(), pictures(task) / np.float32(255), np.full((3, 2), 20, np.int32)
    other = image.copy()
    other[:, 20:] = other[:, :, 20:] = 0
    tokens = jit(task.input)
    np.testing.assert_array_equal(tokens(frozen, image, size), tokens(frozen, other, size))
    assert tokens(frozen, image, size).shape == (3, 8, 8)
    assert not np.array_equal(tokens(frozen, image), tokens(frozen, other))


def test_what_reads_something_else_is_refused(predictor, task, run, tmp_path):
    """In both directions; and a predictor of another tokenizer's tokens."""
    addp = tmp_path / "addp"
    checkpoint.save_params(str(addp), {"pixel_to_token": {"encoder": {"patch_embed": np.zeros(2, np.float32)}}}, {})
    with pytest.raises(errors.UserError, match=f"{FIELD}: .*addp holds pixel_to_token, whose encoder reads pixels, not tokens; .*predictor"):
        make("classification", model__encoder_weights=str(addp)).load_pretrained()
    with pytest.raises(errors.UserError, match=f"{FIELD}: .* holds token_predictor, whose encoder reads tokens, not pixels; .*demo_addp"):
        make("detection", model__input="pixels", model__encoder_weights=run).load_pretrained()
    tuned = tmp_path / "tuned"
    checkpoint.save_params(str(tuned), jax.tree.map(np.asarray, jit(task.init)(jax.random.key(0))), {})
    with pytest.raises(errors.UserError, match="holds classifier, whose encoder reads tokens, not pixels"):
        make("segmentation", model__input="pixels", model__encoder_weights=str(tuned)).load_pretrained()
    assert "token_embed" in make("segmentation", model__encoder_weights=str(tuned)).load_pretrained()["segmenter"]["encoder"]
    other = save(tmp_path / "other", predictor[1], "0" * 16)
    with pytest.raises(errors.UserError, match=f"{FIELD} .*trained with another tokenizer"):
        make("classification", model__encoder_weights=other).load_pretrained()


@pytest.mark.parametrize("encoder", [None, "torn", {"other": 1}])
def test_a_record_without_the_encoders_settings_refuses_nothing(encoder, task, tmp_path):
    params, identity = jax.tree.map(np.asarray, jit(task.init)(jax.random.key(0))), {"model": {"net": {"encoder": encoder}}}
    checkpoint.save_params(str(tmp_path / "tuned"), params, identity)
    make("segmentation", model__encoder_weights=str(tmp_path / "tuned")).load_pretrained()


def test_another_number_of_heads_is_refused(task, tmp_path):
    params = jax.tree.map(np.asarray, jit(task.init)(jax.random.key(0)))
    checkpoint.save_params(str(tmp_path / "tuned"), params, {"model": {"net": {"encoder": {"heads": 3}}}})
    with pytest.raises(errors.UserError, match=f"{FIELD} .*trained with other settings \\(heads was 3, is "):
        make("segmentation", model__encoder_weights=str(tmp_path / "tuned")).load_pretrained()


def test_a_weight_file_of_mage(tmp_path):
    """Its vocabulary has the released rows: 1024 codes, and the class slot at 1100."""
    small = {"width": 16, "depth": 2, "heads": 2}
    net = schema.build(token_predictor.Config, {"encoder": small, "decoder": small | {"depth": 1}, "length": 16})
    init = functools.partial(token_predictor.init, token_predictor.TokenPredictor(net))
    params = jax.tree.map(np.asarray, jit(init)(jax.random.key(0)))
    path = str(tmp_path / "mage.safetensors")
    weight_files.write(path, layouts.arrange("mage", {"token_predictor": params}), "model")
    loaded = make("classification", model__tokenizer__num_codes=1024, model__encoder_weights=path).load_pretrained()
    encoder = loaded["classifier"]["encoder"]
    np.testing.assert_array_equal(encoder["token_embed"], params["token_embed"][:1024])
    np.testing.assert_array_equal(encoder["class_token"], params["token_embed"][1100])
    with pytest.raises(errors.UserError, match=f"{FIELD}: .*mage.safetensors holds token_predictor, whose encoder reads tokens"):
        make("classification", model__input="pixels", model__encoder_weights=path).load_pretrained()


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(model__net__encoder__patch_size=8), "config.model.net.encoder.patch_size: 8, .*token of 4 pixels"),
        (dict(model__tokenizer_weights=""), "config.model.tokenizer_weights is empty"),
        (dict(model__input="codes"), "config.model.input: 'codes'; use pixels or tokens"),
    ],
)
def test_mistakes_are_named(changes, said):
    with pytest.raises(errors.UserError, match=said):
        make("classification", **changes).load_frozen()


def test_pixels_need_no_tokenizer():
    task = make("classification", model__input="pixels", model__tokenizer_weights="nowhere")
    assert task.load_frozen() == {} and "patch_embed" in jax.eval_shape(task.init, jax.random.key(0))["classifier"]["encoder"]


@pytest.mark.medium
@pytest.mark.parametrize("name", DEMOS)
def test_a_whole_run(name, tmp_path):
    """Trained and evaluated on eight devices, then used from Python; other inputs and other codes' layouts are refused."""
    config = settings(name, eval_batches=1, **{"model__score_above": 0.0} if name == "detection" else {})
    loop.train(config, str(tmp_path / "run"))
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert '"train/loss"' in log and '"eval/' in log
    params, _ = checkpoint.load_params(str(tmp_path / "run"), ema=False)
    assert params.keys() == {NETWORKS[name]} and "token_embed" in params[NETWORKS[name]]["encoder"]
    model, photo = addp_jax.load(tmp_path / "run"), np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    if name == "classification":
        assert model.classify([photo])[0]
    elif name == "detection":
        assert model.detect([photo])[0].masks.shape[1:] == (40, 50)
    else:
        assert model.segment([photo])[0].shape == (40, 50)
    with pytest.raises(errors.UserError, match="parameters do not fit: .*patch_embed.* is missing"):
        program.create(settings(name, model__input="pixels")).read(str(tmp_path / "run"))
    layout = {"classification": "finetune", "detection": "detectron2", "segmentation": "mmsegmentation"}[name]
    with pytest.raises(errors.UserError, match="patch_embed" if name == "classification" else "reads tokens") as caught:
        convert.export_weights(str(tmp_path / "run"), [], str(tmp_path / "out.safetensors"), layout, True, False)
    assert "\n" not in str(caught.value)
