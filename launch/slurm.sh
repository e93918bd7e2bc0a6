#!/usr/bin/env bash
# One run on the GPUs of a Slurm job, one process for each GPU.
usage() {
    cat <<'HELP'
launch/slurm.sh [SBATCH OPTION...] CONFIG WORKDIR [FLAG...]

  SBATCH OPTION...   what your cluster wants, as --name=value: --nodes=4 --gpus-per-node=8 --time=24:00:00 --partition=...
  CONFIG             such as configs/vitl.py
  WORKDIR            folder of the run that all nodes share; the job's output goes to WORKDIR/slurm-JOBID.out
  FLAG...            for python -m addp_jax.main: --config.data.path=/data/imagenet, ...

Submits a job; inside one (salloc) it runs at once. A job that is preempted or loses a node is queued again by Slurm; one
that reaches its time limit saves two minutes before and queues itself again. Both go on where they were.
PYTHON: the interpreter. Default: .venv/bin/python, which is installed for ACCELERATOR before the job is submitted: cuda12,
or cuda13 where that is set and the nodes' drivers are new enough.
HELP
}
set -euo pipefail
case ${1:-} in -h | --help) usage; exit 0 ;; esac
options=()
while [[ ${1:-} == -* ]]; do options+=("$1"); shift; done
[ $# -ge 2 ] || { usage >&2; exit 2; }
config=$1 workdir=$2
shift 2
case $workdir in /*) ;; *) workdir=$PWD/$workdir ;; esac
cd "$(dirname "$0")/.."

python=${PYTHON:-${VENV:-.venv}/bin/python}
if [ -z "${PYTHON:-}" ] && { [ -z "${SLURM_JOB_ID:-}" ] || [ ! -x "$python" ]; }; then # compute nodes may be offline
    ACCELERATOR=${ACCELERATOR:-cuda12} bash launch/setup.sh # a login node has no GPU to find
fi
if [ -z "${SLURM_JOB_ID:-}" ]; then
    mkdir -p "$workdir"
    exec sbatch --requeue --open-mode=append --signal=B:USR1@120 --job-name=addp_jax --output="$workdir/slurm-%j.out" \
        "${options[@]}" --chdir="$PWD" --wrap="exec launch/slurm.sh$(printf ' %q' "$config" "$workdir" "$@")"
fi

gpus=${SLURM_GPUS_ON_NODE:-1} limit=no
srun --kill-on-bad-exit=1 --ntasks-per-node="$gpus" --cpus-per-task=$((SLURM_CPUS_ON_NODE / gpus)) \
    "$python" -m addp_jax.main --distributed --config="$config" --workdir="$workdir" "$@" &
step=$!
trap 'limit=yes; kill -TERM $step' USR1 # Slurm sends it to this shell alone; srun hands SIGTERM to the processes
trap 'kill -TERM $step' TERM
status=0
wait $step || status=$?
while kill -0 $step 2>/dev/null; do # a signal has ended the wait, not the step
    status=0
    wait $step || status=$?
done
if [ $limit = yes ] && [ $status -ne 0 ]; then
    echo "time limit: saved, queued again"
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
