"""Which run a work directory's checkpoints are of: its identity, as JSON, and in what two of them differ.

The rule: the copy that a step's manifest vouches for counts; then the root's file, then any other copy; without one
that can be read, the run is unknown, never another one.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import pathlib
import sys

from addp_jax import errors, files, parameters, processes
from addp_jax.weights import manifest

NAME = "identity.json"
SHOWN = 5  # differences in a message
LOCATION = "location"  # the part of an identity that says where the data lay, and is not compared


def differences(saved: dict, identity: dict) -> list[str]:
    """A line for each field in which two identities differ but for `LOCATION`: "model.width was 8, is 16"."""
    trees = saved, json.loads(json.dumps(identity))
    old, new = (_fields({name: tree[name] for name in tree if name != LOCATION}) for tree in trees)
    pairs = {name: [tree.get(name, "absent") for tree in (old, new)] for name in sorted(old.keys() | new.keys())}
    changed = [name for name, (was, now) in pairs.items() if was != now or (name in old) != (name in new)]
    return [f"{files.printable(name, 80)} {_change(*pairs[name])}" for name in changed]


def _fields(tree: dict) -> dict:
    """{names joined by dots: value}, whatever the depth."""
    result, waiting = {}, [("", tree)]
    while waiting:
        prefix, value = waiting.pop()
        if isinstance(value, dict) and (value or not prefix):
            waiting += [(f"{prefix}.{name}" if prefix else name, inner) for name, inner in value.items()]
        else:
            result[prefix] = value
    return result


def _change(old, new) -> str:
    texts = [files.printable(repr(value), 80) for value in (old, new)]
    if not (isinstance(old, list) and isinstance(new, list)) or max(len(repr(old)), len(repr(new))) <= 80:
        return "was {}, is {}".format(*texts)
    counts = [collections.Counter(map(json.dumps, value)) for value in (old, new)]
    parts = []
    for word, entries in (("added", counts[1] - counts[0]), ("removed", counts[0] - counts[1])):
        if entries:
            parts.append(f"{word} {parameters.shortened([files.printable(entry, 40) for entry in entries], 3)}")
    return f"was a list of {len(old)}, is one of {len(new)} ({', '.join(parts) or 'in another order'})"


def completed(saved, own: dict, usual):
    """The fields of `saved` that `own` names; what a run of an earlier version did not have yet is as `usual`."""
    if not isinstance(saved, dict):
        return saved
    usual = usual if isinstance(usual, dict) else {}
    saved = {name: usual[name] for name in own if name in usual} | saved
    shared = {name: (saved[name], own[name], usual.get(name)) for name in own if name in saved}
    return {name: completed(*each) if isinstance(each[1], dict) else each[0] for name, each in shared.items()}


def require_settings(where: str, saved: dict, own: dict) -> None:
    """Raises UserError unless the run in `where`, whose settings are `saved`, has those of the config, `own`."""
    if lines := differences(saved, own):
        shown = parameters.shortened(lines, SHOWN)
        raise errors.UserError(f"{where} was trained with other settings ({shown}); use those of the run")


def find(root: pathlib.Path, folders: list[pathlib.Path]) -> tuple[dict | None, pathlib.Path | None]:
    """(identity, folder) of the first of the steps `folders` that has it, or of `root`; (None, None) without any.

    folder: where it was found; `root` if the file there agrees. Raises UserError if the only file is unreadable.
    """
    try:
        own, problem = (_parsed(manifest.small(root / NAME)), "") if os.path.lexists(root / NAME) else (None, "")
    except (OSError, ValueError) as error:
        own, problem = None, files.reason(error)
    for folder in folders:
        with contextlib.suppress(ValueError):
            copy = _parsed(manifest.verified(folder, NAME) or b"")
            return copy, root if copy == own else folder
    if own is not None:
        return own, root
    for folder in folders:
        with contextlib.suppress(OSError, ValueError):
            if not manifest.exists(folder):
                return _parsed(manifest.small(folder / NAME)), folder
    if problem:
        advice = "put back a copy of it, or delete it to take these checkpoints for those of your config"
        raise errors.UserError(f"cannot read {root / NAME} ({problem}): {advice}")
    return None, None


def require(root: pathlib.Path, steps: list[pathlib.Path], text: str, writes: bool) -> None:
    """Writes the identity `text` to `root`, in the processes that are told to by `writes`.

    Raises UserError if the checkpoints `steps` there are of another run.
    """
    identity, problem = json.loads(text), ""
    saved, source = find(root, steps) if steps else (None, None)
    lines = differences(saved, identity) if saved is not None else []
    if lines:
        advice = parameters.shortened(lines, SHOWN)
        raise errors.UserError(f"{root} holds checkpoints of another run ({advice}); use another workdir")
    processes.agreed(True)  # all have read it
    if writes and source != root:
        if steps:
            what = f"taken from {source}" if source else "not known: taken for those of this config"
            print(f"{root / NAME} cannot be used; the run of these checkpoints is {what}", file=sys.stderr)
        try:
            files.write_text(root / NAME, text)
        except OSError as error:
            problem = f"cannot write to {root}: {files.reason(error)}"
    if not processes.agreed(not problem):
        raise errors.UserError(f"workdir: {problem or f'the first process cannot write to {root}'}")
    if not processes.agreed((root / NAME).exists()):
        problem = "not the same folder for all processes; give one that they share"
        raise errors.UserError(f"workdir {root.parent}: {problem}")


def _parsed(data: bytes) -> dict:
    """The identity in a file's bytes. Raises ValueError."""
    try:
        identity = json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(identity, dict):
        raise ValueError("not an identity: no JSON object")
    return identity
