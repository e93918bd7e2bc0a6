# Sourced by scripts whose paths are relative to the present folder: the environment of setup.sh without leaving it.
# `root` is the repository.
# shellcheck shell=bash
here=$PWD
# shellcheck source=launch/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
root=$PWD
cd "$here" || exit 1
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1 # its modules, not those of a present folder with such names
