"""Damaged weight files: each is refused in one line that names it, or read as finite numbers."""

import functools
import io

import numpy as np
import pytest
from flax import serialization
from safetensors import numpy as safetensors_numpy

from addp_jax import errors
from addp_jax.weights import weight_files

STATE = {f"layer.{i}.weight": np.random.default_rng(i).normal(size=(3, i + 2)).astype(np.float32) for i in range(4)}
KINDS = {"safetensors": "a.safetensors", "zip": "a.pth", "older": "b.pth", "msgpack": "a.msgpack"}


@functools.cache
def sound(kind: str) -> bytes:
    if kind == "safetensors":
        return safetensors_numpy.save(STATE)
    if kind == "msgpack":
        return serialization.msgpack_serialize({"params": STATE})
    import torch

    buffer = io.BytesIO()
    state = {name: torch.from_numpy(array) for name, array in STATE.items()}
    torch.save({"model": state, "epoch": 3}, buffer, _use_new_zipfile_serialization=kind == "zip")
    return buffer.getvalue()


def mutant(data: bytes, rng) -> bytes:
    """One seeded damage."""
    changed, at, length = bytearray(data), int(rng.integers(len(data))), int(rng.integers(1, 40))
    match int(rng.integers(7)):
        case 0:
            return data[: 2 ** int(rng.integers(len(data).bit_length()))]
        case 1:
            for place in rng.integers(len(data), size=int(rng.integers(1, 4))):
                changed[place] ^= 1 << int(rng.integers(8))
        case 2:
            changed[at : at + length] = bytes([int(rng.choice([0, 255, 127]))]) * len(changed[at : at + length])
        case 3:
            changed[at : at + length] = rng.bytes(len(changed[at : at + length]))
        case 4:
            other = int(rng.integers(len(data)))
            changed[at : at + 8], changed[other : other + 8] = changed[other : other + 8], changed[at : at + 8]
        case 5:
            return data + rng.bytes(length)
        case 6:
            return data[:at] + data[at : at + length] + data[at:]
    return bytes(changed)


def try_mutants(tmp_path, kind: str, seeds) -> None:
    path = tmp_path / KINDS[kind]
    for seed in seeds:
        path.write_bytes(mutant(sound(kind), np.random.default_rng(seed)))
        try:
            found = {name: np.asarray(tensor) for name, tensor in weight_files.read(str(path)).items()}
        except errors.UserError as error:
            text = str(error)
            assert str(path) in text and text.isprintable() and len(text) < 500, (seed, text)
            continue
        assert all(np.isfinite(array).all() for array in found.values()), seed
        if kind == "zip":
            assert found.keys() == STATE.keys(), seed
            for name, array in STATE.items():
                np.testing.assert_array_equal(found[name], array, err_msg=str(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_refused_or_read_as_finite_numbers(request, tmp_path, kind):
    if kind in ("zip", "older"):
        request.getfixturevalue("torch")
    try_mutants(tmp_path, kind, range(150))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_more_damaged_files(request, tmp_path, kind):
    if kind in ("zip", "older"):
        request.getfixturevalue("torch")
    try_mutants(tmp_path, kind, range(1000, 6000))
