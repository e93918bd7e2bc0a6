"""From a path to a `Model`: the config of the run, where its frozen networks are, and the networks themselves."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping

import jax
from flax import traverse_util

from addp_jax import errors, files, partition, program, schema, tasks, weights
from addp_jax.api.model import Model
from addp_jax.weights import buckets, dense, layouts, weight_files

DTYPES = ("", "auto", "float32", "bfloat16")
# Of the published networks.
SIZES = {"vitb": dict(width=768, depth=12, heads=12), "vitl": dict(width=1024, depth=24, heads=16)}
DECODER = dict(depth=8, heads=16)
# Numbers of a config that its tensors must confirm before a network is built: a file may claim any size.
CONFIRMED = (
    "width", "depth", "mlp_ratio", "vocab_size", "patch_size", "channels", "multipliers", "num_res_blocks",
    "code_width", "num_classes",
)  # fmt: skip
LARGEST = 2**14  # of any other whole number, such as an image size, in the config of a weight file
ENDING = "_weights"  # of fields that hold a path
SHIPPED = pathlib.Path(__file__).parents[1] / "shipped"  # trained models that come with the package


def load(path: str, size: str, dtype: str, given: Mapping[str, str]) -> Model:
    """See `addp_jax.load`; given: {name of a frozen network: path}."""
    if size not in ("", *SIZES):
        raise ValueError(f"size: {size!r}; use {' or '.join(SIZES)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r}; use float32 or bfloat16")
    path = buckets.fetched(files.expand(path))
    if not os.path.exists(path):
        shipped = {file.stem: str(file) for file in SHIPPED.glob("*.safetensors")}
        if path not in shipped:
            names = " or ".join(f'"{name}"' for name in shipped)
            raise errors.UserError(f"nothing at {path}: give the work directory of a run, a weight file, or {names}")
        path = shipped[path]
    # Where the user has set a folder for compiled programs, JAX keeps all of them, short ones too.
    if os.environ.get("JAX_COMPILATION_CACHE_DIR") and "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    config = published(path, size) if size else of_run(path) if os.path.isdir(path) else of_file(path)
    inside = path if size or not os.path.isdir(path) else ""  # the frozen networks are in the same place
    config = dataclasses.replace(config, mesh=partition.Config(), dtype=dtype or config.dtype)
    run = program.create(dataclasses.replace(config, model=with_paths(config, path, inside, given)))
    with jax.set_mesh(run.mesh):
        params, identity = trained(run, path)
        frozen = load_frozen(run, path)
        weights.check_frozen(path, identity, frozen)
        networks = run.place(params), run.place(frozen)
    names = tasks.class_names(run.task, identity) if isinstance(run.task, tasks.KnowsClasses) else ()
    return Model(run, networks, names)


def of_run(workdir: str) -> program.Config:
    """The config that training wrote. Raises UserError naming the file if there is none that can be read."""
    path = os.path.join(workdir, buckets.CONFIG)
    if not os.path.exists(path):
        why = "it is no run, is imported (then give size=), or was trained before runs kept their config"
        advice = "of a run, the command that trained it writes the file if it is run once more"
        raise errors.UserError(f"{workdir} has no {buckets.CONFIG}: {why}; {advice}")
    with files.explain(f"cannot use {path}", OSError, ValueError, errors.UserError):
        return schema.build(program.Config, files.read_json(path))


def of_file(path: str) -> program.Config:
    """The config in the header of a .safetensors file. Nothing in it is trusted. Raises UserError naming the file."""
    text = weight_files.read_config(path)
    if not text:
        advice = f"give size= ({' or '.join(SIZES)}), or export the run to .safetensors again"
        raise errors.UserError(f"{path} holds no config: {advice}")
    problem = f"{path}: the config in this file cannot be used"
    with files.explain(problem, ValueError, KeyError, TypeError, RecursionError, errors.UserError):
        fields = json.loads(text)
        check_numbers(fields)
        config = schema.build(program.Config, {name: fields[name] for name in ("task", "model")})
        sizes = dense.configs(path) or layouts.configs(path)
        check_sizes(schema.build(tasks.load(config.task).Config, config.model, "config.model"), sizes)
    return config


def check_numbers(fields) -> None:
    """Raises ValueError for a whole number in parsed JSON that is no size of a network."""
    waiting = [fields]
    while waiting:
        value = waiting.pop()
        if isinstance(value, (dict, list)):
            waiting += value.values() if isinstance(value, dict) else value
        elif isinstance(value, int) and abs(value) > LARGEST:
            raise ValueError(f"a number in it is {files.printable(str(value), 20)}, above {LARGEST}")


def check_sizes(model, of_tensors: dict) -> None:
    """Raises ValueError if a network's Config in `model` has other sizes than its tensors: {network: Config}."""
    for entry in dataclasses.fields(model):
        own = getattr(model, entry.name)
        for config in (config for config in of_tensors.values() if type(config) is type(own)):
            ours, theirs = (traverse_util.flatten_dict(schema.fields(each), sep=".") for each in (own, config))
            for name in ours:
                if name.split(".")[-1] in CONFIRMED and ours[name] != theirs[name]:
                    raise ValueError(f"model.{entry.name}.{name} is {ours[name]}, that of its tensors {theirs[name]}")


def published(path: str, size: str) -> program.Config:
    """The config of official weights of a published size."""
    encoder, decoder = SIZES[size], DECODER | {"width": SIZES[size]["width"]}
    transformer = dict(encoder=encoder, decoder=decoder)
    models = {  # by the network that is trained, (task, fields of its model)
        "pixel_to_token": ("addp", dict(net=transformer, predictor=transformer)),
        "token_predictor": ("token_predictor", dict(net=transformer)),
        "classifier": ("classification", dict(net=dict(encoder=encoder | dict(input_norm=False, final_norm=False)))),
        "tokenizer": ("tokenizer", {}),
    }
    networks = weights.read(path) if os.path.isdir(path) else layouts.configs(path)
    holder = next((name for name in models if name in networks), None)
    if holder is None:
        raise errors.UserError(f"{path} holds {', '.join(networks)}; give one of {', '.join(models)}")
    return program.Config(*models[holder])


def frozen_fields(config: program.Config) -> list[str]:
    """Names of the fields of `config.model` that hold the weights of frozen networks."""
    return [entry.name for entry in dataclasses.fields(tasks.load(config.task).Config) if entry.metadata.get("frozen")]


def with_paths(config: program.Config, path: str, inside: str, given: Mapping[str, str]) -> dict:
    """The fields of `config.model`: paths of frozen networks as they are now, none that only training reads.

    inside: where all frozen networks are; "" = where the config says, else beside the work directory `path`.
    Raises ValueError for a `given` path of a network that the run does not have.
    """
    if not isinstance(config.model, Mapping):
        raise errors.UserError(f"{path}: config.model is no group of fields")
    known = [name.removesuffix(ENDING) for name in frozen_fields(config)]
    for name in given:
        if name not in known:
            has = f"has {' and '.join(known)}" if known else "has none"
            raise ValueError(f"{name}: a run of the task {config.task} has no such frozen network; it {has}")
    model = {name: "" if name.endswith(ENDING) else value for name, value in config.model.items()}
    for name in known:
        field = f"{name}{ENDING}"
        written = inside or config.model.get(field, "")
        beside = os.path.join(os.path.dirname(os.path.abspath(path)), os.path.basename(os.path.normpath(str(written))))
        there = written if not written or os.path.exists(written) or not os.path.exists(beside) else beside
        model[field] = files.expand(os.fspath(given[name])) if name in given else there
    return model


def trained(run: program.Program, path: str) -> tuple[dict, dict]:
    """(the networks that the run trained, what it has on record of itself)."""
    if os.path.isdir(path):
        return run.read(path)
    return weights.fit(weights.read(path, run.params.keys()), run.params, path), {}


def load_frozen(run: program.Program, path: str) -> dict:
    """The frozen networks that are used. Raises UserError saying how to give the path of one that is not found."""
    try:
        return run.task.load_for_sampling() if isinstance(run.task, tasks.Generator) else run.task.load_frozen()
    except errors.UserError as error:
        for field in frozen_fields(run.config):
            if str(error).startswith(f"config.model.{field}"):
                name, written = field.removesuffix(ENDING), run.config.model[field]
                if written and os.path.exists(written):
                    raise errors.UserError(f"{error}; or give {name}=PATH") from error
                where = f"nothing at {written!r} nor beside {path}" if written else "the config says no path"
                advice = f"give {name}=PATH, a work directory or a weight file"
                raise errors.UserError(f"config.model.{field}: {where}; {advice}") from error
        raise
