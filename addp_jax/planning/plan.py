"""`--mode=plan`: does a config fit a TPU slice (or GPUs) that one does not have, and what will it cost there?

The project's own train step or sampler is compiled by the real compiler, in a process of its own (`compile_only`); only
the arrays are abstract. Nothing here was measured on the hardware: memory, FLOPs and collectives are what the compiler
made, times are what public peak figures allow at best. Whatever the compiler leaves behind, a report or not, becomes a
verdict in one line.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys

from flax import traverse_util

from addp_jax import errors, files
from addp_jax.planning import topologies
from addp_jax.planning.topologies import GIB

TERA = 1e12
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
    require_compiler(topologies.parse(request.topology, request.slices).kind)
    report = compile_in_child(config, request)
    status, compiled = verdict(report), "peak" in report
    report |= {
        "fits": status == FITS,
        "estimate": estimate(report) if compiled else {},
        "warnings": warnings(report) if compiled else [],
        "would_fit": what_would_fit(config, request, report["batch_size"]) if status == DOES_NOT_FIT else None,
    }
    print(json.dumps(report) if request.json else text(report, status))
    return status


def require_compiler(kind: str) -> None:
    package, extra = ("jax_cuda12_plugin", "plan-gpu") if kind in topologies.GPUS else ("libtpu", "plan")
    if importlib.util.find_spec(package) is None:
        raise errors.UserError(f"a plan for {kind} needs {package}, its compiler: pip install '.[{extra}]'")


def compile_in_child(config: dict, request: Request) -> dict:
    """The report of `compile_only`, or `crashed`: how the compiler ended. Raises UserError for the child's."""
    message = {"config": config} | dataclasses.asdict(request)
    del message["json"]  # how the report is shown
    paths = filter(None, [str(pathlib.Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])
    environment = os.environ | TPU_ENVIRONMENT | gpu_environment(request) | {"PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # a cached program is not readable
    command = [sys.executable, "-m", "addp_jax.planning.compile_only"]
    child = subprocess.run(command, input=json.dumps(message), env=environment, capture_output=True, text=True)
    if code := child.returncode:
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
        lines = child.stderr.strip().splitlines() or ["nothing on stderr"]
        last = ([line for line in lines if "Error" in line] or lines)[-1]
        return {"crashed": f"the compiler {how}: {files.printable(last, files.REASON_LENGTH)}"}
    try:
        report = json.loads(child.stdout.splitlines()[-1])
    except (IndexError, ValueError, RecursionError):
        return {"crashed": "the compiler ended without a report"}
    if "mistake" in report:
        raise errors.UserError(report["mistake"])
    return report


def gpu_environment(request: Request) -> dict:
    """No GPU is there to time kernels on, and ptxas comes from a wheel."""
    if topologies.parse(request.topology).kind not in topologies.GPUS:
        return {}
    package = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.cuda_nvcc")
    if package is None:
        raise errors.UserError("a plan for GPUs needs nvidia-cuda-nvcc-cu12: pip install '.[plan-gpu]'")
    folder = list(package.submodule_search_locations)[0]
    flags = f"--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false --xla_gpu_cuda_data_dir={folder}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}".lstrip()
    return {"XLA_FLAGS": flags, "PATH": f"{folder}/bin{os.pathsep}{os.environ.get('PATH', '')}"}


def verdict(report: dict) -> int:
    if "peak" in report:
        return FITS if report["peak"] <= report["limit"] else DOES_NOT_FIT
    return DOES_NOT_FIT if "needed" in report else UNKNOWN


def estimate(report: dict) -> dict:
    """Seconds of one step that compute, main memory and interconnect take at their public peaks; `longest` names one.

    `bound` is the longest of those that hold for the program that will run: one compiled at O0 moves more through main
    memory than that, so there HBM is no bound, however long it takes.
    """
    chip, devices = topologies.CHIPS[report["kind"]], report["devices"]
    seconds = {"compute": report["executed_flops"] / devices / chip.flops}
    if "collectives" in report:
        passes = [RING_PASSES.get(kind, 0.5) * entry["bytes"] for kind, entry in report["collectives"].items()]
        seconds |= {"HBM": report["hbm_traffic"] / chip.hbm, "interconnect": sum(passes) / chip.link}
    bound = max((name for name in seconds if name != "HBM" or report["level"] == "default"), key=seconds.get)
    hours = report["steps"] * seconds[bound] / 3600
    return {
        "seconds": seconds, "longest": max(seconds, key=seconds.get), "bound": bound, "step_seconds": seconds[bound],
        "mfu_ceiling": report["useful_flops"] / devices / chip.flops / seconds[bound],
        "days": hours / 24, "chip_hours": hours * report["chips"],
    }  # fmt: skip


def warnings(report: dict) -> list[str]:
    """What should make one look again before paying."""
    lines, donated, aliased = [], report["donated"], report["aliased"]
    kinds = {kind: entry["bytes"] for kind, entry in report.get("collectives", {}).items()}
    moved, allowed = sum(kinds.values()), MANY_COLLECTIVES * 2 * report["parameters"] if donated else MUCH
    if moved > allowed:
        lines.append(f"collectives move {gib(moved)} a step, over {gib(allowed)}: "
                     "do activations travel (partition.constrain)?")  # fmt: skip
    shuffles = [kind for kind in SHUFFLES if kinds.get(kind, 0) > MUCH]
    lines += [f"{kind} of {gib(kinds[kind])} a step: an activation changes its layout" for kind in shuffles]
    if aliased < 0.98 * donated:
        lines.append(f"only {gib(aliased)} of the {gib(donated)} of state are updated in place: donation is lost")
    pin = report.get("libtpu_wanted", "")  # 0.0.42.1 matches libtpu==0.0.42.*
    if pin and not report["libtpu"].startswith(pin.partition("==")[2].removesuffix("*")):
        lines.append(f"libtpu {report['libtpu']} is installed, this jax asks for {pin}")
    if "unreadable" in report:
        lines.append(f"the compiled program cannot be printed ({report['unreadable']}): collectives are not known")
    return lines


def what_would_fit(config: dict, request: Request, batch_size: int) -> dict | None:
    """The first of a few changes with which the program fits: `{"changes": {field: value}, "peak": bytes}`.

    batch_size: with which it does not.
    """
    fields = traverse_util.flatten_dict(config, keep_empty_nodes=True, sep=".")
    for changes in candidates(fields, request.program, batch_size):
        print(f"does not fit; trying {flags(changes)}", file=sys.stderr)
        changed = traverse_util.unflatten_dict(fields | changes, sep=".")
        try:
            report = compile_in_child(changed, dataclasses.replace(request, level="O0"))
        except errors.UserError:  # a mesh that does not divide something
            continue
        if verdict(report) == FITS:
            return {"changes": changes, "peak": report["peak"]}
    return None


def candidates(fields: dict, program: str, batch_size: int) -> list[dict]:
    """Changes of a config, cheapest first: what the backward pass recomputes, the mesh, micro-batches.

    fields, and each change: {dotted path: value}.
    """
    if program == "sample":
        return [{"generate.batch_size": batch_size // parts} for parts in (2, 4, 8, 16) if batch_size >= parts]
    stacks = [path for path in fields if path.startswith("model.net.") and path.endswith(".remat")]
    dots, full = (dict.fromkeys(stacks, policy) for policy in ("dots", "full"))
    sharded = {"mesh.data": -1, "mesh.fsdp": -16, "mesh.tensor": 1}
    spread = {"mesh.data": 1, "mesh.fsdp": -1, "mesh.tensor": 1}
    pieces = [{"optim.accumulate": fields["optim.accumulate"] * parts} for parts in (4, 16)]
    options = [dots, full, sharded | full, spread | full, *(spread | full | piece for piece in pieces)]
    needed = [{path: value for path, value in changes.items() if fields[path] != value} for changes in options]
    return [changes for index, changes in enumerate(needed) if changes and changes not in needed[:index]]


# --- the report -----------------------------------------------------------------------------------


def gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB"


def text(report: dict, status: int) -> str:
    """The report, one fact to a line."""
    if status == UNKNOWN:
        return f"could not tell: {report.get('crashed') or report.get('error')}"
    lines = heading(report)
    if "peak" in report:
        lines += memory(report) + work(report) + [f"warning       {line}" for line in report["warnings"]]
    else:
        needed, limit = gib(report["needed"]), gib(report["limit"])
        lines.append(f"memory        over {needed} needed, {limit} there per {unit(report)}: DOES NOT FIT")
    if status == DOES_NOT_FIT:
        option, words = report["would_fit"], "nothing that was tried: remat, a mesh with more fsdp, more micro-batches"
        if option:
            words = f"{flags(option['changes'])} (peak {gib(option['peak'])})"
        lines.append(f"would fit     {words}")
    return "\n".join(lines)


def flags(changes: dict) -> str:
    return " ".join(f"--config.{field}={value}" for field, value in changes.items())


def unit(report: dict) -> str:
    if report["kind"] in topologies.GPUS:
        return "GPU"
    return "chip" if report["devices"] == report["chips"] else "device (half a chip)"


def heading(report: dict) -> list[str]:
    chip, devices, level = topologies.CHIPS[report["kind"]], report["devices"], report["level"]
    mesh = " ".join(f"{axis}={size}" for axis, size in report["mesh"].items())
    images = report["batch_size"] / report["mesh"]["data"] / report["mesh"]["fsdp"]
    compiler = f"libtpu {report['libtpu']}" if "libtpu" in report else "no GPU timed: kernels are the compiler's guess"
    seconds, cpu_seconds = report["compile_seconds"], report["compile_cpu_seconds"]
    peaks = f"{chip.flops / TERA:.0f} TFLOP/s and {gib(report['limit'])} each"
    return [
        f"topology      {report['topology']}: {devices} devices, {peaks}",
        f"compiler      {compiler}, {level} level, {seconds:.0f} s ({cpu_seconds:.0f} s of CPU)",
        f"mesh          {mesh}; batch {report['batch_size']} = {images:g} images per {unit(report)}",
        f"parameters    {report['parameters'] / 1e6:.1f} M trained",
    ]


def memory(report: dict) -> list[str]:
    peak, limit = report["peak"], report["limit"]
    parts = {name: report[f"{name}_bytes"] for name in ("parameter", "optimizer", "frozen", "batch")}
    parts["activations and the rest"] = max(0, peak - sum(parts.values()))
    fits = "FITS" if report["fits"] else "DOES NOT FIT"
    return [
        f"memory        peak {gib(peak)} of {gib(limit)} per {unit(report)} ({100 * peak / limit:.0f} %): {fits}",
        f"              {', '.join(f'{name} {gib(size)}' for name, size in parts.items())}",
    ]


def work(report: dict) -> list[str]:
    best, level = report["estimate"], report["level"]
    useful, executed = report["useful_flops"], report["executed_flops"]
    kinds = sorted(report.get("collectives", {}).items())
    moved = ", ".join(f"{kind} {entry['count']} x, {gib(entry['bytes'])}" for kind, entry in kinds) or "none"
    times = {name: f"{1000 * seconds:.0f} ms" for name, seconds in best["seconds"].items()}
    lines = [
        f"FLOPs         {useful / TERA:.0f} T useful, {executed / TERA:.0f} T executed "
        f"({100 * useful / executed:.0f} % useful); {executed / report['devices'] / TERA:.1f} T per {unit(report)}",
        f"collectives   {moved}",
        f"at best       {times[best['bound']]}, bound by {best['bound']} "
        f"({', '.join(map(' '.join, times.items()))}): MFU at most {100 * best['mfu_ceiling']:.0f} %",
    ]
    if best["longest"] != best["bound"]:
        lines.append(f"              longest is {best['longest']}, {times[best['longest']]}, of this {level} program; "
                     "level default says what is left of it")  # fmt: skip
    if report["donated"]:
        lines.append(f"schedule      {report['steps']} steps (epoch of {report['num_train']} images): "
                     f"at least {best['days']:.2f} days, {best['chip_hours']:.0f} chip-hours")  # fmt: skip
    if report.get("cycles") and level == "default":
        lines.append(f"cycles        {report['cycles'] / 1e6:.0f} M a step by the compiler's own model, "
                     "without collectives; not validated")  # fmt: skip
    return lines
