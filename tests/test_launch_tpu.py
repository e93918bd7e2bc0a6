"""`launch/tpu_pod.sh` and `launch/tpu_worker.sh`, whose slices and trainers are stand-ins."""

import os
import signal
import time

import launching
import programs
import pytest
from launching import RUN, Tools, wait_for

TPU = ("--name", "pod", "--zone", "us-west4-a", "--type", "v5litepod-16", "--version", "v2-alpha-tpuv5-lite")
STEPS = {" create ": "create", " delete ": "delete", "tpu-vm scp": "copy", "tpu_worker.sh start": "start", "tpu-vm start": "switch on"}


class Pod(Tools):
    """Tools with a Google Cloud, where a slice may be there already, and trainers that end as `script` says."""

    def __init__(self, folder, script: str, node: str = "", request: str = ""):
        super().__init__(folder)
        self.workdir = str(folder / "runs" / "run")
        self.add("git", f'tar czf "${{2#--output=}}" -C {programs.ROOT} launch/flags')
        for name in ("gcloud", "python3", "uv", "trainer"):
            self.add(name, getattr(launching, name.upper()))
        self.environment |= {"POLL": "0", "END_LIMIT": "5", "HOME": str(folder)}  # without a key for ssh
        (folder / "script").write_text(script + "\n")
        for name, state in (("node", node), ("request", request)):
            if state:
                (folder / name).write_text(state + "\n")

    def launch(self, *options, **environment):
        return self.start("tpu_pod.sh", *TPU, *options, RUN[0], self.workdir, RUN[2], **environment)

    def ended(self, *options, **environment):
        """Exit status, what was done with the slice, and all that was said."""
        process = self.launch(*options, **environment)
        output, problems = process.communicate(timeout=120)
        return process.returncode, self.steps, output + problems

    @property
    def steps(self) -> list[str]:
        return [step for call in self.calls if call.startswith("gcloud") for part, step in STEPS.items() if part in call]

    def read(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.exists() else ""

    def starts(self, host: str = "pod-0") -> int:
        return len(self.read(f"starts.{host}").splitlines())


@pytest.fixture
def pod(tmp_path):
    """`pod(script, ...)` is a Pod; at the end no worker may ever have had two trainers."""
    pods = []

    def make(*arguments):
        pods.append(Pod(tmp_path, *arguments))
        return pods[-1]

    yield make
    for each in pods:
        (each.folder / "finish").touch()
        assert each.read("two") == ""


def test_a_slice_is_asked_for_installed_on_and_kept(pod):
    tools = pod("0")
    status, steps, output = tools.ended("--spot", "--prepare", 'export MOUNTED="a b"', LIBTPU_INIT_ARGS="--not=carried")
    assert status == 0 and steps == ["create", "copy", "start"], output
    assert "WAITING_FOR_RESOURCES" in output and "step 1 of pod-0" in output and "is kept and costs money" in output
    [create] = [call for call in tools.calls if " create " in call]
    for part in ("--node-id=pod", "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot", "--zone=us-west4-a"):
        assert part in create
    trainers = [call for call in tools.calls if call.startswith("trainer")]
    command = f"trainer -u -m addp_jax.main --distributed --config={RUN[0]} --workdir={tools.workdir} {RUN[2]} "
    assert trainers == [command] * 2 and "uv pip install --quiet -e .[tpu,gs] " in tools.calls
    environment = tools.read("environment").splitlines()
    assert {"MOUNTED=a b", "JAX_PLATFORMS=tpu,cpu", f"JAX_COMPILATION_CACHE_DIR={tools.folder}/runs/xla_cache"} <= set(environment)
    [flags] = [line for line in environment if line.startswith("LIBTPU_INIT_ARGS")]
    assert "scoped_vmem_limit_kib=65536" in flags


def test_a_slice_that_is_there_is_used_and_deleted_if_so_asked(pod):
    status, steps, output = pod("0", "READY").ended("--delete")
    assert status == 0 and steps == ["copy", "start", "delete"] and "costs money" not in output


def test_several_slices_are_one_run(pod):
    tools = pod("0")
    flags = ("--gcloud-flag", "--reserved", "--gcloud-flag", "--network=mine", "--gcloud-ssh-flag", "--internal-ip")
    status, steps, output = tools.ended("--slices", "2", *flags)
    assert status == 0 and steps == ["create", "copy", "copy", "start", "start"], output
    [create] = [call for call in tools.calls if " create " in call]
    assert "--node-count=2 --node-prefix=pod " in create and "--reserved --network=mine" in create and "--node-id" not in create
    remote = [call for call in tools.calls if "tpu-vm ssh" in call or "tpu-vm scp" in call]
    assert all("--internal-ip" in call and "--reserved" not in call for call in remote)
    assert all(tools.starts(f"pod-{node}-{worker}") == 1 for node in (0, 1) for worker in (0, 1))


def test_a_slice_taken_away_is_made_again_and_the_run_goes_on(pod):
    tools = pod("gone gone gone 0")
    status, steps, output = tools.ended()
    again = ["delete", "create", "copy", "start"]
    assert status == 0 and steps == again[1:] + again * 3, output


@pytest.mark.parametrize("script, status, starts", [
    ("2 0", 2, 1), ("mistake 0", 2, 1), ("134 0", 0, 2), ("75 143 0", 0, 3), ("137 255 134 0", 134, 3), ("134 134 step 1 0", 0, 5),
])  # fmt: skip
def test_a_failed_run_is_started_again_while_there_are_new_checkpoints(script, status, starts, pod):
    tools = pod(script, "READY")
    found, steps, output = tools.ended()
    assert found == status and tools.starts() == tools.starts("pod-1") == starts == steps.count("start"), output
    assert ("without a new checkpoint" in output) == (status == 134) and "create" not in steps


@pytest.mark.parametrize("delete", [(), ("--delete",)])
def test_a_cloud_that_fails_now_and_then_changes_nothing(delete, pod):
    tools = pod("134 0", "READY", "ACTIVE")
    status, steps, output = tools.ended(*delete, FAIL_EVERY="3")
    assert status == 0 and tools.starts() == tools.starts("pod-1") == 2, output
    assert "create" not in steps and ("delete" in steps) == bool(delete)
    assert "503" in output


def test_a_slice_of_which_nothing_is_known_is_not_deleted(pod):
    status, steps, output = pod("0", "READY", "ACTIVE").ended("--delete", FAIL_EVERY="1")
    assert status == 1 and not steps and "has failed 12 times in a row" in output and "gcloud compute tpus queued-resources delete" in output


def test_a_request_that_is_refused_is_made_again_for_a_while(pod):
    tools = pod("0")
    (tools.folder / "broke").touch()
    status, steps, output = tools.ended("--delete")
    assert status == 1 and steps == ["create"] * 12 and "quota" in output and "costs money" not in output


@pytest.mark.parametrize("node, queued, expected", [
    ("TERMINATED", "ACTIVE", ["delete", "create"]), ("PREEMPTED", "", ["delete", "create"]), ("", "SUSPENDED", ["delete", "create"]),
    ("", "FAILED", ["delete", "create"]), ("CREATING", "SUSPENDING", ["delete", "create"]), ("STOPPED", "", ["switch on"]), ("STARTING", "ACTIVE", []),
    ("", "WAITING_FOR_RESOURCES", []),
])  # fmt: skip
def test_a_slice_is_deleted_only_in_a_state_that_has_no_future(node, queued, expected, pod):
    status, steps, output = pod("0", node, queued).ended()
    assert status == 0 and steps == [*expected, "copy", "start"], output


def test_a_state_has_a_time_limit_but_for_the_queue(pod):
    status, steps, output = pod("0", "REPAIRING", "ACTIVE").ended(STATE_LIMIT="1")
    assert status == 0 and steps == ["delete", "create", "copy", "start"], output


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_a_launcher_that_dies_is_started_again_and_finds_its_run(number, pod):
    tools = pod("wait 7", "READY")
    launcher = tools.launch("--delete", POLL="1")
    wait_for(lambda: tools.starts("pod-0") and tools.starts("pod-1"))
    launcher.send_signal(number)
    launcher.communicate(timeout=30)
    again = tools.launch("--delete", POLL="1")
    wait_for(lambda: sum("state" in call for call in tools.calls) > 4)
    (tools.folder / "finish").touch()
    output, problems = again.communicate(timeout=60)
    assert again.returncode == 0 and tools.starts() == tools.starts("pod-1") == 1, output + problems
    assert "following the run" in output and "step 1 of pod-0" in output and tools.steps[-1] == "delete" and tools.steps.count("delete") == 1


def test_the_run_goes_on_when_nobody_listens(pod):
    tools = pod("wait", "READY")
    launcher = tools.launch(POLL="1")
    wait_for(lambda: tools.starts("pod-1"))
    launcher.stdout.close()
    launcher.stderr.close()
    time.sleep(1)
    (tools.folder / "finish").touch()
    wait_for(lambda: all(tools.read(f"hosts/pod-{worker}/addp_run/status") == "0\n" for worker in (0, 1)))
    launcher.wait(timeout=30)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_the_run_which_saves(number, pod):
    tools = pod("wait", "READY")
    launcher = tools.launch("--delete", POLL="1")
    wait_for(lambda: tools.starts("pod-1"))
    launcher.send_signal(number)
    output, problems = launcher.communicate(timeout=60)
    assert launcher.returncode == 143, output + problems
    assert all((tools.folder / f"saved.pod-{worker}").exists() for worker in (0, 1)) and tools.steps[-1] == "delete"


def test_ctrl_c_in_the_queue_leaves_it(pod):
    tools = pod("0", "", "ACCEPTED")
    launcher = tools.launch("--delete", POLL="1")
    wait_for(lambda: tools.calls)
    launcher.send_signal(signal.SIGINT)
    output, problems = launcher.communicate(timeout=60)
    assert launcher.returncode == 143 and tools.steps == ["delete"], output + problems


def test_another_run_on_the_slice_is_left_alone(pod):
    tools = pod("wait", "READY")
    launcher = tools.launch(POLL="1")
    wait_for(lambda: tools.starts("pod-1"))
    status, _, problems = tools.call("tpu_pod.sh", *TPU, "--delete", RUN[0], "/another/run")
    assert status == 2 and "error: another run is on pod" in problems and "delete" not in tools.steps
    (tools.folder / "finish").touch()
    launcher.communicate(timeout=60)
    assert launcher.returncode == 0 and tools.starts() == 1


def test_a_worker_that_was_switched_off_does_not_claim_to_run(pod):
    """Its files are still there after a reboot, its processes are not."""
    tools = pod("wait", "READY")
    launcher = tools.launch(POLL="1")
    group = tools.folder / "hosts" / "pod-0" / "addp_run" / "group"
    wait_for(lambda: tools.starts("pod-0") and tools.starts("pod-1") and group.exists())
    launcher.kill()
    launcher.communicate()
    os.killpg(int(group.read_text()), signal.SIGKILL)
    (tools.folder / "script").write_text("wait 0\n")
    status, _, output = tools.ended()
    assert status == 0 and tools.starts() == tools.starts("pod-1") == 2 and "following" not in output, output


@pytest.mark.parametrize("missing", ["--name", "--zone", "--type", "--version"])
def test_a_missing_option_of_the_slice_is_named(missing, pod):
    tools, at = pod("0"), TPU.index(missing)
    status, _, problems = tools.call("tpu_pod.sh", *TPU[:at], *TPU[at + 2 :], *RUN)
    assert status == 2 and f"error: {missing} is missing" in problems and not tools.calls
