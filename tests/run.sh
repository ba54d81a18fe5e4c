#!/usr/bin/env bash
# Everything that CI checks, in a virtual environment of its own:  bash tests/run.sh [--venv DIR] [pytest arguments]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
if [[ ${1:-} == --venv ]]; then
    venv=${2:?--venv needs a directory}
    shift 2
fi
cd "$root"
# With a compiler at hand the kernels must compile for all targets; a warning or a register spill is an error.
if [[ -z ${OREAL_BUILD_CUDA:-} ]] && command -v "${OREAL_NVCC:-nvcc}" >/dev/null; then
    export OREAL_BUILD_CUDA=1
fi
# a slow package index or a broken connection is asked again
export PIP_RETRIES=${PIP_RETRIES:-10} PIP_DEFAULT_TIMEOUT=${PIP_DEFAULT_TIMEOUT:-60}
python=$(bash examples/setup_env.sh "$venv" dev)
bash tests/setup_sglang.sh "$python"
bin=$(dirname "$python")
export OMP_NUM_THREADS=1

"$bin/megatron-oreal" env
echo "== lint and format"
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/shellcheck" .ci/run tests/*.sh examples/*.sh examples/*/*.sh benchmarks/*.sh benchmarks/gpu/run.sh
echo "== types"
"$bin/mypy"
echo "== tests"
"$python" -m pytest -q -n 2 --dist loadfile "$@"
