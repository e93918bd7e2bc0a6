"""Stage 3: which of the paper's choices its fields replace, and what its evaluation says of the encoder."""

import jax
import numpy as np
import programs

from addp_jax import diffusion, partition, program

RANDOM = {"model__tokenizer_weights": "random", "model__predictor_weights": "random"}
IMAGES = {"image": np.zeros((4, 16, 16, 3), np.uint8)}


def test_the_papers_choices_are_the_default_and_can_be_replaced(monkeypatch):
    """What the corruption and the decoder are given, of the tiny config; traced, not run."""
    corrupt, seen = diffusion.corrupt, []

    def spy(*args):
        seen.append(args[-2:])
        return corrupt(*args)

    monkeypatch.setattr(diffusion, "corrupt", spy)
    others = {"model__mapping": "drawn", "model__target": "tokens", "model__known_tokens": False}
    for changes in ({}, others):
        run = program.create_training(programs.config("demo_addp", **RANDOM, **changes), 64, partition.make_mesh(partition.Config()))
        task = run.task
        networks = jax.eval_shape(task.init, jax.random.key(0)), task.load_frozen()
        jax.eval_shape(lambda params, frozen, task=task: task.loss(params, frozen, IMAGES, jax.random.key(0), True), *networks)
        seen[-1] += task.capacity > 0, task.nets(*networks).mapping
    assert seen == [("expected", "teacher", True, "expected"), ("drawn", "tokens", False, "drawn")]


def test_an_evaluation_tells_the_least_loss_and_that_without_the_encoder():
    run = program.create_training(programs.config("demo_addp", **RANDOM), 64, partition.make_mesh(partition.Config()))
    task, frozen, found = run.task, run.task.load_frozen(), []
    params = task.init(jax.random.key(0))
    for scale in (1.0, 2.0):
        net = params["pixel_to_token"]
        changed = {"pixel_to_token": net | {"encoder": jax.tree.map(lambda array: scale * array, net["encoder"])}}
        figures, _ = task._values(changed, frozen, IMAGES, jax.random.key(1))
        found.append(jax.tree.map(np.asarray, figures))
    assert (found[0]["loss_floor"] < found[0]["loss"]).all() and (found[0]["loss_floor"] < found[0]["loss_blind"]).all()
    for name, same in {"loss_floor": True, "loss_blind": True, "loss": False}.items():
        assert np.array_equal(found[0][name], found[1][name]) == same, name
