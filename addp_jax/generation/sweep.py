"""`--mode=generate` with `config.generate.sweep`: the same images drawn with several settings of the sampler.

    config.generate.sweep = "steps=8,20,50;temperature=1,6"

draws the first images with each of the six combinations. Any fields of `config.model.sampler`, also lists as values:
"guidance=0,(0,0,1,2)".
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import json
import os
import pathlib

import jax

from addp_jax import errors, files, logs, partition, pictures, samplers
from addp_jax.generation import generate
from addp_jax.training import evaluate

COLUMNS = 8  # images drawn with each setting


def settings(text: str) -> list[dict]:
    """The combinations that `text` stands for, the last field changing fastest: [{field: value}, ...]."""
    fields = {}
    for part in text.split(";"):
        name, equals, values = (piece.strip() for piece in part.partition("="))
        if not (name and equals and values) or name in fields:
            advice = f'{part.strip()!r} is not understood; write "steps=8,20;temperature=1,6"'
            raise errors.UserError(f"config.generate.sweep: {advice}")
        lists = literal(f"[{values}]")  # of numbers, of lists of numbers
        fields[name] = lists if isinstance(lists, list) else [literal(value.strip()) for value in values.split(",")]
    return [dict(zip(fields, values)) for values in itertools.product(*fields.values())]


def literal(text: str):
    """A number, True, False, or else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def sweep(program, config: generate.Config, workdir: str) -> None:
    """Write `sweep.png`, a row of images for each setting, and `sweep.jsonl`, a line for each.

    Where `config.evaluate.features` is set, both say how far the samples of the setting are from real images.
    Raises UserError when all is written, if own images among the first ones were unreadable.
    """
    combinations = settings(config.sweep)
    output = pathlib.Path(config.output or os.path.join(workdir, "sweep"))
    files.require_writable(output, "config.generate.output")
    start = generate.make_starts(program, config)
    variants = [samplers.with_sampler(program.task, changes) for changes in combinations]
    rows, lines, first = [], [], jax.process_index() == 0  # it alone writes
    progress = logs.Progress(len(combinations), 0, unit="setting", enabled=first)
    with jax.set_mesh(program.mesh):
        networks = [program.place(part) for part in program.load_for_sampling(workdir)]
        numbers = [i for i in range(len(start)) if start.readable(i)][:COLUMNS]
        own = start.batch(generate.padded(numbers, partition.batch_size(len(numbers), program.mesh)))
        shown = [row for row, i in enumerate(numbers) if start.readable(i)]  # their pixels have been read now
        if not shown:
            generate.tell_skipped(start)
        batch = partition.put(own, partition.batch_sharding(program.mesh))
        for changes, task in zip(combinations, variants):
            draw = samplers.drawing(task, program.mesh, start.mask_ratio, start.fewest)
            images = partition.whole(draw((*networks, jax.random.key(config.seed)), batch))
            measures, _ = evaluate.distances(dataclasses.replace(program, task=task), *networks)
            caption = [f"{name} {value}" for name, value in changes.items()]
            caption += [f"{name} {value:.2f}" for name, value in list(measures.items())[:1]]  # the Frechet distance
            rows.append((", ".join(caption), pictures.grid(images[shown], COLUMNS)))
            lines.append(json.dumps(changes | measures | {"at each step": generate.at_each_step(task)}) + "\n")
            progress.update(len(rows))
    progress.close()
    if first:
        print(*pictures.save_pictures(output, {"sweep": pictures.captioned(rows)}), sep="\n")
        path = output / "sweep.jsonl"
        with files.explain(f"config.generate.output: cannot write {path}"):
            files.write_text(path, "".join(lines))
        print(path)
    generate.tell_skipped(start)
