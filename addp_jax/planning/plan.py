"""`--mode=plan`: does a config fit a TPU slice (or GPUs) that one does not have, and what will it cost there?

The project's own train step or sampler is compiled by the real compiler, in a process of its own (`compile_only`); only
the arrays are abstract. Nothing here was measured on the hardware: memory, FLOPs and collectives are what the compiler
made, times are what public peak figures allow at best. Whatever the compiler leaves behind, a report or not, becomes a
verdict in one line.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys

from addp_jax import errors, files
from addp_jax.planning import topologies

GIB, TERA = 2**30, 1e12
FITS, DOES_NOT_FIT, UNKNOWN = 0, 1, 2  # exit statuses
TPU_ENVIRONMENT = {  # no look for a TPU, no log files, and several compilers may run at once
    "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1", "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-16",
}  # fmt: skip
MANY_COLLECTIVES = 4  # times the bytes of the bfloat16 parameters: more means that activations travel
SHUFFLES, MUCH = ("all-to-all", "collective-permute"), 10 * 2**20
RING_PASSES = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}  # of the bytes, over a ring; others 1/2


@dataclasses.dataclass(frozen=True)
class Request:
    """One program, for one topology."""

    topology: str
    program: str = "train"  # train | sample
    slices: int = 1
    level: str = "O0"  # O0 | default
    json: bool = False


def plan(config: dict, request: Request) -> int:
    """Prints the report, or one JSON line; returns the exit status: 0 fits, 1 does not fit, 2 could not tell.

    config: the fields of the run. Raises UserError for mistakes of the user.
    """
    name = topologies.parse(request.topology, request.slices)
    require_compiler(name.kind)
    found = compile_in_child(config, request)
    status = verdict(found)
    found |= {"fits": status == FITS, "estimate": estimate(found) if "peak" in found else {}}
    found["warnings"] = warnings(found) if "peak" in found else []
    found["would_fit"] = what_would_fit(config, request) if status == DOES_NOT_FIT else None
    print(json.dumps(found) if request.json else text(found, status))
    return status


def require_compiler(kind: str) -> None:
    package, extra = ("jax_cuda12_plugin", "plan-gpu") if kind in topologies.GPUS else ("libtpu", "plan")
    if importlib.util.find_spec(package) is None:
        raise errors.UserError(f"a plan for {kind} needs {package}, its compiler: pip install '.[{extra}]'")


def compile_in_child(config: dict, request: Request) -> dict:
    """The report of `compile_only`; `crashed` says what a dead compiler left on stderr. Raises UserError for the child's."""
    message = {"config": config, "topology": request.topology, "slices": request.slices, "program": request.program, "level": request.level}
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}  # not readable
    environment |= TPU_ENVIRONMENT | gpu_environment(request) | {"PYTHONPATH": paths}
    child = subprocess.run(
        [sys.executable, "-m", "addp_jax.planning.compile_only"], input=json.dumps(message), env=environment, capture_output=True, text=True
    )  # fmt: skip
    if child.returncode:
        code = child.returncode
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
        lines = child.stderr.strip().splitlines() or ["nothing on stderr"]
        last = ([line for line in lines if "Error" in line] or lines)[-1]
        return {"crashed": f"the compiler {how}: {files.printable(last, files.REASON_LENGTH)}"}
    try:
        found = json.loads(child.stdout.splitlines()[-1])
    except (IndexError, ValueError, RecursionError):
        return {"crashed": "the compiler ended without a report"}
    if "mistake" in found:
        raise errors.UserError(found["mistake"])
    return found


def gpu_environment(request: Request) -> dict:
    """No GPU is there to time kernels on, and ptxas comes from a wheel."""
    if topologies.parse(request.topology).kind not in topologies.GPUS:
        return {}
    found = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.cuda_nvcc")
    if found is None:
        raise errors.UserError("a plan for GPUs needs nvidia-cuda-nvcc-cu12: pip install '.[plan-gpu]'")
    folder = list(found.submodule_search_locations)[0]
    flags = f"--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false --xla_gpu_cuda_data_dir={folder}"
    return {"XLA_FLAGS": flags, "PATH": f"{folder}/bin{os.pathsep}{os.environ.get('PATH', '')}"}


def verdict(found: dict) -> int:
    if "peak" in found:
        return FITS if found["peak"] <= found["limit"] else DOES_NOT_FIT
    return DOES_NOT_FIT if "needed" in found else UNKNOWN


def estimate(found: dict) -> dict:
    """Seconds of one step that compute, main memory and interconnect take at their public peaks; `longest` names one.

    `bound` is the longest of those that hold for the program that will run: one compiled at O0 moves more through main
    memory than that, so there HBM is no bound, however long it takes.
    """
    chip, devices = topologies.CHIPS[found["kind"]], found["devices"]
    seconds = {"compute": found["executed_flops"] / devices / chip.flops}
    if "collectives" in found:
        passes = {kind: RING_PASSES.get(kind, 0.5) * entry["bytes"] for kind, entry in found["collectives"].items()}
        seconds |= {"HBM": found["hbm_traffic"] / chip.hbm, "interconnect": sum(passes.values()) / chip.link}
    bound = max((name for name in seconds if name != "HBM" or found["level"] == "default"), key=seconds.get)
    floor = seconds[bound]
    hours = found["steps"] * floor / 3600
    return {
        "seconds": seconds, "longest": max(seconds, key=seconds.get), "bound": bound, "step_seconds": floor,
        "mfu_ceiling": found["useful_flops"] / devices / chip.flops / floor,
        "days": hours / 24, "chip_hours": hours * found["chips"],
    }  # fmt: skip


def warnings(found: dict) -> list[str]:
    """What should make one look again before paying."""
    told = []
    kinds = {kind: entry["bytes"] for kind, entry in found.get("collectives", {}).items()}
    allowed = MANY_COLLECTIVES * 2 * found["parameters"] if found["donated"] else MUCH
    if sum(kinds.values()) > allowed:
        told.append(f"collectives move {gib(sum(kinds.values()))} a step, over {gib(allowed)}: do activations travel (partition.constrain)?")
    for kind in SHUFFLES:
        if kinds.get(kind, 0) > MUCH:
            told.append(f"{kind} of {gib(kinds[kind])} a step: an activation changes its layout")
    if found["aliased"] < 0.98 * found["donated"]:
        told.append(f"only {gib(found['aliased'])} of the {gib(found['donated'])} of state are updated in place: donation is lost")
    if found.get("libtpu_wanted") and not matches(found["libtpu"], found["libtpu_wanted"]):
        told.append(f"libtpu {found['libtpu']} is installed, this jax asks for {found['libtpu_wanted']}")
    if "unreadable" in found:
        told.append(f"the compiled program cannot be printed ({found['unreadable']}): collectives are not known")
    return told


def matches(version: str, pin: str) -> bool:
    """0.0.42.1 matches libtpu==0.0.42.*"""
    return version.startswith(pin.partition("==")[2].removesuffix("*"))


def what_would_fit(config: dict, request: Request) -> dict | None:
    """The first of a few changes with which the program fits: `{"changes": {field: value}, "peak": bytes}`."""
    for changes in candidates(config, request.program):
        print(f"does not fit; trying {flags(changes)}", file=sys.stderr)
        changed = copy.deepcopy(config)
        for field, value in changes.items():
            *groups, last = field.split(".")
            target = changed
            for group in groups:
                target = target[group]
            target[last] = value
        try:
            found = compile_in_child(changed, dataclasses.replace(request, level="O0"))
        except errors.UserError:  # a mesh that does not divide something
            continue
        if verdict(found) == FITS:
            return {"changes": changes, "peak": found["peak"]}
    return None


def candidates(config: dict, program: str) -> list[dict]:
    """Changes of a config, cheapest first: what the backward pass recomputes, the mesh, micro-batches."""
    if program == "sample":
        size = config["generate"]["batch_size"]
        return [{"generate.batch_size": size // parts} for parts in (2, 4, 8, 16) if size >= parts]
    stacks = [path for path, _ in leaves(config["model"], "model") if path.startswith("model.net.") and path.endswith(".remat")]
    remat = {policy: dict.fromkeys(stacks, policy) for policy in ("dots", "full")}
    sharded = {"mesh.data": -1, "mesh.fsdp": -16, "mesh.tensor": 1}
    spread = {"mesh.data": 1, "mesh.fsdp": -1, "mesh.tensor": 1}
    pieces = [{"optim.accumulate": config["optim"]["accumulate"] * parts} for parts in (4, 16)]
    options = [remat["dots"], remat["full"], sharded | remat["full"], spread | remat["full"]]
    options += [spread | remat["full"] | piece for piece in pieces]
    now = dict(leaves(config, "config"))
    needed = [{field: value for field, value in changes.items() if now[f"config.{field}"] != value} for changes in options]
    return [changes for index, changes in enumerate(needed) if changes and changes not in needed[:index]]


def leaves(tree, prefix: str):
    """`(dotted path, value)` of every field."""
    for name, value in tree.items():
        path = f"{prefix}.{name}"
        yield from leaves(value, path) if isinstance(value, dict) else [(path, value)]


# --- the report -----------------------------------------------------------------------------------


def gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB"


def text(found: dict, status: int) -> str:
    """The report, one fact to a line."""
    if status == UNKNOWN:
        return f"could not tell: {found.get('crashed') or found.get('error')}"
    lines = heading(found)
    if "peak" in found:
        lines += memory(found) + work(found) + [f"warning       {line}" for line in found["warnings"]]
    else:
        lines.append(f"memory        over {gib(found['needed'])} needed, {gib(found['limit'])} there per {unit(found)}: DOES NOT FIT")
    if status == DOES_NOT_FIT:
        lines.append(f"would fit     {suggestion(found['would_fit'])}")
    return "\n".join(lines)


def suggestion(option: dict | None) -> str:
    if option is None:
        return "nothing that was tried: remat, a mesh with more fsdp, more micro-batches"
    return f"{flags(option['changes'])} (peak {gib(option['peak'])})"


def flags(changes: dict) -> str:
    return " ".join(f"--config.{field}={value}" for field, value in changes.items())


def unit(found: dict) -> str:
    return "GPU" if found["kind"] in topologies.GPUS else "chip" if found["devices"] == found["chips"] else "device (half a chip)"


def heading(found: dict) -> list[str]:
    chip, devices = topologies.CHIPS[found["kind"]], found["devices"]
    mesh = " ".join(f"{axis}={size}" for axis, size in found["mesh"].items())
    shards = found["mesh"]["data"] * found["mesh"]["fsdp"]
    compiler = f"libtpu {found['libtpu']}, " if "libtpu" in found else "no GPU timed: kernels are the compiler's guess, "
    return [
        f"topology      {found['topology']}: {devices} devices, {chip.flops / TERA:.0f} TFLOP/s and {gib(found['limit'])} each",
        f"compiler      {compiler}{found['level']} level, {found['compile_seconds']:.0f} s ({found['compile_cpu_seconds']:.0f} s of CPU)",
        f"mesh          {mesh}; batch {found['batch_size']} = {found['batch_size'] / shards:g} images per {unit(found)}",
        f"parameters    {found['parameters'] / 1e6:.1f} M trained",
    ]


def memory(found: dict) -> list[str]:
    parts = {name: found[f"{name}_bytes"] for name in ("parameter", "optimizer", "frozen", "batch")}
    rest = max(0, found["peak"] - sum(parts.values()))
    split = ", ".join(f"{name} {gib(size)}" for name, size in (parts | {"activations and the rest": rest}).items())
    fits = "FITS" if found["fits"] else "DOES NOT FIT"
    share = 100 * found["peak"] / found["limit"]
    return [f"memory        peak {gib(found['peak'])} of {gib(found['limit'])} per {unit(found)} ({share:.0f} %): {fits}", f"              {split}"]


def work(found: dict) -> list[str]:
    devices, best = found["devices"], found["estimate"]
    useful, executed = found["useful_flops"], found["executed_flops"]
    kinds = sorted(found.get("collectives", {}).items())
    moved = ", ".join(f"{kind} {entry['count']} x, {gib(entry['bytes'])}" for kind, entry in kinds) or "none"
    seconds = ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in best["seconds"].items())
    lines = [
        f"FLOPs         {useful / TERA:.0f} T useful, {executed / TERA:.0f} T executed ({100 * useful / executed:.0f} % useful); "
        f"{executed / devices / TERA:.1f} T per {unit(found)}",
        f"collectives   {moved}",
        f"at best       {1000 * best['step_seconds']:.0f} ms, bound by {best['bound']} ({seconds}): MFU at most {100 * best['mfu_ceiling']:.0f} %",
    ]
    if best["longest"] != best["bound"]:
        longest = 1000 * best["seconds"][best["longest"]]
        lines.append(
            f"              longest is {best['longest']}, {longest:.0f} ms, of this {found['level']} program; "
            "level default says what is left of it"
        )
    if found["donated"]:
        lines.append(
            f"schedule      {found['steps']} steps (epoch of {found['num_train']} images): at least {best['days']:.2f} days, "
            f"{best['chip_hours']:.0f} chip-hours"
        )
    if found.get("cycles") and found["level"] == "default":
        lines.append(f"cycles        {found['cycles'] / 1e6:.0f} M a step by the compiler's own model, without collectives; not validated")
    return lines
