"""From a user's ConfigDict to frozen dataclasses: the door at which ConfigDict stops.

A field says in its dataclass what it may hold and what depends on it (`field`):

    numbers are finite and within the field's range; a seed is a whole number from 0 to 2^32 - 1
    a text that begins with `~` is a path in the home folder
    matters=TRAINING: a trained network is the same whatever its value; NOTHING: no number of a run depends on it
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import math
import pkgutil
import types
import typing
from collections.abc import Mapping

from addp_jax import errors, files

NETWORK, TRAINING, NOTHING = ("training", "network"), ("training",), ()  # what depends on a field
LARGEST_SEED = 2**32 - 1


class Named:
    """A base of configs of which one is chosen by its `name`: that of a module in the base's PACKAGE, which has a `Config`."""

    PACKAGE: typing.ClassVar[str]
    name: typing.Any


def module_of(config: Named):
    """The module whose Config it is."""
    return importlib.import_module(f"{config.PACKAGE}.{config.name}")


def chosen(kind: type[Named], name, where: str) -> type:
    """The Config of the module `name`. Raises UserError, naming the modules there are, if it is none of them."""
    names = sorted(module.name for module in pkgutil.iter_modules(importlib.import_module(kind.PACKAGE).__path__))
    if name not in names:
        raise errors.UserError(f"{where}.name: {name!r}; use {' or '.join(names)}")
    return importlib.import_module(f"{kind.PACKAGE}.{name}").Config


@typing.dataclass_transform(frozen_default=True)
def config(cls: type) -> type:
    """A frozen dataclass whose fields are in their ranges: else making one raises ValueError that begins with a field's name."""
    own = next((vars(base)["__post_init__"] for base in cls.__mro__ if "__post_init__" in vars(base)), None)

    def check(self):
        for entry in dataclasses.fields(self):
            check_range(getattr(self, entry.name), entry)
        if own:
            own(self)

    cls.__post_init__ = check  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True)(cls)


def field(
    default=dataclasses.MISSING, *, least=-math.inf, most=math.inf, above=-math.inf, below=math.inf, choices=(),
    matters=NETWORK, tiny=None,
):  # fmt: skip
    """A dataclass field for numbers in [least, most], larger than `above` and smaller than `below`, or for one of `choices`.

    matters: what depends on it. tiny: its value in a run that takes seconds, where that is another.
    """
    limits = {"least": least, "most": most, "above": above, "below": below, "choices": tuple(choices)}
    metadata = {**limits, "matters": matters, "tiny": tiny}
    return dataclasses.field(default=default, metadata=metadata)


def frozen_weights() -> str:
    """A field that holds where the weights of a frozen network are. Their content matters, not their path."""
    return dataclasses.field(default="", metadata={"matters": NOTHING, "frozen": True})


def with_frozen_weights(cls, fields: Mapping, value: str) -> dict:
    """`fields` of the dataclass `cls` with `value` in those of `frozen_weights`."""
    names = {entry.name for entry in dataclasses.fields(cls) if entry.metadata.get("frozen")}
    return dict(fields) | dict.fromkeys(names, value)


def identity(config, matters: str = "training") -> dict:
    """The fields of a dataclass, as JSON takes them, on which training or a trained `network` depends."""
    return {
        entry.name: _plain(getattr(config, entry.name), matters)
        for entry in dataclasses.fields(config)
        if matters in entry.metadata.get("matters", NETWORK)
    }


def fields(config, tiny: bool = False) -> dict:
    """All fields of a dataclass as nested dicts, as ConfigDict takes them; `tiny`: with the values of a run that takes seconds."""
    found = {}
    for entry in dataclasses.fields(config):
        value, small = getattr(config, entry.name), entry.metadata.get("tiny")
        if dataclasses.is_dataclass(value):
            found[entry.name] = fields(value, tiny)
        else:
            found[entry.name] = small if tiny and small is not None else value
    return found


def _plain(value, matters: str):
    if dataclasses.is_dataclass(value):
        return identity(value, matters)
    return [_plain(entry, matters) for entry in value] if isinstance(value, (tuple, list)) else value


def build(cls, fields: Mapping, where: str = "config"):
    """Make the frozen dataclass `cls` from a mapping, nested dataclasses included.

    Raises UserError naming the field as the user types it (`config.data.path`) when a field is
    unknown, missing, of the wrong type or out of its range.
    """
    if not isinstance(fields, Mapping):
        raise errors.UserError(f"{where}: expected a group of fields, got {fields!r}")
    if issubclass(cls, Named):
        cls = chosen(cls, fields.get("name", cls.name), where)
    known = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for name in fields:
        if name not in known:
            guess = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {where}.{guess[0]}?" if guess else f"the fields are {', '.join(known)}"
            raise errors.UserError(f"{where}.{name}: no such field; {hint}")
    values = {name: convert(hints[name], fields[name], f"{where}.{name}") for name in fields}
    for name, entry in known.items():
        no_default = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if name not in values and no_default:
            raise errors.UserError(f"{where}.{name}: this field has no value")
    try:
        return cls(**values)
    except ValueError as error:  # of a dataclass: begins with the name of the field
        raise errors.UserError(f"{where}.{error}") from error


def check_range(value, entry: dataclasses.Field) -> None:
    """Raises ValueError for a number outside the range of its field."""
    name = entry.name
    numbers = value if isinstance(value, tuple) else (value,)
    if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
        raise ValueError(f"{name}: {value}; use a finite number")
    if entry.name == "seed" or entry.name.endswith("_seed"):
        if not 0 <= value <= LARGEST_SEED:
            raise ValueError(f"{name}: {value}; use a whole number from 0 to {LARGEST_SEED}")
    limits = entry.metadata
    if "least" not in limits:
        return
    if limits["choices"] and value not in limits["choices"]:
        raise ValueError(f"{name}: {value!r}; use {' or '.join(limits['choices'])}")
    low, high = max(limits["least"], limits["above"]), min(limits["most"], limits["below"])
    for number in numbers:
        if isinstance(number, (int, float)) and not (
            limits["least"] <= number <= limits["most"] and limits["above"] < number < limits["below"]
        ):
            bounds = [f"{'above' if limits['above'] == low else 'at least'} {low:g}"] * (low > -math.inf)
            bounds += [f"{'below' if limits['below'] == high else 'at most'} {high:g}"] * (high < math.inf)
            raise ValueError(f"{name}: {value}; use {' and '.join(bounds)}")


def _fits(kind, value) -> bool:
    """Whether a value may be meant to be of a kind, of several."""
    if kind is float:
        return type(value) in (int, float)
    return isinstance(value, (tuple, list)) if typing.get_origin(kind) is tuple else type(value) is kind


def convert(kind, value, where: str):
    """One value to its declared type: nested dataclass, tuple, or a plain str, bool, int, float."""
    if isinstance(kind, types.UnionType):
        options = typing.get_args(kind)
        if value is None and types.NoneType in options:
            return None
        options = tuple(option for option in options if option is not types.NoneType)
        kind = next((option for option in options if _fits(option, value)), options[0])
    if dataclasses.is_dataclass(kind):
        return value if type(value) is kind or isinstance(value, Named) else build(kind, value, where)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (tuple, list)):
            raise errors.UserError(f"{where}: expected a tuple, got {value!r}")
        items = typing.get_args(kind)
        if items[-1] is Ellipsis:
            items = items[:1] * len(value)
        if len(items) != len(value):
            raise errors.UserError(f"{where}: expected {len(items)} values, got {value!r}")
        return tuple(convert(item, entry, f"{where}[{i}]") for i, (item, entry) in enumerate(zip(items, value)))
    if kind is float and type(value) is int:
        return float(value)
    if kind is not typing.Any and type(value) is not kind:
        raise errors.UserError(f"{where}: expected {kind.__name__}, got {value!r}")
    return files.expand(value) if kind is str else value
