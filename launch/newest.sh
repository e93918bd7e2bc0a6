# Sourced by the launchers.
# shellcheck shell=bash
newest() { # WORKDIR: prints the step of its newest checkpoint, if there is one
    { case $1 in gs://*) gcloud storage ls "$1/checkpoints/" ;; *) ls "$1/checkpoints" ;; esac 2>/dev/null || true; } |
        sed 's|/$||; s|.*/||' | grep -x '[0-9]*' | sort -n | tail -n 1 || true
}
