"""`--mode=import` and `--mode=export`: weight files to checkpoints and back. Needs no accelerator."""

from __future__ import annotations

import json
import os

import jax

from addp_jax import errors, files, parameters, partition, weights
from addp_jax.weights import buckets, checkpoint, dense, layouts, weight_files

OPTIONAL = {"addp": {"token_predictor"}, "mage": {"tokenizer"}}  # networks that a layout may lack


def import_weights(paths: list[str], workdir: str) -> None:
    """Write the networks of weight files as a checkpoint in `workdir`.

    Of a network that is in several files, the first counts. Nothing is written before all of them are checked.
    The run's identity is the files' names and the content hash of each network.
    """
    require(weights=paths, workdir=workdir)
    checkpoint.require_no_checkpoints(workdir)
    networks = collect({}, paths)
    hashes = {name: parameters.content_hash(params) for name, params in networks.items()}
    identity = {"imported": [os.path.basename(os.path.normpath(path)) for path in paths], "networks": hashes}
    checkpoint.save_params(workdir, networks, identity)
    print(f"{workdir}: wrote {', '.join(networks)}")


def export_weights(workdir: str, paths: list[str], output: str, layout: str, ema: bool, force: bool) -> None:
    """Write the networks of the run in `workdir`, and those it lacks from `paths`, as one file.

    Args:
      paths: run folders or weight files; a network that the run was trained with must be the very same.
      output: `.safetensors`, which also gets the config of the run, or `.pth` (needs PyTorch).
      layout: see `layouts`.
      ema: the averaged parameters where there are.
      force: replace an existing file.
    """
    require(workdir=workdir, output=output, layout=layout)
    weight_files.check_output(output, force)
    own = dense.FORMATS.get(layout)
    needed = {own.network} if own else {network.name for network in layouts.WRITABLE[layout].parts.values()}
    params, info = checkpoint.load_params(workdir, ema=ema)
    networks = {name: params[name] for name in params if name in needed}
    names = ", ".join(networks) or "none needed"
    print(f"{workdir}: {'averaged' if info['ema'] else 'raw'} parameters of step {info['step']}: {names}")
    networks = collect(networks, paths, needed)
    frozen = {name: networks[name] for name in networks if name not in params}
    weights.check_frozen(f"weights: {workdir}", info["identity"], frozen)
    missing = needed - networks.keys()
    if missing - OPTIONAL.get(layout, set()):
        lacking = f"no {' and no '.join(sorted(missing))} in {', '.join([workdir, *paths])}"
        raise errors.UserError(f"layout={layout}: {lacking}; give a run folder or weight file for each as weights=PATH")
    if missing:
        print(f"{output}: without {', '.join(missing)}, which the official code may ask for; weights=PATH adds it")
    # With the config if what the run trained can be read back from the file.
    readable = (own or layout in layouts.READABLE) and params.keys() - needed <= set(weights.TRAINING_ONLY)
    config = config_text(workdir) if readable else ""
    if own and not config:
        raise errors.UserError(f"layout={layout}: the sizes of windows are not known without the config of the run")
    tensors = dense.arrange(layout, networks, json.loads(config)["model"]) if own else layouts.arrange(layout, networks)
    print(f"{output}: writing {len(tensors)} tensors, {sum(array.nbytes for array in tensors.values()) / 1e6:.0f} MB")
    wrapper = own.wrapper if own else layouts.WRITABLE[layout].wrapper
    weight_files.write(output, tensors, wrapper, config)


def config_text(workdir: str) -> str:
    """The task and the model's fields of the run in `workdir` as JSON, for `addp_jax.load`; "" if there is none."""
    path = os.path.join(workdir, buckets.CONFIG)
    if not os.path.exists(path):
        print(f"{path} is missing: the file will hold no config, so that its sizes must be given where it is loaded")
        return ""
    advice = "; delete it to export without a config"
    with files.explain(f"cannot read {path}", OSError, ValueError, KeyError, TypeError, advice=advice):
        fields = files.read_json(path)
        return json.dumps({name: fields[name] for name in ("task", "model")})


def require(**arguments) -> None:
    for name, value in arguments.items():
        if not value:
            raise errors.UserError(f"{name} is missing")


def collect(networks: dict, paths: list[str], wanted=None) -> dict:
    """`networks` and those of `paths` that it lacks (of `wanted` only, if given)."""
    for path in paths:
        with jax.set_mesh(partition.make_mesh(partition.Config(), jax.devices("cpu")[:1])):
            more = weights.read(path, None if wanted is None else wanted - networks.keys())
        for name in sorted(more.keys() - networks.keys()):
            count = sum(leaf.size for leaf in jax.tree.leaves(more[name]))
            print(f"{path}: {name}, {count / 1e6:.1f} M parameters")
        networks = more | networks
    return networks
