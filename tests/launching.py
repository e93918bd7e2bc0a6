"""Stand-ins for the programs that the launch scripts call, as hard as the real ones; they record what they were asked."""

import os
import pathlib
import signal
import socket
import subprocess
import time

import programs

LAUNCH = programs.ROOT / "launch"
RUN = ("configs/vitb.py", "/shared/run", "--config.data.path=/data/my images")


class Tools:
    """A folder of stand-in programs, first in PATH; every call adds a line to `calls`."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        outer = ("SLURM_", "TPU_", "JAX_", "XLA_", "ACCELERATOR", "EXTRAS", "VENV", "PYTHON")  # PYTHONPATH too
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
        return subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=heed_signals,
        )  # fmt: skip

    def call(self, script: str, *arguments, cwd=None, **environment):
        process = self.start(script, *arguments, cwd=cwd, **environment)
        output, problems = process.communicate(timeout=300)
        return process.returncode, output, problems

    @property
    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def heed_signals():
    """What ignores SIGINT, or nohup SIGHUP, passes that on, and bash does nothing about what it finds ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def wait_for(condition, seconds: float = 30):
    """Until `condition()` holds; its value."""
    deadline = time.time() + seconds
    while not (value := condition()):
        assert time.time() < deadline, "it has not happened"
        time.sleep(0.05)
    return value


# One task stands for all. `$TOOLS/script`: how each start ends, a word each; "wait" goes on until SIGTERM, "step" leaves a
# checkpoint and fails. As the real srun does, this one refuses a task without a processor and, given SIGTERM, kills the tasks.
SRUN = r"""
case "$*" in *--cpus-per-task=0*) echo "srun: error: Invalid numeric value" >&2; exit 1 ;; esac
env >"$TOOLS/environment"
read -r word rest <"$TOOLS/script"; echo "$rest" >"$TOOLS/script"
task() {
    trap 'sleep 0.5; touch "$TOOLS/saved"; exit 143' TERM
    touch "$TOOLS/up"
    case $word in
        wait) while :; do sleep 0.1; done ;;
        step) mkdir -p "$TOOLS/run/checkpoints/$RANDOM"; exit 134 ;;
        *) exit "$word" ;;
    esac
}
task & task=$!
echo $task >"$TOOLS/task"
trap 'kill -KILL $task' TERM
status=0
wait $task || status=$?
exit $status
"""
SCANCEL = r"""case "$*" in *--batch* | *--full*) exit 1 ;; *--signal=TERM*) kill -TERM "$(cat "$TOOLS/task")" ;; esac"""
SCONTROL = r"""case $1 in show) echo "   JobState=${JOB_STATE:-RUNNING} Reason=None" ;; esac"""

# Two workers to a node. `node`, `request`: the states, absent where the files are; each look moves them on. Every FAIL_EVERY-th
# call fails, half of them after it has done what was asked. The ssh of worker 1 breaks whenever it starts something, and is
# made again while the first command is still at work.
GCLOUD = r"""
here=$PWD; cd "$TOOLS"
exec 3>lock; flock 3
number=$(($(cat number 2>/dev/null || echo 0) + 1)); echo $number >number
flock -u 3; exec 3>&-
fail() { echo "ERROR: (gcloud) $1" >&2; exit 1; }
if [ $((number % ${FAIL_EVERY:-1000000})) = 0 ]; then
    [ $((number / FAIL_EVERY % 2)) = 0 ] || fail "UNAVAILABLE: 503"
    trap 'fail "UNAVAILABLE: 503, but it is done"' EXIT
fi
look() { # file
    local state
    [ -e "$1" ] || fail "NOT_FOUND: Resource $1 was not found"
    state=$(cat "$1"); echo "$state"
    case $1:$state in
        request:WAITING_FOR_RESOURCES) echo ACTIVE >request; echo CREATING >node ;;
        request:SUSPENDING) echo SUSPENDED >request; rm -f node ;;
        node:CREATING | node:STARTING) echo READY >node ;;
    esac
}
for argument; do case $argument in --command=*) command=${argument#*=} ;; --worker=*) worker=${argument#*=} ;; esac; done
[ "${worker:-}" != all ] || worker="0 1"
on_worker() {
    mkdir -p "hosts/$1"
    (cd "hosts/$1" && HOME=$PWD exec bash -c "$command")
}
case "$3 $4" in
    "queued-resources create")
        [ ! -e broke ] || fail "RESOURCE_EXHAUSTED: quota"
        [ ! -e request ] || fail "ALREADY_EXISTS: Resource 'pod' already exists"
        echo WAITING_FOR_RESOURCES >request ;;
    "queued-resources describe") look request ;;
    "tpu-vm describe") look node ;;
    "tpu-vm start") echo STARTING >node ;;
    *" delete")
        for group in hosts/*/addp_run/group; do [ ! -e "$group" ] || kill -KILL -- "-$(cat "$group")" 2>/dev/null; done
        rm -rf hosts request node ;;
    "tpu-vm scp")
        sources=()
        for argument in "${@:5}"; do case $argument in *:) node=${argument%:} ;; -*) ;; *) sources+=("$argument") ;; esac; done
        for each in $worker; do mkdir -p "hosts/$node-$each"; (cd "$here" && cp "${sources[@]}" "$TOOLS/hosts/$node-$each/"); done ;;
    "tpu-vm ssh")
        [ "$(cat node)" = READY ] || exit 255
        status=0
        for each in $worker; do
            case $each:$command in 1:*"start "* | 1:*--distributed*) on_worker "$5-1" & sleep 0.1 ;; esac
            on_worker "$5-$each" || status=$?
        done
        wait
        exit $status ;;
esac
"""
PYTHON3 = r"""
case "$*" in
    *"--target "*) folder=${*: -2:1}; mkdir -p "$folder/bin"; cp "$TOOLS/uv" "$folder/bin/uv" ;;
    *) echo "error: externally-managed-environment" >&2; exit 1 ;;
esac
"""
UV = """case $1 in venv) mkdir -p .venv/bin; cp "$TOOLS/trainer" .venv/bin/python ;; esac"""
# `$TOOLS/script` as above, the same for every worker; "gone" takes the slice away, of "mistake" one worker alone tells.
TRAINER = r"""
host=$(basename "$HOME")
exec 5>"$HOME/trains"; flock -n 5 || echo "$host" >>"$TOOLS/two"
env >"$TOOLS/environment"
echo start >>"$TOOLS/starts.$host"
echo "step 1 of $host"
word=$(cut -d ' ' -f "$(wc -l <"$TOOLS/starts.$host")" "$TOOLS/script")
case $word in
    wait)
        trap 'touch "$TOOLS/saved.$host"; exit 143' TERM
        while [ ! -e "$TOOLS/finish" ]; do sleep 0.1 5>&-; done ;;
    gone) case $host in *-0) echo PREEMPTED >"$TOOLS/node"; echo SUSPENDED >"$TOOLS/request" ;; esac; kill -KILL $$ ;;
    step) for flag in "$@"; do case $flag in --workdir=*) mkdir -p "${flag#*=}/checkpoints/$RANDOM" ;; esac; done; exit 134 ;;
    mistake) case $host in *-1) exit 2 ;; esac; exit 134 ;;
    *) exit "$word" ;;
esac
"""
