"""One run at a time in a work directory of a bucket: the object `lock`, made only if there is none.

It says who holds it and changes every 20 s. It belongs to nobody if its process is known to have ended on this host, or
if it does not change for 60 s, which the next run waits for. A store that cannot make an object only if there is none
does not tell apart two runs that begin within the same second.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
import uuid
from collections.abc import Iterator

import jax

from addp_jax import errors
from addp_jax.weights import buckets, lock

HEARTBEAT_SECONDS = 20.0
STALE_SECONDS = 60.0  # without a change
LOOK_SECONDS = 5.0  # between two looks at another run's lock


@contextlib.contextmanager
def hold(bucket: buckets.Bucket) -> Iterator[Held | None]:
    """Keeps other runs out of `bucket` while the block runs. The first process holds the lock for all, and gets it.

    Every process must enter. Raises UserError, the same in every process, if another run is at work there.
    """
    held, problem = None, ""
    if jax.process_index() == 0:
        try:
            held = Held(bucket)
        except errors.UserError as error:
            problem = str(error)
    if problem := lock.line_from_first(problem):
        raise errors.UserError(problem)
    try:
        yield held
    finally:
        if held:
            held.release()


class Held:
    """The lock, held by this process. Raises UserError if another one holds it."""

    def __init__(self, bucket: buckets.Bucket):
        self._bucket, self._beats = bucket, 0
        self._record = lock.own_record() | {"token": uuid.uuid4().hex}
        while not bucket.create(lock.NAME, self._text()) and not self._is_own():
            self._take_over()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def require(self) -> None:
        """Raises UserError if another run holds the lock by now, as after a pause of this process for minutes."""
        if not self._is_own():
            raise errors.UserError(f"{self._bucket.url}: another run has taken over this work directory")

    def release(self) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(errors.UserError):
            if self._is_own():
                self._bucket.remove([lock.NAME])

    def _take_over(self) -> None:
        """Removes the lock of a run that has ended. Raises UserError for one that has not."""
        data = self._bucket.read(lock.NAME)
        if data is None:
            return
        record, deadline = lock.parsed(data), time.monotonic() + STALE_SECONDS
        if record and record["host"] == socket.gethostname():
            ended = not lock.alive(record, age=0)
        else:
            print(f"{self._bucket.url}: is a run at work here{lock.description(record)}? Watching its lock", flush=True)
            while (ended := self._bucket.read(lock.NAME) == data) and time.monotonic() < deadline:
                time.sleep(LOOK_SECONDS)
        if not ended:
            advice = "wait for it, stop it, or use another workdir"
            raise errors.UserError(f"{self._bucket.url}: a run is at work here{lock.description(record)}; {advice}")
        self._bucket.remove([lock.NAME])

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(errors.UserError):  # a save tells of a store that fails for long
                if self._is_own():
                    self._beats += 1
                    self._bucket.write(lock.NAME, self._text())

    def _text(self) -> bytes:
        return json.dumps(self._record | {"beats": self._beats}).encode()

    def _is_own(self) -> bool:
        record = lock.parsed(self._bucket.read(lock.NAME) or b"")
        return bool(record) and record.get("token") == self._record["token"]
