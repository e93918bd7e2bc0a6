"""From the user's fields to frozen dataclasses; every mistake names the field as the user types it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from ml_collections import ConfigDict

from addp_jax import errors, schema


@schema.config
class Inner:
    path: str
    betas: tuple[float, ...] = (0.9, 0.95)
    sizes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Outer:
    data: Inner
    steps: int
    lr: float = 1e-4
    flip: bool = True
    limit: int | None = None
    model: Any = None


GOOD = {"data": {"path": "x"}, "steps": 3}


def build(**changes):
    return schema.build(Outer, GOOD | changes)


def message(**changes) -> str:
    with pytest.raises(errors.UserError) as caught:
        build(**changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nested_fields_become_nested_dataclasses():
    assert build(data={"path": "x", "sizes": (1, 2)}) == Outer(Inner("x", sizes=(1, 2)), 3)


def test_a_config_dict_builds_what_its_plain_dict_builds():
    fields = ConfigDict(GOOD | {"data": {"path": "x", "betas": (0.5, 0.6)}})
    assert schema.build(Outer, fields.to_dict()) == build(data={"path": "x", "betas": (0.5, 0.6)})


def test_a_ready_made_dataclass_is_taken_as_it_is():
    inner = Inner("y")
    assert build(data=inner).data is inner


def test_any_takes_anything_unchanged():
    model = {"width": [1, "a"]}
    assert build(model=model).model is model


def test_an_optional_field_takes_none_and_its_type_only():
    assert build(limit=None).limit is None and build(limit=5).limit == 5
    assert message(limit="5") == "config.limit: expected int, got '5'"


def test_an_integer_becomes_a_float_where_a_float_is_wanted():
    built = build(lr=1, data={"path": "x", "betas": (0, 1)})
    assert type(built.lr) is float and [type(beta) for beta in built.data.betas] == [float, float]


def test_unknown_fields_are_named_with_the_closest_known_one():
    assert message(stepz=1) == "config.stepz: no such field; did you mean config.steps?"
    assert message(data={"path": "x", "beta": ()}) == "config.data.beta: no such field; did you mean config.data.betas?"


def test_unknown_fields_that_resemble_nothing_list_the_known_ones():
    assert message(data={"path": "x", "qqq": 1}).endswith("config.data.qqq: no such field; the fields are path, betas, sizes")


def test_missing_fields_are_named():
    assert message(data={}) == "config.data.path: this field has no value"
    with pytest.raises(errors.UserError, match="config.model.data: this field has no value"):
        schema.build(Outer, {"steps": 1}, "config.model")


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"steps": 1.0}, "config.steps: expected int, got 1.0"),
        ({"steps": "1"}, "config.steps: expected int, got '1'"),
        ({"steps": None}, "config.steps: expected int, got None"),
        ({"steps": True}, "config.steps: expected int, got True"),
        ({"lr": True}, "config.lr: expected float, got True"),
        ({"flip": 1}, "config.flip: expected bool, got 1"),
        ({"data": {"path": 7}}, "config.data.path: expected str, got 7"),
        ({"data": {"path": "x", "betas": (0.9, "b")}}, "config.data.betas[1]: expected float, got 'b'"),
        ({"data": {"path": "x", "sizes": (1, 2.0)}}, "config.data.sizes[1]: expected int, got 2.0"),
    ],
)
def test_values_of_a_wrong_type_are_named(changes, expected):
    assert message(**changes) == expected


@pytest.mark.parametrize("changes", [{"data": 3}, {"data": None}, {"data": "x"}, {"data": {"path": "x", "sizes": 3}}])
def test_a_plain_value_in_place_of_a_group_or_tuple_is_named(changes):
    assert "config.data" in message(**changes)


def test_a_string_is_not_taken_for_a_tuple():
    assert message(data={"path": "x", "sizes": "12"}).startswith("config.data.sizes: expected")


@dataclasses.dataclass(frozen=True)
class Pair:
    betas: tuple[float, float]


@pytest.mark.parametrize("betas", [(), (0.9,), (0.9, 0.95, 0.99)])
def test_a_tuple_of_fixed_length_has_that_length(betas):
    assert schema.build(Pair, {"betas": (0.9, 1)}).betas == (0.9, 1.0)
    with pytest.raises(errors.UserError, match=r"config.betas: expected 2 values, got \("):
        schema.build(Pair, {"betas": betas})


@schema.config
class Ranged:
    share: float = schema.field(0.5, above=0, most=1)
    rate: float = schema.field(0.1, least=0, below=1, matters=schema.TRAINING)
    count: int = schema.field(1, least=1)
    betas: tuple[float, float] = schema.field((0.9, 0.99), least=0, below=1)
    place: str = schema.field("", matters=schema.NOTHING)
    seed: int = 0
    data_seed: int = 0
    inner: Inner = Inner("x")


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"share": 0.0}, "config.share: 0.0; use above 0 and at most 1"),
        ({"rate": 1.0}, "config.rate: 1.0; use at least 0 and below 1"),
        ({"count": 0}, "config.count: 0; use at least 1"),
        ({"betas": (0.9, 1.0)}, "config.betas: (0.9, 1.0); use at least 0 and below 1"),
        ({"rate": float("nan")}, "config.rate: nan; use a finite number"),
        ({"share": float("inf")}, "config.share: inf; use a finite number"),
        ({"seed": -1}, "config.seed: -1; use a whole number from 0 to 4294967295"),
        ({"data_seed": 2**32}, "config.data_seed: 4294967296; use a whole number from 0 to 4294967295"),
        ({"inner": {"path": "x", "betas": (float("-inf"),)}}, "config.inner.betas: (-inf,); use a finite number"),
    ],
)
def test_numbers_out_of_range_are_named(changes, expected):
    with pytest.raises(errors.UserError) as caught:
        schema.build(Ranged, changes)
    assert str(caught.value) == expected


def test_the_ends_of_a_range():
    built = schema.build(Ranged, {"share": 1.0, "rate": 0.0, "betas": (0, 0), "seed": 2**32 - 1})
    assert (built.share, built.rate, built.betas, built.seed) == (1.0, 0.0, (0.0, 0.0), 2**32 - 1)


def test_texts_that_begin_with_a_tilde_are_paths_in_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/house")
    assert build(data={"path": "~/pics"}).data.path == "/house/pics" and build(data={"path": "pics~"}).data.path == "pics~"


def test_identity_holds_what_matters_as_json_takes_it():
    ranged = Ranged(inner=Inner("y", sizes=(1, 2)))
    inner = {"path": "y", "betas": [0.9, 0.95], "sizes": [1, 2]}
    network = {"share": 0.5, "count": 1, "betas": [0.9, 0.99], "seed": 0, "data_seed": 0, "inner": inner}
    assert schema.identity(ranged, "network") == network
    assert schema.identity(ranged) == network | {"rate": 0.1}
