"""The paper's claim in miniature: ADDP's encoder, MAGE's and none, compared on generated shapes.

    launch/miniature.sh [--out FOLDER] [--rows ROW,...] [--columns COLUMN,...] [--seeds N] [--config.FIELD=VALUE...]

Trains a tokenizer, MAGE's token predictor and ADDP on the same textured pictures, then measures each row: samples,
frozen features, classification from few labels, detection, segmentation. Writes table.json, table.md and table.png.
Started again, it goes on where it was stopped.
"""

import argparse
import collections
import dataclasses
import functools
import itertools
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
from matplotlib.figure import Figure

from addp_jax import files, pictures

ROOT = pathlib.Path(__file__).resolve().parent.parent
ADDP = {  # rows that are runs of ADDP: what their config has of its own
    "addp": {},
    "aligned": {"model.alignment.weight": 1.0, "model.alignment.block": 2, "model.alignment.target_block": 4},
    "dispersive": {"model.alignment.dispersive_weight": 0.5, "model.alignment.block": 2},
    "one_step": {"model.masks.max_jump": 1},
    "drawn_codes": {"model.mapping": "drawn"},
    "untold": {"model.known_tokens": False},
    "true_tokens": {"model.target": "tokens"},
}
ROWS = ("scratch", "mage", *ADDP)
COLUMNS = {  # name, what the log's value is multiplied by, which is better
    "frechet": ("Frechet distance", 1, "lower"),
    "class_score": ("class score of samples", 1, "higher"),
    "knn": ("frozen, 20-NN, %", 100, "higher"),
    "probe": ("frozen, probe, %", 100, "higher"),
    "rank": ("effective rank", 1, "higher"),
    "top1_10": ("10 labels, top-1, %", 100, "higher"),
    "top1_100": ("100 labels, top-1, %", 100, "higher"),
    "box_ap": ("box AP", 100, "higher"),
    "mask_ap": ("mask AP", 100, "higher"),
    "miou": ("mIoU, %", 100, "higher"),
}
RELEASED = {"model.sampler.top_p": 1.0, "model.sampler.temperature": 6.0, "model.sampler.guidance": 0.0}  # its sampler


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of `python -m addp_jax.main`."""

    name: str  # of its work directory
    config: str  # in configs/
    minutes: float  # on two CPU cores, for the estimate
    fields: dict  # of the config
    figures: dict = dataclasses.field(default_factory=dict)  # {column: name in the log}
    row: str = ""
    sampled: str = ""  # the work directory whose samples are measured; "" = the job is a training


def jobs(out: pathlib.Path, rows: list[str], seeds: int) -> Iterator[Job]:
    """In the order in which they need each other."""
    judge, tokenizer, predictor = (str(out / name) for name in ("judge", "tokenizer", "predictor"))
    tokens = {"model.tokenizer_weights": tokenizer}
    nets = tokens | {"model.predictor_weights": predictor}
    yield Job("judge", "demo_judge", 8, {"steps": 2500})
    yield Job("tokenizer", "demo_tokenizer", 15, {"steps": 6000})
    yield Job("predictor", "demo_predictor", 8, {"steps": 2000, "optim.base_lr": 0.024} | tokens)
    average = {"optim.ema_decay": 0.99}
    pretraining = {"steps": 600, "evaluate.watch_features": 2000} | average | nets
    for seed, row in itertools.product(range(seeds), [row for row in rows if row in ADDP]):
        fields = pretraining | ADDP[row] | {"seed": seed}
        yield Job(f"{row}_{seed}", "demo_addp", 7, fields, {"rank": "eval/features_rank"}, row)

    for row, seed in itertools.product(rows, range(seeds)):
        encoder = {"mage": predictor, "scratch": ""}.get(row, str(out / f"{row}_{seed}"))
        reading = {"model.encoder_weights": encoder} | ({"model.input": "tokens"} | tokens if row == "mage" else {})

        def measured(what, config, minutes, fields, figures, row=row, seed=seed):
            return Job(f"{what}_{row}_{seed}", config, minutes, {"seed": seed} | fields, figures, row)

        if encoder:
            stage, frozen = ("demo_predictor", tokens) if row == "mage" else ("demo_addp", average | nets | ADDP[row])
            sampling = {"generate.sweep": "steps=20", "evaluate.features": judge, "evaluate.seed": seed}
            judged = {"frechet": "frechet_2k", "class_score": "class_score_2k"}
            job = measured("samples", stage, 3, frozen | RELEASED | sampling, judged)
            yield dataclasses.replace(job, sampled=encoder)
        probe, frozen = "demo_probe", {"model.encoder_weights": encoder or "random"}
        if row == "mage":
            probe, frozen = "demo_token_probe", nets
        frozen = frozen | {"model.cache": str(out / "features")}
        yield measured("probe", probe, 1, frozen, {"knn": "eval/knn_top1", "probe": "eval/top1"})
        for labels, steps in ((10, 100), (100, 400)):
            name, few = f"top1_{labels}", {"optim.base_lr": 0.008, "data.num_train": 8 * labels} | length(steps)
            yield measured(name, "demo_classification", 0.6 + steps / 220, reading | few, {name: "eval/top1"})
        found = {"box_ap": "eval/bbox_AP", "mask_ap": "eval/segm_AP"}
        small = {"model.net.encoder.image_size": 64}  # pixels, as in pre-training
        anchors = {"model.anchor_sizes": (8.0, 16.0, 32.0, 64.0, 128.0)}
        detecting = reading | small | anchors | length(400) | {"eval_batches": 0, "data.num_eval": 200}
        yield measured("detection", "demo_detection", 5, detecting, found)
        yield measured("segmentation", "demo_segmentation", 4, reading | small | length(1000), {"miou": "eval/mIoU"})


def length(steps: int) -> dict[str, int]:
    """Fields of a training that is measured at its end only."""
    return {"steps": steps, "eval_every": steps}


def run(job: Job, out: pathlib.Path, flags: list[str]) -> dict[str, float]:
    """Its figures, by column. Exits with the status of a run that fails, its output shown."""
    folder, fields = out / job.name, job.fields
    mode, workdir, log = "train", folder, folder / "log.jsonl"
    if job.sampled:
        mode, workdir, log = "generate", job.sampled, folder / "sweep.jsonl"
        fields = fields | {"generate.output": folder}
    command = [sys.executable, "-m", "addp_jax.main", f"--mode={mode}", f"--workdir={workdir}"]
    command += [f"--config={ROOT / 'configs' / job.config}.py:textured"]
    command += [f"--config.{name}={value}" for name, value in fields.items()] + flags
    text = folder.with_suffix(".txt")
    with open(text, "w") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if status:
        print(text.read_text()[-4000:], file=sys.stderr)
        sys.exit(status)
    last = {}
    for line in log.read_text().splitlines():
        last |= json.loads(line)
    return {column: last[name] for column, name in job.figures.items()}


def shown_columns(figures: dict[str, dict[str, list[float]]]) -> list[str]:
    """The columns that a row has values of."""
    return [column for column in COLUMNS if any(values[column] for values in figures.values())]


def table(figures: dict[str, dict[str, list[float]]], seeds: int, hours: float) -> str:
    """Markdown: mean and, of several seeds, standard deviation; `figures`: {row: {column: a value of each seed}}."""
    columns = shown_columns(figures)
    lines = [["encoder", *(COLUMNS[column][0] for column in columns)], ["---"] * (1 + len(columns))]
    for row, values in figures.items():
        cells = (np.array(values[column]) * COLUMNS[column][1] for column in columns)
        lines.append([row, *(f"{cell.mean():.2f} ± {cell.std():.2f}" if len(cell) else "" for cell in cells)])
    about = f"Mean and standard deviation of {seeds} seeds, but of one pre-training of MAGE and one untrained encoder."
    about += f" {hours:.1f} hours in all."
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{about}\n"


def draw(figures: dict[str, dict[str, list[float]]], path: pathlib.Path) -> None:
    """A panel for each column: bars of the means, a dot for every seed."""
    shown = shown_columns(figures)
    figure = Figure(figsize=(2.2 * len(shown), 3), dpi=120, layout="constrained")
    for panel, column in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown):
        name, factor, better = COLUMNS[column]
        panel.set_title(f"{name}\n({better} is better)", fontsize=8)
        for place, row in enumerate(figures):
            values = np.array(figures[row][column]) * factor
            if len(values):
                panel.bar(place, values.mean(), color=f"C{place}", alpha=0.6)
                panel.plot([place] * len(values), values, "k.", markersize=4)
        panel.set_xticks(range(len(figures)), list(figures), rotation=60, fontsize=8)
    pictures.write(path, figure.savefig)


def main(argv=None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("launch/miniature.sh", None, __doc__, formatter_class=raw, allow_abbrev=False)
    add = functools.partial(parser.add_argument, metavar="")
    add("--out", default="runs/miniature", help="where runs and tables go; default %(default)s")
    add("--rows", default=",".join(ROWS[:4]), help=f"of {', '.join(ROWS)}; default %(default)s")
    columns = f"to measure, of {', '.join(COLUMNS)}; default all; rank comes with every pre-training"
    add("--columns", default=",".join(COLUMNS), help=columns)
    add("--seeds", type=int, default=3, help="of ADDP and all that is measured; default %(default)s")
    options, flags = parser.parse_known_args(argv)
    rows, columns = options.rows.split(","), options.columns.split(",")
    if wrong := [row for row in rows if row not in ROWS]:
        parser.error(f"--rows: {wrong[0]}; use {', '.join(ROWS)}")
    if wrong := [column for column in columns if column not in COLUMNS]:
        parser.error(f"--columns: {wrong[0]}; use {', '.join(COLUMNS)}")
    if wrong := [flag for flag in flags if not flag.startswith("--config.")]:
        parser.error(f"{wrong[0]}: use --config.FIELD=VALUE")
    out = pathlib.Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    done_file = out / "done.json"  # {job: [seconds, figures]}
    done = json.loads(done_file.read_text()) if done_file.exists() else {}
    wanted = {*columns, "rank"}
    planned = [job for job in jobs(out, rows, options.seeds) if wanted & job.figures.keys() or not job.figures]
    for number, job in enumerate(planned):
        if job.name in done:
            continue
        finished = [job for job in planned if job.name in done]
        pace = sum(done[job.name][0] for job in finished) / sum(job.minutes for job in finished) if finished else 60
        left = pace * sum(job.minutes for job in planned[number:] if job.name not in done) / 3600
        print(f"{number + 1} of {len(planned)}: {job.name}; about {left:.1f} hours left", flush=True)
        started = time.monotonic()
        figures = run(job, out, flags)
        done[job.name] = [time.monotonic() - started, figures]
        files.write_text(done_file, json.dumps(done, indent=1))
    figures = {row: collections.defaultdict(list) for row in rows}
    for job in planned:
        for column, value in done[job.name][1].items():
            figures[job.row][column].append(value)
    text = table(figures, options.seeds, sum(done[job.name][0] for job in planned) / 3600)
    files.write_text(out / "table.json", json.dumps(figures, indent=1))
    files.write_text(out / "table.md", text)
    draw(figures, out / "table.png")
    print(text)


if __name__ == "__main__":
    main()
