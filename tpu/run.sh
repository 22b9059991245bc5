#!/usr/bin/env bash
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

about=(
    "tpu/run.sh --name NAME --zone ZONE --config CONFIG [--run-dir gs://BUCKET/RUN] [COMMAND] [section.key=value ...]"
    ""
    "Starts python -m kdrl_jax.main on every worker, in the background: it outlives the connection."
    "COMMAND is train if none is given. Given again after an interruption, the same line goes on with the run."
)
slice_options
run_command_options
parse_options "$@"
check_slice
check_run_command
make_scratch

# Looked at first, so that no worker starts where another cannot.
ask_jobs "" || fail "not every worker of ${option_value[name]} could be asked; has tpu/setup.sh been run?"
(($(jobs_with running) == 0)) ||
    fail "a job is running on ${option_value[name]} already; tpu/logs.sh shows it, tpu/stop.sh ends it"

command=(.venv/bin/python -m kdrl_jax.main "${arguments[@]}")
on_workers all all "$(job start "$(files_id)" "$(job_id "${command[@]}")" "${command[@]}")" ||
    fail "the job did not start on all workers; see the words above (tpu/stop.sh ends it where it did)"
say "started; tpu/logs.sh follows it"
