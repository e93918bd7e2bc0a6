"""From a user's ConfigDict to frozen dataclasses: the door at which ConfigDict stops."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping

from addp_jax import errors


def build(cls, fields: Mapping, where: str = "config"):
    """Make the frozen dataclass `cls` from a mapping, nested dataclasses included.

    Raises UserError naming the field as the user types it (`config.data.path`) when a field is
    unknown, missing or of the wrong type.
    """
    if not isinstance(fields, Mapping):
        raise errors.UserError(f"{where}: expected a group of fields, got {fields!r}")
    known = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for name in fields:
        if name not in known:
            guess = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {where}.{guess[0]}?" if guess else f"the fields are {', '.join(known)}"
            raise errors.UserError(f"{where}.{name}: no such field; {hint}")
    values = {name: convert(hints[name], fields[name], f"{where}.{name}") for name in fields}
    for name, field in known.items():
        no_default = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if name not in values and no_default:
            raise errors.UserError(f"{where}.{name}: this field has no value")
    return cls(**values)


def convert(kind, value, where: str):
    """One value to its declared type: nested dataclass, tuple, or a plain str, bool, int, float."""
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kind = next(option for option in typing.get_args(kind) if option is not type(None))
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else build(kind, value, where)
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
    return value
