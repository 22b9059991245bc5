#!/usr/bin/env bash
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

about=(
    "tpu/fetch.sh --run-dir gs://BUCKET/RUN [--to FOLDER] [--without-checkpoints]"
    "tpu/fetch.sh --name NAME --zone ZONE --remote-dir runs/RUN [--to FOLDER]"
    ""
    "Copies a run here: from its bucket, or, where it had none, from the disk of worker 0."
    "A run in a bucket needs no slice any more, and what is here already is not copied again."
)
slice_options
option run-dir GS_PATH "the run directory, gs://BUCKET/PATH"
option remote-dir PATH "the run directory on worker 0, such as runs/quickstart"
option to FOLDER "where to; runs/ and the run's own name by default"
flag without-checkpoints "leave out checkpoints/, which is most of it"
parse_options "$@"
no_words
check_bucket_path run-dir
# One asked for by hand counts more than the bucket that the environment names for all scripts.
from_worker=${option_value[remote-dir]}
if [[ -n $from_worker ]]; then
    check remote-dir '^[a-zA-Z0-9_][a-zA-Z0-9_./-]*$' "give a path below the repository's copy, such as runs/quickstart"
    if is_set without-checkpoints; then mistake "--without-checkpoints works with --run-dir only: scp copies all"; fi
    check_slice
    source=${from_worker%/}
else
    [[ -n ${option_value[run-dir]} ]] ||
        mistake "give --run-dir gs://BUCKET/RUN (or KDRL_TPU_RUN_DIR), or --remote-dir runs/RUN of a run without a bucket"
    source=${option_value[run-dir]%/}
fi
to=${option_value[to]:-runs/${source##*/}}
[[ $to != gs:* ]] || mistake "--to $to: give a folder on this machine"
[[ -z $from_worker || ! -e $to ]] ||
    mistake "--to $to: exists already, and scp would put the copy inside it; give another"

if [[ -n $from_worker ]]; then
    run mkdir -p "$(dirname "$to")"
    run "${queued_resources[@]}" scp --recurse "${option_value[name]}:$remote/$source" "$to" "${where[@]}" \
        ${reach[@]+"${reach[@]}"} --quiet --node=0 --worker=0
else
    copy=(gcloud storage rsync "$source" "$to" --recursive)
    if is_set without-checkpoints; then copy+=("--exclude=(^|.*/)checkpoints/.*"); fi
    run mkdir -p "$to"
    run "${copy[@]}"
fi
say "$source is in $to"
