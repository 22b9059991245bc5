#!/usr/bin/env bash
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

about=(
    "tpu/gke/submit.sh --name NAME --image IMAGE --type v5e --topology 4x4 --config CONFIG --run-dir gs://BUCKET/RUN"
    "                  [COMMAND] [section.key=value ...]"
    ""
    "Fills tpu/gke/jobset.yaml and creates the JobSet in the cluster that kubectl points to."
    "CONFIG is one of the image's. Preempted or failed, the JobSet starts again and goes on with the run."
)
option name NAME "the JobSet's"
option image IMAGE "made from tpu/Dockerfile, such as us-docker.pkg.dev/PROJECT/REPOSITORY/kdrl_jax:TAG"
option type TYPE "TPU generation: v4, v5e, v5p, v6e or v7x"
option topology SHAPE "chips of a slice, such as 4x4 (v5e, v6e) or 2x2x2 (v4, v5p, v7x)"
option slices N "slices of that shape, each a node pool" 1
option chips-per-host N "of the node pool's machine type; 1 for a single chip, else 4 by default"
option hosts N "nodes of the pool, to be compared with what topology and chips per host make"
option namespace NAME "Kubernetes namespace" default
option kubernetes-account NAME "Kubernetes service account with rights on the bucket; of several slices, see README" default
option max-restarts N "times that the whole JobSet starts again" 20
option grace-seconds N "time to save after SIGTERM" 300
run_command_options
parse_options "$@"

# Generation, sizes in a shape, and the node label of GKE.
gke_table="\
v4 3 tpu-v4-podslice
v5e 2 tpu-v5-lite-podslice
v5p 3 tpu-v5p-slice
v6e 2 tpu-v6e-slice
v7x 3 tpu7x"

check_topology() {
    local type=${option_value[type]} shape=${option_value[topology]} sizes example size
    sizes=$(table_row "$gke_table" 1 "$type" 2)
    [[ -n $sizes ]] || mistake "--type $type: one of $(awk '{print $1}' <<<"$gke_table" | paste -sd ' ')"
    example=$([[ $sizes == 2 ]] && echo 4x4 || echo 2x2x2)
    [[ $shape =~ ^[1-9][0-9]{0,2}(x[1-9][0-9]{0,2}){$((sizes - 1))}$ ]] ||
        mistake "--topology $shape: a $type slice has a shape of $sizes sizes, such as $example"
    chips=1
    for size in ${shape//x/ }; do chips=$((chips * size)); done
    chips_per_host=${option_value[chips-per-host]:-$((chips == 1 ? 1 : 4))}
    [[ $chips_per_host =~ ^[148]$ ]] || mistake "--chips-per-host $chips_per_host: TPU machines have 1, 4 or 8"
    ((chips % chips_per_host == 0)) ||
        mistake "--topology $shape: $chips chips are no whole number of hosts with $chips_per_host (--chips-per-host)"
    hosts=$((chips / chips_per_host))
    [[ -z ${option_value[hosts]} || ${option_value[hosts]} == "$hosts" ]] ||
        mistake "--hosts ${option_value[hosts]}: $shape has $chips chips, on $hosts hosts of $chips_per_host (--chips-per-host)"
    ((hosts > 1 || option_value[slices] == 1)) ||
        mistake "--slices ${option_value[slices]}: GKE joins only slices of several hosts, and $shape has one"
}

# A single-quoted YAML scalar, which means nothing but itself.
yaml() {
    local single="'"
    printf "'%s'" "${1//$single/$single$single}"
}

# Kubernetes replaces $(NAME) in a command; a doubled $ means itself.
command_list() {
    local word list='' dollar='$'
    for word; do list+="${list:+, }$(yaml "${word//"$dollar"/"$dollar$dollar"}")"; done
    printf '[%s]' "$list"
}

# Fills in the template in one pass, so that nothing in a value is taken for a name.
fill() {
    local rest filled=''
    rest=$(<"$here/gke/jobset.yaml")
    # The first lines are about the template.
    rest=${rest#*$'\n'apiVersion:}
    rest="apiVersion:$rest"
    while [[ $rest =~ __([A-Z]+(_[A-Z]+)*)__ ]]; do
        filled+=${rest%%"${BASH_REMATCH[0]}"*}${template[${BASH_REMATCH[1]}]}
        rest=${rest#*"${BASH_REMATCH[0]}"}
    done
    printf '%s\n' "$filled$rest"
}

for needed in name image type topology; do need "$needed"; done
# JobSet appends -slice-0-0 and five letters for a pod, which must stay below 63.
check_name name 40
check_name namespace 63
check_name kubernetes-account 63
check image '^[a-z0-9][a-zA-Z0-9._/:@-]*$' "give an image, such as us-docker.pkg.dev/PROJECT/REPOSITORY/kdrl_jax:TAG"
check_at_least slices 1
check_at_least max-restarts 0
check_at_least grace-seconds 1
check_topology
check_run_command
need_bucket_run
save_within_grace

declare -A template=(
    [NAME]=$(yaml "${option_value[name]}")
    [MAX_RESTARTS]=${option_value[max-restarts]}
    [SLICES]=${option_value[slices]}
    [HOSTS]=$hosts
    [GRACE_SECONDS]=${option_value[grace-seconds]}
    [HOST_NETWORK]=$( ((option_value[slices] > 1)) && echo true || echo false)
    [DNS_POLICY]=$( ((option_value[slices] > 1)) && echo ClusterFirstWithHostNet || echo ClusterFirst)
    [KUBERNETES_ACCOUNT]=$(yaml "${option_value[kubernetes-account]}")
    [ACCELERATOR]=$(yaml "$(table_row "$gke_table" 1 "${option_value[type]}" 3)")
    [TOPOLOGY]=$(yaml "${option_value[topology]}")
    [IMAGE]=$(yaml "${option_value[image]}")
    [COMMAND]=$(command_list .venv/bin/python -m kdrl_jax.main "${arguments[@]}")
    [CHIPS_PER_HOST]=$chips_per_host
)
build=$repository/build/tpu # git ignores it
manifest=$build/${option_value[name]}.yaml
if is_dry_run; then
    quote mkdir -p "$build"
    printf "cat >%s <<'MANIFEST'\n%s\nMANIFEST\n" "$(quote "$manifest")" "$(fill)"
else
    mkdir -p "$build"
    fill >"$manifest"
fi
# create, not apply: a JobSet of that name that is there must not be changed under its run.
run kubectl create --namespace="${option_value[namespace]}" --filename="$manifest"
pods=(--namespace="${option_value[namespace]}" --selector="jobset.sigs.k8s.io/jobset-name=${option_value[name]}")
say "kubectl logs ${pods[*]} --follow shows what it does; kubectl delete jobset ${option_value[name]} ends it"
