#!/usr/bin/env bash
# Plan the shipped configs anew: examples/plans/make.sh [CONFIG...]; see --help. PYTHON=/path/to/python chooses one.
set -euo pipefail
exec "${PYTHON:-python}" -W ignore "$(dirname "${BASH_SOURCE[0]}")/make.py" "$@"
