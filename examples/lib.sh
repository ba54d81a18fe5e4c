# Shared by the launch scripts beside it, which source it. It sets no variable of the environment and starts nothing.
# shellcheck shell=bash
# shellcheck disable=SC2034  # variables are for the scripts that source this file

examples=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$examples")

# What most scripts take; parse_common sets them.
python=python3
dry_run=""
overrides=()
consumed=0

COMMON_HELP="  --python PATH         a Python with megatron_oreal installed (default: python3)
  --dry-run             print the commands, ready to be pasted, and run none
  -h, --help            this text"

TRAIN_HELP="  --nproc-per-node N    ranks on each node (default: the GPUs that nvidia-smi lists)
  --skip-check          do not run 'megatron-oreal check' first
  --no-fabric           check without the all-reduce over all ranks
$COMMON_HELP
  key=value             config overrides, for example total_steps=40"

die() {
    echo "error: $*" >&2
    exit 2
}

# value OPTION [VALUE ...]: the value of an option, or an error when there is none.
value() {
    (($# >= 2)) || die "$1 needs a value"
    printf '%s\n' "$2"
}

# A positive number without a sign; OPTION VALUE.
require_number() {
    [[ $2 =~ ^[0-9]+$ ]] || die "$1=$2: must be a whole number"
}

# show COMMAND...: the command as it could be typed.
show() {
    local quoted
    printf -v quoted '%q ' "$@"
    echo "${quoted% }"
}

# run COMMAND...: run it, or only show it.
run() {
    if [[ -n $dry_run ]]; then
        show "$@"
    else
        "$@"
    fi
}

# run_last COMMAND...: the same in place of this shell, so that signals reach it.
run_last() {
    if [[ -n $dry_run ]]; then
        show "$@"
        exit 0
    fi
    exec "$@"
}

# parse_common OPTION...: options of all scripts; sets `consumed` to how many words it took. Needs a function `usage`.
parse_common() {
    consumed=1
    case $1 in
        --python) python=$(value "$@") || exit; consumed=2 ;;
        --dry-run) dry_run=yes ;;
        -h | --help) usage; exit 0 ;;
        -*) echo "error: unknown option $1; see --help" >&2; exit 2 ;;
        *=*) overrides+=("$1") ;;
        *) echo "error: unknown argument $1 (overrides are key=value); see --help" >&2; exit 2 ;;
    esac
}

# Options of the scripts that train; sets config, nproc, skip_check and check_options.
config=""
nproc=""
skip_check=""
check_options=(--fabric)
parse_training() {
    consumed=1
    case $1 in
        --nproc-per-node) nproc=$(value "$@") || exit; require_number "$1" "$nproc"; consumed=2 ;;
        --skip-check) skip_check=yes ;;
        --no-fabric) check_options=() ;;
        -*) parse_common "$@" ;;
        *=*) overrides+=("$1") ;;
        *)
            [[ -z $config ]] || die "two configs: $config and $1"
            config=$1
            ;;
    esac
}

# What a script that trains has to have been told; the ranks' number is counted where it was not.
require_training() {
    [[ -n $config ]] || die "which config? for example examples/configs/oreal_7b.yaml; see --help"
    [[ -f $config ]] || die "config file $config does not exist"
    if [[ -z $nproc ]]; then
        nproc=$(count_gpus)
        ((nproc)) || die "nvidia-smi lists no GPU: give --nproc-per-node"
    fi
}

count_gpus() {
    { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null; } | grep -c '^GPU' || true
}

# In the root of the repository every Python finds the package; whether it has what the package needs is the question.
require_package() {
    [[ -n $dry_run ]] && return
    command -v "$python" >/dev/null || die "--python $python: no such program"
    local why
    why=$("$python" 2>&1 >/dev/null -c '
import sys
sys.version_info >= (3, 11) or sys.exit("it is Python %d.%d, needed is 3.11 or newer" % sys.version_info[:2])
import importlib.util, megatron_oreal.cli
for name in ("torch", "megatron", "transformers", "huggingface_hub"):
    importlib.util.find_spec(name) or sys.exit("there is no " + name)') && return
    why=${why##*$'\n'}
    die "$python has no megatron_oreal${why:+ ($why)}: activate its environment, or give --python (see examples/setup_env.sh)"
}
