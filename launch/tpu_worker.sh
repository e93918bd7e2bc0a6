#!/usr/bin/env bash
# What launch/tpu_pod.sh asks of one worker of a TPU slice, by ssh. Every call is short, and may be made again at any moment.
#
#   start ID CHIP PREPARE CONFIG WORKDIR [FLAG...]   ends what runs here and starts this, detached; nothing if ID was started
#   state [BYTE]   one line "addp_run ID running|STATUS CHECKPOINT"; then the log from BYTE on
#   stop           SIGTERM to the trainer, which saves
#
# In ~/addp_run: id, workdir, log, status (of the run that has ended), trainer (its process). The trainer and its parent
# hold a lock on `alive`: the kernel says whether they are there, also after a reboot.
set -euo pipefail
worker=$(readlink -f "$0")
# shellcheck source=launch/newest.sh
. "$(dirname "$worker")/newest.sh"
mkdir -p ~/addp_run
cd ~/addp_run

running() { ! flock --nonblock alive true; }

start() {
    exec 8>lock
    flock 8
    [ "$(cat id 2>/dev/null)" != "$1" ] || return 0
    while running; do # the group of an older run
        kill -KILL -- "-$(cat group)" 2>/dev/null || true
        sleep 0.2
    done
    rm -f status trainer group
    echo "$1" >id
    echo "$5" >workdir
    exec 9>alive
    flock 9
    setsid bash "$worker" attend "${@:2}" >log 2>&1 </dev/null 8>&- &
}

attend() {
    local status=0
    echo $$ >group
    bash "$worker" train "$@" &
    echo $! >trainer
    wait $! || status=$?
    echo $status >status.new
    mv status.new status
}

train() { # CHIP PREPARE CONFIG WORKDIR [FLAG...]
    local chip=$1 prepare=$2 config=$3 workdir=$4
    mkdir -p ~/addp_jax
    cd ~/addp_jax
    tar xzf ~/addp_jax.tar.gz
    # The images' own Python is too old, and may refuse packages beside its own: not so in a folder of ours.
    [ -x ~/addp_run/uv/bin/uv ] || python3 -m pip install --quiet --target ~/addp_run/uv uv
    [ -d .venv ] || ~/addp_run/uv/bin/uv venv --quiet --python 3.12
    ~/addp_run/uv/bin/uv pip install --quiet -e '.[tpu,gs]'
    eval "$prepare" 9>&- # a mount that it leaves behind is no part of the run
    export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$(dirname "$workdir")/xla_cache}
    # shellcheck disable=SC1090
    [ ! -e "launch/flags/$chip.env" ] || . "launch/flags/$chip.env"
    JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu} exec .venv/bin/python -u -m addp_jax.main --distributed --config="$config" --workdir="$workdir" "${@:5}"
}

state() {
    local status=255 # it is gone and could not say how
    if [ -e status ]; then status=$(cat status); elif running; then status=running; fi
    echo "addp_run $(cat id 2>/dev/null || echo none) $status $(newest "$(cat workdir 2>/dev/null)")"
    [ $# = 0 ] || tail -c "+$(($1 + 1))" log
}

stop() { ! running || kill -TERM "$(cat trainer)"; }

"$@"
