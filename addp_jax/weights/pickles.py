"""Pickles read as data: nothing is imported, called or constructed, whatever the pickle asks for.

A pickle is a program for a stack machine. This one runs it with plain values only: where the program names a class or
calls a function, the stack gets a `Made`, which holds the name and the arguments. Each operation costs no more than its
bytes in the file and the items that it takes from the stack, and at most `OPERATIONS` are carried out, so that
reading ends soon and a small pickle stays small. Keys of a dict are strings and small integers; what stands under
other keys is dropped, because hashing a nested key can take for ever.
"""

from __future__ import annotations

import pickletools
import warnings
from typing import IO

from addp_jax import files

OPERATIONS = 3_000_000  # a checkpoint with its optimizer takes some 100,000
KEY_LIMIT = 2**32  # integers below are keys
DICTS = ("collections.OrderedDict", "collections.defaultdict", "builtins.dict", "__builtin__.dict")
VALUES = (
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
)  # fmt: skip
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
PERSISTENT = "persistent id"  # name of a `Made` for what the pickle says is stored outside


class Made:
    """What stands for a class (`args` is None), for what one would have made from `args`, or for a persistent id.

    state: what the pickle would have set on it afterwards.
    """

    __slots__ = ("name", "args", "state")

    def __init__(self, name: str, args=None):
        self.name, self.args, self.state = name, args, None


class Machine:
    def __init__(self):
        self.stack, self.marks, self.memo, self.persistent = [], [], {}, []

    def above_mark(self) -> list:
        return self.cut(self.marks.pop())

    def cut(self, start: int) -> list:
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def pop(self, count: int) -> list:
        start = len(self.stack) - count
        if start < 0:
            raise ValueError("its pickle takes more from the stack than there is")
        return self.cut(start)

    def made(self, maker, args):
        """What `maker(*args)` is here: a dict for the kinds of dict, a `Made` for all else."""
        name = maker.name if isinstance(maker, Made) and maker.args is None else "something that is no class"
        if name not in DICTS:
            return Made(name, args)
        pairs = args[0] if isinstance(args, tuple) and args and isinstance(args[0], list) else []
        pairs = [pair for pair in pairs if isinstance(pair, (list, tuple)) and len(pair) == 2]
        return set_items({}, [item for pair in pairs for item in pair])

    def run(self, name: str, arg):
        """One operation, by its name in `pickletools`."""
        stack = self.stack
        match name:
            case _ if name in VALUES:
                stack.append(arg)
            case _ if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.marks.append(len(stack))
            case "POP":  # also takes a mark off, where one is on top
                self.marks.pop() if self.marks and self.marks[-1] == len(stack) else self.pop(1)
            case "POP_MARK":
                self.above_mark()
            case "DUP":
                stack.append(stack[-1])
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[arg])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[arg] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "LIST" | "FROZENSET":
                stack.append(self.above_mark())
            case "TUPLE":
                stack.append(tuple(self.above_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self.pop(int(name[-1]))))
            case "DICT":
                stack.append(set_items({}, self.above_mark()))
            case _:
                self.run_on_objects(name, arg)

    def run_on_objects(self, name: str, arg):
        stack = self.stack
        match name:
            case "APPEND" | "APPENDS" | "ADDITEMS":
                items = self.pop(1) if name == "APPEND" else self.above_mark()
                if isinstance(stack[-1], list):
                    stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                items = self.pop(2) if name == "SETITEM" else self.above_mark()
                if isinstance(stack[-1], dict):
                    set_items(stack[-1], items)
            case "GLOBAL":
                stack.append(Made(arg.replace(" ", ".")))
            case "STACK_GLOBAL":
                stack.append(Made(".".join(str(part) for part in self.pop(2) if isinstance(part, str))))
            case "REDUCE" | "NEWOBJ":
                stack.append(self.made(*self.pop(2)))
            case "NEWOBJ_EX":
                stack.append(self.made(*self.pop(3)[:2]))
            case "OBJ":
                maker, *args = self.above_mark()
                stack.append(self.made(maker, tuple(args)))
            case "INST":
                stack.append(self.made(Made(arg.replace(" ", ".")), tuple(self.above_mark())))
            case "BUILD":
                (state,) = self.pop(1)
                if isinstance(stack[-1], Made):
                    stack[-1].state = state
            case "BINPERSID":
                stack.append(Made(PERSISTENT, self.pop(1)[0]))
                self.persistent.append(stack[-1])
            case _:
                raise ValueError(f"its pickle has the operation {name}, which PyTorch does not write")


def set_items(target: dict, items: list) -> dict:
    """`target` with keys and values that alternate in `items`."""
    for key, value in zip(items[::2], items[1::2]):
        if isinstance(key, str) or (isinstance(key, int) and abs(key) < KEY_LIMIT):
            target[key] = value
    return target


def load(file: IO[bytes]) -> tuple[object, list[Made]]:
    """`(value, persistent ids)` of the pickle at the position of `file`, which is left after it.

    file: in memory or memory-mapped, so that no more is read than there is. Raises ValueError for what is no pickle.
    """
    machine = Machine()
    try:
        with warnings.catch_warnings(action="ignore"):  # of Python about escapes in damaged texts
            for count, (opcode, arg, _) in enumerate(pickletools.genops(file)):
                if count == OPERATIONS:
                    raise ValueError(f"its pickle has more than {OPERATIONS:,} operations")
                if opcode.name == "STOP":
                    return machine.pop(1)[0], machine.persistent
                machine.run(opcode.name, arg)
    except Exception as error:  # a damaged program fails wherever it can: an empty stack, no mark, no such number
        raise ValueError(files.reason(error) if isinstance(error, ValueError) else "its pickle is damaged") from error
    raise ValueError("its pickle does not end")
