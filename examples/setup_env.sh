#!/usr/bin/env bash
# Make (or reuse) a virtual environment with megatron_oreal in it and print the path of its python.
#   setup_env.sh DIR [EXTRA]      EXTRA: a setup.py extra, for example dev
set -euo pipefail
usage() {
    sed -n '2,3s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}
case ${1:-} in
    -h | --help) usage; exit 0 ;;
    "" | -*) usage >&2; exit 2 ;; # standard output is for the path
esac
dir=$1
extra=${2:-}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3; do
        if [[ -n $candidate ]] && command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: needs Python 3.11 or 3.12; set PYTHON=/path/to/python" >&2
    return 2
}

# one at a time in a checkout: two would write one environment, or one egg-info
exec 9<"$root/setup.py"
flock 9 || echo "no lock on $root/setup.py: do not start this twice at once" >&2
stamp=$dir/.ready-${extra:-plain}
wanted=$(cat "$root"/setup.py "$root"/constraints.txt "$root"/megatron_oreal/loss/nvcc.py "$root"/megatron_oreal/loss/csrc/* | cksum)
if [[ ! -f $stamp || $(cat "$stamp") != "$wanted" ]]; then
    python=$(find_python)
    echo "setting up $dir with $("$python" --version) (a few minutes the first time)" >&2
    "$python" -m venv "$dir"
    {
        "$dir/bin/python" -m pip install --quiet --upgrade pip setuptools wheel
        # torch by itself first: see constraints.txt
        "$dir/bin/python" -m pip install --quiet -c "$root/constraints.txt" torch
        "$dir/bin/python" -m pip install --quiet -c "$root/constraints.txt" -e "$root${extra:+[$extra]}"
    } >&2
    echo "$wanted" >"$stamp"
fi
echo "$dir/bin/python"
