#!/usr/bin/env bash
# Train on several nodes: start this on every one of them, with its own --node-rank. Checks first, on all nodes together.
set -euo pipefail
# shellcheck source=examples/lib.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/lib.sh"

usage() {
    cat <<USAGE
usage: train_multi_node.sh CONFIG --nnodes N [options] [key=value ...]

  --nnodes N            nodes (default: the variable NNODES)
  --node-rank R         this one, counted from 0 (default: NODE_RANK, then SLURM_NODEID)
  --master-addr ADDR    address of node 0 (default: MASTER_ADDR)
  --master-port PORT    a port of node 0 that is free and that the others reach (default: MASTER_PORT, then 29500)
  --join-timeout S      how long the nodes wait for each other (default 300)
  --launcher NAME       megatron-oreal (default), or torchrun: then give every node its own rollout.server.host
$TRAIN_HELP

The variables are those that schedulers and torchrun use; no others are read. The config, the overrides, the code and the
model have to be the same on all nodes, and work_dir one shared directory: the check says where they are not.
Exit status: that of the check (1) or of the training.
USAGE
}

nnodes=${NNODES:-}
node_rank=${NODE_RANK:-${SLURM_NODEID:-}}
master_addr=${MASTER_ADDR:-}
master_port=${MASTER_PORT:-29500}
join_timeout=""
launcher=megatron-oreal
while (($#)); do
    case $1 in
        --nnodes) nnodes=$(value "$@") || exit; consumed=2 ;;
        --node-rank) node_rank=$(value "$@") || exit; consumed=2 ;;
        --master-addr) master_addr=$(value "$@") || exit; consumed=2 ;;
        --master-port) master_port=$(value "$@") || exit; consumed=2 ;;
        --join-timeout) join_timeout=$(value "$@") || exit; consumed=2 ;;
        --launcher) launcher=$(value "$@") || exit; consumed=2 ;;
        *) parse_training "$@" ;;
    esac
    shift "$consumed"
done
[[ -n $nnodes ]] || die "--nnodes is missing (or the variable NNODES)"
[[ -n $node_rank ]] || die "--node-rank is missing (or the variable NODE_RANK): 0 on the first node, 1 on the second, ..."
[[ -n $master_addr ]] || die "--master-addr is missing (or the variable MASTER_ADDR): the address of node 0"
require_number --nnodes "$nnodes"
require_number --node-rank "$node_rank"
require_number --master-port "$master_port"
[[ $launcher == megatron-oreal || $launcher == torchrun ]] || die "--launcher $launcher: megatron-oreal or torchrun"
require_training
require_package

RUN_ARGS=("$config" "${overrides[@]}")
RANK_ARGS=(
    --nnodes "$nnodes"
    --node-rank "$node_rank"
    --nproc-per-node "$nproc"
    --master-addr "$master_addr"
    --master-port "$master_port"
)
JOIN_ARGS=()
[[ -z $join_timeout ]] || JOIN_ARGS=(--join-timeout "$join_timeout")

[[ -n $skip_check ]] ||
    run "$python" -m megatron_oreal check "${RUN_ARGS[@]}" "${RANK_ARGS[@]}" "${JOIN_ARGS[@]}" "${check_options[@]}"
if [[ $launcher == torchrun ]]; then
    run_last "$python" -m torch.distributed.run "${RANK_ARGS[@]}" -m megatron_oreal train "${RUN_ARGS[@]}"
fi
run_last "$python" -m megatron_oreal train "${RUN_ARGS[@]}" "${RANK_ARGS[@]}" "${JOIN_ARGS[@]}"
