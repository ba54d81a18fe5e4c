#!/usr/bin/env bash
# OREAL from nothing to a better model, on a CPU: makes a small Qwen2 model with a tokenizer, teaches it three-digit
# addition until it solves some problems, trains it with OREAL on two ranks (TP 2), exports it and checks the export.
set -euo pipefail

usage() {
    cat <<USAGE
usage: quickstart.sh [--seed N] [--work-dir DIR] [--python PATH] [--keep]

  --seed N        seed of the model, the data and the run (default 0)
  --work-dir DIR  where everything is written (default work_dir/quickstart)
  --python PATH   a Python that already has megatron_oreal; default: a virtual environment of its own, .venv
  --keep          go on in a work directory that is already there (resumes a run that was cut off)
USAGE
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
seed=0 work=$root/work_dir/quickstart python="" keep=""
while (($#)); do
    case $1 in
        --seed) seed=${2:?--seed needs a number}; shift 2 ;;
        --work-dir) work=${2:?--work-dir needs a directory}; shift 2 ;;
        --python) python=${2:?--python needs a path}; shift 2 ;;
        --keep) keep=yes; shift ;;
        -h | --help) usage; exit 0 ;;
        *) echo "error: unknown argument $1" >&2; usage >&2; exit 2 ;;
    esac
done
if [[ -e $work && -z $keep ]]; then
    echo "error: $work is there already: remove it, give --work-dir, or --keep to go on in it" >&2
    exit 2
fi
[[ -n $python ]] || python=$(bash "$root/examples/setup_env.sh" "$root/.venv")
mkdir -p "$work"
work=$(cd "$work" && pwd)

config=$root/examples/configs/quickstart.yaml
oreal=("$python" -m megatron_oreal)
ranks=(--nproc-per-node 2)
paths=(
    "seed=$seed"
    "work_dir=$work/run"
    "data.train=$work/data/train.jsonl"
    "evaluation.data=$work/data/held_out.jsonl"
    "sft.data=$work/data/solutions.jsonl"
    "sft.output=$work/sft"
)

export CUDA_VISIBLE_DEVICES="" # this example is for a CPU, also on a machine with GPUs
began=$SECONDS
[[ -f $work/data/train.jsonl ]] || "$python" "$root/examples/quickstart/prepare.py" "$work/data" --seed "$seed"
[[ -d $work/sft ]] || "${oreal[@]}" sft "$config" "${paths[@]}" "model.path=$work/data/model" "${ranks[@]}"
"${oreal[@]}" train "$config" "${paths[@]}" "model.path=$work/sft" "${ranks[@]}"
"$python" "$root/examples/quickstart/check_export.py" "$work/run" "$work/data/held_out.jsonl"
echo "quickstart: done in $((SECONDS - began)) s, installation aside"
