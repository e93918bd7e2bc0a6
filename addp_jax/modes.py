"""What `--mode` can be: what runs each mode, which fields it reads, what the run's task must be able to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from addp_jax import errors, files, program, schema, tasks
from addp_jax.generation import generate, search, sweep
from addp_jax.planning import benchmark
from addp_jax.recognition import own, predict, robustness
from addp_jax.training import check, evaluate, loop
from addp_jax.weights import mirror

SECTIONS = {"generate": generate.Config, "search": search.Config, "predict": own.Config, "robustness": robustness.Config}


@dataclasses.dataclass(frozen=True)
class Mode:
    """One mode of the command line."""

    run: Callable  # (program) or, with fields of its own, (program, settings), and with a work directory (..., workdir)
    ability: type = tasks.Task  # the protocol of the tasks that it works with
    section: str = ""  # of SECTIONS: the config's group of fields that it reads
    workdir: bool = True
    resumes: tuple[str, ...] = ()  # folders of the work directory that it goes on with
    trains: bool = False  # `run` gets the run's Config instead of a Program


MODES = {
    "train": Mode(loop.train, trains=True),
    "evaluate": Mode(evaluate.evaluate),
    "generate": Mode(
        lambda *args: (sweep.sweep if args[1].sweep else generate.generate)(*args), tasks.Generator, "generate",
        resumes=("generated", "sweep"),
    ),  # fmt: skip
    "search": Mode(search.search, tasks.Generator, "search", resumes=("search",)),
    "predict": Mode(predict.predict, tasks.KnowsClasses, "predict"),
    "features": Mode(predict.write_features, tasks.Recogniser, "predict"),
    "robustness": Mode(robustness.robustness, tasks.Classifier, "robustness"),
    "check": Mode(check.check, workdir=False),
    "benchmark": Mode(benchmark.benchmark, workdir=False, trains=True),
}


def fields(task: str, model: Any = None) -> dict:
    """Every field of a run of `task` with its default, nested; `model`: the task's Config where it differs."""
    model = tasks.load(task).Config() if model is None else model
    return schema.fields(program.Config(task, model)) | {name: schema.fields(section()) for name, section in SECTIONS.items()}


def tiny(config: Mapping) -> dict:
    """All fields, with those values that the dataclasses state for a run of seconds (`schema.field`)."""
    own, sections = split(config)
    own = dataclasses.replace(own, model=schema.build(tasks.load(own.task).Config, own.model, "config.model"))
    return schema.fields(own, tiny=True) | {name: schema.fields(sections[name], tiny=True) for name in sections}


def split(config: Mapping) -> tuple[program.Config, dict[str, Any]]:
    """(the run's Config, {section: its Config}) of all fields. Raises UserError naming one that is wrong."""
    sections = {name: schema.build(SECTIONS[name], config[name], f"config.{name}") for name in SECTIONS if name in config}
    return schema.build(program.Config, {name: config[name] for name in config if name not in SECTIONS}), sections


def run(name: str, own: program.Config, sections: Mapping[str, Any], workdir: str) -> Any:
    """Run the mode `name` on what `split` returns. Raises UserError for what the user can put right."""
    mode = MODES[name]
    if mode.workdir and not workdir:
        raise errors.UserError("workdir is missing: give a folder for checkpoints, logs and pictures")
    subject = own if mode.trains else program.create(own)
    if isinstance(subject, program.Program):
        tasks.require(subject.task, own.task, mode.ability)
    settings = [sections[mode.section]] if mode.section else []
    if not mode.workdir:
        return mode.run(subject, *settings)
    with mirror.opened(files.expand(workdir), mode.trains, mode.resumes) as folder:
        return mode.run(subject, *settings, folder)
