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
python=$(bash examples/setup_env.sh "$venv" dev)
bin=$(dirname "$python")
export OMP_NUM_THREADS=1

echo "== lint and format"
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/shellcheck" .ci/run tests/run.sh examples/*.sh
echo "== types"
"$bin/mypy"
echo "== tests"
"$python" -m pytest -q -n 2 --dist loadfile "$@"
