"""Two real processes, one of which reads its images from a mount that fails or is slow; a host without temporary room."""

import json
import pathlib
import socket
import subprocess
import sys
import time

import launching
import programs
import pytest
from test_processes import MINUTE, Launch, records

pytestmark = pytest.mark.medium

STEPS = 12
FLAGS = (
    "--config=configs/demo_classification.py:tiny", "--config.model.encoder_weights=", "--config.data.source=image_folder",
    "--config.data.num_train=0", "--config.data.eval_split=train", f"--config.eval_every={STEPS}", f"--config.steps={STEPS}",
    "--config.log_every=4",
)  # fmt: skip
SCRIPT = str(pathlib.Path(__file__).with_name("troubled.py"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    (root / "train").mkdir()
    programs.photos(root / "train", {f"{kind}/{number}.png": (48, 48) for kind in range(8) for number in range(4)})
    return f"--config.data.path={root}"


def start(workdir, photos, trouble, *flags):
    command = (sys.executable, SCRIPT, *FLAGS, f"--workdir={workdir}", photos, *flags)
    return Launch(*command, TROUBLE=json.dumps(trouble), PYTHONPATH=programs.ROOT)


def both(workdir, photos, second):
    """How two processes end, of which the second one reads with trouble, and the seconds that they took."""
    begun, flags, number = time.time(), (f"--coordinator=localhost:{launching.free_port()}", "--num_processes=2"), "--process_id="
    with start(workdir, photos, {}, *flags, number + "0") as sound, start(workdir, photos, second, *flags, number + "1") as other:
        return sound.end(), other.end(), time.time() - begun


def test_a_mount_that_fails_for_a_moment_is_waited_for_and_a_slow_host_is_named(tmp_path, photos):
    ends = both(tmp_path, photos, {"failing": [20, 22], "seconds": 0.1})[:2]
    assert [end[0] for end in ends] == [0, 0], ends
    assert [record["step"] for record in records(tmp_path, "train/")] == [4, 8, 12]
    assert records(tmp_path, "pace/")[-1]["pace/worst_process"] == 1
    assert f": process 1 ({socket.gethostname()}) waits " in ends[0][1]


def test_a_mount_that_is_gone_ends_all_with_a_status_that_asks_for_a_new_try(tmp_path, photos):
    *ends, seconds = both(tmp_path, photos, {"failing": [20, 10**9]})
    for status, _, problems in ends:
        assert status == 75 and "Traceback" not in problems, problems
        assert problems.count("error: process 1 of 2: cannot read ") == 1 and "Input/output error" in problems
    assert seconds < 5 * MINUTE  # of which most is the start on a loaded machine


FAULT = """
import sys
from addp_jax import processes
port, number = map(int, sys.argv[1:])
processes.start(f"localhost:{port}", 2, number, interruptible=False)
with processes.as_one():
    if number == 0:
        raise FileNotFoundError("a mark is gone")
    processes.agreed(True)
"""


def test_an_error_of_one_that_nobody_foresaw_ends_the_other():
    port = launching.free_port()
    with Launch(sys.executable, "-c", FAULT, str(port), "0") as first, Launch(sys.executable, "-c", FAULT, str(port), "1") as other:
        ends = first.end(), other.end()
    for status, _, problems in ends:
        assert status == 1 and "error: process 0 of 2: FileNotFoundError: a mark is gone" in problems, problems
    assert "Traceback" in ends[0][2]


def test_a_full_folder_of_temporary_files_stops_no_run(tmp_path, photos):
    disk = tmp_path / "tmp"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here (needs root)")
    try:
        with open(disk / "filler", "wb", buffering=0) as filler, pytest.raises(OSError):
            while True:
                filler.write(b"x" * 4096)
        command = (sys.executable, "-m", "addp_jax.main", *FLAGS, f"--workdir={tmp_path / 'run'}", photos)
        with Launch(*command, TMPDIR=str(disk)) as run:
            status, _, problems = run.end()
        assert status == 0, problems
        assert [record["step"] for record in records(tmp_path / "run", "train/")] == [4, 8, 12]
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
