"""Where arrays live: the device mesh, the logical axis names, how the layout that a network's module states becomes shardings.

The mesh has three axes. Eight devices as `Config(data=2, fsdp=2, tensor=2)`:

    data 0:  [[d0 d1]    rows: fsdp (parameters, optimizer and EMA state are split over it)
              [d2 d3]]   columns: tensor (attention heads and MLP hidden units are split over it)
    data 1:  [[d4 d5]
              [d6 d7]]   the batch is split over data and fsdp together
"""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from addp_jax import errors, schema

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. None = replicated.
RULES = {
    "batch": ("data", "fsdp"),
    "length": None,
    "embed": None,  # of activations
    "layers": None,
    "width": "fsdp",  # of parameters
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": None,
    "channels": "fsdp",
    "replicated": None,
}

# Of a network's parameters: (regular expression for the whole path, logical axis of each dimension); the first match counts.
Layout = tuple[tuple[str, tuple[str, ...]], ...]
CHOSEN_AT_ONCE = 64  # rows, of `chosen`


@schema.config
class Config:
    """Mesh sizes; one may be -1 (all remaining devices).

    fsdp=-16: the largest size up to 16 that divides 16 and the devices that data and tensor leave.
    """

    data: int = schema.field(-1, tiny=-1)
    fsdp: int = schema.field(1, tiny=1)
    tensor: int = schema.field(1, tiny=1)


def make_mesh(config: Config, devices=None) -> Mesh:
    """The mesh over `devices` (default: all). Raises UserError when the sizes do not multiply to their number."""
    devices = list(jax.devices() if devices is None else devices)
    left = len(devices) // (max(1, config.data) * max(1, config.tensor))
    fsdp = math.gcd(left, config.fsdp) if config.fsdp < -1 else config.fsdp
    sizes = [config.data, fsdp, config.tensor]
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = len(devices) // max(1, -int(np.prod(sizes)))
    if min(sizes) < 1 or int(np.prod(sizes)) != len(devices):
        raise errors.UserError(
            f"config.mesh: data={config.data} fsdp={config.fsdp} tensor={config.tensor} does not multiply to the "
            f"{len(devices)} devices present; use sizes of at least 1 that do, one of them -1 for the rest"
        )
    return Mesh(_grid(sizes, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _grid(sizes: list[int], devices: list) -> np.ndarray:
    """`devices` in the shape `sizes`. Several TPU slices, which only a slow network joins, divide the data axis."""
    slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"})
    if slices <= 1:
        return mesh_utils.create_device_mesh(tuple(sizes), devices, allow_split_physical_axes=True)
    if sizes[0] % slices:
        raise errors.UserError(f"config.mesh.data: {sizes[0]} is not a multiple of the {slices} slices, each of which needs whole copies")
    inside = (sizes[0] // slices, *sizes[1:])
    return mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices, allow_split_physical_axes=True)


def spec(*names: str | None) -> PartitionSpec:
    """PartitionSpec of an array whose dimensions have these logical names; an unknown name is a KeyError."""
    axes = [RULES[name] if name is not None else None for name in names]
    used = [axis for entry in axes if entry for axis in ((entry,) if isinstance(entry, str) else entry)]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {names} use a mesh axis twice: {used}")
    return PartitionSpec(*axes)


def constrain(array: jax.Array, *names: str | None) -> jax.Array:
    """Pin the layout of an activation. Without a mesh, and inside `per_device`, it is a no-op."""
    if len(names) != array.ndim:
        raise ValueError(f"{len(names)} axis names {names} for an array of shape {array.shape}")
    layout, mesh = spec(*names), jax.sharding.get_abstract_mesh()
    if mesh.empty or all(kind == AxisType.Manual for kind in mesh.axis_types):
        return array
    return jax.lax.with_sharding_constraint(array, layout)


def one_by_one(function, batch):
    """`function(batch)`, [B,...] -> [B,...], on CPUs an example at a time: a convolutional network's activations are
    larger than the cache, and then fewer of them leave it. Not for a batch divided among devices: a loop would gather it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    divided = mesh.size > 1 and not all(kind == AxisType.Manual for kind in mesh.axis_types)
    if divided or len(batch) == 1:
        return function(batch)

    def loop(batch):
        return jax.lax.map(lambda example: function(example[None])[0], batch)

    return jax.lax.platform_dependent(batch, cpu=loop, default=function)


def path_name(path) -> str:
    """A pytree path as `encoder/blocks/block/mlp/fc1/kernel`."""
    return "/".join(str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part)))) for part in path)


def parameter_spec(path: str, shape: tuple[int, ...], mesh: Mesh, layout: Layout) -> PartitionSpec:
    """Of one parameter. Raises ValueError on no match or wrong rank, UserError on an indivisible dimension."""
    for pattern, names in layout:
        if re.fullmatch(pattern, path):
            break
    else:
        raise ValueError(f"the layout has no entry for {path} {shape}")
    if len(names) != len(shape):
        raise ValueError(f"{path}: the layout names {len(names)} axes {names}, the shape is {shape}")
    axes = spec(*names)
    for size, name, axis in zip(shape, names, axes):
        parts = int(np.prod([mesh.shape[entry] for entry in ((axis,) if isinstance(axis, str) else axis or ())]))
        if size % parts:
            raise errors.UserError(f"config.mesh: {path} has {size} along '{name}', not divisible by {axis}={parts}")
    return axes


def shardings(tree, mesh: Mesh, layout: Layout):
    """NamedSharding of every array of a parameter-like tree (optimizer and EMA state keep the parameter's path).

    layout: of its networks, such as `vit.LAYOUT`. Scalars (steps, counts) are replicated.
    """

    def one(path, leaf):
        if not leaf.shape:
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, parameter_spec("/" + path_name(path), leaf.shape, mesh, layout))

    return jax.tree_util.tree_map_with_path(one, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Layout of anything whose first dimension is the batch."""
    return NamedSharding(mesh, spec("batch"))


def put(tree, shardings):
    """Arrays of the host, the same on every process, on the devices; `shardings`: one, or a tree of them."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    one = lambda leaf, sharding: jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__)
    return jax.tree.map(one, tree, shardings)


def rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a batch this process's devices hold, rising. They need not be neighbours, and processes that
    share a `tensor` group hold the same."""
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in slices]))


def share(mesh: Mesh) -> tuple[int, int]:
    """`(number, count)`: which share of what processes work on apart is this one's, of how many.

    Processes that share a `tensor` group, and so hold the same rows of a batch, have the same share.
    """
    size, first = batch_size(1, mesh), {}
    for device, index in batch_sharding(mesh).devices_indices_map((size,)).items():
        start = index[0].start or 0
        first[device.process_index] = min(start, first.get(device.process_index, start))
    order = sorted(set(first.values()))
    return order.index(first[jax.process_index()]), len(order)


def current() -> Mesh:
    """The mesh that is set; an empty one if there is none."""
    return jax.sharding.get_mesh()


def one_device():
    """Context in which arrays and programs are this process's own, on one device, whatever mesh was set before."""
    return jax.set_mesh(Mesh(np.array(jax.local_devices()[:1]).reshape(1, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 3))


def of_process(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """A batch of which each process has the rows of its own devices, see `rows`."""
    return jax.make_array_from_process_local_data(batch_sharding(mesh), array)


def replicate(tree):
    """Every array of `tree` whole on every device. For use under `jax.jit`, or on arrays that are on the mesh."""
    return jax.tree.map(lambda array: constrain(array, *[None] * array.ndim), tree)


def whole(tree):
    """`tree` as numpy arrays, all of each on every process. All processes must ask, and for the same."""
    spread = lambda leaf: isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)
    return jax.device_get(jax.jit(replicate)(tree) if any(map(spread, jax.tree.leaves(tree))) else tree)


def chosen(array: jax.Array, rows) -> np.ndarray:
    """The rows with these numbers of an array [B,...] of bytes, on every process. All must ask, and for the same.

    No device comes to hold more than its own rows and `CHOSEN_AT_ONCE` of these.
    """
    if array.is_fully_addressable:
        return np.asarray(array)[rows]
    pieces = [rows[first : first + CHOSEN_AT_ONCE] for first in range(0, len(rows), CHOSEN_AT_ONCE)]
    padded = [np.pad(piece, (0, CHOSEN_AT_ONCE - len(piece)), "edge") for piece in pieces]
    return np.concatenate([jax.device_get(_chosen(array, at))[: len(piece)] for at, piece in zip(padded, pieces)])


@jax.jit
def _chosen(array, rows):
    """A sum of one row and zeros: indexing would first put the whole array on every device. Bytes are exact in it."""
    picked = jax.nn.one_hot(rows, len(array), dtype=jnp.float32)
    return replicate(jnp.einsum("nb,b...->n...", picked, array.astype(jnp.float32)).astype(array.dtype))


def batch_size(wanted: int, mesh: Mesh) -> int:
    """`wanted`, or a little more: as many examples on each device."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-wanted // shards) * shards


def per_device(function, mesh: Mesh):
    """Run `function(replicated, batched) -> batched` on each device's own slice of the batch, without communication."""
    batched = spec("batch")
    return jax.shard_map(
        function, mesh=mesh, in_specs=(PartitionSpec(), batched), out_specs=batched, check_vma=False
    )


def each(function, *batched):
    """`function` of each example of the arrays [B,...], on each device's own slice of the batch, without communication.

    For use under `jax.jit`; the mesh is the one that is set.
    """
    mesh, function = jax.sharding.get_abstract_mesh(), jax.vmap(function)
    if mesh.empty or mesh.size == 1 or all(kind == AxisType.Manual for kind in mesh.axis_types):
        return function(*batched)
    return jax.shard_map(function, in_specs=spec("batch"), out_specs=spec("batch"), check_vma=False)(*batched)


def own_rows(array) -> np.ndarray:
    """The rows of an array divided along its batch that this process's devices hold, rising; see `rows`."""
    pieces = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(pieces[first]) for first in sorted(pieces)])


def compute_dtype(name: str, mesh: Mesh):
    """`config.dtype` -> dtype; "auto" is float32 on CPU and bfloat16 elsewhere. The mesh tells, not the process's
    default backend: a plan for a TPU is compiled on a CPU."""
    if name == "auto":
        name = "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"
    if name not in ("float32", "bfloat16"):
        raise errors.UserError(f"config.dtype: {name!r}; use auto, float32 or bfloat16")
    return jax.numpy.dtype(name)
