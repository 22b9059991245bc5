#!/usr/bin/env bash
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

about=(
    "tpu/supervise.sh --name NAME --zone ZONE --accelerator TYPE [--spot] --config CONFIG --run-dir gs://BUCKET/RUN"
    "                 [COMMAND] [section.key=value ...]"
    ""
    "Brings a run to its end: requests the slice if there is none, sets it up, starts the run and watches it."
    "A slice that is taken away is requested again, and a job that failed is started again; either goes on with"
    "the run. Given again, the same line takes over what is there."
    "Exit status: the run's own, 0 complete, 2 a mistake in the config (which no other try mends), 143 stopped"
    "by tpu/stop.sh; or 1 if the slice was not to be had."
)
slice_options
request_options
option extras NAMES "extras of pyproject.toml to install" tpu,gcs
option prepare COMMAND "run on every worker after each setup, such as: gcloud storage cp -r gs://BUCKET/data ."
run_command_options
option max-recreations N "times that the slice is requested again" 20
option max-failures N "times that a failed job is started again" 3
flag delete-at-end "delete the slice when the run has ended, however it did"
parse_options "$@"
check_slice
check_request
check_run_command
need_bucket_run
check_files
check_at_least max-recreations 0
check_at_least max-failures 0
make_scratch
name=${option_value[name]}
wanted=$(job_id .venv/bin/python -m kdrl_jax.main "${arguments[@]}")

# The scripts for each step take their options from the environment.
for option in "${option_names[@]}"; do
    if [[ $option != help ]]; then export "$(environment_name "$option")=${option_value[$option]}"; fi
done

recreations=0
failures=0
heard=0     # whether gcloud has ever said what the slice is doing
was_there=0 # whether the slice has ever been there
doubted=0   # whether the last try ended with a mistake on some hosts only
# Numbers of looks, KDRL_TPU_POLL_SECONDS apart:
first_answer=5  # until gcloud has said for the first time what the slice is doing
lost_after=20   # without an answer from workers whose slice is ACTIVE, until it is requested anew
end_after=10    # at a job that has ended on some workers only, until the rest is ended
settle_for=5    # after a failure, for the slice to say that it is being taken away

# finish STATUS WORDS...
finish() {
    say "${*:2}"
    if is_set delete-at-end; then
        "$here/delete.sh" || say "error: $name could not be deleted, and may cost: try tpu/delete.sh again"
    else
        say "$name is still there and paid for; tpu/delete.sh removes it"
    fi
    exit "$1"
}

# recreate REASON...: removes what is left of the slice, so that the next round requests it anew.
recreate() {
    ((++recreations <= option_value[max-recreations])) ||
        finish 1 "$*; and it was requested again ${option_value[max-recreations]} times already (--max-recreations)"
    say "$*; requesting it again ($recreations of ${option_value[max-recreations]})"
    "$here/delete.sh" || say "could not delete it yet"
    wait_a_little
}

# try_again STATUS REASON...: after a while, twice as long each time.
try_again() {
    ((++failures <= option_value[max-failures])) ||
        finish "$1" "${*:2}; and it was started again ${option_value[max-failures]} times already (--max-failures)"
    say "${*:2}; starting it again ($failures of ${option_value[max-failures]})"
    wait_a_little $((2 ** (failures < 6 ? failures : 6)))
}

# know_state EXPECTED: as ask_state, and patient: nothing is lost while gcloud is out of reach, but who has
# never had an answer has rather made a mistake.
know_state() {
    local silent
    for ((silent = 1; ; silent++)); do
        if ask_state "$1"; then
            heard=1
            return
        fi
        ((heard || silent < first_answer)) || finish 1 "gcloud does not say what $name is doing"
        say "no answer about $name ($silent)"
        wait_a_little
    done
}

# Sets `fresh` if the slice was requested just now. Fails where the slice is not there after all.
have_slice() {
    local status=0
    fresh=0
    know_state ABSENT
    while [[ $state == SUSPENDING || $state == DELETING ]]; do
        say "$name: $state"
        wait_a_little
        know_state ABSENT
    done
    case $state in
        ACTIVE) ;;
        FAILED | SUSPENDED)
            recreate "$name is $state"
            return 1
            ;;
        *)
            fresh=1
            "$here/create.sh" || status=$?
            ((status != 2)) || exit 2
            if ((status == 3)); then
                ((was_there)) || finish 1 "the very first request was refused, so more of them would be too"
                recreate "the request for $name was refused"
            fi
            # What failed is found in its state in the next round; a request that still waits must not lose
            # its place because nothing was heard of it for a while.
            ((status == 0)) || return 1
            ;;
    esac
    was_there=1
}

# Fails where the job could not be started, or is not the one that is wanted.
have_job() {
    if ((!fresh)) && ask_jobs "" && (($(jobs_with running) > 0)); then
        [[ $(awk '{print $4}' <<<"$jobs" | sort -u) == "$wanted" ]] ||
            mistake "another job is running on $name; tpu/stop.sh ends it, or give another --name"
        say "the run is going already; watching it"
        return
    fi
    local status=0
    "$here/setup.sh" || status=$?
    if ((status == 0)); then "$here/run.sh" ${words[@]+"${words[@]}"} || status=$?; fi
    ((status != 2)) || finish 2 "setup or run refused what it was given (see above)"
    ((status == 0))
}

is_gone() {
    [[ $state != ACTIVE && $state != UNKNOWN ]]
}

# Returns when the job has ended on all workers, or the slice is gone; fails where it cannot be reached.
watch() {
    local silent=0 ending=0 running total
    note "every $poll_seconds s, until the job has ended on all workers or the slice is not ACTIVE any more:"
    while true; do
        know_state ACTIVE
        if is_gone; then return; fi
        if ask_jobs "worker ended 0 id"; then
            silent=0
            running=$(jobs_with running)
            total=$(wc -l <<<"$jobs")
            ((running > 0)) || return 0
            if ((running < total)); then
                say "the job has ended on $((total - running)) of $total workers"
                if ((++ending >= end_after)); then
                    say "the others do not follow: ending them"
                    on_workers all all "$(job end 10)" >&2 || true
                fi
            fi
        else
            ((++silent < lost_after)) || return 1
            say "not every worker answered ($silent)"
        fi
        wait_a_little
    done
}

# What became of a job that has ended on all workers.
conclude() {
    local status look everywhere
    status=$(overall_status)
    everywhere=$(awk '{print $3}' <<<"$jobs" | sort -u | wc -l)
    ((status != 0)) || finish 0 "the run is complete"
    (($(jobs_with stopped) == 0)) ||
        finish "$status" "the run was stopped on purpose; the same line goes on with it"
    on_workers all all "$(job last 20)" >&2 || true
    # All hosts read the same config. Where they end differently, another host's failure may have come first;
    # or one host's 2 was its disk or its network, which a second try finds better.
    if ((status == 2 && (everywhere == 1 || doubted))); then
        finish 2 "the config has a mistake (see above); no other try would mend it"
    fi
    doubted=$((status == 2))
    # A slice that is taken away ends its jobs first, and says so a little later.
    for ((look = 0; look < settle_for; look++)); do
        know_state ACTIVE
        if is_gone; then
            recreate "$name is $state"
            return
        fi
        wait_a_little
    done
    try_again "$status" "the job ended with $status"
}

trap 'say "no longer watched; the run goes on. The same line watches it again, tpu/stop.sh ends it"; exit 130' INT TERM

while true; do
    have_slice || continue
    if ! have_job; then
        know_state ACTIVE
        if is_gone; then recreate "$name is $state"; else try_again 1 "the job could not be started"; fi
    elif ! watch; then
        recreate "$name is $state, but its workers have not answered for $lost_after times"
    elif is_gone; then
        recreate "$name is $state"
    else
        conclude
    fi
done
