"""What XLA's text of a compiled program says of its collectives and of the compiler's own estimate of its time."""

from __future__ import annotations

import collections
import dataclasses
import math
import re

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16} | {f"{kind}{bits}": bits for kind in "sufc" for bits in (2, 4, 8, 16, 32, 64, 128)}
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?(%[\w.\-]+) = (.*?) ([a-z][a-z\-]*)\((.*)")
_CALLED = re.compile(r"(?:calls|body|to_apply)=%[\w.\-]+|branch_computations=\{[^}]*\}")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shape: str  # of the result, as text
    opcode: str
    rest: str  # operands and attributes, as text


@dataclasses.dataclass
class Collective:
    """All of one kind: how often they run in a step, and the bytes that each device ends up with or puts in."""

    count: int = 0
    bytes: int = 0


def num_bytes(shape: str) -> int:
    """Of an array or tuple of arrays: `(bf16[8,128]{1,0}, f32[])` has 2052."""
    arrays = [(_BITS[kind], sizes.split(",")) for kind, sizes in _ARRAY.findall(shape) if kind in _BITS]
    return sum(bits * math.prod(map(int, filter(None, sizes))) // 8 for bits, sizes in arrays)


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Instructions by computation, and the name of the entry."""
    bodies, entry, body = {}, "", None
    for line in text.splitlines():
        if line.endswith("{") and line.startswith(("%", "ENTRY ")):
            name = line.removeprefix("ENTRY ").split()[0]
            entry = name if line.startswith("ENTRY ") else entry
            body = bodies.setdefault(name, [])
        elif line == "}":
            body = None
        elif body is not None and (match := _INSTRUCTION.match(line)):
            body.append(Instruction(*match.groups()))
    return bodies, entry


def _trip_count(instruction: Instruction, bodies) -> int:
    """Of a `while`: what the compiler says, as for GPUs, or what the loop counter is compared with."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.rest):
        return int(known[1])
    condition = bodies[re.search(r"condition=(%[\w.\-]+)", instruction.rest)[1]]
    constants = [re.match(r"(\d+)\)", entry.rest) for entry in condition if entry.opcode == "constant"]
    return max((int(match[1]) for match in constants if match), default=1)


def runs(text: str) -> list[tuple[Instruction, int, bool]]:
    """`(instruction, times, fused)` of every instruction: how often it runs in a step, and whether inside a fusion."""
    bodies, entry = computations(text)
    times, fused = collections.Counter({entry: 1}), {entry: False}
    queue = [entry]
    for name in queue:  # callers come before what they call; a computation has one caller, or callers that are clones
        for instruction in bodies[name]:
            factor = _trip_count(instruction, bodies) if instruction.opcode == "while" else 1
            for callee in re.findall(r"%[\w.\-]+", " ".join(_CALLED.findall(instruction.rest))):
                if callee in bodies:
                    times[callee] += factor * times[name]
                    fused[callee] = fused[name] or instruction.opcode == "fusion"
                    queue += [callee] * (callee not in queue)
    return [(instruction, times[name], fused[name]) for name in queue for instruction in bodies[name]]


def collectives(text: str) -> dict[str, Collective]:
    """By kind. A reduction of which each device keeps its part only (a TPU's `all-reduce-scatter`) is a reduce-scatter.

    Bytes are those of the largest side: what is gathered, what is reduced. Copies of one collective that the
    compiler splits into pieces of an asynchronous fusion count once.
    """
    kinds, seen = collections.defaultdict(Collective), set()
    bodies, _ = computations(text)
    scattered = re.findall(r"calls=(%all-reduce-scatter[\w.\-]*)", text)
    inside = {entry.name for name in scattered for entry in bodies.get(name, ())}
    for instruction, times, _ in runs(text):
        kind = instruction.opcode.removesuffix("-start")
        channel = re.search(r"channel_id=(\d+)", instruction.rest)
        shared = channel and instruction.name not in inside  # in those fusions, all have channel 1
        key = (kind, channel[1]) if shared else instruction.name
        if kind not in COLLECTIVES or key in seen:
            continue
        seen.add(key)
        kind = "reduce-scatter" if instruction.name in inside else kind
        kinds[kind].count += times
        kinds[kind].bytes += times * num_bytes(instruction.shape)
    return dict(kinds)


def estimated_cycles(text: str) -> int:
    """The TPU compiler's estimate of a step's cycles without collectives; means nothing at reduced optimization."""
    cost = re.compile(r'"estimated_cycles":"(\d{1,18})"')  # unknown ones have 19 digits
    matches = [(cost.search(entry.rest), times) for entry, times, fused in runs(text) if not fused]
    return sum(times * int(match[1]) for match, times in matches if match)


_NO_TRAFFIC = (
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all opt-barrier partition-id iota"
    " copy-start slice-start async-start all-gather-done all-reduce-done collective-permute-done".split()
)
_SLICES = ("dynamic-slice", "slice", "gather")


def hbm_bytes(text: str) -> int:
    """What a step reads from and writes to the main memory of a device, counted at the edges of fusions.

    What the compiler keeps in a TPU's fast memory (`S(1)`) is not counted; of a stack of layers, of which a fusion
    reads or writes one slice, the slice is.
    """
    bodies, _ = computations(text)
    shapes = {entry.name: entry.shape for body in bodies.values() for entry in body}
    moved = {}

    def traffic(entry: Instruction) -> int:
        if entry.opcode in ("copy-done", "slice-done", "async-done"):  # one way; the other side is fast memory
            return num_bytes(entry.shape)
        sliced, written = _moved(entry, bodies, moved)
        operands = [(index, shapes[name]) for index, name in enumerate(_operands(entry)) if name in shapes]
        reads = sum(sliced[index] if index in sliced else _main_memory(shape) for index, shape in operands)
        return reads + (_main_memory(entry.shape) if written is None else written)

    moving = [(entry, times) for entry, times, fused in runs(text) if not fused and entry.opcode not in _NO_TRAFFIC]
    return sum(times * traffic(entry) for entry, times in moving)


def _operands(entry: Instruction) -> list[str]:
    return re.findall(r"%[\w.\-]+", entry.rest.split(")", 1)[0])


def _main_memory(shape: str) -> int:
    """Bytes of those arrays of a shape that are not in fast memory."""
    return num_bytes(re.sub(r"\w+\[[\d,]*\]\{[^}]*S\(\d+\)[^}]*\}", "", shape))


def _moved(entry: Instruction, bodies, known: dict):
    """`({operand's index: bytes read of it in slices}, bytes written or None: the result's)`; fusions may be nested."""
    callee = re.search(r"calls=(%[\w.\-]+)", entry.rest)
    if callee and entry.opcode == "fusion":
        if callee[1] not in known:
            known[callee[1]] = _moved_in(bodies[callee[1]], bodies, known)
        return known[callee[1]]
    if entry.opcode == "dynamic-update-slice":
        return {0: 0}, None
    return ({0: _main_memory(entry.shape)} if entry.opcode in _SLICES else {}), None


def _moved_in(body: list[Instruction], bodies, known: dict):
    """`_moved` of a fusion's operands, from what it computes."""
    shapes = {entry.name: entry.shape for entry in body}
    origin = {entry.name: int(re.match(r"\d+", entry.rest)[0]) for entry in body if entry.opcode == "parameter"}
    sliced, whole, written = collections.Counter(), set(), None
    for entry in body:
        operands = _operands(entry)
        if entry.opcode == "bitcast" and operands[0] in origin:  # another name
            origin[entry.name] = origin[operands[0]]
            continue
        parts, update = _moved(entry, bodies, known)
        if entry.opcode == "dynamic-update-slice":
            update = num_bytes(shapes.get(operands[1], ""))
        written = written if update is None else (written or 0) + update
        for index, name in enumerate(operands):
            if name in origin and index in parts:
                sliced[origin[name]] += parts[index]
            elif name in origin:
                whole.add(origin[name])
    return {index: size for index, size in sliced.items() if index not in whole}, written
