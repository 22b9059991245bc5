# shellcheck shell=bash
# What the scripts beside it share: their options, the checks of what was given, and the one way in which a
# command is run. A script declares its options, calls `parse_options "$@"`, checks, and only then runs.

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
    echo "error: bash $BASH_VERSION is too old; 4.4 or newer is needed (on macOS: brew install bash)" >&2
    exit 2
fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(dirname "$here")
poll_seconds=${KDRL_TPU_POLL_SECONDS:-30}

# The folder in a worker's home that the repository is copied to.
remote=kdrl_jax

# Generation, the name that accelerator types begin with, and the software a TPU VM is made with, as
# docs.cloud.google.com/tpu/docs/runtimes recommends them for JAX.
runtime_table="\
v4 v4 tpu-ubuntu2204-base
v5e v5litepod v2-alpha-tpuv5-lite
v5p v5p v2-alpha-tpuv5
v6e v6e v2-alpha-tpuv6e"

# What happens, beside the commands' own output; a dry run does nothing that could be told.
say() {
    is_dry_run || printf '%(%H:%M:%S)T %s\n' -1 "$*" >&2
}

# In a dry run, a comment between its commands.
note() {
    if is_dry_run; then printf '# %s\n' "$*"; fi
}

# The run failed, or something was not to be had.
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# What was given is wrong: nothing has been run.
mistake() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# ---- options -----------------------------------------------------------------------------------------------

about=() # the lines of the help before the options
option_names=()
declare -A option_metavar=() option_help=() option_value=()
words=() # what is no option

# option NAME METAVAR MEANING [DEFAULT]: --NAME VALUE, or KDRL_TPU_NAME in the environment.
option() {
    local variable=kdrl_tpu_${1//-/_}
    variable=${variable^^}
    option_names+=("$1")
    option_metavar[$1]=$2
    option_help[$1]=$3
    option_value[$1]=${!variable-${4-}}
}

# flag NAME MEANING: --NAME, or KDRL_TPU_NAME=1 in the environment.
flag() {
    option "$1" "" "$2" 0
    case ${option_value[$1]} in
        "") option_value[$1]=0 ;;
        0 | 1) ;;
        *) mistake "$(environment_name "$1")=${option_value[$1]}: give 1 or 0" ;;
    esac
}

environment_name() {
    local variable=kdrl_tpu_${1//-/_}
    echo "${variable^^}"
}

slice_options() {
    option name NAME "the slice, as a queued resource"
    option zone ZONE "its zone, such as us-east5-b"
    option project PROJECT "Google Cloud project; gcloud's own if not given"
    flag iap "reach workers through IAP, where they have no external addresses"
}

request_options() {
    option accelerator TYPE "such as v5litepod-16, v5p-8, v6e-16 or v4-8"
    option slices N "slices of that type, joined over the data centre network" 1
    option runtime-version VERSION "software of the TPU VMs; the table in tpu/lib.sh by default"
    option service-account EMAIL "whose rights the TPU VMs have; the project's default if not given"
    flag spot "preemptible: cheaper, and may be taken away at any time"
    flag reserved "from the project's reservation"
}

usage() {
    local name meaning variable
    printf '%s\n' "${about[@]}" ""
    echo "Each option may also come from the environment, by the name behind it."
    for name in "${option_names[@]}"; do
        variable=" ($(environment_name "$name"))"
        meaning=${option_help[$name]}
        if [[ $name == help ]]; then variable=; fi
        if [[ -n ${option_metavar[$name]} && -n ${option_value[$name]} ]]; then
            meaning+=" [${option_value[$name]}]"
        fi
        printf '  --%-25s %s%s\n' "$name${option_metavar[$name]:+ ${option_metavar[$name]}}" "$meaning" "$variable"
    done
    echo "KDRL_TPU_POLL_SECONDS: seconds between looks at what is waited for [$poll_seconds]"
}

# Reads "$@" into option_value and words; answers --help.
parse_options() {
    flag dry-run "print the commands that would be run, and run none"
    option_names+=(help)
    option_metavar[help]=
    option_help[help]="this"
    option_value[help]=
    while (($#)); do
        local given=$1 name value=
        shift
        case $given in
            --)
                words+=("$@")
                break
                ;;
            -h | --help)
                usage
                exit 0
                ;;
            --*=*)
                name=${given%%=*}
                name=${name#--}
                known_option "$name"
                [[ -n ${option_metavar[$name]} ]] || mistake "--$name takes no value, got ${given#*=}"
                option_value[$name]=${given#*=}
                ;;
            --*)
                name=${given#--}
                known_option "$name"
                value=1
                if [[ -n ${option_metavar[$name]} ]]; then
                    (($#)) || mistake "--$name needs a value: --$name ${option_metavar[$name]}"
                    value=$1
                    shift
                fi
                option_value[$name]=$value
                ;;
            -*) known_option "${given#-}" ;;
            *) words+=("$given") ;;
        esac
    done
    [[ $poll_seconds =~ ^[0-9]+$ ]] || mistake "KDRL_TPU_POLL_SECONDS=$poll_seconds: give whole seconds"
}

known_option() {
    [[ -n $1 && -n ${option_help[$1]+known} ]] && return
    mistake "unknown option --$1; did you mean --$(nearest "$1" "${option_names[@]}")? (--help lists all)"
}

# nearest WORD CANDIDATE...: the candidate that fewest edits make of the word.
nearest() {
    printf '%s\n' "${@:2}" | awk -v word="$1" '
        function least(a, b, c) { return a < b ? (a < c ? a : c) : (b < c ? b : c) }
        {
            for (j = 0; j <= length($0); j++) row[j] = j
            for (i = 1; i <= length(word); i++) {
                corner = row[0]; row[0] = i
                for (j = 1; j <= length($0); j++) {
                    above = row[j]
                    differs = substr(word, i, 1) != substr($0, j, 1)
                    row[j] = least(row[j] + 1, row[j - 1] + 1, corner + differs)
                    corner = above
                }
            }
            if (NR == 1 || row[length($0)] < best) { best = row[length($0)]; found = $0 }
        }
        END { print found }'
}

is_set() {
    [[ ${option_value[$1]} == 1 ]]
}

is_dry_run() {
    is_set dry-run
}

# ---- checks ------------------------------------------------------------------------------------------------

need() {
    [[ -n ${option_value[$1]} ]] ||
        mistake "--$1 ${option_metavar[$1]} is needed (or $(environment_name "$1")): ${option_help[$1]}"
}

no_words() {
    ((${#words[@]} == 0)) || mistake "unexpected ${words[0]}; --help shows what can be given"
}

# check OPTION PATTERN WHAT: an option that is given must match.
check() {
    local value=${option_value[$1]}
    [[ -z $value || $value =~ $2 ]] || mistake "--$1 $value: $3"
}

# A name of Kubernetes or of a TPU. The room left is for what is appended to it: -0, -1 for slices.
check_name() {
    check "$1" "^[a-z]([-a-z0-9]{0,$(($2 - 2))}[a-z0-9])?$" \
        "a name has at most $2 lower-case letters, digits and hyphens, begins with a letter and ends with no hyphen"
}

check_at_least() {
    check "$1" '^[0-9]{1,6}$' "give a whole number"
    ((10#${option_value[$1]} >= $2)) || mistake "--$1 ${option_value[$1]}: give $2 or more"
    option_value[$1]=$((10#${option_value[$1]}))
}

check_place() {
    check zone '^[a-z]+-[a-z]+[0-9]+-[a-z]$' "a zone looks like us-east5-b (gcloud compute tpus locations list)"
    check project '^([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]$' "give a project's id, such as my-project-123"
}

# Sets `where`, which every command about the slice ends with.
check_slice() {
    need name
    need zone
    check_name name 60
    check_place
    where=(--zone="${option_value[zone]}")
    [[ -z ${option_value[project]} ]] || where+=(--project="${option_value[project]}")
    reach=()
    if is_set iap; then reach=(--tunnel-through-iap); fi
}

check_request() {
    need accelerator
    check_accelerator accelerator
    check_at_least slices 1
    check service-account '^[^@[:space:]]+@[^@[:space:]]+$' \
        "give the account's address, such as kdrl@my-project.iam.gserviceaccount.com"
    check runtime-version '^[a-z0-9][a-z0-9._-]*$' "see docs.cloud.google.com/tpu/docs/runtimes"
    if is_set spot && is_set reserved; then
        mistake "--spot and --reserved exclude each other; give one, or neither for on demand"
    fi
}

# Accelerator types count chips (v5e, v6e) or TensorCores, two a chip (v4, v5p; four chips a VM).
check_accelerator() {
    local type=${option_value[$1]} kinds
    local prefix=${type%-*} size=${type##*-}
    [[ $type != v7x* && $type != tpu7x* ]] ||
        mistake "--$1 $type: Cloud TPU's own API has no v7x; use GKE (tpu/gke/submit.sh --type v7x)"
    kinds=$(awk '{print $2 "-N"}' <<<"$runtime_table" | paste -sd ' ')
    [[ $type == *-* && $size =~ ^[1-9][0-9]{0,4}$ && -n $(table_row "$runtime_table" 2 "$prefix" 1) ]] ||
        mistake "--$1 $type: an accelerator type is one of $kinds (gcloud compute tpus accelerator-types list)"
    case $prefix in
        v5litepod | v6e)
            [[ " 1 4 8 16 32 64 128 256 " == *" $size "* ]] ||
                mistake "--$1 $type: $prefix has 1, 4, 8, 16, 32, 64, 128 or 256 chips"
            ;;
        *)
            ((size % 8 == 0)) ||
                mistake "--$1 $type: a $prefix counts TensorCores, in a multiple of 8 ($prefix-8 has four chips)"
            ;;
    esac
}

# table_row TABLE COLUMN VALUE WANTED: the wanted column of the row with that value; nothing if there is none.
table_row() {
    awk -v column="$2" -v value="$3" -v wanted="$4" '$column == value {print $wanted; exit}' <<<"$1"
}

check_bucket_path() {
    check "$1" '^gs://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9](/[^[:space:]]+)$' \
        "give a folder in a bucket, gs://BUCKET/PATH without spaces"
}

run_command_options() {
    option config CONFIG "a config of this repository, or gs://BUCKET/RUN to resume that run"
    option run-dir GS_PATH "the run directory, gs://BUCKET/PATH, which all hosts see"
    flag accept-changes "go on with a run although settings give its updates another meaning"
}

commands=(train eval)

# Checks --config, --run-dir and the words, and sets `arguments`: what follows `python -m kdrl_jax.main`.
check_run_command() {
    local config=${option_value[config]} word command=() overrides=()
    need config
    check_bucket_path run-dir
    if [[ $config == gs:* ]]; then
        check_bucket_path config
        [[ $config != *.yaml && $config != *.yml ]] ||
            mistake "--config $config: give a config of this repository, or a run in a bucket"
        [[ -z ${option_value[run-dir]} || ${option_value[run-dir]} == "$config" ]] ||
            mistake "--run-dir ${option_value[run-dir]} and --config $config: a run goes on where it is; leave one out"
        option_value[run-dir]=
    else
        config=${config#"$repository"/}
        [[ -f $repository/$config ]] || mistake "--config ${option_value[config]}: no such file in this repository"
        git -C "$repository" ls-files --error-unmatch -- "$config" >/dev/null 2>&1 ||
            mistake "--config $config: git does not track it, so it is not copied to the workers; git add it"
    fi
    for word in ${words[@]+"${words[@]}"}; do
        if [[ $word =~ ^[a-zA-Z_][a-zA-Z0-9_.-]*= ]]; then
            [[ $word != log.dir=* || -z ${option_value[run-dir]} ]] ||
                mistake "$word and --run-dir ${option_value[run-dir]} say the same thing twice; give one"
            overrides+=("$word")
        elif ((${#command[@]} + ${#overrides[@]} == 0)); then
            [[ ! $word =~ ^(sample|plan|export|report)$ ]] ||
                mistake "$word runs on one machine; start it there, with python -m kdrl_jax.main"
            [[ " ${commands[*]} " == *" $word "* ]] ||
                mistake "unknown command $word; did you mean $(nearest "$word" "${commands[@]}")?"
            command=("$word")
        else
            mistake "unexpected $word; settings are given as section.key=value"
        fi
        [[ $word != *$'\n'* ]] || mistake "${word%%=*}=...: a setting has no line breaks"
    done
    arguments=(${command[@]+"${command[@]}"} --config "$config" --coordinator auto)
    [[ -z ${option_value[run-dir]} ]] || arguments+=("log.dir=${option_value[run-dir]}")
    arguments+=(${overrides[@]+"${overrides[@]}"})
    if is_set accept-changes; then
        [[ ${command[*]-} != eval ]] || mistake "--accept-changes is about training; eval changes no run"
        arguments+=(--accept-changes)
    fi
}

# Lets the program take as long to save as the cluster does, less a moment for its end to be seen.
save_within_grace() {
    local grace=${option_value[grace-seconds]}
    [[ " ${arguments[*]}" == *" checkpoint.stop_within_s="* ]] ||
        arguments+=("checkpoint.stop_within_s=$((grace > 10 ? grace - 5 : grace))")
}

# What setup copies and installs.
check_files() {
    local missing
    need extras
    check extras '^[a-z0-9]+(,[a-z0-9]+)*$' "give names separated by commas, such as tpu,gcs,math"
    missing=$(git -C "$repository" ls-files --deleted | head -n 1)
    [[ -z $missing ]] || mistake "$missing: git tracks it, but it is gone; git rm it, or git checkout it"
}

# Where the disk may be gone when the run goes on.
need_bucket_run() {
    [[ ${option_value[config]} == gs:* || " ${arguments[*]}" == *" log.dir=gs://"* ]] ||
        mistake "--run-dir gs://BUCKET/RUN is needed (or KDRL_TPU_RUN_DIR): the disk here does not outlive a preemption"
}

# ---- commands ----------------------------------------------------------------------------------------------

# The words on one line, such that any POSIX shell reads the same words back.
quote() {
    local word line='' single="'" escaped="'\\''"
    for word; do
        if [[ ! $word =~ ^[a-zA-Z0-9_@%+=:,./-]+$ ]]; then word="'${word//$single/$escaped}'"; fi
        line+="${line:+ }$word"
    done
    printf '%s\n' "$line"
}

# Runs a command; in a dry run prints it, so that it can be pasted.
run() {
    if is_dry_run; then quote "$@"; else "$@"; fi
}

# wait_a_little [TIMES]
wait_a_little() {
    is_dry_run || sleep "$((poll_seconds * ${1:-1}))"
}

make_scratch() {
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
}

queued_resources=(gcloud compute tpus queued-resources)

# ask_state EXPECTED: sets `state` to the slice's, or ABSENT; in a dry run to what is expected.
# Fails, with gcloud's words, where there was no answer.
ask_state() {
    local command=("${queued_resources[@]}" describe "${option_value[name]}" "${where[@]}")
    command+=("--format=value(state.state)")
    state=$1
    if is_dry_run; then
        quote "${command[@]}"
    elif state=$("${command[@]}" 2>"$scratch/describe"); then
        state=${state:-UNKNOWN}
    elif grep -qiE 'not[_ ]found' "$scratch/describe"; then
        state=ABSENT
    else
        state=UNKNOWN
        cat "$scratch/describe" >&2
        return 1
    fi
}

# on_workers NODE WORKER COMMAND: a command line for the shell of some or `all`, in their home.
on_workers() {
    run "${queued_resources[@]}" ssh "${option_value[name]}" "${where[@]}" ${reach[@]+"${reach[@]}"} --quiet \
        --node="$1" --worker="$2" --command="$3"
}

job() {
    quote bash "$remote/tpu/worker/job.sh" "$@"
}

# ask_jobs EXPECTED: sets `jobs` to one line per worker, HOST STATE STATUS ID: STATE is running, ended (with
# its STATUS), stopped (the same, because it was asked to), lost (no status was left behind) or none.
# Fails where not every worker could be reached.
ask_jobs() {
    if is_dry_run; then
        on_workers all all "$(job status)"
        jobs=$1
        return
    fi
    local answer reached=0
    answer=$(on_workers all all "$(job status)" 2>"$scratch/ssh") || reached=$?
    jobs=$(sed -n 's/^.*kdrl_job //p' <<<"$answer")
    if ((reached != 0)) || [[ -z $jobs ]]; then
        tail -n 5 "$scratch/ssh" >&2
        return 1
    fi
}

# jobs_with STATE: how many workers are in it.
jobs_with() {
    awk -v state="$1" '$2 == state {n++} END {print n + 0}' <<<"$jobs"
}

# One exit status for all workers: 2 (a mistake) if any of them says so, else the least that is not 0.
overall_status() {
    awk '
        {
            status = $2 == "lost" ? 1 : $3
            seen[status]++
            if (status > 0 && (!least || status < least)) least = status
        }
        END { print seen[0] == NR ? 0 : seen[2] ? 2 : least ? least : 1 }' <<<"$jobs"
}

# Names the files that git tracks, as they are now: what the workers get, and what they are asked about.
files_id() {
    (cd "$repository" && git ls-files -z | xargs -0 cksum | cksum | tr -d ' ')
}

# Names a command, to tell whether the job that is running is the one that is wanted.
job_id() {
    quote "$@" | cksum | tr -d ' '
}
