"""Performance options that need or exclude each other: one line that names the keys and the mend."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_config import SPEC, config_of, refusal

from megatron_oreal.config_check import check_config

P = "parallel."
GRADIENTS = [P + "overlap_grad_reduce=true"]
SP2 = [P + "tensor_model_parallel_size=2", P + "sequence_parallel=true"]
TP_OVERLAP = [*SP2, P + "tp_comm_overlap=true"]
CONTRADICTIONS: dict[str, tuple[int, list[str], list[str]]] = {
    "gather-alone": (1, [P + "overlap_param_gather=true"], ["overlap_param_gather=true", "overlap_grad_reduce"]),
    "gather-of-no-reward-model": (
        1,
        [*GRADIENTS, P + "overlap_param_gather=true", "model.reward_model=false", "algorithm.actor_freeze_steps=0"],
        ["overlap_param_gather=true is for the reward model", "model.reward_model=false"],
    ),
    "buckets": (1, [P + "ddp_bucket_size=9"], ["ddp_bucket_size=9", "overlap_grad_reduce=true"]),
    "tp-overlap-without-sp": (1, [P + "tp_comm_overlap=true"], ["tp_comm_overlap=true", "sequence_parallel=true"]),
    "tp-overlap-vpp": (
        4,
        [*TP_OVERLAP, P + "pipeline_model_parallel_size=2", P + "virtual_pipeline_model_parallel_size=3"],
        ["tp_comm_overlap=true", "virtual_pipeline_model_parallel_size to null"],
    ),
    "tp-options-alone": (1, [P + "tp_comm_overlap_cfg={qkv_fprop: {num_sm: 4}}"], ["tp_comm_overlap=true: unset"]),
    "tp-foreign-option": (
        2,
        [*TP_OVERLAP, P + "tp_comm_overlap_options={bf16: true}"],
        ["tp_comm_overlap_options: bf16", "remove it"],
    ),
    "tp-option-of-another-type": (
        2,
        [*TP_OVERLAP, P + "tp_comm_overlap_options={tp_comm_overlap_ag: sometimes}"],
        ["tp_comm_overlap_ag='sometimes'", "use true or false"],
    ),
    "tp-bootstrap": (
        2,
        [*TP_OVERLAP, P + "tp_comm_overlap_options={tp_comm_bootstrap_backend: smoke}"],
        ["tp_comm_bootstrap_backend='smoke'", "nccl, gloo, mpi"],
    ),
    "tp-unknown-gemm": (
        2,
        [*TP_OVERLAP, P + "tp_comm_overlap_cfg={qkv_fprp: {num_sm: 4}}"],
        ["tp_comm_overlap_cfg: qkv_fprp", "qkv_fprop"],
    ),
    "fusion": (
        1,
        [P + "gradient_accumulation_fusion=maybe"],
        ["parallel.gradient_accumulation_fusion='maybe': input should be 'auto', True or False"],
    ),
    "cuda-graphs": (1, [P + "cuda_graph_impl=local"], ["cuda_graph_impl=local", "packed sequences", "none"]),
    "cpu-adam-alone": (
        1,
        [P + "optimizer_cpu_offload=true", P + "use_distributed_optimizer=false"],
        ["optimizer_cpu_offload=true", "use_distributed_optimizer=true"],
    ),
    "cpu-adam-fp32": (
        1,
        [P + "optimizer_cpu_offload=true", "model.dtype=fp32"],
        ["optimizer_cpu_offload=true", "model.dtype=bf16"],
    ),
    "cpu-adam-copies": (1, [P + "overlap_cpu_optimizer_d2h_h2d=true"], ["optimizer_cpu_offload=true"]),
    "cpu-adam-in-other-dtypes": (
        1,
        [P + "optimizer_cpu_offload=true", P + "use_precision_aware_optimizer=true"],
        ["exclude each other", "set one to false"],
    ),
    "moments": (1, [P + "exp_avg_dtype=bf16"], ["exp_avg_dtype=bf16", "use_precision_aware_optimizer=true"]),
    "modules-without-selective": (1, [P + "recompute_modules=[mlp]"], ["recompute_granularity=selective"]),
    "offloaded-layers": (1, [P + "cpu_offloading_num_layers=6"], ["cpu_offloading_num_layers=6", "6 layers"]),
    "offloaded-layers-pp": (
        2,
        [P + "cpu_offloading_num_layers=2", P + "pipeline_model_parallel_size=2"],
        ["cpu_offloading_num_layers=2", "pipeline_model_parallel_size=1"],
    ),
    "offloaded-layers-recompute": (
        1,
        [P + "cpu_offloading_num_layers=2", P + "recompute_granularity=selective"],
        ["cpu_offloading_num_layers=2", "recompute_granularity=selective"],
    ),
    "fraction-alone": (1, [P + "optimizer_offload_fraction=0.5"], ["optimizer_cpu_offload=true"]),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_contradiction_names_the_keys_and_the_mend(tmp_path: Path, case: str) -> None:
    world_size, overrides, parts = CONTRADICTIONS[case]
    message = refusal(tmp_path, *overrides, world_size=world_size)
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize(
    "overrides",
    [
        [*GRADIENTS, P + "overlap_param_gather=true", P + "ddp_bucket_size=1000000"],
        [*TP_OVERLAP, P + "tp_comm_overlap_options={tp_comm_overlap_rs_dgrad: true}"],
        [*TP_OVERLAP, P + "tp_comm_overlap_cfg={fc2_fprop: {num_sm: 4}, qkv_wgrad: {method: bulk}}"],
        [P + "optimizer_cpu_offload=true", P + "optimizer_offload_fraction=0.5"],
        [P + "use_precision_aware_optimizer=true", P + "exp_avg_dtype=bf16", P + "exp_avg_sq_dtype=bf16"],
        [P + "recompute_granularity=selective", P + "recompute_modules=[core_attn, mlp]"],
    ],
)
def test_options_that_go_together_are_accepted(tmp_path: Path, overrides: list[str]) -> None:
    check_config(config_of(tmp_path, *overrides), SPEC, 2)
