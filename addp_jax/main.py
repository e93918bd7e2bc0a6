"""Command line: `python -m addp_jax.main --config=configs/vitl.py --workdir=runs/vitl [--mode=train]`."""

from __future__ import annotations

import os
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from addp_jax import errors

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file; any field can be set: --config.batch_size=64")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run: checkpoints, logs, pictures")
NOMINAL_STEPS = 1000  # of an epoch, where nothing is trained and the training split is not opened
CONVERSIONS = ("import", "export")  # modes without a config
MODES = ["train", "evaluate", "generate", "predict", "features", "robustness", "benchmark", *CONVERSIONS]
MODE = flags.DEFINE_enum("mode", "train", MODES, "What to do; configs/base.py says what every field of config.MODE means")
WEIGHTS = flags.DEFINE_multi_string(
    "weights", [], "import: weight file; export: run folder or file with a network that --workdir lacks. May be repeated"
)
OUTPUT = flags.DEFINE_string("output", None, "export: file to write, .safetensors or .pth")
LAYOUT = flags.DEFINE_enum("layout", None, ["addp", "mage", "vqgan", "timm"], "export: whose tensor names")
EMA = flags.DEFINE_bool("ema", True, "export: the averaged parameters where there are; --noema: the raw ones")
FORCE = flags.DEFINE_bool("force", False, "export: replace an existing --output")


def parse(argv):
    """Flags, with every mistake in one line."""
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # configs import configs.base
    try:
        rest = flags.FLAGS(argv)
        if CONFIG.value is None and MODE.value not in CONVERSIONS:
            raise ValueError("--config is missing: give a file, such as --config=configs/demo_tokenizer.py")
        return rest
    except Exception as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


def convert() -> None:
    from addp_jax.interop import convert

    if MODE.value == "import":
        return convert.import_weights(WEIGHTS.value, WORKDIR.value)
    return convert.export_weights(WORKDIR.value, WEIGHTS.value, OUTPUT.value, LAYOUT.value, EMA.value, FORCE.value)


def run() -> None:
    from addp_jax import benchmark, evaluate, generate, predict, robustness, schema, sweep, train

    fields = CONFIG.value.to_dict()
    config = schema.build(train.Config, fields)
    if MODE.value == "benchmark":
        return benchmark.benchmark(config)
    if not WORKDIR.value:
        raise errors.UserError("--workdir is missing: give a folder for checkpoints, logs and pictures")
    if MODE.value == "train":
        print(CONFIG.value)
        return train.train(config, WORKDIR.value)
    program = train.build(config, num_train=config.batch_size * NOMINAL_STEPS)
    if MODE.value == "evaluate":
        return evaluate.evaluate(program, WORKDIR.value)
    if MODE.value in ("predict", "features"):
        run_mode = predict.predict if MODE.value == "predict" else predict.write_features
        return run_mode(program, schema.build(predict.Config, config.predict, "config.predict"), WORKDIR.value)
    if MODE.value == "robustness":
        settings = schema.build(robustness.Config, config.robustness, "config.robustness")
        return robustness.robustness(program, settings, WORKDIR.value)
    settings = schema.build(generate.Config, config.generate, "config.generate")
    run_mode = sweep.sweep if settings.sweep else generate.generate
    return run_mode(program, settings, WORKDIR.value)


def main(argv) -> None:
    if len(argv) > 1:
        print(f"error: {argv[1]!r} is not a flag; see --help", file=sys.stderr)
        sys.exit(2)
    logging.set_verbosity(logging.WARNING)  # jax tells of every backend it does not find
    try:
        convert() if MODE.value in CONVERSIONS else run()
    except errors.UserError as error:
        print("error:", error, file=sys.stderr)
        sys.exit(2)


def entry() -> None:
    app.run(main, flags_parser=parse)


if __name__ == "__main__":
    entry()
