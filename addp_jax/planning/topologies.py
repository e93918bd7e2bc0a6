"""Accelerators by name, also those that are not there: `v5e:16x16`, `v5e-256`, `h100x8`."""

from __future__ import annotations

import dataclasses
import math
import os
import re

import jax
from jax.experimental import topologies

from addp_jax import errors, files

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Public figures of one accelerator (cloud.google.com/tpu/docs, nvidia.com), each per jax device."""

    flops: float  # bfloat16 multiply-adds x 2 per second, dense
    hbm: float  # bytes per second
    link: float  # bytes per second that a device sends along one torus axis, both directions (GPU: NVLink)
    axes: int = 2  # of the torus
    per_name: int = 1  # `v5p-128` counts this many units (TensorCores) for each chip
    options: tuple = ()  # that the compiler's description of the topology needs
    memory: int = 0  # bytes, where the compiler has no limit of its own


CHIPS = {
    "v4": Chip(275e12, 1228e9, 100e9, 3, 2, (("chip_config_name", "megacore"),)),
    "v5e": Chip(197e12, 819e9, 100e9),
    "v5p": Chip(459e12, 2765e9, 200e9, 3, 2),
    "v6e": Chip(918e12, 1640e9, 224e9),
    "tpu7x": Chip(1153e12, 3690e9, 200e9, 3, 2),  # two devices to a chip
    "h100": Chip(989e12, 3350e9, 450e9, memory=84929347584),
    "h200": Chip(989e12, 4800e9, 450e9, memory=150121545728),
}
ALIASES = {"v5litepod": "v5e", "v5": "v5p", "v6litepod": "v6e", "v7x": "tpu7x", "ironwood": "tpu7x"}
GPUS = ("h100", "h200")
GPU_SHARE = 0.75  # of a GPU's memory that jax takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise
GPUS_PER_HOST = 8
EXAMPLES = "v5e:16x16, v5e-256, v4:4x4x8, v4-256, v5p-256, v6e-256, tpu7x:4x4x4, h100x8"


@dataclasses.dataclass(frozen=True)
class Name:
    """What is compiled for."""

    kind: str  # a key of CHIPS
    shape: tuple[int, ...]  # chips along each torus axis; of GPUs: hosts, GPUs per host
    slices: int = 1

    def __str__(self):
        slices = f" x {self.slices} slices" if self.slices > 1 else ""
        if self.kind in GPUS:
            return f"{self.kind}x{math.prod(self.shape)}{slices}"
        return f"{self.kind}:{'x'.join(map(str, self.shape))}{slices}"

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices


def parse(text: str, slices: int = 1) -> Name:
    """A topology by its shape (`v5e:16x16`), as one orders it (`v5e-256`, `v4-256`: cores), or GPUs (`h100x8`).

    Raises UserError listing what is known.
    """
    match = re.fullmatch(r"([a-z0-9]*?[a-z]\d*[a-z]*)([:=x-])(\d+(?:x\d+)*)", text.lower()) if text else None
    kind = ALIASES.get(match[1], match[1]) if match else ""
    numbers = tuple(map(int, match[3].split("x"))) if match else (0,)
    if kind not in CHIPS or min(numbers) < 1 or slices < 1:
        raise errors.UserError(f"topology={text}: not known; examples are {EXAMPLES}")
    chip, count = CHIPS[kind], numbers[0]
    if kind in GPUS:
        if len(numbers) > 1 or (count > GPUS_PER_HOST and count % GPUS_PER_HOST):
            raise errors.UserError(f"topology={text}: {kind}xN with N up to {GPUS_PER_HOST} or a multiple of it")
        return Name(kind, (max(1, count // GPUS_PER_HOST), min(count, GPUS_PER_HOST)), slices)
    shape = numbers
    if match[2] not in ":=":
        chips, rest = divmod(count, chip.per_name)
        shape = _shape(chips, chip.axes) if len(numbers) == 1 and not rest else ()
    if len(shape) != chip.axes:
        sizes = "x".join("ABC"[: chip.axes])
        advice = f"give {kind}:{sizes}, or a power of two as in {kind}-256"
        raise errors.UserError(f"topology={text}: {kind} has {chip.axes} torus axes; {advice}")
    return Name(kind, shape, slices)


def _shape(chips: int, axes: int) -> tuple[int, ...]:
    """The slice that so many chips are sold as: sides as equal as powers of two can be, the short ones first."""
    power = chips.bit_length() - 1
    if chips != 2**power:
        return ()
    if chips == 4:
        return (2, 2, 1)[:axes]
    return tuple(2 ** ((power + index) // axes) for index in range(axes))


def describe(name: Name) -> list:
    """The devices of a topology, which exist for the compiler only. Raises UserError where it knows no such topology.

    The TPU's compiler takes no TPU, so it neither heeds nor takes the lock by which libtpu keeps processes apart.
    """
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    if name.kind in GPUS:
        platform, text, advice = "cuda", name.kind, "; it needs pip install '.[plan-gpu]'"
        options = {"target_config": _target(name.kind), "topology": "x".join(map(str, (name.slices, *name.shape)))}
    else:
        platform, text, advice = "tpu", f"{name.kind}:{'x'.join(map(str, name.shape))}", ""
        options = dict(CHIPS[name.kind].options) | ({"num_slices": name.slices} if name.slices > 1 else {})
        options |= {"chips_per_host_bounds": (1, 1, 1)} if name.chips < 4 else {}
    with files.explain(f"topology={name}", RuntimeError, ValueError, advice=advice):
        return topologies.get_topology_desc(platform=platform, topology_name=text, **options).devices


def _target(kind: str) -> str:
    """What the CUDA compiler must know of a Hopper GPU, in the text form of XLA's GpuTargetConfigProto."""
    chip = CHIPS[kind]
    return f"""gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
        shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        memory_bandwidth: {int(chip.hbm)} l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: {chip.memory}
        shared_memory_per_block_optin: 232448 cuda_compute_capability {{ major: 9 }} registers_per_core_limit: 65536
        registers_per_block_limit: 65536 }} platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }}
        runtime_version {{ major: 12 minor: 9 patch: 0 }} device_description_str: "NVIDIA {kind.upper()}" """


def memory_limit(name: Name, device) -> float:
    """Bytes that a program may use on one device: a TPU's compiler tells when it is asked for too much."""
    if name.kind in GPUS:
        return GPU_SHARE * CHIPS[name.kind].memory
    sharding = jax.sharding.SingleDeviceSharding(device)
    huge = jax.ShapeDtypeStruct((2**28, 2**10), "float32", sharding=sharding)
    try:
        jax.jit(lambda array: array.sum()).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        return float(re.search(r"available HBM \(([\d.]+)G\)", str(error))[1]) * GIB
    raise ValueError(f"{device} holds 2**40 bytes")
