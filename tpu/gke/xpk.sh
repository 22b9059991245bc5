#!/usr/bin/env bash
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

about=(
    "tpu/gke/xpk.sh --cluster CLUSTER --zone ZONE --name NAME --image IMAGE --accelerator v5litepod-16"
    "               --config CONFIG --run-dir gs://BUCKET/RUN [COMMAND] [section.key=value ...]"
    ""
    "The same as submit.sh through XPK (pip install xpk), in a cluster that xpk cluster create has made."
)
option name NAME "the workload's"
option cluster NAME "GKE cluster"
option zone ZONE "its zone, such as us-east5-b"
option project PROJECT "Google Cloud project; gcloud's own if not given"
option image IMAGE "made from tpu/Dockerfile, such as us-docker.pkg.dev/PROJECT/REPOSITORY/kdrl_jax:TAG"
option accelerator TYPE "such as v5litepod-16, v5p-8, v6e-16 or v4-8"
option slices N "slices of that type" 1
option max-restarts N "times that the whole workload starts again" 20
option grace-seconds N "time to save after SIGTERM" 300
run_command_options
parse_options "$@"
for needed in name cluster zone image accelerator; do need "$needed"; done
check_name name 40
check_name cluster 40
check_place
check image '^[a-z0-9][a-zA-Z0-9._/:@-]*$' "give an image, such as us-docker.pkg.dev/PROJECT/REPOSITORY/kdrl_jax:TAG"
check_accelerator accelerator
check_at_least slices 1
check_at_least max-restarts 0
check_at_least grace-seconds 1
check_run_command
need_bucket_run
save_within_grace

# exec, because xpk passes SIGTERM on to the shell that it runs this in, and a shell would keep it to itself.
workload=(xpk workload create --cluster="${option_value[cluster]}" --workload="${option_value[name]}"
    --tpu-type="${option_value[accelerator]}" --num-slices="${option_value[slices]}"
    --docker-image="${option_value[image]}" --max-restarts="${option_value[max-restarts]}"
    --termination-grace-period-seconds="${option_value[grace-seconds]}"
    # By itself xpk restarts after signals only; 1 is a host's failure, and 2, a mistake, stays an end.
    --restart-on-exit-codes=1
    --zone="${option_value[zone]}")
if [[ -n ${option_value[project]} ]]; then workload+=(--project="${option_value[project]}"); fi
run "${workload[@]}" --command="exec $(quote .venv/bin/python -m kdrl_jax.main "${arguments[@]}")"
