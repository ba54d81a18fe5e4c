#!/usr/bin/env bash
# What a run reads: a model and prompts from Hugging Face, on request in Megatron's format too. Can be started again.
set -euo pipefail
# shellcheck source=examples/lib.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/lib.sh"

usage() {
    cat <<USAGE
usage: prepare.sh [options]

  --model REPO          Hugging Face model (default internlm/OREAL-7B-SFT); '' for none
  --model-dir DIR       where it goes (default models/NAME); a local model that is there already is left alone
  --prompts REPO        Hugging Face data set with question, gold_answer and pass_rate
                        (default internlm/OREAL-RL-Prompts); '' for none
  --prompts-file FILE   where they go, as JSON lines (default data/NAME.jsonl)
  --revision REV        of the model (default main)
  --megatron DIR        also write the model as a dist_checkpointing directory, for model.megatron_checkpoint
  --tp N, --pp N        its parallel sizes (default 1); any others can be loaded from it too
$COMMON_HELP

Downloads go on where they were cut off; what is there and whole is not fetched again. A token for private models is
taken from 'hf auth login'. Nothing is downloaded unless all of it fits on the disk.
USAGE
}

model=internlm/OREAL-7B-SFT model_dir="" prompts=internlm/OREAL-RL-Prompts prompts_file="" revision=main
megatron="" tp=1 pp=1
while (($#)); do
    case $1 in
        --model) model=$(value "$@") || exit; consumed=2 ;;
        --model-dir) model_dir=$(value "$@") || exit; consumed=2 ;;
        --prompts) prompts=$(value "$@") || exit; consumed=2 ;;
        --prompts-file) prompts_file=$(value "$@") || exit; consumed=2 ;;
        --revision) revision=$(value "$@") || exit; consumed=2 ;;
        --megatron) megatron=$(value "$@") || exit; consumed=2 ;;
        --tp) tp=$(value "$@") || exit; require_number "$1" "$tp"; consumed=2 ;;
        --pp) pp=$(value "$@") || exit; require_number "$1" "$pp"; consumed=2 ;;
        -*) parse_common "$@" ;;
        *) die "unknown argument $1; see --help" ;;
    esac
    shift "$consumed"
done
[[ -n $model_dir ]] || model_dir=models/${model##*/}
[[ -n $prompts_file ]] || prompts_file=data/${prompts##*/}.jsonl
[[ -z $megatron || -n $model || -f $model_dir/config.json ]] || die "--megatron needs a model: give --model or --model-dir"
require_package

if [[ -n $model ]]; then
    run "$python" "$examples/prepare/fetch_model.py" "$model" "$model_dir" --revision "$revision"
fi
if [[ -n $prompts && -f $prompts_file ]]; then
    echo "$prompts_file is there already"
elif [[ -n $prompts ]]; then
    run "$python" "$examples/prepare/fetch_prompts.py" "$prompts" "$prompts_file"
fi
if [[ -n $megatron && -f $megatron/metadata.json ]]; then
    echo "$megatron is there already" # written under another name until it is whole
elif [[ -n $megatron ]]; then
    run "$python" "$root/tools/checkpoint_convert/hf_to_megatron.py" --hf "$model_dir" --out "$megatron" --tp "$tp" --pp "$pp"
fi
