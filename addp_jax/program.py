"""One object per program: a config's task on a mesh, its data, and how trained networks get into it.

A network is used only with what it was trained with: `Program.read` and `weights.check_frozen` compare the record that a
run keeps of itself (`train.identity`) with the present config and weights, in every mode.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from addp_jax import checkpoint, errors, parameters, partition, provenance, schema, tasks
from addp_jax.interop import weights
from addp_jax.ops import keys

SHOWN = 5  # differences, or class names, in a message


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """What every mode works with; only training knows more (`train.Run`)."""

    config: Any  # train.Config
    task: Any
    mesh: jax.sharding.Mesh
    params: Any  # shapes and shardings of the networks that the task trains
    opened: dict = dataclasses.field(default_factory=dict)  # what `source` has opened, and evaluations have computed

    def source(self, split: str):
        """What the task reads in the split "train" or "eval"; opened once."""
        if split not in self.opened:
            self.opened[split] = tasks.open_source(self.task, split, self.config.data)
        return self.opened[split]

    def read(self, workdir: str) -> tuple[dict, dict]:
        """`(parameters as numpy arrays, identity)` of the newest checkpoint in `workdir`, averaged where there is an average.

        Raises UserError if the run is one of another task or had other settings of its networks.
        """
        params, info = checkpoint.load_params(workdir, ema=True)
        identity = info["identity"]
        own = {"task": self.config.task, "model": schema.identity(self.task.config, "network")}
        if "model" in identity:  # imported weights have no record of their settings
            saved = {"task": identity.get("task"), "model": _common(identity["model"], own["model"])}
            if lines := provenance.differences(saved, own):
                raise errors.UserError(
                    f"{workdir} was trained with other settings ({parameters.shortened(lines, SHOWN)}); use those of the run"
                )
        params = weights.fit(params, self.params, workdir)
        print(f"{workdir}: parameters of step {info['step']}")
        return params, identity

    def load(self, workdir: str):
        """`((parameters, frozen networks) on the mesh, identity)`: parameters laid out as in training, the others whole."""
        params, identity = self.read(workdir)
        frozen = self.task.load_frozen()
        weights.check_frozen(workdir, identity, frozen)
        layouts = jax.tree.map(lambda leaf: leaf.sharding, self.params)
        return (partition.put(params, {name: layouts[name] for name in params}), self.place(frozen)), identity

    def load_for_sampling(self, workdir: str):
        """`(parameters, frozen networks)` as numpy arrays: those that sampling needs."""
        params, identity = self.read(workdir)
        frozen = self.task.load_for_sampling()
        weights.check_frozen(workdir, identity, frozen)
        return params, frozen

    def place(self, networks):
        """Networks whole on every device."""
        return partition.put(self.compact(networks), partition.replicated(self.mesh))

    def compact(self, networks):
        """Networks as they are kept on the devices: kernels in the dtype of the computation where the task allows it."""
        dtype = partition.compute_dtype(self.config.dtype, self.mesh)
        return parameters.compact(networks, getattr(self.task, "compact", ()), dtype)


def create(config, mesh=None) -> Program:
    """The program of a config; nothing is computed and no data is opened yet. mesh: default: all devices."""
    mesh = mesh or partition.make_mesh(config.mesh)
    task = tasks.create(config.task, config.model, partition.compute_dtype(config.dtype, mesh))
    with jax.set_mesh(mesh):  # whose devices may exist in a plan only: nothing is computed, the key neither
        shapes = jax.eval_shape(lambda: task.init(keys.of(config.seed, "parameters")))
    layout = partition.shardings(shapes, mesh)
    params = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, layout)
    return Program(config, task, mesh, params)


def check_classes(where: str, recorded, source) -> None:
    """Raises UserError unless `source` has the classes that are on `recorded` in `where`, in the same order."""
    found = list(source.classes)
    if not recorded or not found or list(recorded) == found:
        return
    gone, new = (sorted(set(one) - set(other)) for one, other in ((recorded, found), (found, recorded)))
    text = f"lacks {parameters.shortened(gone, SHOWN)}" * bool(gone) + ", " * bool(gone and new)
    text += f"has {parameters.shortened(new, SHOWN)}" * bool(new)
    raise errors.UserError(
        f"config.data: {source!r} has {len(found)} classes, {where} {len(recorded)}: "
        f"this data {text or 'has them in another order'}"
    )


def _common(saved: dict, own: dict) -> dict:
    """`saved` without the fields that `own` does not name."""
    if not isinstance(saved, dict):
        return saved
    return {name: _common(saved[name], own[name]) if isinstance(own[name], dict) else saved[name] for name in own if name in saved}
