#!/usr/bin/env bash
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

about=(
    "tpu/stop.sh --name NAME --zone ZONE [--kill]"
    ""
    "Asks the job on every worker to save and end, for which it has checkpoint.stop_within_s (25 s, if a config does not"
    "say otherwise). The slice stays (and is paid for): tpu/delete.sh removes it."
)
slice_options
flag kill "end at once what has not ended in ten seconds, saved or not"
parse_options "$@"
no_words
check_slice

verb=(stop)
if is_set kill; then verb+=(10); fi
on_workers all all "$(job "${verb[@]}")" || fail "not every worker could be asked; see the words above"
