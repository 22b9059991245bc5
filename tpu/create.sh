#!/usr/bin/env bash
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

about=(
    "tpu/create.sh --name NAME --zone ZONE --accelerator TYPE [--spot | --reserved] [--slices N]"
    ""
    "Requests a TPU slice (or several) as a queued resource, and waits until it is there."
    "Exit status: 0 it is; 1 the request failed; 2 a mistake in what was given; 3 gcloud refused the request."
)
slice_options
request_options
parse_options "$@"
no_words
check_slice
check_request
make_scratch
name=${option_value[name]}
runtime_version=${option_value[runtime-version]}
if [[ -z $runtime_version ]]; then
    runtime_version=$(table_row "$runtime_table" 2 "${option_value[accelerator]%-*}" 3)
fi

request=("${queued_resources[@]}" create "$name" "${where[@]}"
    --accelerator-type="${option_value[accelerator]}" --runtime-version="$runtime_version")
if ((option_value[slices] > 1)); then
    request+=(--node-count="${option_value[slices]}" --node-prefix="$name")
else
    request+=(--node-id="$name")
fi
if is_set spot; then request+=(--spot); fi
if is_set reserved; then request+=(--reserved); fi
if is_set iap; then request+=(--internal-ips); fi
if [[ -n ${option_value[service-account]} ]]; then
    request+=(--service-account="${option_value[service-account]}")
fi

ask_state ABSENT || fail "gcloud does not say whether $name exists; see its words above"
case $state in
    ABSENT) run "${request[@]}" || {
        echo "error: gcloud refused the request for $name; see its words above" >&2
        exit 3
    } ;;
    FAILED | SUSPENDING | SUSPENDED | DELETING) fail "$name exists and is $state; tpu/delete.sh removes it" ;;
    *) say "$name has been requested before and is $state" ;;
esac

note "every $poll_seconds s, until it says ACTIVE:"
silent=0
before=
for ((round = 0; ; round++)); do
    if ask_state ACTIVE; then silent=0; else
        ((++silent < 5)) || fail "gcloud has not said for $silent times what became of $name"
    fi
    if [[ $state != "$before" ]] || ((round % 20 == 0)); then
        say "$name: $state ($((SECONDS / 60)) min $((SECONDS % 60)) s)"
    fi
    before=$state
    case $state in
        ACTIVE) break ;;
        FAILED)
            why=("${queued_resources[@]}" describe "$name" "${where[@]}")
            reason=$("${why[@]}" "--format=value(state.failedData.error.message)" || true)
            fail "$name FAILED: ${reason:-no reason given}; tpu/delete.sh removes it"
            ;;
        SUSPENDING | SUSPENDED | DELETING | ABSENT)
            fail "$name is $state before it was ever there; tpu/delete.sh removes what is left"
            ;;
    esac
    wait_a_little
done
