#!/usr/bin/env bash
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

about=(
    "tpu/logs.sh --name NAME --zone ZONE [--worker N] [--node N] [--lines N]"
    ""
    "Follows the log of one worker until its job ends. If the job failed, shows the last lines of every worker."
    "Ends with the job's exit status; Ctrl-C ends the log, never the job."
)
slice_options
option worker N "whose log" 0
option node N "of which slice, where there are several" 0
option lines N "lines before the newest" 100
parse_options "$@"
no_words
check_slice
check_at_least worker 0
check_at_least node 0
check_at_least lines 0
make_scratch

on_workers "${option_value[node]}" "${option_value[worker]}" "$(job follow "${option_value[lines]}")" ||
    fail "worker ${option_value[worker]} of node ${option_value[node]} could not be followed; has tpu/run.sh been run?"

ask_jobs "worker ended 0 id" || fail "not every worker could be asked how it ended"
if (($(jobs_with running) > 0)); then
    say "still running on $(jobs_with running) workers"
    exit 0
fi
(($(jobs_with none) == 0)) || fail "no job has been started on some workers; tpu/run.sh starts one"
status=$(overall_status)
if ((status != 0)); then
    say "ended with $status; the last lines of every worker:"
    on_workers all all "$(job last 20)" || true
fi
exit "$status"
