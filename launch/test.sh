#!/usr/bin/env bash
# Sets everything up and runs the tests. Arguments go to pytest: launch/test.sh -k sampling
# --fast leaves out the tests that take a while, --slow adds the longest ones.
set -euo pipefail
# shellcheck source=launch/setup.sh
. "$(dirname "$0")/setup.sh"
exec python -m pytest tests --numprocesses=2 --dist=loadfile "$@"
