#!/usr/bin/env bash
# Runs on a TPU VM: the one job of this worker, and what became of it.
#
#   bash kdrl_jax/tpu/worker/job.sh start FILES_ID JOB_ID COMMAND...   in the background; it outlives ssh
#   bash kdrl_jax/tpu/worker/job.sh status                  kdrl_job HOST STATE STATUS JOB_ID, on one line
#   bash kdrl_jax/tpu/worker/job.sh follow LINES | last LINES | stop [SECONDS] | end [SECONDS]
#
# ~/kdrl_job has the job's log, pid, exit status and id, and the log before it as log.1.
set -euo pipefail
folder=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
job=$HOME/kdrl_job
host=$(hostname)
# A pid means nothing after a restart of the machine.
boot=$(cat /proc/sys/kernel/random/boot_id)

content() {
    cat "$job/$1" 2>/dev/null || true
}

# While its holder is there too, since the command's end is not yet written down.
is_running() {
    [[ ! -f $job/status && $(content boot) == "$boot" ]] &&
        { kill -0 "$(content holder)" || kill -0 "$(content pid)"; } 2>/dev/null
}

start() {
    local files_id=$1 id=$2
    shift 2
    if is_running; then
        echo "$host: a job is running already" >&2
        exit 1
    fi
    if [[ $(cat "$folder/.files_id" 2>/dev/null) != "$files_id" ]]; then
        echo "$host: the files here are not those of your repository as it is now; run tpu/setup.sh again" >&2
        exit 1
    fi
    mkdir -p "$job"
    rm -f "$job"/{status,stopped,pid,holder}
    if [[ -f $job/log ]]; then mv "$job/log" "$job/log.1"; fi
    printf '%s\n' "$id" >"$job/id"
    printf '%s\n' "$boot" >"$job/boot"
    cd "$folder"
    setsid bash "$folder/tpu/worker/job.sh" hold "$@" </dev/null >"$job/log" 2>&1 &
    for _ in {1..1000}; do
        if [[ -s $job/pid ]]; then
            echo "$host: started"
            return
        fi
        sleep 0.01
    done
    echo "$host: the job did not start" >&2
    exit 1
}

# Stays beside the command to write down how it ended, also when a signal reaches both of them.
hold() {
    local status=0
    trap '' TERM INT HUP
    printf '%s\n' $$ >"$job/holder"
    (
        trap - TERM INT HUP
        printf '%s\n' "$BASHPID" >"$job/pid.new"
        mv "$job/pid.new" "$job/pid"
        exec "$@"
    ) || status=$?
    printf '%s\n' "$status" >"$job/status.new"
    mv "$job/status.new" "$job/status"
}

status() {
    local state=lost
    if [[ ! -d $job ]]; then
        state=none
    elif is_running; then
        state=running
    elif [[ -f $job/status ]]; then
        state=ended
        if [[ -f $job/stopped ]]; then state=stopped; fi
    fi
    local number id
    number=$(content status)
    id=$(content id)
    echo "kdrl_job $host $state ${number:--} ${id:--}"
}

follow() {
    if is_running; then
        tail -n "$1" --pid="$(content pid)" -F "$job/log" 2>/dev/null
    else
        tail -n "$1" "$job/log"
    fi
}

last() {
    tail -n "$1" "$job/log" | sed "s/^/$host | /"
}

# stop [SECONDS]: as asked for by a person, which is written down.
stop() {
    if is_running; then touch "$job/stopped"; fi
    end "$@"
}

# end [SECONDS]: asks the job to save and end; what has not done so after the seconds is killed.
end() {
    if ! is_running; then
        echo "$host: no job is running"
        return
    fi
    kill -TERM "$(content pid)" 2>/dev/null || true # it may just have ended
    echo "$host: asked to save and end"
    if (($# == 0)); then return; fi
    for ((tenths = 10 * $1; tenths > 0; tenths--)); do
        if ! is_running; then return; fi
        sleep 0.1
    done
    kill -KILL "$(content pid)" 2>/dev/null || true
    echo "$host: killed"
}

case $1 in
    start | hold | status | follow | last | stop | end) "$@" ;;
    *)
        echo "job.sh: unknown verb $1" >&2
        exit 2
        ;;
esac
