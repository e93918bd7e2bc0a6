"""Where the time of a run goes, and which of its processes the others wait for."""

from __future__ import annotations

import resource
import shutil
import socket
import sys
import tempfile
import time

import jax

from addp_jax import processes

# `train`: steps, and waiting for the devices; `data`: waiting for the next batch; `compile`: the first step.
PHASES = ("start", "restore", "compile", "train", "data", "save", "evaluate")
SLOW = 0.2  # part of a step that a process waits for data: from here on it is named


class Clock:
    """The seconds of this process, each in one phase; it begins with `start`.

    Attributes:
      seconds: {phase: seconds} up to the last change of phase.
    """

    def __init__(self):
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._phase, self._since = "start", time.perf_counter()

    def to(self, phase: str) -> None:
        """End the present phase and begin another."""
        now = time.perf_counter()
        self.seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now


class Pace:
    """What the log says of speed and room. All processes must ask at the same steps."""

    def __init__(self, clock: Clock, workdir: str, step: int):
        self.clock, self.workdir = clock, workdir
        self._step, self._before = step, dict(clock.seconds)

    def at(self, step: int) -> dict[str, float]:
        """Figures of the steps since the last call, of the slowest or fullest process where there are several:

          steps_per_second: without the time of evaluations and checkpoints, as `data_wait`
          data_wait: seconds a step that a process waits for its next batch; `worst_process` is its number
          peak_memory_gib: resident, of a process
          free_gib: of the work directory's disk or of the one for temporary files
          seconds/PHASE: since the start of this process; the first one's
          goodput: the part of these that was `train`

        On the console, a process that waits long for data is named.
        """
        clock, steps = self.clock.seconds, step - self._step
        spent = {phase: clock[phase] - self._before[phase] for phase in PHASES}
        self._step, self._before = step, dict(clock)
        seconds, wait = (spent["train"] + spent["data"]) / steps, spent["data"] / steps
        own = {"data_wait": wait, "host": socket.gethostname()} | room(self.workdir)
        each = processes.gathered({str(jax.process_index()): own})
        worst = max(each, key=lambda number: each[number]["data_wait"])
        wait = each[worst]["data_wait"]
        figures = {
            "steps_per_second": 1 / seconds, "data_wait": wait,
            "peak_memory_gib": max(one["peak_memory_gib"] for one in each.values()),
            "free_gib": min(one["free_gib"] for one in each.values()),
            "goodput": clock["train"] / sum(clock.values()),
        }  # fmt: skip
        if len(each) > 1:
            figures["worst_process"] = int(worst)
            if wait > SLOW * seconds:
                host = each[worst]["host"]
                print(f"step {step}: process {worst} ({host}) waits {wait:.2f} of {seconds:.2f} s a step for data")
        return figures | {f"seconds/{phase}": total for phase, total in clock.items()}


def room(workdir: str) -> dict[str, float]:
    """GiB that this process took at most, and GiB left where it writes."""
    unit = 2**30 if sys.platform == "darwin" else 2**20  # ru_maxrss counts bytes there, KiB elsewhere
    free = min(shutil.disk_usage(folder).free for folder in (workdir, tempfile.gettempdir()))
    return {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, "free_gib": free / 2**30}
