"""Plan mode: what it makes of a compiler's report, exit statuses, and one real compile where libtpu is installed."""

import json
import os
import subprocess
import sys

import jax
import programs
import pytest

from addp_jax import errors, partition
from addp_jax.planning import compile_only, plan, topologies

GIB = 2**30
REPORT = {
    "topology": "v5e:16x16", "kind": "v5e", "devices": 256, "chips": 256, "level": "O0", "limit": 15.75 * GIB, "peak": 4 * GIB,
    "mesh": {"data": 16, "fsdp": 16, "tensor": 1}, "batch_size": 4096, "steps": 1000, "num_train": 10**6, "parameters": 4 * 10**8,
    "parameter_bytes": GIB // 10, "optimizer_bytes": GIB // 5, "frozen_bytes": GIB, "batch_bytes": 10**6, "donated": 3 * GIB // 10,
    "aliased": 3 * GIB // 10, "executed_flops": 197e12 * 256 // 10, "useful_flops": 197e12 * 256 * 9 // 100, "compile_seconds": 30.0, "compile_cpu_seconds": 25.0,
    "collectives": {"all-gather": {"count": 300, "bytes": GIB}, "all-reduce": {"count": 10, "bytes": GIB // 4}},
    "cycles": 0, "hbm_traffic": 819e9 // 20, "libtpu": "0.0.42.1", "libtpu_wanted": "libtpu==0.0.42.*",
}  # fmt: skip
NEEDS_TOO_MUCH = {name: value for name, value in REPORT.items() if name not in ("peak", "collectives")} | {"needed": 20 * GIB, "error": "RESOURCE_EXHAUSTED"}
REQUEST = plan.Request("v5e-256")


@pytest.fixture
def answer(monkeypatch):
    """`answer(*reports)`: what the compiler says the first time, the second, ..."""

    def prepare(*reports):
        asked, left = [], list(reports)

        def compile_in_child(config, request):
            asked.append(config)
            return dict(left.pop(0) if len(left) > 1 else left[0])

        monkeypatch.setattr(plan, "compile_in_child", compile_in_child)
        monkeypatch.setattr(plan, "require_compiler", lambda kind: None)
        return asked

    return prepare


def fields():
    return programs.fields("vitl", "").to_dict()


def test_a_program_that_fits(answer, capsys):
    answer(REPORT)
    assert plan.plan(fields(), REQUEST) == plan.FITS == 0
    out = capsys.readouterr().out
    for words in ("FITS", "peak 4.00 GiB of 15.75 GiB per chip", "16 images per chip", "all-gather 300 x, 1.00 GiB", "90 % useful"):
        assert words in out
    assert "100 ms, bound by compute" in out and "MFU at most 90 %" in out
    assert "1000 steps" in out and "7 chip-hours" in out and "warning" not in out


def test_the_slowest_part_bounds_the_step():
    assert plan.estimate(REPORT | {"hbm_traffic": 819e9 // 4})["bound"] == "compute"  # O0 moves more than need be
    best = plan.estimate(REPORT | {"hbm_traffic": 819e9 // 4, "level": "default"})
    assert best["bound"] == "HBM" and round(best["step_seconds"], 3) == 0.25 and round(best["mfu_ceiling"], 2) == 0.36
    assert plan.estimate(REPORT | {"collectives": {"all-reduce": {"count": 1, "bytes": 50e9}}})["bound"] == "interconnect"


def test_what_does_not_fit_and_what_would(answer, capsys):
    asked = answer(NEEDS_TOO_MUCH, REPORT | {"peak": 16 * GIB}, NEEDS_TOO_MUCH, REPORT | {"peak": 3 * GIB})
    assert plan.plan(fields(), REQUEST) == plan.DOES_NOT_FIT == 1
    out = capsys.readouterr().out
    assert "over 20.00 GiB needed, 15.75 GiB there per chip: DOES NOT FIT" in out
    assert "--config.mesh.data=1 --config.mesh.fsdp=-1 --config.model.net.decoder.remat=full --config.model.net.encoder.remat=full --config.optim.accumulate=4 (peak 3.00 GiB)" in out
    assert [config["model"]["net"]["decoder"]["remat"] for config in asked] == ["dots", "full", "full", "full"]


def test_nothing_that_was_tried_fits(answer, capsys):
    asked = answer(NEEDS_TOO_MUCH)
    assert plan.plan(fields(), plan.Request("v5e-256", "sample")) == plan.DOES_NOT_FIT
    assert "nothing that was tried" in capsys.readouterr().out
    assert [config["generate"]["batch_size"] for config in asked] == [0, 2048, 1024, 512, 256]


def test_a_memory_time_that_is_longer_than_the_bound_is_told(answer, capsys):
    answer(REPORT | {"hbm_traffic": 819e9 * 0.163})
    plan.plan(fields(), REQUEST)
    out = capsys.readouterr().out
    assert "100 ms, bound by compute (compute 100 ms, HBM 163 ms" in out
    assert "longest is HBM, 163 ms, of this O0 program; level default" in out


@pytest.mark.parametrize("change, longest, bound", [
    ({}, "compute", "compute"), ({"hbm_traffic": 819e9}, "HBM", "compute"), ({"hbm_traffic": 819e9, "level": "default"}, "HBM", "HBM"),
    ({"collectives": {"all-reduce": {"count": 1, "bytes": 50e9}}, "hbm_traffic": 819e9 * 0.6}, "interconnect", "interconnect"),
])  # fmt: skip
def test_the_longest_time_is_named_beside_the_bound(change, longest, bound, answer, capsys):
    best = plan.estimate(REPORT | change)
    assert (best["longest"], best["bound"]) == (longest, bound)
    assert best["seconds"][longest] == max(best["seconds"].values())
    answer(REPORT | change)
    plan.plan(fields(), REQUEST)
    assert ("longest is" in capsys.readouterr().out) == (longest != bound)


def test_a_task_that_trains_on_computed_features_is_planned_without_them():
    fields = programs.fields("demo_probe").to_dict()
    run = compile_only.build(fields, partition.make_mesh(partition.Config(), jax.devices()[:1]))
    _, (_, frozen, batch), sizes = compile_only.training(run, fields)
    assert {name: leaf.shape for name, leaf in batch.items()} == {"features": (8, 16), "label": (8,)}
    assert sizes["batch_size"] == 8 and jax.tree.leaves(frozen)


@pytest.mark.parametrize("kind", compile_only.PROGRAMS)
def test_a_plan_runs_nothing(kind):
    """The compiler's devices cannot: an array made in passing would end the plan."""
    tiny = programs.fields("demo_addp", "tiny").to_dict()
    run, compiled = compile_only.build(tiny, partition.make_mesh(partition.Config(), jax.devices()[:1])), []
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(lambda name, _, **more: compiled.append(name))
    try:
        with jax.set_mesh(run.mesh):
            compile_only.PROGRAMS[kind](run, tiny)
    finally:
        jax.monitoring.clear_event_listeners()
    assert not [name for name in compiled if "backend_compile" in name]


@pytest.mark.parametrize("change, words", [
    ({"collectives": {"all-gather": {"count": 1, "bytes": 57 * GIB}}}, "collectives move 57.00 GiB a step, over 2.98 GiB"),
    ({"collectives": {"all-to-all": {"count": 1, "bytes": GIB}}}, "all-to-all of 1.00 GiB"),
    ({"aliased": 0}, "donation is lost"),
    ({"libtpu": "0.0.52"}, "libtpu 0.0.52 is installed, this jax asks for libtpu==0.0.42.*"),
    ({"unreadable": "INTERNAL"}, "cannot be printed"),
])  # fmt: skip
def test_warnings(change, words):
    (found,) = plan.warnings(REPORT | change)
    assert words in found


@pytest.mark.parametrize("message, gib", [
    ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (18.52G) exceeds available HBM (15.75G).", 18.52),
    ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 1.5T of 15.75G hbm.", 1536),
])  # fmt: skip
def test_what_the_compiler_says_of_too_large_a_program(message, gib):
    assert compile_only.memory_needed(message) == gib * GIB
    assert compile_only.memory_needed("INTERNAL: Mosaic failed") is None


def test_json(answer, capsys):
    answer(REPORT)
    plan.plan(fields(), plan.Request("v5e-256", json=True))
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["estimate"]["bound"] == "compute" and found["collectives"]["all-gather"]["count"] == 300


@pytest.mark.parametrize("script, words", [
    ("kill -ABRT $$", "the compiler died of SIGABRT"),
    ("echo boom >&2; exit 3", "the compiler exited with status 3: boom"),
    ("echo '{\"error\": \"INTERNAL: no\", \"limit\": 1}'", "could not tell: INTERNAL: no"),
    ("exit 0", "could not tell: the compiler ended without a report"),
    ("echo goodbye", "could not tell: the compiler ended without a report"),
    ("printf 'Error \\033[2J%0500d' 7 >&2; exit 4", "exited with status 4: Error \\x1b[2J0000"),
])  # fmt: skip
def test_a_compiler_that_fails_is_not_a_program_that_does_not_fit(script, words, tmp_path, monkeypatch, capsys):
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\ncat > /dev/null\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    monkeypatch.setattr(plan, "require_compiler", lambda kind: None)
    assert plan.plan(fields(), REQUEST) == plan.UNKNOWN == 2
    out = capsys.readouterr().out
    assert words in out and len(out.splitlines()) == 1 and len(out) < 300


def test_a_mistake_that_the_child_finds_is_the_users(tmp_path, monkeypatch):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\ncat > /dev/null\necho '{\"mistake\": \"config.batch_size: 7\"}'\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(errors.UserError, match="config.batch_size: 7"):
        plan.compile_in_child(fields(), REQUEST)


def test_a_missing_compiler_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
    for kind, extra in (("v5e", "plan"), ("h100", "plan-gpu")):
        with pytest.raises(errors.UserError, match=rf"pip install '.\[{extra}\]'"):
            plan.require_compiler(kind)


def test_the_real_compiler_on_a_tiny_step():
    """Parameters divided by four, updated in place; what is shuffled between devices is less than the images."""
    pytest.importorskip("libtpu", reason="needs pip install '.[plan]'")
    command = [sys.executable, "-m", "addp_jax.main", "--mode=plan", "--config=configs/demo_addp.py:tiny", "--topology=v5e:2x2"]
    more = ["--json", "--config.mesh.fsdp=4", "--config.model.net.encoder.dropout=0.1"]
    done = subprocess.run(command + more, cwd=programs.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["fits"] and not found["warnings"] and found["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    assert found["parameter_bytes"] < 4 * found["parameters"] / 3 and found["aliased"] >= found["donated"]
    assert found["collectives"]["all-to-all"]["bytes"] < found["batch_bytes"] and found["executed_flops"] == found["useful_flops"]
    assert found["limit"] == 15.75 * topologies.GIB


@pytest.mark.parametrize("first", ["topologies", "plan"])
def test_the_compiler_runs_beside_another_process_that_holds_libtpu(first, tmp_path):
    pytest.importorskip("libtpu", reason="needs pip install '.[plan]'")
    hold = "from jax.experimental import topologies as t; t.get_topology_desc(platform='tpu', topology_name='v5e:2x2'); print('held', flush=True); input()"
    environment = {name: value for name, value in os.environ.items() if name != "ALLOW_MULTIPLE_LIBTPU_LOAD"}
    environment |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_LOG_DIR": "disabled", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-16"}
    describe = "from addp_jax.planning import topologies as t; print(len(t.describe(t.parse('v5e:2x2'))))"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True) as holder:
        try:
            holder.stdout.readline()  # or its end, where yet another process holds libtpu
            if first == "topologies":
                done = subprocess.run([sys.executable, "-c", describe], cwd=programs.ROOT, env=environment, capture_output=True, text=True, timeout=300)
                assert done.returncode == 0 and done.stdout.split()[-1] == "4", done.stderr
            else:
                found = plan.compile_in_child(programs.fields("demo_judge").to_dict(), plan.Request("v5e:2x2"))
                assert found.get("peak"), found
        finally:
            holder.kill()
