"""Progress on the console. It is only shown: a terminal that is gone ends the showing, not the run."""

import collections
import contextlib
import os
import shutil
import sys
import time

PLAIN_SECONDS = 10.0  # between progress lines in a log file
BAR_WIDTH = 24
RATE_WINDOW = 20  # drawn lines over which steps/s is measured


class Lasting:
    """A stream whose reader may go away, or whose disk may be full: what it does not take is dropped."""

    def __init__(self, stream):
        """stream: None = closed from the beginning."""
        self._stream = stream or open(os.devnull, "w", encoding="utf-8")

    def write(self, text):
        with contextlib.suppress(OSError):
            self._stream.write(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name):
        return getattr(self._stream, name)


class Progress:
    """Steps done, steps/s and time left: one line redrawn on a terminal, a line now and then elsewhere."""

    def __init__(self, total_steps, start_step=0, unit="step", stream=None, min_interval=1.0, enabled=True):
        self._total, self._step, self._unit = total_steps, start_step, unit
        self._stream = sys.stderr if stream is None else stream
        self._enabled = enabled and self._stream is not None and not self._stream.closed
        self._terminal = self._enabled and self._stream.isatty()
        self._interval = min_interval if self._terminal else max(min_interval, PLAIN_SECONDS)
        self._message, self._drawn = "", None  # _drawn: the step shown last
        self._marks = collections.deque(maxlen=RATE_WINDOW)  # (seconds, step) of each line

    def update(self, step, message=""):
        """step: how many are done; draws only if the last line is old enough."""
        self._step, self._message = step, message
        if self._enabled and (not self._marks or time.monotonic() - self._marks[-1][0] >= self._interval):
            self._draw()

    def close(self):
        """Draws the last state; later output begins on a line of its own."""
        if not self._enabled or not self._marks:
            return
        if self._drawn != self._step:
            self._draw()
        if self._terminal:
            self._write("\n")

    def _draw(self):
        self._marks.append((time.monotonic(), self._step))
        self._drawn = self._step
        if self._terminal:
            columns = shutil.get_terminal_size().columns
            self._write("\r" + f"{self._bar()} {self._line()}"[: columns - 1] + "\x1b[K")
        else:
            self._write(self._line() + "\n")

    def _write(self, text):
        """Shows `text`; a stream that takes no more of it is left alone from then on."""
        if not self._enabled:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # a pipe without a reader, a full disk; ValueError: closed
            self._enabled = False

    def _bar(self):
        done = min(self._step / self._total, 1.0) if self._total else 1.0
        filled = round(done * BAR_WIDTH)
        return "[" + "#" * filled + "." * (BAR_WIDTH - filled) + "]"

    def _line(self):
        parts = [f"{self._unit} {self._step}/{self._total}"]
        rate = self._rate()
        if rate:
            remaining = max(self._total - self._step, 0) / rate
            parts += [f"{rate:.3g} {self._unit}s/s", f"ETA {_duration(remaining)}"]
        return "  ".join(parts + [self._message] * bool(self._message))

    def _rate(self):
        (first_time, first_step), (last_time, last_step) = self._marks[0], self._marks[-1]
        return (last_step - first_step) / (last_time - first_time) if last_time > first_time else 0.0


def _duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
