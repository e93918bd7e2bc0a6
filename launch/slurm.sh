#!/usr/bin/env bash
# One run on the GPUs of a Slurm job, one process for each GPU.
usage() {
    cat <<'HELP'
launch/slurm.sh [SBATCH OPTION...] CONFIG WORKDIR [FLAG...]

  SBATCH OPTION...   what your cluster wants, as --name=value: --nodes=4 --gpus-per-node=8 --time=24:00:00 --partition=...
  CONFIG             such as configs/vitl.py
  WORKDIR            folder of the run that all nodes share; the job's output goes to WORKDIR/slurm-JOBID.out
  FLAG...            for python -m addp_jax.main: --config.data.path=/data/imagenet, ...

Submits a job; inside one (salloc) it runs at once. The nodes are asked for whole, with all of their memory, unless an
option says --cpus-per-task, --mem... or --exclusive. Relative paths, those in flags as well, are relative to the present
folder; CONFIG that is not there is one of this repository.
A job that loses a node is queued again by Slurm; one that is preempted, or has two minutes left of its time, saves and
queues itself again. A run that fails is started again in its job, until three starts in a row have brought no new
checkpoint; one with a mistake in its flags (exit status 2) is not. All go on where they were.
PYTHON: the interpreter. Default: .venv/bin/python, which is installed for ACCELERATOR before the job is submitted: cuda12,
or cuda13 where that is set and the nodes' drivers are new enough. CHIP: whose launch/flags are used (default h100).
HELP
}
set -euo pipefail
case ${1:-} in -h | --help) usage; exit 0 ;; esac
options=()
while [[ ${1:-} == -* ]]; do options+=("$1"); shift; done
[ $# -ge 2 ] || { usage >&2; exit 2; }
config=$1 workdir=$2
shift 2
root=$(cd "$(dirname "$0")/.." && pwd)
case $workdir in /* | gs://*) ;; *) workdir=$PWD/$workdir ;; esac
[ -e "${config%:*}" ] || [ ! -e "$root/${config%:*}" ] || config=$root/$config
PAUSE=${PAUSE:-30} # seconds before another start; longer each time
STARTS=3           # so many in a row may bring no new checkpoint

python=${PYTHON:-${VENV:-$root/.venv}/bin/python}
if [ -z "${PYTHON:-}" ] && { [ -z "${SLURM_JOB_ID:-}" ] || [ ! -x "$python" ]; }; then # compute nodes may be offline
    ACCELERATOR=${ACCELERATOR:-cuda12} bash "$root/launch/setup.sh" # a login node has no GPU to find
fi
if [ -z "${SLURM_JOB_ID:-}" ]; then
    asked=" ${options[*]}" resources=()
    if [[ $asked =~ (--gpus-per-node=|--gres=gpu:)([a-zA-Z][^:, ]*:)?([0-9]+) ]]; then
        resources=(--ntasks-per-node="${BASH_REMATCH[3]}")
    fi
    [[ $asked =~ ' --'(cpus-per|mem|exclusive) ]] || resources+=(--exclusive --mem=0)
    case $workdir in gs://*) output=$PWD ;; *) output=$workdir && mkdir -p "$workdir" ;; esac
    exec sbatch --requeue --open-mode=append --signal=B:USR1@120 --job-name=addp_jax --output="$output/slurm-%j.out" \
        "${resources[@]}" "${options[@]}" --chdir="$PWD" \
        --wrap="exec$(printf ' %q' "$root/launch/slurm.sh" "$config" "$workdir" "$@")"
fi

# The repository's modules, wherever this is run; SAFEPATH: not those of a present folder with such names.
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu} # without a GPU: an error, no run on the CPU
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$(dirname "$workdir")/xla_cache}
# shellcheck disable=SC1090
. "$root/launch/flags/${CHIP:-h100}.env"
nodes=${SLURM_JOB_NUM_NODES:-1} gpus=${SLURM_GPUS_ON_NODE:-1}
cpus=${SLURM_CPUS_PER_TASK:-$((${SLURM_CPUS_ON_NODE:-1} / gpus))}

# shellcheck source=launch/newest.sh
. "$root/launch/newest.sh"

# scancel reaches the processes and not this shell; srun, sent a SIGTERM itself, would kill them. Slurm sends USR1 to this
# shell alone, but SIGTERM, when it preempts or cancels, to the processes as well.
ending=""
trap 'ending=limit; scancel --signal=TERM "$SLURM_JOB_ID" || true' USR1
trap 'ending=${ending:-TERM}' TERM
starts=0 step=$(newest "$workdir")
while :; do
    # --wait: when a process has ended the others have a minute to end by themselves, with a status that says why
    srun --kill-on-bad-exit=0 --wait=60 --ntasks=$((nodes * gpus)) --ntasks-per-node="$gpus" --cpus-per-task=$((cpus > 0 ? cpus : 1)) \
        "$python" -u -m addp_jax.main --distributed --config="$config" --workdir="$workdir" "$@" &
    srun=$! status=0
    wait $srun || status=$?
    while kill -0 $srun 2>/dev/null; do # a signal has ended the wait, not the step
        status=0
        wait $srun || status=$?
    done
    case $status in 0 | 2) exit $status ;; esac
    [ -z "$ending" ] || break
    starts=$((starts + 1))
    before=$step step=$(newest "$workdir")
    [ "$step" = "$before" ] || starts=1
    echo "the run ended with status $status; newest checkpoint: ${step:-none}" >&2
    [ $starts -lt $STARTS ] || { echo "error: $STARTS starts in a row without a new checkpoint" >&2; exit $status; }
    sleep $((PAUSE * starts)) &
    wait $! || true
    [ -z "$ending" ] || break
done
# A job that is being cancelled must not come back; a preempted one is still running.
if [ "$ending" = limit ] || scontrol show job "$SLURM_JOB_ID" | grep -q JobState=RUNNING; then
    echo "saved, queued again"
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
