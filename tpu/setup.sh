#!/usr/bin/env bash
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

about=(
    "tpu/setup.sh --name NAME --zone ZONE [--extras tpu,gcs,math] [--prepare 'COMMAND']"
    ""
    "Copies the files that git tracks here, as they are now, to every worker, and installs them in a virtual"
    "environment of their own. Do it again after each change: what is installed already takes no time."
)
slice_options
option extras NAMES "extras of pyproject.toml to install" tpu,gcs
option prepare COMMAND "run on every worker in the copy afterwards, such as: gcloud storage cp -r gs://BUCKET/data ."
parse_options "$@"
no_words
check_slice
check_files

build=$repository/build/tpu/${option_value[name]} # git ignores it
archive=$build/kdrl_jax.tar.gz
if is_dry_run; then
    quote mkdir -p "$build"
    echo "$(quote git -C "$repository" ls-files -z) | $(quote tar -C "$repository" --null -T - -czf "$archive")"
else
    mkdir -p "$build"
    git -C "$repository" ls-files -z | tar -C "$repository" --null -T - -czf "$archive"
    say "copying to ${option_value[name]} and installing; the first time takes minutes"
fi

run "${queued_resources[@]}" scp "$archive" "${option_value[name]}:" "${where[@]}" ${reach[@]+"${reach[@]}"} --quiet \
    --node=all --worker=all || fail "the files could not be copied to all workers; see gcloud's words above"

# The installer comes out of the archive itself: in the home, beside the folder it will fill.
install=$(quote bash tpu/worker/install.sh "$remote" "${option_value[extras]}" "$(files_id)" "${option_value[prepare]}")
on_workers all all "tar -xzf kdrl_jax.tar.gz tpu/worker/install.sh && $install" ||
    fail "not every worker could be set up; see the words above"
