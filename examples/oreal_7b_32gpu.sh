#!/usr/bin/env bash
# OREAL-7B: internlm/OREAL-7B-SFT on 4 nodes of 8 GPUs. Start it on every node; the options are train_multi_node.sh's.
#   bash examples/prepare.sh --model internlm/OREAL-7B-SFT     once, into the shared directory
#   bash examples/oreal_7b_32gpu.sh --node-rank R --master-addr NODE0 'verifier.hosts=["10.0.0.5:10003"]'
# Under Slurm: sbatch --nodes 4 --gpus-per-node 8 examples/slurm_train.sh examples/configs/oreal_7b.yaml
set -euo pipefail
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
fi
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
exec bash "$here/train_multi_node.sh" "$here/configs/oreal_7b.yaml" --nnodes 4 --nproc-per-node 8 "$@"
