"""addp_jax.lock: one run at a time in a work directory, told by real processes."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from addp_jax import errors
from addp_jax.weights import lock

pytestmark = pytest.mark.medium

HOLD = """
import os, sys, time
from addp_jax.weights import lock
with lock.hold(sys.argv[1]):
    if len(sys.argv) == 2 or os.fork() == 0:
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def holder(workdir, *arguments):
    """A process that holds the lock, and the number of the one that said it is ready: itself, or the child that it forked."""
    command = [sys.executable, "-c", HOLD, str(workdir), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"XLA_FLAGS": ""})
    try:
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


def write(workdir, **fields):
    record = {"host": socket.gethostname(), "boot": lock._boot(), "pid": os.getpid(), "start": lock._start(os.getpid()), "since": "noon"}
    (workdir / lock.NAME).write_text(json.dumps(record | fields))


def refused(workdir, name="workdir"):
    with pytest.raises(errors.UserError) as caught, lock.hold(workdir, name):
        pass
    return str(caught.value)


def taken(workdir):
    with lock.hold(workdir):
        assert json.loads((workdir / lock.NAME).read_text())["pid"] == os.getpid()
    return not (workdir / lock.NAME).exists()


def test_a_second_start_is_refused_until_the_first_ends(tmp_path):
    with holder(tmp_path) as (process, _):
        expected = (
            rf"{tmp_path}: a run is at work here \(process {process.pid} on {socket.gethostname()} since 20.*\); "
            "wait for it, stop it, or use another workdir"
        )
        assert re.fullmatch(expected, refused(tmp_path))
        process.send_signal(signal.SIGSTOP)
        assert re.fullmatch(expected, refused(tmp_path))
        process.kill()
        process.wait()
        assert taken(tmp_path)


def test_a_forked_child_that_outlives_the_holder_keeps_nobody_out(tmp_path):
    with holder(tmp_path, "fork") as (process, child):
        assert "at work" in refused(tmp_path)
        process.kill()
        process.wait()
        try:
            os.kill(child, 0)  # is there
            assert taken(tmp_path)
        finally:
            os.kill(child, signal.SIGKILL)


def test_the_lock_is_held_within_one_process_too_and_ends_with_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), lock.hold(tmp_path / "new"):
        assert f"process {os.getpid()} " in refused(tmp_path / "new", "--output")
        assert f"process {os.getpid()} " in refused(tmp_path / "new")
        1 / 0
    assert taken(tmp_path / "new") and not os.listdir(tmp_path / "new")


@pytest.mark.parametrize("text", ["", "{", "\0" * 40, "3", "[" * 5000, '{"pid": "x\\n"}', '{"host": 1, "pid": -1}'])
def test_a_file_that_names_nobody_is_taken_over(tmp_path, text):
    (tmp_path / lock.NAME).write_text(text)
    os.utime(tmp_path / lock.NAME, (0, 0))
    assert taken(tmp_path)
    if text in ("", "{"):
        (tmp_path / lock.NAME).write_text(text)  # just now: its holder may be writing
        assert taken(tmp_path)


@pytest.mark.parametrize("fields", [{"pid": 2**22 + 7}, {"pid": 10**30}, {"start": "1"}, {"boot": "another"}])
def test_a_dead_process_of_this_host_is_taken_over(tmp_path, fields):
    write(tmp_path)
    assert "at work" in refused(tmp_path)
    write(tmp_path, **fields)
    assert taken(tmp_path)


@pytest.mark.parametrize("shared", [True, False])
def test_another_host_counts_as_long_as_its_heart_beats(tmp_path, monkeypatch, shared):
    if not shared:
        monkeypatch.setattr(lock, "_flock", lambda descriptor: True)
    write(tmp_path, host="far\x1b[2J")
    assert f"(process {os.getpid()} on far\\x1b[2J since noon)" in refused(tmp_path)
    for age in (lock.STALE_SECONDS + 5, -1e6):
        write(tmp_path, host="far")
        os.utime(tmp_path / lock.NAME, (time.time() - age,) * 2)
        assert taken(tmp_path)


def test_without_locks_of_the_file_system_the_name_in_the_file_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_flock", lambda descriptor: True)
    with holder(tmp_path) as (process, _):
        assert f"process {process.pid} " in refused(tmp_path)
    assert taken(tmp_path)


def test_the_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.05)
    with lock.hold(tmp_path):
        os.utime(tmp_path / lock.NAME, (0, 0))
        deadline = time.time() + 20
        while (tmp_path / lock.NAME).stat().st_mtime < 1e9 and time.time() < deadline:
            time.sleep(0.02)
        assert (tmp_path / lock.NAME).stat().st_mtime > 1e9


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("elsewhere", path)])
def test_what_cannot_be_a_lock_is_named(tmp_path, make):
    make(tmp_path / lock.NAME)
    assert refused(tmp_path) == f"workdir: cannot lock {tmp_path}/lock: not a regular file; delete it"


def test_folders_that_cannot_be_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    assert "--output: cannot write to" in refused(tmp_path / "file/run", "--output")
    assert "gs://bucket/run is a URL" in refused("gs://bucket/run")


MEMBER = """
import sys
from addp_jax import errors, processes; from addp_jax.weights import lock
processes.start(sys.argv[2], 2, int(sys.argv[3]), interruptible=False)
try:
    with lock.hold(sys.argv[1]):
        sys.stderr.write("held")
except errors.UserError as error:
    sys.stderr.write(str(error))
processes.agreed(True)
"""


def two_members(workdir):
    """What each of two processes of one run says."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    members = [
        subprocess.Popen(
            [sys.executable, "-c", MEMBER, str(workdir), address, str(number)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"XLA_FLAGS": ""},
        ) for number in range(2)
    ]  # fmt: skip
    return [member.communicate(timeout=120)[1].splitlines()[-1] for member in members]


def test_processes_of_one_run_hold_one_lock_and_give_one_line(tmp_path):
    assert two_members(tmp_path) == ["held", "held"]
    with lock.hold(tmp_path):
        one, other = two_members(tmp_path)
        assert one == other and f"(process {os.getpid()} on " in one
