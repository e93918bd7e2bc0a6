"""Command line: `python -m addp_jax.main --config=configs/vitl.py --workdir=runs/vitl [--mode=train]`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import zlib

from absl import app, flags, logging
from ml_collections import config_flags

from addp_jax import errors, files, logs

MESSAGE_LENGTH = 2000  # characters of an error that are shown
CONFIG = config_flags.DEFINE_config_file("config", None, "Config file; any field can be set: --config.batch_size=64")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run: checkpoints, logs, pictures")
HELP = ("--help", "-help", "-h", "--helpshort", "--helpfull", "--helpxml")
INTERRUPTED = 130  # exit status after Ctrl-C where there is nothing to save
LIBTPU_STACK = "fibers_default_thread_stack_size"  # bytes; on its own 64 KiB the compiler of libtpu 0.0.42 dies of fused attention
CACHE = "JAX_COMPILATION_CACHE_DIR"
CONVERSIONS = ("import", "export")  # modes without a config
MODES = ["train", "evaluate", "generate", "search", "predict", "features", "robustness", "check", "benchmark", "plan", *CONVERSIONS]  # modes.MODES and three more
MODE = flags.DEFINE_enum("mode", "train", MODES, "What to do; configs/base.py says what every field of config.MODE means")
WEIGHTS = flags.DEFINE_multi_string(
    "weights", [], "import: weight file; export: run folder or file with a network that --workdir lacks. May be repeated"
)
OUTPUT = flags.DEFINE_string("output", None, "export: file to write, .safetensors or .pth; benchmark: .json")
BASELINE = flags.DEFINE_string("baseline", None, "benchmark: an earlier run's --output, whose seconds are compared")
LAYOUT = flags.DEFINE_enum("layout", None, ["addp", "mage", "vqgan", "finetune", "timm", "detectron2", "mmsegmentation"], "export: whose tensor names")
EMA = flags.DEFINE_bool("ema", True, "export: the averaged parameters where there are; --noema: the raw ones")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "This is one of several processes, which Slurm, TPU metadata or Open MPI tell of; or the flags below"
)
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT on which process 0 listens for the others")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator: how many there are")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator: which of them this is, from 0")
FORCE = flags.DEFINE_bool("force", False, "export: replace an existing --output")
TOPOLOGY = flags.DEFINE_string("topology", None, "plan: what to compile for: v5e:16x16, v5e-256, v4-256, v5p-128, v6e-256, h100x8")
NUM_SLICES = flags.DEFINE_integer("num_slices", 1, "plan: TPU slices of this topology")
PROGRAM = flags.DEFINE_enum("program", "train", ["train", "sample"], "plan: the training step, or the sampler of --mode=generate")
LEVEL = flags.DEFINE_enum("level", "O0", ["O0", "default"], "plan: effort of the compiler; default takes ten times as long")
JSON = flags.DEFINE_bool("json", False, "plan: print one JSON line")


def parse(argv):
    """Flags, with every mistake in one line; a request for help ends with status 0."""
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # configs import configs.base
    try:
        require_config_file(argv)
        rest = flags.FLAGS(argv)
        if CONFIG.value is None and MODE.value not in CONVERSIONS:
            raise ValueError("--config is missing: give a file, such as --config=configs/demo_tokenizer.py")
        return rest
    except SystemExit:  # only a request for help ends here, and absl calls it a failure
        sys.exit(0 if any(argument in HELP for argument in argv[1:]) else 1)
    except errors.UserError as error:
        text = str(error)
    except Exception as error:
        text = unknown_field(error, argv) or unfolded(error)
    print("error:", files.printable(text, MESSAGE_LENGTH), file=sys.stderr)
    sys.exit(2)


def unfolded(error: Exception) -> str:
    """The message of an error of flags or of a config file, without the traceback that absl folds into some."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    folded = any(line.startswith("Traceback") for line in lines)
    text = f"{lines[0]} {lines[-1]}" if folded else " ".join(lines)
    if isinstance(error, (flags.Error, ValueError)) and text:
        return text
    return f"--config={CONFIG_ARGUMENT.get('path', '')}: {type(error).__name__}: {text}"


def unknown_field(error: Exception, argv) -> str:
    """What to say where a flag sets a field that the config does not have; "" for other errors."""
    # ml_collections folds one error into another, whose line break is then escaped.
    found = re.search(r"""'(\w+)\\?'(?:(?:\\n|\s)+Did you mean "(\w+)")?""", str(error))
    if not found or not isinstance(error, (AttributeError, KeyError)):
        return ""
    for argument in argv:
        flag = argument.split("=")[0]
        if re.match(r"--?config\.", flag) and found[1] in flag.split("."):
            return f"{flag}: no such field" + (f"; did you mean {found[2]}?" if found[2] else "")
    return ""


CONFIG_ARGUMENT = {}  # {"path": of the config file}, once the arguments were looked at


def require_config_file(argv) -> None:
    """Raises UserError if the file of --config is not there: its own error is two tracebacks."""
    values = [argument.split("=", 1)[1] for argument in argv if argument.startswith(("--config=", "-config="))]
    values += [after for before, after in zip(argv, argv[1:]) if before in ("--config", "-config")]
    for value in values:
        path = CONFIG_ARGUMENT["path"] = files.expand(value.split(":", 1)[0])
        if not os.path.isfile(path):
            hint = f"; did you mean {path}.py?" if os.path.isfile(f"{path}.py") else ""
            raise errors.UserError(f"--config={path}: {'no such file' if not os.path.exists(path) else 'not a file'}{hint}")
        if not path.endswith(".py"):
            raise errors.UserError(f"--config={path}: a config is a Python file that ends in .py")


def convert() -> None:
    from addp_jax.weights import buckets, convert, mirror

    paths, workdir = [files.expand(path) for path in WEIGHTS.value], files.expand(WORKDIR.value or "")
    if MODE.value == "import":
        with mirror.opened(workdir, trains=True) as folder:
            return convert.import_weights(paths, folder)
    return convert.export_weights(buckets.fetched(workdir), paths, files.expand(OUTPUT.value or ""), LAYOUT.value, EMA.value, FORCE.value)


def plan_run() -> None:
    from addp_jax.planning import plan

    if not TOPOLOGY.value:
        raise errors.UserError("topology is missing: what to compile for, such as --topology=v5e:16x16")
    request = plan.Request(TOPOLOGY.value, PROGRAM.value, NUM_SLICES.value, LEVEL.value, JSON.value)
    sys.exit(plan.plan(CONFIG.value.to_dict(), request))


def run() -> None:
    from addp_jax import modes, processes
    from addp_jax.planning import benchmark

    measured = MODE.value == "benchmark"
    earlier = benchmark.read(files.expand(BASELINE.value)) if measured and BASELINE.value else None
    members = (COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    configs = modes.split(CONFIG.value.to_dict())  # a mistake there is said before the other processes are waited for
    if DISTRIBUTED.value or any(value is not None for value in members):
        processes.start(*members, interruptible=MODE.value == "train")
    if MODE.value == "train":
        print(CONFIG.value)
    with processes.as_one():
        result = modes.run(MODE.value, *configs, WORKDIR.value or "")
        if measured and OUTPUT.value:
            files.write_text(files.expand(OUTPUT.value), json.dumps(result, indent=1) + "\n")
        if earlier is not None:
            benchmark.compare(result, earlier)
        processes.agreed(True)  # the first one may still be writing


def flagged(message: str) -> str:
    """The message of an error, with the spelling of the flag where it begins with the name of a field or of a flag."""
    name = re.match(r"[\w.]+", message)
    known = name and (name[0].startswith("config.") or name[0] in flags.FLAGS)
    return f"--{message}" if known else message


def main(argv) -> None:
    sys.stdout, sys.stderr = map(logs.Lasting, (sys.stdout, sys.stderr))
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be text
    if len(argv) > 1:
        print(f"error: {argv[1]!r} is not a flag; see --help", file=sys.stderr)
        sys.exit(2)
    logging.set_verbosity(logging.WARNING)  # jax tells of every backend it does not find
    try:
        plan_run() if MODE.value == "plan" else convert() if MODE.value in CONVERSIONS else run()
    except errors.UserError as error:
        from addp_jax import processes

        print(f"error: {processes.name()}{files.printable(flagged(str(error)), MESSAGE_LENGTH)}", file=sys.stderr)
        sys.exit(error.status)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def keep_programs() -> None:
    """Has JAX keep compiled programs between runs, in a folder of the user unless the environment names one.

    Each kind of processor has its own, since a program compiled for another one may die of an unknown instruction.
    """
    root, features = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), ""
    if CACHE in os.environ or root.startswith("~"):  # a user without a home
        return
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        features = next((line for line in file if line.lower().startswith(("flags", "features"))), "")
    folder = os.path.join(root, "addp_jax", f"xla-{zlib.crc32(features.encode()):08x}")
    with contextlib.suppress(OSError):  # where nothing can be written nothing is kept
        os.makedirs(folder, exist_ok=True)
        os.environ[CACHE] = folder


def entry() -> None:
    keep_programs()
    arguments = os.environ.get("LIBTPU_INIT_ARGS", "")
    if LIBTPU_STACK not in arguments:
        os.environ["LIBTPU_INIT_ARGS"] = f"{arguments} --{LIBTPU_STACK}={2**20}".lstrip()
    app.run(main, flags_parser=parse)


if __name__ == "__main__":
    entry()
