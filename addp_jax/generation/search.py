"""`--mode=search`: fit the sampler's values at each step to how far its samples are from real images.

    <output>/search.jsonl   the settings, then a line for each schedule that was tried: its values and their distance
    <output>/schedule.json  the best one, for `config.model.sampler.schedule_file`
    <output>/search.png     it beside the one that the search began with, and the distances

The distance is the Frechet distance of `config.evaluate`: its feature network, its number of images. All schedules draw
with the same noise (`config.evaluate.seed`), so that they differ by their values alone. One value after the other is
moved up, then down; a move that helps stays. The next moves of a value that neither helped are half as large.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Iterator

import jax
import numpy as np

from addp_jax import errors, files, logs, partition, pictures, processes, samplers, schema
from addp_jax.generation import generate
from addp_jax.metrics import generation as metrics
from addp_jax.ops import keys
from addp_jax.training import evaluate

MOVES = {"schedule": 0.05, "temperature": 1.0, "token_temperature": 0.2, "guidance": 0.5}  # the first
HELD_OUT = 1  # added to the seed of the noise that the search has not seen


@schema.config
class Config:
    """Fields of `config.search`."""

    rounds: int = schema.field(3, least=1, tiny=1)  # times that every value is moved
    output: str = ""  # folder; "" = WORKDIR/search. The search goes on where it was stopped


def search(program, config: Config, workdir: str) -> None:
    """Write the files of the module's text. Raises UserError without `config.evaluate.features`."""
    if not program.config.evaluate.features:
        raise errors.UserError("config.evaluate.features: is empty; give the network that a search compares images by")
    output, first = pathlib.Path(config.output or os.path.join(workdir, "search")), jax.process_index() == 0
    files.require_writable(output, "config.search.output")
    task, length = program.task, program.task.config.tokenizer.length
    begin = initial(task, length)
    total = 1 + 2 * config.rounds * len(moves(begin))  # at most
    with jax.set_mesh(program.mesh):
        networks = program.load_for_sampling(workdir)
        log = Log(output / "search.jsonl", settings(program, config, networks), total, first)
        measure = measuring(program, [program.place(part) for part in networks])
        progress = logs.Progress(total, len(log.distances), unit="schedule", enabled=first)
        distances, best = [], begin

        def distance(values: dict) -> float:
            index = len(distances)
            distances.append(log.distances[index] if index < len(log.distances) else measure(values, 0))
            log.write(index, values, distances[-1])
            progress.update(len(distances), f"distance {min(distances):.4g}, of {distances[0]:.4g}")
            return distances[-1]

        for best in improve(begin, distance, config.rounds, length):
            if first:
                with files.explain(f"config.search.output: cannot write to {output}"):
                    files.write_text(output / "schedule.json", json.dumps(best) + "\n")
        progress.close()
        held_out = [measure(values, HELD_OUT) for values in (begin, best)]
    if first:
        sheet = pictures.schedules(begin, best, distances)
        print(*pictures.save_pictures(output, {"search": sheet}), output / "schedule.json", sep="\n")
        results = {"distance": min(distances), "at_the_start": distances[0], "schedules": len(distances)}
        print(json.dumps(results | {"other_noise": held_out[1], "other_noise_at_the_start": held_out[0]}))


def initial(task, length: int) -> dict:
    """The values at each step that the sampler's config stands for, as fields of a config; only those that matter."""
    at = samplers.schedule(task.sampler_config, np.zeros(task.sampler_config.steps))
    parts = task.sampler.segments(task.sampler_config, length, 1.0)
    num_masked = np.concatenate([part.num_masked for _, part in parts])
    num_masked = np.pad(num_masked, (len(at.step) - len(num_masked), 0), constant_values=length)  # steps left out
    neutral = {"token_temperature": np.ones(len(at.step)), "guidance": np.zeros(len(at.step))}
    values = {"schedule": num_masked}
    if task.sampler_config.order == "confidence":
        values["temperature"] = at.temperature
    values |= {name: neutral[name] if getattr(at, name) is None else getattr(at, name) for name in neutral}
    values = {name: value.astype(float if value.dtype.kind == "f" else int) for name, value in values.items()}
    return {"steps": len(at.step)} | {name: np.round(value, 4).tolist() for name, value in values.items()}


def moves(values: dict) -> dict[tuple[str, int], float]:
    """The first move of each value, {(name, step): by}, but of the last number of masked tokens and the first guidance,
    which changes nothing while all is masked."""
    steps = lambda name: range(name == "guidance", values["steps"] - (name == "schedule"))
    return {(name, k): by for name, by in MOVES.items() if name in values for k in steps(name)}


def improve(values: dict, distance: Callable[[dict], float], rounds: int, length: int) -> Iterator[dict]:
    """The best values so far, whenever there are better ones, the given ones first."""
    best, sizes = distance(values), moves(values)
    yield values
    for _ in range(rounds):
        for (name, k), size in sizes.items():
            for sign in (1, -1):
                other = changed(values, name, k, sign * size, length)
                if other == values:
                    continue
                if (found := distance(other)) < best:
                    best, values = found, other
                    yield values
                    break
            else:
                sizes[name, k] = size / 2


def changed(values: dict, name: str, k: int, by: float, length: int) -> dict:
    """`values` with one moved as far as its neighbours or 0 allow. A number of masked tokens moves by a share of L."""
    row = list(values[name])
    if name == "schedule":
        by = int(np.sign(by)) * max(1, round(abs(by) * length))
        row[k] = min(max(row[k] + by, row[k + 1]), row[k - 1] if k else length)
    else:
        row[k] = round(max(row[k] + by, 0.0), 4)
    return values | {name: row}


def measuring(program, networks) -> Callable[[dict, int], float]:
    """`(values, number added to the seed) -> Frechet distance`; the real images are read here, once."""
    config, mesh = program.config.evaluate, program.mesh
    net, _, source = evaluate.prepare(program)
    size = partition.batch_size(config.batch_size, mesh)
    real = evaluate.Images(net)
    for batch in evaluate.on_device(program, source, size):
        real.add(batch["image"], partition.whole(batch["valid"]))
    draw, gaussian = samplers.drawing(program.task, mesh), real.features.gaussians["pool"]

    def distance(values: dict, seed: int) -> float:
        sampler = samplers.with_sampler(program.task, values).sampler_config
        samples, key = evaluate.Images(net), keys.of(config.seed + seed, "samples")
        for first in range(0, config.num_images, size):
            numbers = np.arange(first, first + size)
            batch = partition.put({"number": numbers}, partition.batch_sharding(mesh))
            samples.add(draw((*networks, key), batch, sampler), numbers < config.num_images)
        return metrics.frechet_distance(gaussian, samples.features.gaussians["pool"])

    return distance


def settings(program, config: Config, networks) -> dict:
    """What the distances depend on, as JSON."""
    described = generate.settings(program, *networks)
    evaluation = {f"evaluate.{name}": value for name, value in schema.fields(program.config.evaluate).items()}
    return json.loads(json.dumps(described | evaluation | {"rounds": config.rounds}))


class Log:
    """`search.jsonl`. A search is a function of its settings and the distances: a resumed one needs no more.

    distances: those in the file, in every process. Raises UserError if the file is of other settings.
    """

    def __init__(self, path: pathlib.Path, settings: dict, total: int, first: bool):
        self._path, self._first, self._lines = path, first, [settings]
        before = self._read(settings) if first and path.exists() else []
        padded = np.full(total, np.nan)
        padded[: len(before)] = [line["distance"] for line in before]
        padded = processes.from_first(padded)
        self.distances = padded[~np.isnan(padded)].tolist()
        self._lines += before

    def _read(self, settings: dict) -> list[dict]:
        advice = "give another config.search.output, or delete that file"
        torn = OSError, ValueError, TypeError, KeyError, AttributeError
        with files.explain(f"{self._path} cannot be read", *torn, advice=f"; {advice}"):
            head, *lines = map(json.loads, files.read_lines(self._path)[:-1])
            other = [name for name in head | settings if head.get(name) != settings.get(name)]
            lines = [line | {"distance": float(line["distance"])} for line in lines]
        if other:
            raise errors.UserError(f"{self._path} is of a search with other settings ({', '.join(other)}): {advice}")
        return lines

    def write(self, index: int, values: dict, distance: float) -> None:
        """Add a schedule; one that is there already is left alone."""
        if not self._first or index < len(self._lines) - 1:
            return
        self._lines.append(values | {"distance": distance})
        with files.explain(f"config.search.output: cannot write {self._path}"):
            files.write_text(self._path, "".join(json.dumps(line) + "\n" for line in self._lines))
