"""Distances between the evaluation split and a model's own images."""

import dataclasses
import json

import jax
import numpy as np
import programs
import pytest

from addp_jax import errors
from addp_jax.data import part, pipeline
from addp_jax.metrics import generation
from addp_jax.models import convnet
from addp_jax.ops import images
from addp_jax.program import Evaluation, create_training
from addp_jax.training import evaluate, loop
from addp_jax.weights import checkpoint

pytestmark = pytest.mark.medium

NET = dict(image_size=16, patch_size=2, channels=8, multipliers=(1, 2), num_groups=4, num_classes=8)
SAME = 1e-4  # relative; float32 features of the same images in other batches
PREDICTOR = {"model__tokenizer_weights": "random", "model__sampler__steps": 2}
TOKENIZER = {"model__discriminator_weight": 0.0}  # compiles in a fraction of the time


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A work directory of the task convnet, untrained."""
    path = tmp_path_factory.mktemp("convnet")
    params = {"convnet": convnet.init(convnet.ConvNet(convnet.Config(**NET)), jax.random.key(0))}
    checkpoint.save_params(path, params, {"model": {"net": NET}})
    return str(path)


def build(name, mesh, **changes):
    """(program, parameters, frozen) of a tiny config."""
    changes |= {"demo_tokenizer": TOKENIZER, "demo_predictor": PREDICTOR}.get(name, {})
    program = create_training(programs.config(name, **changes), num_train=64, mesh=mesh)
    return program, program.init(jax.random.key(0)).params, program.task.load_frozen()


def test_nothing_is_compared_unless_asked_for(mesh):
    program, params, frozen = build("demo_tokenizer", mesh)
    assert evaluate.distances(program, params, frozen) == ({}, {})


def test_a_tokenizers_distance_is_that_of_its_reconstructions(mesh, judge):
    program, params, frozen = build("demo_tokenizer", mesh, evaluate__features=judge, evaluate__num_images=11)
    measures, provenance = evaluate.distances(program, params, frozen)
    assert set(measures) == {"rfrechet_11"} and provenance["features"]["network"] == "convnet"
    source = part.Part(pipeline.open_source(program.config.data, "eval", 16), 11)
    transform = program.task.transform("eval", program.config.data)
    real = np.stack([transform(source[i], None)["image"] for i in range(11)])
    made = images.to_uint8(program.task.reconstruct(params, frozen, real / np.float32(255)))
    net = evaluate.feature_net(judge, "", mesh)
    gaussians = []
    for some in (real, np.asarray(made)):
        moments = generation.Moments(16)
        moments.add(net(some)["pool"])
        gaussians.append(moments.gaussian())
    np.testing.assert_allclose(measures["rfrechet_11"], generation.frechet_distance(*gaussians), rtol=SAME)


def test_a_generators_samples_are_compared_and_do_not_depend_on_batches(mesh, judge):
    found = []
    for batch_size in (4, 16):
        changes = dict(evaluate__features=judge, evaluate__num_images=13, evaluate__batch_size=batch_size)
        found.append(evaluate.distances(*build("demo_predictor", mesh, **changes)))
    (one, about_one), (other, about_other) = found
    measures = {"frechet", "class_score", "class_score_std", "kernel", "kernel_std", "precision", "recall", "density", "coverage"}
    assert set(one) == {f"{name}_13" for name in measures}
    assert about_one["real"] == about_other["real"] != about_one["samples"]
    # Another batch size may flip a token where two are level within float noise.
    assert abs(one["frechet_13"] - other["frechet_13"]) < 0.1 * one["frechet_13"]


def test_the_mode_prints_measures_and_where_they_come_from(mesh, judge, tmp_path, capsys):
    program, params, _ = build("demo_tokenizer", mesh, evaluate__features=judge)
    checkpoint.save_params(tmp_path, params, {})
    evaluate.evaluate(program, str(tmp_path))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"psnr", "ssim", "codebook_usage", "rfrechet_16", "protocol", "seed", "features"} <= set(result)
    assert result["real"]["images"] == 16 and len(result["samples"]["hash"]) == 16


def test_evaluation_in_the_loop_holds_the_distances(mesh, judge):
    program, params, frozen = build("demo_tokenizer", mesh, evaluate__features=judge)
    state = program.init(jax.random.key(0))
    scalars, images = evaluate.run(program, state, frozen)
    assert "rfrechet_16" in scalars and "part/psnr" in scalars and (scalars["images"], scalars["of"]) == (8, 16) and "reconstructions" in images


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("demo_tokenizer", {"evaluate__num_images": 17}, "config.evaluate.num_images: 17, but the evaluation split has 16"),
        ("demo_judge", {}, "config.evaluate.features: this task makes no images"),
        ("demo_tokenizer", {"evaluate__features": "nowhere"}, "nowhere"),
        ("demo_tokenizer", {"evaluate__features": "inception"}, "config.evaluate.inception_weights is empty"),
    ],
)
def test_mistakes_are_told_before_the_first_step(judge, tmp_path, name, changes, message):
    config = programs.config(name, **{"evaluate__features": judge} | changes)
    with pytest.raises(errors.UserError, match=message):
        loop.train(config, str(tmp_path))
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("changes", ({"num_images": 1}, {"batch_size": 0}))
def test_numbers_out_of_range_name_their_field(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        dataclasses.replace(Evaluation(), **changes)
