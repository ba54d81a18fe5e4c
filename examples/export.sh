#!/usr/bin/env bash
# A checkpoint of a run as a Hugging Face model directory, compared with the checkpoint bit by bit.
set -euo pipefail
# shellcheck source=examples/lib.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/lib.sh"

usage() {
    cat <<USAGE
usage: export.sh WORK_DIR --out DIR [options]

  WORK_DIR              of the run; its checkpoints are WORK_DIR/checkpoints/step_XXXXXX
  --out DIR             the model directory to write; must not exist
  --step N              the checkpoint that has seen N steps (default: the newest; the best may be an earlier one)
  --reward-model        the token reward model instead of the policy
  --shard-size SIZE     of a safetensors file (default 5GB)
  --no-compare          do not read both again to compare them
$COMMON_HELP

A finished run has written its policy to WORK_DIR/hf already; this is for other steps and for runs that were cut off.
USAGE
}

work_dir="" out="" step="" model=policy shard_size=5GB compare=yes
while (($#)); do
    case $1 in
        --out) out=$(value "$@") || exit; consumed=2 ;;
        --step) step=$(value "$@") || exit; require_number "$1" "$step"; consumed=2 ;;
        --reward-model) model=reward_model consumed=1 ;;
        --shard-size) shard_size=$(value "$@") || exit; consumed=2 ;;
        --no-compare) compare="" consumed=1 ;;
        -*) parse_common "$@" ;;
        *)
            [[ -z $work_dir ]] || die "two work directories: $work_dir and $1"
            work_dir=$1 consumed=1
            ;;
    esac
    shift "$consumed"
done
[[ -n $work_dir ]] || die "which work_dir? see --help"
[[ -n $out ]] || die "--out is missing"
if [[ -n $step ]]; then
    printf -v checkpoint '%s/checkpoints/step_%06d' "$work_dir" "$((10#$step))"
else
    steps=("$work_dir"/checkpoints/step_*)
    checkpoint=${steps[-1]} # of equal length up to a million steps, so the last name is the newest
fi
if [[ ! -d $checkpoint/$model ]]; then
    steps=("$work_dir"/checkpoints/step_*)
    [[ -d ${steps[0]} ]] || die "$work_dir/checkpoints has no step_XXXXXX: is $work_dir the work_dir of a run?"
    die "$checkpoint/$model: no such directory; there are: ${steps[*]##*/}"
fi
require_package

tools=$root/tools/checkpoint_convert
run "$python" "$tools/megatron_to_hf.py" --megatron "$checkpoint/$model" --out "$out" --shard-size "$shard_size"
[[ -z $compare ]] || run "$python" "$tools/compare.py" "$checkpoint/$model" "$out" --weights-only
