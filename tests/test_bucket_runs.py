"""Runs whose work directory is in a bucket: killed and resumed, read by other modes, saved by two processes."""

import importlib.util
import json
import os
import subprocess
import sys
import time

import fake_gcs
import jax
import launching
import numpy as np
import programs
import pytest
import test_main
import test_processes

from addp_jax.weights import buckets, checkpoint

pytestmark = [
    pytest.mark.medium,
    pytest.mark.skipif(not importlib.util.find_spec("gcsfs"), reason="needs the extra gs"),
]

STEPS, PATIENCE = 15, 180.0
LATENCY = 0.01  # seconds a request


def arguments(workdir):
    return (
        test_main.TINY, f"--workdir={workdir}", f"--config.steps={STEPS}", "--config.checkpoint.every=3",
        "--config.eval_every=6", "--config.optim.ema_decay=0.9", "--config.data.threads=2",
    )  # fmt: skip


@pytest.fixture
def server(monkeypatch):
    with fake_gcs.running() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        server.seconds = LATENCY
        yield server


def newest(server, run="a") -> int:
    prefix = f"bucket/runs/{run}/checkpoints/"
    return max(buckets.committed([name.removeprefix(prefix) for name in list(server.objects)]), default=0)


def lines(text) -> list[dict]:
    """The log without what differs between any two runs."""
    logged = [json.loads(line) for line in text.splitlines()]
    values = [{name: value for name, value in line.items() if "pace/" not in name} for line in logged]
    return [value | {"time": 0} for value in values if len(value) > 2]


def test_a_run_in_a_bucket_that_is_killed_ends_as_one_on_a_disk(server, tmp_path):
    status, _, problems = test_main.call(*arguments(tmp_path / "whole"))
    assert status == 0, problems
    process, deadline = test_main.start(*arguments("gs://bucket/runs/a")), time.time() + PATIENCE
    while process.poll() is None and not newest(server) and time.time() < deadline:
        time.sleep(0.02)
    process.kill()
    _, problems = process.communicate()
    assert 0 < newest(server) < STEPS, problems
    assert "bucket/runs/a/lock" in server.objects  # the next run finds that its owner is gone
    status, output, problems = test_main.call(*arguments("gs://bucket/runs/a"))
    assert status == 0 and "damaged" not in problems, problems
    assert "bucket/runs/a/lock" not in server.objects and newest(server) == STEPS

    copy = buckets.fetched("gs://bucket/runs/a")
    for ema in (False, True):
        trees = [checkpoint.load_params(path, ema=ema) for path in (tmp_path / "whole", copy)]
        assert [info["step"] for _, info in trees] == [STEPS, STEPS]
        for one, other in zip(*(jax.tree.leaves(tree) for tree, _ in trees), strict=True):
            np.testing.assert_array_equal(one, other)
    assert lines(server.objects["bucket/runs/a/log.jsonl"].decode()) == lines((tmp_path / "whole/log.jsonl").read_text())
    for name in ("config.json", "curves.png", "parameters.txt", "checkpoints/identity.json"):
        assert f"bucket/runs/a/{name}" in server.objects
    assert sum("/tensorboard/events" in name for name in server.objects) >= 2

    status, output, problems = test_main.call(*arguments("gs://bucket/runs/a"), "--mode=evaluate")
    assert status == 0 and f"parameters of step {STEPS}" in output, problems
    export = ("--mode=export", "--layout=vqgan", f"--output={tmp_path / 'a.safetensors'}", "--workdir=gs://bucket/runs/a")
    assert test_main.call(*export)[0] == 0 and (tmp_path / "a.safetensors").stat().st_size > 0


def half_a_checkpoint(server, run) -> dict[str, bytes]:
    """The objects of a run as soon as a checkpoint has arrived and part of another one has."""
    deadline = time.time() + PATIENCE
    while time.time() < deadline:
        with server.guard:
            names = [name for name in server.objects if name.startswith(f"bucket/runs/{run}/")]
            steps = {int(part[4]) for name in names if (part := name.split("/"))[3] == "checkpoints" and part[4].isdecimal()}
            if 0 < newest(server, run) < max(steps, default=0):
                return {name: server.objects[name] for name in names}
        time.sleep(0.002)
    pytest.fail("no checkpoint has been seen on its way")


def test_two_processes_in_a_bucket_go_on_from_what_a_kill_leaves_there(server):
    server.seconds = 0.002  # a file for each array and device makes many requests
    flags = (
        "--config.mesh.fsdp=2", "--config.steps=6", "--config.checkpoint.every=2", "--config.eval_every=3", "--config.log_every=1",
        "--config.optim.ema_decay=0",
    )  # fmt: skip
    with test_processes.two("gs://bucket/runs/whole", *flags) as both:
        left = half_a_checkpoint(server, "whole")
        status, _, problems = both.end()
    assert status == 0, problems
    with server.guard:
        server.objects |= {name.replace("/whole/", "/killed/", 1): data for name, data in left.items()}
    begun = newest(server, "killed")
    with test_processes.two("gs://bucket/runs/killed", *flags) as both:
        status, _, problems = both.end()
    assert status == 0 and "damaged" not in problems and 0 < begun < newest(server, "killed") == 6, problems
    logs = [lines(server.objects[f"bucket/runs/{run}/log.jsonl"].decode()) for run in ("whole", "killed")]
    assert logs[0] == logs[1] and len(logs[0]) == 8
    trees = [checkpoint.load_params(buckets.fetched(f"gs://bucket/runs/{run}"), ema=True)[0] for run in ("whole", "killed")]
    for one, other in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_array_equal(one, other)
    parts = {name.split("/")[-2] for name in server.objects if "killed/checkpoints/6/state/" in name}
    assert len(parts) > 2, parts


PROCESS = """
import contextlib, os, sys
import jax, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
from addp_jax import partition, processes
from addp_jax.weights import checkpoint, mirror

url, port, number, count, last = sys.argv[1], *map(int, sys.argv[2:])
if count > 1:
    processes.start(f"127.0.0.1:{port}", count, number, interruptible=False)
mesh = partition.make_mesh(partition.Config())
sharding = partition.batch_sharding(mesh)
array = lambda seed: jax.make_array_from_callback((8, 4), sharding, lambda at: np.random.default_rng(seed).random((8, 4), np.float32)[at])
shapes = {"params": {"split": jax.ShapeDtypeStruct((8, 4), np.float32, sharding=sharding)}}
with mirror.opened(url, trains=True) as folder, contextlib.closing(checkpoint.Checkpointer(folder, checkpoint.Config(), {"a": 1})) as saver:
    state, step = saver.restore_latest(shapes) or (None, 0)
    if step:
        for shard in state["params"]["split"].addressable_shards:
            np.testing.assert_array_equal(shard.data, np.random.default_rng(step).random((8, 4), np.float32)[shard.index])
    for new in range(step + 1, last + 1):
        saver.save(new, {"params": {"split": array(new)}})
processes.agreed(True)  # the first one may still be writing
print("from", step, file=sys.stderr, flush=True)
if count > 1:
    jax.distributed.shutdown()
os._exit(0)  # a thread waits for mistakes of the others
"""


def run_processes(url, count, last):
    port = launching.free_port()
    commands = [[sys.executable, "-c", PROCESS, url, *map(str, (port, number, count, last))] for number in range(count)]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    started = [
        subprocess.Popen(command, cwd=programs.ROOT, env=environment, text=True, stderr=subprocess.PIPE) for command in commands
    ]
    problems = [process.communicate(timeout=PATIENCE)[1] for process in started]
    assert not any(process.returncode for process in started), problems
    return problems


def test_several_processes_save_what_each_has(tmp_path):
    url = f"file://{tmp_path}/run"
    assert all("from 0" in text for text in run_processes(url, 2, last=2))
    files = buckets.Bucket(f"{url}/checkpoints").sizes()
    assert buckets.committed(files) == [2, 1]
    assert {f"2/state/params.split/{device}.0" for device in range(4)} <= files.keys()
    assert all("from 2" in text for text in run_processes(url, 1, last=4))
    assert all("from 4" in text for text in run_processes(url, 2, last=4))
    assert checkpoint.load_params(buckets.fetched(url), ema=False)[1]["step"] == 4
