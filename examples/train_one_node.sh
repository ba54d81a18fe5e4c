#!/usr/bin/env bash
# Train on the GPUs of this machine: check, then train. Started again, it goes on from the newest checkpoint.
set -euo pipefail
# shellcheck source=examples/lib.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/lib.sh"

usage() {
    cat <<USAGE
usage: train_one_node.sh CONFIG [options] [key=value ...]

$TRAIN_HELP

Paths in the config are relative to the directory that this is started in.
Exit status: that of the check (1) or of the training.
USAGE
}

while (($#)); do
    parse_training "$@"
    shift "$consumed"
done
require_training
require_package

RUN_ARGS=("$config" "${overrides[@]}")
RANK_ARGS=(--nproc-per-node "$nproc")

[[ -n $skip_check ]] || run "$python" -m megatron_oreal check "${RUN_ARGS[@]}" "${RANK_ARGS[@]}" "${check_options[@]}"
run_last "$python" -m megatron_oreal train "${RUN_ARGS[@]}" "${RANK_ARGS[@]}"
