"""What a run reports: TensorBoard events, a JSON-lines log, pictures.

    <workdir>/tensorboard/...                  scalars, images
    <workdir>/log.jsonl                        {"step": 10, "time": 1.7e9, "loss": 3.2} per call
    <workdir>/tensorboard/plugins/profile/...  what the devices did in a few steps, if asked for
    <workdir>/pictures/<name>_<step>.png       every image, also without TensorBoard
    <workdir>/parameters.txt                   name, shape, dtype, size and sharding of every trained parameter

Only host 0 reports; on the others everything here is made with `enabled=False` and does nothing.

What cannot be written is a UserError that names the file or the work directory, and no file but the log and the events,
which grow, is ever seen half written. Of a log read back, a line counts if its step is a whole number, and a value if
it is a finite number.
"""

import functools
import json
import math
import pathlib
import time

import jax
from clu import parameter_overview, profiler
from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

from addp_jax import errors, files, pictures

PANELS_PER_ROW = 5  # of the curves
FLUSH_SECONDS = 10.0  # the most that a kill takes from the TensorBoard events


class Writer:
    """Writes scalars and images of a run to its work directory.

    Every method raises UserError if the work directory cannot be written to or is full.
    """

    def __init__(self, workdir, enabled=True, start_step=0):
        """start_step: the step resumed from; what an earlier run logged beyond it is dropped."""
        self._enabled = enabled
        self._workdir = pathlib.Path(workdir)
        if not enabled:
            return
        with self._naming_errors():
            (self._workdir / "tensorboard").mkdir(parents=True, exist_ok=True)
            self._path = self._workdir / "log.jsonl"
            self._path.touch()
            _drop_later_lines(self._path, start_step)
            # tensorboardX's SummaryWriter queues events to a thread: on a full disk that thread dies
            # and the run hangs. Its event file alone writes at once, and raises. The suffix keeps
            # a run resumed within the same second from overwriting the file before.
            prefix = str(self._workdir / "tensorboard" / "events")
            self._events = event_file_writer.EventsWriter(prefix, f".{time.time_ns()}")
            self._flushed = 0.0
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            # TensorBoard hides the events that an earlier run wrote from this step on.
            self._write(start_step + 1 if start_step else 0, session_log=start)

    def scalars(self, step, values):
        """values: {name: number}. Not-finite numbers become null in the log, which stays valid JSON."""
        if not self._enabled:
            return
        values = {name: float(value) for name, value in values.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self._naming_errors():
            with open(self._path, "a", encoding="utf-8") as log:  # closed each time: only then a mounted bucket has it
                log.write(json.dumps({"step": int(step), "time": time.time(), **finite}) + "\n")
            for name, value in values.items():
                self._write(step, summary=summary.scalar(name, value))

    def images(self, step, images):
        """images: {name: [H,W,3], uint8 or float in [0,1]}; a "/" in a name makes a folder."""
        if not self._enabled:
            return
        images = {name: pictures.to_uint8(image) for name, image in images.items()}
        with self._naming_errors():
            named = {f"{name}_{step:07d}": image for name, image in images.items()}
            pictures.save_pictures(self._workdir / "pictures", named)
            for name, image in images.items():
                self._write(step, summary=summary.image(name, image, dataformats="HWC"))

    def close(self):
        if self._enabled:
            with self._naming_errors():
                self._events.close()

    def _write(self, step, **content):
        self._events.write_event(event_pb2.Event(step=int(step), wall_time=time.time(), **content))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._events.flush()
            self._flushed = time.monotonic()

    def _naming_errors(self):
        return files.explain(f"cannot write to workdir {self._workdir}")


def parameters(workdir, networks: dict) -> str:
    """Writes the table `<workdir>/parameters.txt`; returns one line: how many there are, in all and in each network.

    networks: {name: nested dict whose leaves have shape, dtype and, if any, sharding}.
    """
    path = pathlib.Path(workdir) / "parameters.txt"
    with files.explain(f"cannot write {path}"):
        files.write_text(path, parameter_overview.get_parameter_overview(networks, include_stats="sharding") + "\n")
    counts = {name: int(parameter_overview.count_parameters(net)) for name, net in networks.items()}
    each = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    return f"{sum(counts.values()):,} trained parameters ({each}); {path} lists them"


class Trace:
    """A profile of the steps `first` to `first + STEPS - 1` for TensorBoard. Traces nothing with `enabled=False`."""

    STEPS = 5

    def __init__(self, workdir, first: int, enabled=True):
        """first: counted from 1."""
        self._workdir, self._first, self._enabled, self._running = pathlib.Path(workdir), first, enabled, False

    def before(self, step: int) -> None:
        """To be called before each step is dispatched."""
        if self._enabled and step == self._first:
            with self._naming_errors():
                profiler.start(str(self._workdir / "tensorboard"))
            self._running = True

    def after(self, step: int, outputs, last=False) -> None:
        """To be called after each; waits for `outputs` of the last one that is traced. last: no other one follows."""
        if self._running and (last or step == self._first + self.STEPS - 1):
            jax.block_until_ready(outputs)
            self.close()

    def close(self) -> None:
        """Writes what has been traced."""
        if self._running:
            self._running = False
            with self._naming_errors():
                profiler.stop()

    def _naming_errors(self):
        return files.explain(f"cannot write the profile of config.profile to {self._workdir}")


def curves(log_path, out_png, keys=()):
    """Draws the scalars `keys` of a log.jsonl over the steps, one panel each, into `out_png`.

    Without `keys`: the training loss and every evaluation scalar but those of single classes.
    Raises UserError naming the file that cannot be read or written.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise errors.UserError("drawing curves needs matplotlib: pip install matplotlib") from error
    from matplotlib import figure

    with files.explain(f"cannot read {log_path}"):
        lines = _read_log(log_path)
    evaluated = sorted({key for line in lines for key in line if key.startswith("eval/") and "/class/" not in key})
    keys = keys or ["train/loss", *evaluated]
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        # A Figure of its own, without pyplot: needs no display and leaves no global state.
        columns = min(len(keys), PANELS_PER_ROW)
        rows = math.ceil(len(keys) / columns)
        canvas = figure.Figure(figsize=(3.2 * columns, 2.4 * rows), layout="constrained")
        panels = canvas.subplots(rows, columns, squeeze=False).ravel()
        for axes in panels[len(keys) :]:
            axes.set_axis_off()
        for axes, key in zip(panels, keys):
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            if points:
                axes.plot(*zip(*points), linewidth=1.4)
            else:
                axes.text(0.5, 0.5, "no data", ha="center")
            axes.set(title=key, xlabel="step")
            axes.grid(alpha=0.25)
        pictures.write(pathlib.Path(out_png), functools.partial(canvas.savefig, format="png", dpi=150))


def holds(path, step: int, prefix: str) -> bool:
    """Whether the log at `path` has a value of this step whose name begins with `prefix`."""
    lines = _read_log(path) if pathlib.Path(path).exists() else []
    return any(line["step"] == step and any(name.startswith(prefix) for name in line) for line in lines)


def _drop_later_lines(path, start_step):
    """Rewrites the log without the lines the resumed run will write again, atomically."""
    kept = [line for line in _read_log(path) if start_step and line["step"] <= start_step]
    files.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def _read_log(path):
    """The log's lines as {"step": int, name: finite float or None}; what else there is is left out."""
    lines = []
    for text in files.read_bytes(path).decode("utf-8", "replace").split("\n"):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and type(line.get("step")) is int and 0 <= line["step"] < 2**63:
            numbers = {name: value for name, value in line.items() if value is None or type(value) in (int, float)}
            lines.append({name: _finite(value) for name, value in numbers.items()} | {"step": line["step"]})
    return lines


def _finite(value):
    try:
        return value if value is not None and math.isfinite(value) else None
    except OverflowError:  # an integer beyond floats
        return None
