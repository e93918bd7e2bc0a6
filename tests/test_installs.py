"""What a run leaves about its parameters and its devices, whom it warns, and what the files of the installation agree on."""

import configparser
import dataclasses
import gzip
import json
import os
import re
import runpy
import subprocess
import sys
import types

import jax
import numpy as np
import programs
import pytest
import setuptools

from addp_jax import errors, parameters, program
from addp_jax.planning import plan
from addp_jax.training import loop, reports
from addp_jax.weights import checkpoint


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Work directories of the same tiny run, with and without a profile."""
    folders = {profile: tmp_path_factory.mktemp(f"run{profile}") for profile in (0, 2)}
    for profile, folder in folders.items():
        config = dataclasses.replace(programs.config("demo_tokenizer"), profile=profile)
        loop.train(config, str(folder))
    return folders


@pytest.mark.medium
def test_a_profile_is_left_for_tensorboard(runs):
    [trace] = (runs[2] / "tensorboard" / "plugins" / "profile").glob("*/*.trace.json.gz")
    names = {event.get("name", "") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert any("step" in name for name in names)
    assert list(trace.parent.glob("*.xplane.pb"))
    assert not (runs[0] / "tensorboard" / "plugins").exists()


@pytest.mark.medium
def test_a_profile_changes_no_number_of_the_run(runs):
    params = [parameters.named_leaves(checkpoint.load_params(str(folder), ema=True)[0]) for folder in runs.values()]
    assert params[0].keys() == params[1].keys()
    assert all(np.array_equal(params[0][name], params[1][name]) for name in params[0])


@pytest.mark.medium
def test_a_run_lists_its_parameters(runs):
    params, _ = checkpoint.load_params(str(runs[0]), ema=True)
    text = (runs[0] / "parameters.txt").read_text()
    for name, leaf in parameters.named_leaves(params).items():
        assert re.search(rf"^\| {re.escape(name)} +\| {re.escape(str(leaf.shape))} ", text, re.MULTILINE)
    assert text.endswith(f"\nTotal: {sum(leaf.size for leaf in jax.tree.leaves(params)):,} -- {parameters.size(params):,} bytes\n")


def test_the_summary_counts_each_network(tmp_path):
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, np.float32)
    networks = {"net": {"kernel": shape(30, 50), "bias": shape(50)}, "discriminator": {"scale": shape()}}
    line = reports.parameters(tmp_path, networks)
    assert line == f"1,551 trained parameters (net 1,550, discriminator 1); {tmp_path}/parameters.txt lists them"
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.UserError, match="cannot write .*file/parameters.txt"):
        reports.parameters(tmp_path / "file", networks)


class Profiler:
    """Stands for clu's; notes what it is asked."""

    def __init__(self):
        self.calls = []

    def start(self, folder):
        self.calls.append(f"start {folder}")

    def stop(self):
        self.calls.append("stop")


@pytest.mark.parametrize("first, last, enabled, expected", [
    (3, 20, True, [(3, "start"), (7, "stop")]), (3, 5, True, [(3, "start"), (5, "stop")]), (1, 20, True, [(1, "start"), (5, "stop")]),
    (30, 20, True, []), (0, 20, True, []), (3, 20, False, []),
])  # fmt: skip
def test_the_steps_that_are_traced(first, last, enabled, expected, monkeypatch):
    monkeypatch.setattr(reports, "profiler", profiler := Profiler())
    trace, seen = reports.Trace("/run", first, enabled), []
    for step in range(1, last + 1):
        trace.before(step)
        trace.after(step, {}, step == last)
        seen += [(step, call.split()[0]) for call in profiler.calls]
        assert set(profiler.calls) <= {"start /run/tensorboard", "stop"}
        profiler.calls.clear()
    trace.close()
    assert seen == expected and not profiler.calls


def test_a_run_that_ends_early_writes_its_trace(monkeypatch):
    monkeypatch.setattr(reports, "profiler", profiler := Profiler())
    trace = reports.Trace("/run", 3)
    trace.before(3)
    trace.close()
    trace.close()
    assert profiler.calls == ["start /run/tensorboard", "stop"]


def test_no_number_depends_on_the_profile():
    config = programs.config("demo_tokenizer")
    same = dataclasses.replace(config, profile=100)
    assert program.schema.identity(config) == program.schema.identity(same)


@pytest.mark.parametrize("count, platform, warned", [
    (loop.LARGE + 1, "cpu", True), (loop.LARGE, "cpu", False), (10 * loop.LARGE, "gpu", False), (10 * loop.LARGE, "tpu", False),
])  # fmt: skip
def test_a_large_network_on_a_cpu_is_said_in_one_line(count, platform, warned, capsys):
    devices = np.array([types.SimpleNamespace(platform=platform)])
    params = {"net": {"a": jax.ShapeDtypeStruct((count - 1,), np.float32), "b": jax.ShapeDtypeStruct((), np.float32)}}
    loop.warn_of_cpu(types.SimpleNamespace(mesh=types.SimpleNamespace(devices=devices), params=params))
    output = capsys.readouterr()
    assert not output.out and output.err.count("\n") == warned
    assert ("pip install -e '.[cuda12]'" in output.err) == warned


# --- the files of the installation ----------------------------------------------------------------


@pytest.fixture(scope="module")
def extras():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **arguments: found.update(arguments))
        found = {}
        runpy.run_path(str(programs.ROOT / "setup.py"))
    return found["extras_require"]


def test_every_extra_that_is_named_exists(extras):
    """Of these spellings every pip finds the extra; older ones miss those with an underscore."""
    assert all(re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", name) for name in extras)
    paths = [path for folder in ("addp_jax", "launch") for path in (programs.ROOT / folder).rglob("*") if path.is_file()]
    texts = [path.read_text() for path in (*paths, programs.ROOT / "README.md", *(programs.ROOT / "docs").glob("*.md")) if path.suffix in (".py", ".sh", ".yaml", ".md")]
    named = {name for text in texts for name in re.findall(r"""["' ]\.\[([a-z0-9-]+)\]""", text)}
    assert {"tpu", "cuda12", "plan"} <= named <= extras.keys()


def test_each_accelerator_has_the_extra_of_jax(extras):
    assert {name: extras[name] for name in ("cuda12", "cuda13", "tpu")} == {
        "cuda12": ["jax[cuda12]"], "cuda13": ["jax[cuda13]"], "tpu": ["jax[tpu]"]
    }  # fmt: skip
    assert set(extras["test"]) < set(extras["ci"])
    assert [entry for entry in extras["ci"] if entry.startswith("torch==")]


@pytest.mark.slow
@pytest.mark.parametrize("extra, needed", [
    ("cuda12", ["nvidia-cudnn-cu12", "nvidia-nccl-cu12", "nvidia-cublas-cu12"]), ("cuda13", ["nvidia-cudnn-cu13", "nvidia-nccl-cu13", "nvidia-cublas"]), ("tpu", ["libtpu"]),
])  # fmt: skip
def test_an_extra_brings_all_that_its_accelerator_needs(extra, needed, extras):
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-", *extras[extra], "jax>=0.10,<0.12"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the package index does not answer: {done.stderr.strip()[-200:]}")
    assert set(needed) <= {entry["metadata"]["name"].lower() for entry in json.loads(done.stdout)["install"]}


@pytest.mark.medium
@pytest.mark.parametrize("chip, variable, mine", [
    ("v5e", "LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=1"), ("v5p", "LIBTPU_INIT_ARGS", ""), ("v6e", "LIBTPU_INIT_ARGS", ""), ("h100", "XLA_FLAGS", ""),
])  # fmt: skip
def test_the_compilers_know_the_flags_of_a_chip(chip, variable, mine):
    """One that they do not know ends the process."""
    if chip == "h100":
        program = "import jax; jax.devices()"  # every build of XLA knows the flags of all
    else:
        pytest.importorskip("libtpu", reason="needs pip install '.[plan]'")
        program = "from addp_jax.planning import topologies as t; t.describe(t.parse('v5e:2x2'))"
    environment = os.environ | plan.TPU_ENVIRONMENT | {variable: mine}
    shell = f". launch/flags/{chip}.env; printf '%s' \"${variable}\"; exec {sys.executable} -c \"{program}\""
    done = subprocess.run(["bash", "-c", shell], cwd=programs.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.startswith("--xla_") and done.stdout.endswith(f" {mine}")  # the last one wins


def test_the_files_that_mypy_reads_are_there():
    settings = configparser.ConfigParser()
    settings.read(programs.ROOT / "mypy.ini")
    assert all((programs.ROOT / path.strip()).is_file() for path in settings["mypy"]["files"].split(","))
