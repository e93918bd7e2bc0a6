"""Import and export as a user runs them: a freshly trained run becomes a file with the same numbers, and back."""

import contextlib
import functools
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
import released
import test_main
from safetensors import numpy as safetensors_numpy

from addp_jax import errors, parameters, partition, weights
from addp_jax.codecs import vqgan
from addp_jax.models import token_predictor
from addp_jax.program import create_training
from addp_jax.training import loop
from addp_jax.weights import checkpoint, convert, layouts

pytestmark = pytest.mark.medium

ROUND_TRIP = 1e-4  # largest deviation over largest magnitude, of logits and of input gradients
MASKED = 9  # of the tiny image's 16 tokens
HEADS = (2, 2)
FROZEN = ("tokenizer", "token_predictor")


def program(root, **changes):
    """The tiny ADDP config on two devices, parameters split over them, with frozen networks from `root`."""
    paths = {f"model__{field}_weights": str(root / name) for field, name in zip(("tokenizer", "predictor"), FROZEN)}
    config = programs.config("demo_addp", **paths | dict(optim__ema_decay=0.5) | changes)
    return create_training(config, num_train=8, mesh=partition.make_mesh(partition.Config(data=1, fsdp=2), jax.devices()[:2]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders `tokenizer` and `token_predictor`, random, and `addp`, trained with them for two steps."""
    root = tmp_path_factory.mktemp("runs")
    run = program(root)
    for module, net, name in ((vqgan, run.task.tokenizer, "tokenizer"), (token_predictor, run.task.predictor, "token_predictor")):
        params = jax.jit(functools.partial(module.init, net))(jax.random.key(7))
        checkpoint.save_params(root / name, {name: jax.tree.map(np.asarray, params)}, {})
    with jax.set_mesh(run.mesh):
        frozen, state = run.task.load_frozen(), run.init(jax.random.key(0))
        with contextlib.closing(checkpoint.Checkpointer(root / "addp", run.config.checkpoint, loop.identity(run, frozen, {}))) as saver:
            for seed in range(2):
                batch = {"image": np.random.default_rng(seed).integers(0, 256, (8, 16, 16, 3), np.uint8)}
                state, _ = run.step(state, frozen, batch)
            saver.save(2, state)
    return root


def load(root, ema=True):
    return checkpoint.load_params(root / "addp", ema=ema)[0]


def export(root, output, layout="addp", paths=FROZEN, workdir="addp", ema=True, force=False):
    convert.export_weights(str(root / workdir), [str(root / path) for path in paths], str(output), layout, ema, force)


@pytest.fixture(scope="module")
def exported(runs):
    """The run as one safetensors file."""
    export(runs, runs / "addp.safetensors")
    return runs / "addp.safetensors"


def assert_same(one, other):
    one, other = parameters.named_leaves(one), parameters.named_leaves(other)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def assert_close(ours, theirs):
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape and np.isfinite(theirs).all()
    assert np.abs(ours - theirs).max() <= ROUND_TRIP * np.abs(theirs).max()


def assert_twins_agree(ours, theirs, image, out_shape):
    """Outputs and input gradients of two functions of `image`, ours in JAX, theirs in PyTorch."""
    import twin

    weights_out = np.random.default_rng(1).normal(size=out_shape).astype(np.float32)

    @jax.jit
    def both(image):
        out, pull_back = jax.vjp(ours, image)
        return out, pull_back(weights_out)[0]

    expected = twin.outputs_and_gradient(theirs, image, weights_out)
    for one, other in zip(both(image), expected, strict=True):
        assert_close(one, other)


def images():
    return np.random.default_rng(0).uniform(0.01, 0.99, (2, 16, 16, 3)).astype(np.float32)


# --- the same numbers in PyTorch -------------------------------------------------------------------


def test_an_exported_run_gives_the_same_logits_and_gradients_in_pytorch(torch, runs, tmp_path):
    import twin

    export(runs, tmp_path / "a.pth")
    state = torch.load(tmp_path / "a.pth", weights_only=True)["model"]
    task, rng = program(runs).task, np.random.default_rng(2)
    mask = rng.permuted(np.arange(32).reshape(2, 16) % 16 < MASKED, axis=1)
    ids = rng.integers(0, task.config.net.num_codes, (2, 16)).astype(np.int32)
    params = {"params": jax.tree.map(jnp.asarray, load(runs)["pixel_to_token"])}
    assert_twins_agree(
        lambda image: task.net.apply(params, image, ids, mask, 16 - MASKED),
        lambda image: twin.addp(state, image, torch.from_numpy(ids), torch.from_numpy(mask), HEADS),
        images(), (2, 16, task.config.net.vocab_size),
    )  # fmt: skip


def test_an_exported_encoder_gives_the_same_features_and_gradients_in_pytorch(torch, runs, tmp_path):
    import twin

    export(runs, tmp_path / "a.pth", "timm", paths=())
    state = torch.load(tmp_path / "a.pth", weights_only=True)
    net, params = program(runs).task.net, {"params": load(runs)["pixel_to_token"]}
    assert_twins_agree(
        lambda image: net.apply(params, image, method="encode"),
        lambda image: twin.encoder(state, (image - twin.MEAN) / twin.STD, HEADS[0], "norm_pre"),
        images(), (2, 17, 16),
    )  # fmt: skip


def test_an_exported_classifier_gives_the_same_logits_and_gradients_in_pytorch(torch, tmp_path):
    import twin

    task = create_training(programs.config("in1k:b"), num_train=8).task
    params = jax.tree.map(np.array, jax.jit(task.init)(jax.random.key(3)))
    params["classifier"]["dense_out"]["kernel"] *= 1e4  # it starts near 0
    checkpoint.save_params(tmp_path / "run", params, {})
    convert.export_weights(str(tmp_path / "run"), [], str(tmp_path / "a.pth"), "finetune", True, False)
    state = torch.load(tmp_path / "a.pth", weights_only=True)["model"]
    assert_twins_agree(
        lambda image: task.net.apply({"params": jax.tree.map(jnp.asarray, params["classifier"])}, image),
        lambda image: twin.classifier(state, (image - twin.MEAN) / twin.STD, HEADS[0]),
        images(), (2, task.num_classes),
    )  # fmt: skip
    convert.import_weights([str(tmp_path / "a.pth")], str(tmp_path / "again"))
    assert_same(checkpoint.load_params(tmp_path / "again", ema=True)[0], params)


@pytest.mark.parametrize("layout", ["addp", "mage", "vqgan", "timm"])
def test_both_kinds_of_file_hold_the_same(torch, runs, tmp_path, layout):
    workdir = {"mage": "token_predictor", "vqgan": "tokenizer"}.get(layout, "addp")
    for extension in ("pth", "safetensors"):
        export(runs, tmp_path / f"a.{extension}", layout, workdir=workdir)
    written = safetensors_numpy.load_file(tmp_path / "a.safetensors")
    state = torch.load(tmp_path / "a.pth", weights_only=True)
    state = state[layouts.WRITABLE[layout].wrapper] if layouts.WRITABLE[layout].wrapper else state
    assert_same({name: tensor.numpy() for name, tensor in state.items()}, written)
    assert {"addp": "vqgan.encoder.conv_in.weight", "mage": "cls_token"}.get(layout, next(iter(state))) in state


# --- there and back --------------------------------------------------------------------------------


def test_an_exported_file_imports_as_what_was_exported(runs, exported, tmp_path):
    convert.import_weights([str(exported)], str(tmp_path))
    found, info = checkpoint.load_params(tmp_path, ema=True)
    expected = {name: weights.read(str(runs / name))[name] for name in FROZEN} | {"pixel_to_token": load(runs)["pixel_to_token"]}
    assert_same(found, expected)
    hashes = {name: parameters.content_hash(params) for name, params in expected.items()}
    assert info["identity"] == {"imported": ["addp.safetensors"], "networks": hashes}


def test_averaged_or_raw_parameters_are_exported(runs, tmp_path):
    for ema in (True, False):
        export(runs, tmp_path / "a.safetensors", "timm", ema=ema, force=True)
        bias = safetensors_numpy.load_file(tmp_path / "a.safetensors")["norm.bias"]
        np.testing.assert_array_equal(bias, load(runs, ema)["pixel_to_token"]["encoder"]["final_norm"]["bias"])
    assert (load(runs, True)["pixel_to_token"]["mask_token"] != load(runs, False)["pixel_to_token"]["mask_token"]).any()


def test_several_files_make_one_checkpoint_and_the_first_counts(tmp_path):
    state = {"vqgan": released.part("vqgan."), "mage": released.part("token_predictor.")}
    other = {f"vqgan.{name}": array + 1 for name, array in state["vqgan"].items()}
    safetensors_numpy.save_file(state["vqgan"], tmp_path / "vqgan.safetensors")
    safetensors_numpy.save_file(state["mage"] | other, tmp_path / "mage.safetensors")
    convert.import_weights([str(tmp_path / f"{name}.safetensors") for name in state], str(tmp_path / "run"))
    found = checkpoint.load_params(tmp_path / "run", ema=True)[0]
    assert_same(found, {"tokenizer": released.tokenizer_params(), "token_predictor": released.predictor_params()})


def test_imported_networks_are_loaded_for_evaluation_and_sampling_like_trained_ones(runs, exported, tmp_path):
    """One imported folder serves as the run and as both frozen networks."""
    convert.import_weights([str(exported)], str(tmp_path))
    paths = dict(model__tokenizer_weights=str(tmp_path), model__predictor_weights=str(tmp_path))
    with jax.set_mesh(program(runs).mesh):
        imported = program(runs, **paths).load(str(tmp_path))[0]
        trained = program(runs).load(str(runs / "addp"))[0]
    assert_same(imported[0], trained[0])


def test_frozen_weights_come_from_a_file_as_from_a_run(runs, exported):
    task = program(runs, model__tokenizer_weights=str(exported), model__predictor_weights=str(exported)).task
    assert_same(task.load_frozen(), program(runs).task.load_frozen())


@pytest.mark.parametrize("field, name", [("tokenizer", "tokenizer"), ("predictor", "token_predictor")])
def test_a_file_without_the_network_names_the_field(runs, tmp_path, field, name):
    export(runs, tmp_path / "a.safetensors", *(("mage", ()) if field == "tokenizer" else ("vqgan", ())),
           workdir="token_predictor" if field == "tokenizer" else "tokenizer")  # fmt: skip
    task = program(runs, **{f"model__{field}_weights": str(tmp_path / "a.safetensors")}).task
    with pytest.raises(errors.UserError, match=f"^config.model.{field}_weights: .*a.safetensors holds .*not a {name}"):
        task.load_frozen()


def test_a_file_of_another_size_names_the_field(runs, tmp_path):
    safetensors_numpy.save_file(released.part("vqgan."), tmp_path / "a.safetensors")
    task = program(runs, model__tokenizer_weights=str(tmp_path / "a.safetensors")).task
    with pytest.raises(errors.UserError, match=r"^config.model.tokenizer_weights .*codebook is \[1024, 256\], expected \[32, 8\]"):
        task.load_frozen()


# --- what export refuses ---------------------------------------------------------------------------


def test_missing_networks_are_named(runs, tmp_path):
    with pytest.raises(errors.UserError, match="layout=addp: no token_predictor and no tokenizer in .*as weights=PATH"):
        export(runs, tmp_path / "a.safetensors", paths=())
    assert not list(tmp_path.iterdir())


def test_frozen_networks_must_be_those_of_the_training(runs, tmp_path):
    other = weights.read(str(runs / "tokenizer"))["tokenizer"]
    checkpoint.save_params(tmp_path / "other", {"tokenizer": other | {"codebook": other["codebook"] + 1}}, {})
    with pytest.raises(errors.UserError, match="was trained with another tokenizer than the one given"):
        export(runs, tmp_path / "a.safetensors", paths=(tmp_path / "other", "token_predictor"))


def test_an_existing_file_is_replaced_only_by_force(runs, tmp_path):
    output = tmp_path / "a.safetensors"
    output.write_text("mine")
    with pytest.raises(errors.UserError, match="; force replaces it"):
        export(runs, output, "timm")
    assert output.read_text() == "mine"
    export(runs, output, "timm", force=True)
    assert "norm_pre.weight" in safetensors_numpy.load_file(output)


def test_import_keeps_what_is_in_the_work_directory(runs, exported):
    before = sorted(path.stat().st_mtime_ns for path in (runs / "addp").rglob("*"))
    with pytest.raises(errors.UserError, match="already holds checkpoints"):
        convert.import_weights([str(exported)], str(runs / "addp"))
    assert sorted(path.stat().st_mtime_ns for path in (runs / "addp").rglob("*")) == before


def test_import_to_a_full_disk_leaves_no_checkpoint(exported, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(errors.UserError, match="checkpoint 0"):
            convert.import_weights([str(exported)], str(tmp_path / "run"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# --- config.init -----------------------------------------------------------------------------------


def test_the_first_state_and_its_average_are_the_given_weights(runs, exported):
    run = program(runs)
    given = weights.fit(weights.read(str(exported)), run.state.params, "here")
    with jax.set_mesh(run.mesh):
        state = run.init(jax.random.key(0), given)
    for params in (state.params, state.ema_params):
        assert_same(params, load(runs))
        assert jax.tree.map(lambda leaf: leaf.sharding, params) == jax.tree.map(lambda leaf: leaf.sharding, run.state.params)


def test_a_run_starts_from_the_weights_it_is_given(tmp_path):
    """At the smallest learning rate it also ends with them. Other weights make it another run, wherever they are."""
    still = functools.partial(programs.config, "demo_judge", steps=1, eval_batches=1, optim__warmup_steps=0, optim__base_lr=1e-30)
    given, moved, ended = (str(tmp_path / name) for name in ("given", "moved", "ended"))
    run = create_training(still(), num_train=8)
    with jax.set_mesh(run.mesh):
        params = jax.tree.map(np.asarray, run.init(jax.random.key(5)).params)
    checkpoint.save_params(given, params, {})
    loop.train(still(init=given), ended)
    for one, other in zip(jax.tree.leaves(checkpoint.load_params(ended, ema=True)[0]), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-20, rtol=0)
    shutil.move(given, moved)
    loop.train(still(init=moved), ended)
    with pytest.raises(errors.UserError, match="init.* is 'absent'.*use another workdir"):
        loop.train(still(), ended)
    with pytest.raises(errors.UserError, match="^config.init: nothing at /nowhere"):
        loop.train(still(init="/nowhere"), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_another_network_to_start_from_is_refused(runs):
    with pytest.raises(errors.UserError, match="here: parameters do not fit: pixel_to_token/.* is missing"):
        weights.fit(weights.read(str(runs / "tokenizer")), program(runs).state.params, "here")


def test_only_an_discriminator_may_be_missing(runs):
    tree = weights.read(str(runs / "tokenizer"))
    assert_same(weights.fit(tree, tree | {"discriminator": {"kernel": np.zeros(2)}}, "here"), tree)
    with pytest.raises(errors.UserError, match="here: parameters do not fit: other/kernel"):
        weights.fit(tree, tree | {"other": {"kernel": np.zeros(2)}}, "here")


# --- the command line ------------------------------------------------------------------------------


def test_the_commands(runs, exported, tmp_path):
    output = tmp_path / "again.safetensors"
    status, _, problems = test_main.call("--mode=import", f"--weights={exported}", f"--workdir={tmp_path / 'run'}")
    assert status == 0, problems
    status, out, problems = test_main.call("--mode=export", f"--workdir={tmp_path / 'run'}", f"--output={output}", "--layout=addp")
    assert status == 0 and "writing" in out, problems
    assert output.read_bytes() == exported.read_bytes()


@pytest.mark.parametrize("arguments, missing", [
    (("--mode=import", "--workdir=x"), "--weights"),
    (("--mode=export", "--workdir=x", "--layout=addp"), "--output"),
    (("--mode=export", "--workdir=nowhere", "--layout=addp", "--output=a.safetensors"), "nowhere"),
])  # fmt: skip
def test_missing_flags_and_folders_are_named(arguments, missing):
    test_main.assert_refused(*arguments, names=(missing,))


def test_a_hostile_file_is_one_line_and_exit_status_2(torch, tmp_path):
    import pathlib

    torch.save({"model": {"a": torch.ones(2), "x": pathlib.PurePosixPath("x")}}, tmp_path / "a.pth")
    test_main.assert_refused(
        "--mode=import", f"--weights={tmp_path / 'a.pth'}", f"--workdir={tmp_path / 'run'}", names=("pathlib.PurePosixPath", "a.pth")
    )
    assert not (tmp_path / "run").exists()
