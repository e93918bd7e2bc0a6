"""What the training loop reports of its steps."""

from __future__ import annotations

import collections
import math

import jax

from addp_jax import errors, logs
from addp_jax.program import TrainingProgram
from addp_jax.training import pace, reports

AHEAD = 2  # steps that the devices are given before the metrics of an earlier one are waited for


class Log:
    """Metrics of each step, `AHEAD` steps late; the console, TensorBoard, log.jsonl, parameters.txt and a profile."""

    def __init__(self, workdir: str, run: TrainingProgram, saver, start: int, clock: pace.Clock):
        if jax.process_index() == 0:
            print(reports.parameters(workdir, run.params))
        self.writer = reports.Writer(workdir, enabled=jax.process_index() == 0, start_step=start)
        self.progress = logs.Progress(run.length.total, start, enabled=jax.process_index() == 0)
        self.every, self.saver, self.workdir = run.config.log_every, saver, workdir
        self.waiting, self.window = collections.deque(), []
        self.pace = pace.Pace(clock, workdir, start)
        first = run.config.profile
        self.trace = reports.Trace(workdir, first, enabled=jax.process_index() == 0 and first > start)

    def add(self, step: int, metrics) -> None:
        self.waiting.append((step, metrics, self.pace.at(step) if step % self.every == 0 else {}))
        self.flush(AHEAD)

    def flush(self, ahead: int = 0) -> None:
        """Read the waiting metrics of all but the last `ahead` steps.

        Raises UserError when the loss, a gradient or a new parameter is not finite.
        """
        while len(self.waiting) > ahead:
            self.read(*self.waiting.popleft())

    def read(self, step: int, metrics, figures: dict) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        watched = {name: values[name] for name in ("loss", "grad_norm", "param_norm")}
        if not all(map(math.isfinite, watched.values())):
            found = ", ".join(f"{name} {value}" for name, value in watched.items())
            raise errors.UserError(
                f"step {step}: {found}; stopped. In {self.workdir} {self.last_checkpoint()}; lower config.optim.base_lr"
            )
        self.window.append(values)
        self.progress.update(step, f"loss {values['loss']:.4f}")
        if step % self.every == 0:
            mean = {name: sum(entry[name] for entry in self.window) / len(self.window) for name in values}
            self.write(self.writer.scalars, step, {f"train/{name}": value for name, value in mean.items()})
            self.write(self.writer.scalars, step, {f"pace/{name}": value for name, value in figures.items()})
            self.window = []

    def results(self, step: int, scalars: dict, images: dict) -> None:
        self.write(self.writer.scalars, step, {f"eval/{name}": value for name, value in scalars.items()})
        self.write(self.writer.images, step, images)

    def write(self, method, step: int, values: dict) -> None:
        try:
            method(step, values)
        except errors.UserError as error:
            raise errors.UserError(f"{error}; {self.last_checkpoint()}", error.passing) from error

    def last_checkpoint(self) -> str:
        newest = self.saver.newest()
        return "there is no checkpoint yet" if newest is None else f"the last good checkpoint is step {newest}"

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            self.trace.close()
            self.progress.close()
            self.writer.close()
            if jax.process_index() == 0:
                reports.curves(f"{self.workdir}/log.jsonl", f"{self.workdir}/curves.png")
        except errors.UserError:
            if kind is None:  # else the error that ends the run says more
                raise
