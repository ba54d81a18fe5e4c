#!/usr/bin/env bash
#SBATCH --job-name=oreal
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:USR1@180
# Train on a Slurm allocation: one launcher a node by srun, checks first; requeues itself before the time limit.
set -euo pipefail

# sbatch runs a copy of this file from its spool directory; the repository is where it was submitted, or beside it.
for here in "${SLURM_SUBMIT_DIR:-}/examples" "${SLURM_SUBMIT_DIR:-}" "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"; do
    [[ -f $here/train_multi_node.sh && -f $here/lib.sh ]] && break
done
[[ -f $here/lib.sh ]] || {
    echo "error: examples/lib.sh is not found: submit from the root of the repository" >&2
    exit 2
}
# shellcheck source=examples/lib.sh
source "$here/lib.sh"

usage() {
    cat <<USAGE
usage: sbatch --nodes N --gpus-per-node G [sbatch options] examples/slurm_train.sh CONFIG [options] [key=value ...]

Submit from the root of the repository, which all nodes must see. One task a node starts train_multi_node.sh.

  --nproc-per-node N    ranks on each node (default: SLURM_GPUS_ON_NODE)
  --master-port PORT    default: from the job's number, 20000 to 29999
  --max-requeues N      times the job goes back into the queue at its time limit (default 20); training goes on from
                        the newest checkpoint in work_dir, see checkpoint.every
  --srun-arg ARG        further argument of srun, for example --container-image=...; may be repeated
  --join-timeout S, --launcher NAME
                        as for train_multi_node.sh
$TRAIN_HELP

Slurm's own variables are read: SLURM_JOB_ID, SLURM_JOB_NODELIST, SLURM_JOB_NUM_NODES, SLURM_GPUS_ON_NODE,
SLURM_SUBMIT_DIR, SLURM_RESTART_COUNT. Outside of a job only --dry-run works, with NODES, FIRST_NODE and PORT in their places.
USAGE
}

master_port="" max_requeues=20
SRUN_ARGS=() NODE_ARGS=()
while (($#)); do
    case $1 in
        --master-port) master_port=$(value "$@") || exit; require_number "$1" "$master_port"; consumed=2 ;;
        --max-requeues) max_requeues=$(value "$@") || exit; require_number "$1" "$max_requeues"; consumed=2 ;;
        --srun-arg) SRUN_ARGS+=("$(value "$@")") || exit; consumed=2 ;;
        --join-timeout | --launcher) NODE_ARGS+=("$1" "$(value "$@")") || exit; consumed=2 ;;
        *) parse_training "$@" ;;
    esac
    shift "$consumed"
done
[[ -n $nproc ]] || nproc=${SLURM_GPUS_ON_NODE:-}
if [[ -n ${SLURM_JOB_ID:-} ]]; then
    num_nodes=$SLURM_JOB_NUM_NODES
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || die "scontrol does not name the job's nodes"
    master_addr=${hosts%%$'\n'*}
    [[ -n $master_port ]] || master_port=$((20000 + SLURM_JOB_ID % 10000))
elif [[ -n $dry_run ]]; then
    num_nodes=NODES master_addr=FIRST_NODE master_port=${master_port:-PORT}
else
    die "not in a Slurm job: submit this with sbatch, or see --help"
fi
require_training # the package is looked for on each node, where there may be a container about it

[[ -z $skip_check ]] || NODE_ARGS+=(--skip-check)
((${#check_options[@]})) || NODE_ARGS+=(--no-fabric)
step=(
    srun --nodes "$num_nodes" --ntasks "$num_nodes" --ntasks-per-node 1 --kill-on-bad-exit=1 "${SRUN_ARGS[@]}"
    env -u NODE_RANK bash "$examples/train_multi_node.sh" "$config" "${overrides[@]}"
    --nnodes "$num_nodes" --nproc-per-node "$nproc" --master-addr "$master_addr" --master-port "$master_port"
    "${NODE_ARGS[@]}" --python "$python"
)
if [[ -n $dry_run ]]; then
    show "${step[@]}"
    exit 0
fi

# shellcheck disable=SC2329  # of a trap
at_time_limit() {
    if ((${SLURM_RESTART_COUNT:-0} < max_requeues)); then
        echo "the time limit is near: job $SLURM_JOB_ID goes back into the queue, and on from its newest checkpoint"
        scontrol requeue "$SLURM_JOB_ID" || echo "error: job $SLURM_JOB_ID does not go back into the queue: submit it again" >&2
    else
        echo "error: the time limit is near, and --max-requeues=$max_requeues is used up: submit again" >&2
    fi
}
running=""
# shellcheck disable=SC2329  # of a trap
end_step() {
    [[ -z $running ]] || kill -TERM "$running" 2>/dev/null || true
}
trap at_time_limit USR1
trap end_step TERM INT
"${step[@]}" &
running=$!
status=0
wait "$running" || status=$?
while kill -0 "$running" 2>/dev/null; do # wait came back for a signal, not for the end of the step
    status=0
    wait "$running" || status=$?
done
exit "$status"
