"""Several processes as one run: how they find each other, agree, stop together and speak with one voice.

Every process runs the same program on its own devices and must reach the same collective operations in the same
order; that the first one alone writes and prints is the only difference between them.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from addp_jax import errors

HEARTBEAT_SECONDS = 100  # without a sign of life from a process, the others end; a paused machine may come back
WAIT_SECONDS = 300  # for all processes to be there, and to leave
WATCH_SECONDS = 1.0  # between looks for a mistake of another process
GRACE_SECONDS = 3.0  # in which the others may come to the same mistake by themselves
HEARING_SECONDS = 15.0  # in which the others hear of it: the first process serves what they read, and ends last
FAILED, FIRST, HEARD = "addp_jax/failed", "addp_jax/first_failed", "addp_jax/heard"  # keys of the coordination service
LOST = re.compile("gloo|nccl|coordination service|heartbeat|socket closed|connection reset|connection closed", re.I)
_ending = threading.Lock()  # of the thread that ends this process


def start(coordinator: str | None, num_processes: int | None, process_id: int | None, interruptible: bool) -> None:
    """Join the other processes; call it before anything asks for devices.

    Args:
      coordinator: HOST:PORT on which process 0 listens; with None, all three come from Slurm, TPU metadata or whatever
        else jax knows.
      interruptible: SIGTERM is kept for an `Interrupt` instead of ending this process.
    Raises UserError when only some of the three are given or nothing is found, and when the others do not come.
    """
    given = (coordinator, num_processes, process_id)
    if len({value is None for value in given}) > 1:
        raise errors.UserError("coordinator, num_processes and process_id belong together: give all, or none")
    jax.config.update("jax_enable_preemption_service", interruptible)  # while it is on, it takes every SIGTERM
    try:
        jax.distributed.initialize(
            *given, initialization_timeout=WAIT_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=WAIT_SECONDS,
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        advice = "give coordinator=HOST:PORT num_processes=N process_id=I" if coordinator is None else "see --help"
        raise errors.UserError(f"distributed: {str(error).splitlines()[0]}; {advice}") from error
    ending = threading.Event()
    watch = threading.Thread(target=_end_with_the_others, args=(ending,), daemon=True)
    watch.start()
    atexit.register(lambda: (ending.set(), watch.join()))  # a thread inside jax must not meet the end of Python
    if jax.process_index():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    print(
        f"{jax.process_count()} processes, {jax.device_count()} devices; if a process dies, the others end within "
        f"{HEARTBEAT_SECONDS} s: start all of them again to go on from the newest checkpoint",
        flush=True,
    )


def name() -> str:
    """What an error message begins with: which of several processes has it."""
    return f"process {jax.process_index()} of {jax.process_count()}: " if jax.distributed.is_initialized() else ""


def _all_have(key: str, seconds: float) -> bool:
    """Whether every process has set its `key`, be it within this time."""
    client, deadline = multihost.get_jax_distributed_client(), time.monotonic() + seconds
    while time.monotonic() < deadline:
        if len(client.key_value_dir_get(key)) == jax.process_count():
            return True
        time.sleep(0.05)
    return False


def _mistake() -> tuple[int, str] | None:
    """(status, text) of a mistake that a process has come to, if one has."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # none yet
        status, _, text = multihost.get_jax_distributed_client().key_value_try_get(FIRST).partition(" ")
        return int(status), text
    return None


def _end_with_the_others(ending: threading.Event) -> None:
    """Ends this process once another one has come to a mistake; this one may wait for it in the middle of an operation."""
    while not ending.wait(WATCH_SECONDS):
        if mistake := _mistake():
            if not _all_have(FAILED, GRACE_SECONDS):
                _end(*mistake)
            return


def _end(status: int, text: str) -> None:
    _ending.acquire()
    print(f"error: {text}", file=sys.stderr, flush=True)
    multihost.get_jax_distributed_client().key_value_set(f"{HEARD}/{jax.process_index()}", text, allow_overwrite=True)
    if jax.process_index() == 0:
        _all_have(HEARD, HEARING_SECONDS)
    os._exit(status)  # a regular exit would wait for the others


@contextlib.contextmanager
def as_one():
    """Within it, what ends one process ends all of them, each with a line that says why.

    A UserError that every process comes to is raised in each. One that a single process comes to, for whatever only it
    sees, ends all of them with its status and its text. So does any other error, with status 1, and an operation that fails
    because another process is gone.
    """
    try:
        yield
    except errors.UserError as error:
        if jax.distributed.is_initialized():
            client, text = multihost.get_jax_distributed_client(), f"{name()}{error}"
            client.key_value_set(f"{FAILED}/{jax.process_index()}", text, allow_overwrite=True)
            client.key_value_set(FIRST, f"{error.status} {text}", allow_overwrite=True)
            if not _all_have(FAILED, GRACE_SECONDS):
                _end(error.status, text)
        raise
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        if mistake := _mistake():  # of another one, which this one misses
            _end(*mistake)
        reason = str(error).partition("\n")[0]
        if isinstance(error, (ValueError, RuntimeError)) and LOST.search(str(error)):
            print(f"error: {name()}another process is gone ({reason}); start all of them again", file=sys.stderr, flush=True)
            os._exit(1)  # a regular exit would wait for the one that is gone
        traceback.print_exc()
        text = f"{name()}{type(error).__name__}: {reason}"
        multihost.get_jax_distributed_client().key_value_set(FIRST, f"1 {text}", allow_overwrite=True)
        _end(1, text)


def agreed(flag: bool) -> bool:
    """Whether `flag` holds on every process. Also a meeting point: what they did before has been done by all."""
    if jax.process_count() == 1:
        return flag
    return bool(np.all(multihost_utils.process_allgather(np.asarray(flag))))


def largest(value: int) -> int:
    """The largest `value` of all processes; all of them must call it."""
    return int(np.max(multihost_utils.process_allgather(np.asarray(value)))) if jax.process_count() > 1 else value


def from_first(array) -> np.ndarray:
    """The first process's array, in every process; all of them must call it."""
    return np.asarray(multihost_utils.broadcast_one_to_all(array)) if jax.process_count() > 1 else array


def gathered(values: dict) -> dict:
    """`values` of all processes in one, as JSON takes them; of equal keys one is kept. All of them must call it."""
    if jax.process_count() == 1:
        return values
    own = np.frombuffer(json.dumps(values).encode(), np.uint8)
    padded = np.pad(own, (0, largest(len(own)) - len(own)), constant_values=ord(" "))
    merged = {}
    for row in multihost_utils.process_allgather(padded):
        merged |= json.loads(row.tobytes())
    return merged


def tell(key: str, text: str) -> None:
    """Leave `text` for the other processes. Of these two, unlike of the others, a thread may make use: no device takes part."""
    multihost.get_jax_distributed_client().key_value_set(f"addp_jax/{key}", text)


def told(key: str) -> str:
    """What a process has left by `tell`, once it has. Raises JaxRuntimeError after `WAIT_SECONDS` in vain."""
    return multihost.get_jax_distributed_client().blocking_key_value_get(f"addp_jax/{key}", 1000 * WAIT_SECONDS)


class Interrupt:
    """Asks the training loop to save and stop when SIGTERM or Ctrl-C comes, instead of killing the process.

    It takes the signals while entered. Before, they end a process that is alone at once, as usual; several processes
    look for SIGTERM in `leave`. Of several processes, one that gets it stops all of them, at the same question: all must
    ask `after` and `leave` equally often. A second Ctrl-C ends this one at once.

    Attributes:
      requested: number of the signal that came; 0 = none.
      cut_short: whether one came within `at_once`.
    """

    _at_once: Interrupt | None = None  # the one that is within it

    def __init__(self):
        self.requested, self.cut_short = 0, False
        self._asked, self._agreed, self._before = 0, False, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            # Of several processes jax takes SIGTERM and tells the others; Ctrl-C becomes one.
            names = [signal.SIGINT] if jax.distributed.is_initialized() else [signal.SIGINT, signal.SIGTERM]
            self._before = {name: signal.signal(name, self._request) for name in names}
        return self

    def after(self) -> bool:
        """Whether to stop now; to be asked after each step."""
        if not jax.distributed.is_initialized():
            return bool(self.requested)
        if not self._agreed:
            self._asked += 1  # one by one: they agree on the number after the highest one that any of them has reached
            self._agreed = multihost_utils.reached_preemption_sync_point(self._asked)
        if self._agreed:
            self.requested = self.requested or signal.SIGTERM
        return self._agreed

    def leave(self) -> None:
        """To be asked where there is nothing to save yet. Raises SystemExit if a signal came."""
        if self.after():
            print("stopped by a signal before the first step; the same command starts again")
            raise SystemExit(128 + self.requested)

    @contextlib.contextmanager
    def at_once(self):
        """A signal ends what is done within, and `cut_short` is set: in the midst of it where a process is alone, else
        before the next of `stoppable` batches."""
        Interrupt._at_once = self
        try:
            yield
        except _Stopped:
            self.cut_short = True
        finally:
            Interrupt._at_once = None

    def _request(self, number, frame):
        if number == signal.SIGINT:
            if self.requested:
                raise KeyboardInterrupt
            print("\nstopping after this step, with a checkpoint; Ctrl-C again stops at once", file=sys.stderr, flush=True)
        self.requested = number
        if jax.distributed.is_initialized():
            os.kill(os.getpid(), signal.SIGTERM)
        elif self._at_once is self:
            raise _Stopped

    def __exit__(self, *_):
        for name, handler in self._before.items():
            signal.signal(name, handler)


class _Stopped(Exception):
    """A signal came within `Interrupt.at_once`."""


def stoppable(batches: Iterable) -> Iterator:
    """`batches`, of which all processes take equally many; within `Interrupt.at_once` a signal ends them."""
    for batch in batches:
        if Interrupt._at_once and Interrupt._at_once.after():
            raise _Stopped
        yield batch
