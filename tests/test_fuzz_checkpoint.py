"""Damaged checkpoints, from seeds: the right parameters, an older step, or one line; never anything else."""

import random
import shutil

import numpy as np
import pytest

from addp_jax import errors, parameters
from addp_jax.weights import checkpoint, provenance

MUTANTS = 60


def damage(data: bytes, chance: random.Random) -> bytes:
    place, other = sorted((chance.randrange(len(data) + 1), chance.randrange(len(data) + 1)))
    flipped = bytearray(data)
    if data:
        flipped[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    zeros = data[:place] + bytes(other - place) + data[other:]
    return chance.choice([data[:place], bytes(flipped), bytes(len(data)), data + b"\0", zeros, data[:place] + data[other:], b"[" * 100_000])


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sound")
    with_two = checkpoint.Checkpointer(workdir, checkpoint.Config(), {"seed": 3})
    for step in (4, 6):
        with_two.save(step, {"params": {"a": np.arange(600, dtype=np.float32).reshape(20, 30) + step}})
    with_two.close()
    hashes = {step: parameters.content_hash(checkpoint.load_params(workdir / f"checkpoints/{step}", ema=False)[0]) for step in (4, 6)}
    return workdir, hashes


def test_no_damage_is_read_silently(sound, tmp_path, capsys):
    workdir, hashes = sound
    chance, steps = random.Random(0), set()
    names = sorted(path.relative_to(workdir) for path in (workdir / "checkpoints/6").rglob("*") if path.is_file())
    names.append(names[0].parents[1] / provenance.NAME)
    for number in range(MUTANTS):
        copy = tmp_path / str(number)
        shutil.copytree(workdir, copy)
        name = chance.choice(names)
        data = (copy / name).read_bytes()
        (copy / name).write_bytes(damage(data, chance))
        try:
            params, info = checkpoint.load_params(copy, ema=False)
        except errors.UserError as error:
            assert str(copy) in str(error) and "\n" not in str(error)
            continue
        assert parameters.content_hash(params) == hashes[info["step"]] and info["identity"] == {"seed": 3}, name
        steps.add(info["step"])
    assert steps == {4, 6}
    assert "Traceback" not in capsys.readouterr().err
