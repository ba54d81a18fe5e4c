#!/usr/bin/env bash
# Throughput of a config on one or several nodes: `megatron-oreal bench` on all of their ranks, after checks.
set -euo pipefail
# shellcheck source=examples/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../examples/lib.sh"

usage() {
    cat <<USAGE
usage: throughput.sh CONFIG --nnodes N [options] [key=value ...]

Start it on every node, each with its own --node-rank.

  --nnodes N            nodes (default: the variable NNODES, then 1)
  --node-rank R         this one, counted from 0 (default: NODE_RANK, then SLURM_NODEID, then 0)
  --master-addr ADDR    address of node 0 (default: MASTER_ADDR)
  --master-port PORT    a free port of node 0 (default: MASTER_PORT, then 29500)
  --nproc-per-node N    ranks on each node (default: the GPUs that nvidia-smi lists)
  --random-weights DIR  a directory with the model's config.json: weights are drawn, and neither tokenizer nor prompts
                        are needed
  --gpu NAME            as 'megatron-oreal plan --gpu' knows it: h100, h200, a100-80g, ... (default h100)
  --parts LIST          some of rollout,update,loss,reshard,switch,step (default: all)
  --lengths DIST        lognormal:median=3000,sigma=0.8, fixed:512 or file:TRAJECTORIES.jsonl
  --prompt-tokens N     of every prompt (default 512)
  --warmup N            repeats that do not count (default 1)
  --repeats N           repeats that count (default 3)
  --output FILE         (default: bench_CONFIG_RANKS.json in the current directory)
  --launcher NAME       megatron-oreal (default), or torchrun: then give every node its own rollout.server.host
  --skip-check          go on without the checks
$COMMON_HELP
  key=value             config overrides, for example parallel.max_tokens_per_microbatch=32768

Checks: this node's GPUs against --nproc-per-node; on node 0 that the planner finds it fits on the GPU; and, unless the
weights are random, 'megatron-oreal check --fabric' on all nodes. Exit status 1 or 2 when one of them fails.
USAGE
}

config="" random_weights="" gpu=h100 output="" launcher=megatron-oreal nproc="" skip_check=""
nnodes=${NNODES:-1}
node_rank=${NODE_RANK:-${SLURM_NODEID:-0}}
master_addr=${MASTER_ADDR:-}
master_port=${MASTER_PORT:-29500}
BENCH_ARGS=()
while (($#)); do
    consumed=2
    case $1 in
        --nnodes) nnodes=$(value "$@") || exit ;;
        --node-rank) node_rank=$(value "$@") || exit ;;
        --master-addr) master_addr=$(value "$@") || exit ;;
        --master-port) master_port=$(value "$@") || exit ;;
        --nproc-per-node) nproc=$(value "$@") || exit ;;
        --random-weights) random_weights=$(value "$@") || exit ;;
        --gpu) gpu=$(value "$@") || exit ;;
        --output) output=$(value "$@") || exit ;;
        --launcher) launcher=$(value "$@") || exit ;;
        --parts | --lengths | --prompt-tokens | --warmup | --repeats)
            chosen=$(value "$@") || exit
            BENCH_ARGS+=("$1" "$chosen")
            ;;
        --skip-check) skip_check=yes consumed=1 ;;
        -* | *=*) parse_common "$@" ;;
        *)
            [[ -z $config ]] || die "two configs: $config and $1"
            config=$1 consumed=1
            ;;
    esac
    shift "$consumed"
done
[[ -n $config ]] || die "which config? for example examples/configs/oreal_7b.yaml; see --help"
[[ -f $config ]] || die "config file $config does not exist"
require_number --nnodes "$nnodes"
require_number --node-rank "$node_rank"
require_number --master-port "$master_port"
nnodes=$((10#$nnodes)) node_rank=$((10#$node_rank)) # schedulers may pad with zeros, which would be octal
((nnodes >= 1 && node_rank < nnodes)) || die "--node-rank $node_rank is not one of --nnodes $nnodes, which count from 0"
((nnodes == 1)) || [[ -n $master_addr ]] || die "--master-addr is missing (or MASTER_ADDR): the address of node 0"
[[ $launcher == megatron-oreal || $launcher == torchrun ]] || die "--launcher $launcher: megatron-oreal or torchrun"
gpus=$(count_gpus)
if [[ -z $nproc ]]; then
    ((gpus)) || die "nvidia-smi lists no GPU: give --nproc-per-node"
    nproc=$gpus
fi
require_number --nproc-per-node "$nproc"
nproc=$((10#$nproc))
((nproc)) || die "--nproc-per-node=0: must be 1 or more"
if [[ -n $random_weights ]]; then
    [[ -f $random_weights/config.json ]] || die "--random-weights $random_weights: there is no config.json in it"
    overrides+=("model.path=$random_weights")
fi
require_package

name=$(basename "$config" .yaml)
RUN_ARGS=("$config" "${overrides[@]}")
RANK_ARGS=(--nnodes "$nnodes" --node-rank "$node_rank" --nproc-per-node "$nproc")
RANK_ARGS+=(--master-addr "${master_addr:-localhost}" --master-port "$master_port")
BENCH_ARGS+=(--output "${output:-bench_${name}_$((nnodes * nproc)).json}")

if [[ -z $skip_check ]]; then
    [[ -n $dry_run ]] || ((gpus >= nproc)) ||
        die "this node has $gpus GPUs (nvidia-smi -L) for --nproc-per-node $nproc: give fewer, or look at the driver"
    ((node_rank)) || run "$python" -m megatron_oreal plan "${RUN_ARGS[@]}" --world-size "$((nnodes * nproc))" --gpu "$gpu"
    [[ -n $random_weights ]] || run "$python" -m megatron_oreal check "${RUN_ARGS[@]}" "${RANK_ARGS[@]}" --fabric
fi
if [[ $launcher == torchrun ]]; then
    run_last "$python" -m torch.distributed.run "${RANK_ARGS[@]}" -m megatron_oreal bench "${RUN_ARGS[@]}" \
        "${BENCH_ARGS[@]}"
fi
run_last "$python" -m megatron_oreal bench "${RUN_ARGS[@]}" "${RANK_ARGS[@]}" "${BENCH_ARGS[@]}"
