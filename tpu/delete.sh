#!/usr/bin/env bash
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

about=(
    "tpu/delete.sh --name NAME --zone ZONE"
    ""
    "Deletes the slice and its request, running or not; nothing is paid for any more. Buckets stay as they are."
    "A job on it is ended without notice: tpu/stop.sh lets it save first."
)
slice_options
parse_options "$@"
no_words
check_slice
make_scratch

ask_state ACTIVE || fail "gcloud does not say whether ${option_value[name]} exists; see its words above"
if [[ $state == ABSENT ]]; then
    say "${option_value[name]} does not exist; nothing to delete"
    exit 0
fi
say "deleting ${option_value[name]} ($state)"
# --force: its nodes first; without it, only what has no nodes any more can be deleted.
run "${queued_resources[@]}" delete "${option_value[name]}" "${where[@]}" --force --quiet ||
    fail "${option_value[name]} may still exist, and cost: see gcloud's words above"
