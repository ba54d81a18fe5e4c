#!/usr/bin/env bash
# Throughput of OREAL-32B on 16 nodes of 8 GPUs: every part of a step, and whole steps. Start it on every node:
#   bash benchmarks/throughput_32b_128.sh --node-rank R --master-addr NODE0 [--random-weights examples/models/OREAL-32B-SFT]
# With random weights nothing has to be downloaded or converted. All other options are throughput.sh's; see its --help.
# The figures of two runs are compared by: megatron-oreal bench --compare A.json B.json
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    echo
fi
exec bash "$here/throughput.sh" "$here/../examples/configs/oreal_32b.yaml" --nnodes 16 --nproc-per-node 8 "$@"
