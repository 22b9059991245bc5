#!/usr/bin/env bash
# Runs on a TPU VM, in the home, beside the archive kdrl_jax.tar.gz that tpu/setup.sh has copied there.
#
#   bash tpu/worker/install.sh FOLDER EXTRAS FILES_ID PREPARE
#
# Puts the archive's files into FOLDER in place of those of the archive before, with a virtual environment in
# FOLDER/.venv, and runs the command PREPARE there. FILES_ID is left for job.sh to compare with.
set -euo pipefail
folder=$1 extras=$2 files_id=$3 prepare=$4
host=$(hostname)

if [[ -f $folder/tpu/worker/job.sh ]] && [[ $(bash "$folder/tpu/worker/job.sh" status) == *" running "* ]]; then
    echo "$host: a job is running from these files; tpu/stop.sh ends it" >&2
    exit 1
fi

mkdir -p "$folder"
# A file that is no longer there must not be imported any longer; data, models and runs stay.
if [[ -f $folder/.shipped ]]; then (cd "$folder" && xargs -d '\n' rm -f -- <.shipped); fi
rm -f "$folder/.files_id"
tar -xzf kdrl_jax.tar.gz -C "$folder"
tar -tzf kdrl_jax.tar.gz >"$folder/.shipped"
cd "$folder"

# TPU VMs come with Ubuntu's Python: 3.10 on 22.04, which JAX no longer supports. So a newer one where there
# is one that can make environments, else uv, which brings its own.
make_environment() {
    local python
    for python in python3.12 python3.13 python3.11 python3.14 python3; do
        if "$python" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            "$python" -m venv .venv
            return
        fi
    done
    python3 -m pip install --quiet --user uv
    "$HOME/.local/bin/uv" venv --quiet --seed --python 3.12 .venv
}

if [[ ! -x .venv/bin/python ]]; then make_environment; fi
.venv/bin/python -m pip install --quiet --editable ".[$extras]"
if [[ -n $prepare ]]; then bash -euc "$prepare"; fi
printf '%s\n' "$files_id" >.files_id
echo "$host: ready"
