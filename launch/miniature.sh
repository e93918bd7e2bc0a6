#!/usr/bin/env bash
# Installs if need be, then compares encoders on generated shapes: see miniature.py, or --help.
#
#   launch/miniature.sh [--out FOLDER] [--rows ROW,...] [--columns COLUMN,...] [--seeds N] [--config.FIELD=VALUE...]
set -euo pipefail
# shellcheck source=launch/here.sh
. "$(dirname "$0")/here.sh"
exec python "$root/launch/miniature.py" "$@"
