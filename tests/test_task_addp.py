"""Stage 3: which of the paper's choices its fields replace."""

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
