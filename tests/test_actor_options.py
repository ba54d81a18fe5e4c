"""Performance options on real gloo ranks: the losses and weights are those without them, and readers get whole ones."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import actor_cases
import pytest
import torch
from dist import run_ranks
from megatron.core.optimizer import optimizer_config

from megatron_oreal.actor.optimizer import ModelOptimizer, _allocate_moments
from megatron_oreal.actor.options import check_options, fuses_weight_gradient
from megatron_oreal.config import OptimizerConfig, ParallelConfig
from megatron_oreal.errors import UserError

GRADIENTS = {"overlap_grad_reduce": True, "ddp_bucket_size": 20_000}
BOTH = GRADIENTS | {"overlap_param_gather": True}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}
CPU_ADAM = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}
PARTS = ["optimizer", "reward_model", "reference", "policy"]
PP2 = {"pipeline_model_parallel_size": 2}
TWO_RANKS: dict[str, Any] = {
    "DP2": (
        {},
        "fp32",
        {"gradients-all-reduce": GRADIENTS | {"use_distributed_optimizer": False}, "selective": SELECTIVE},
    ),
    "DP2-bf16": (
        {},
        "bf16",
        {"both-offloaded": BOTH | {"offload": PARTS}, "cpu-adam-offloaded": CPU_ADAM | {"offload": PARTS}},
    ),
}
FOUR_RANKS: dict[str, Any] = {
    "TP2-DP2": ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, "fp32", {"both": BOTH}),
    "PP2-DP2": (PP2, "fp32", {"both": BOTH}),
    "VPP2-DP2": (PP2 | {"virtual_pipeline_model_parallel_size": 2}, "fp32", {"both": BOTH}),
}


def variants(cases: dict[str, Any]) -> list[str]:
    return [f"{case}/{name}" for case in cases for name in cases[case][2]]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of two ranks: what each case and variant gave."""
    folder = tmp_path_factory.mktemp("options")
    arguments = {"path": actor_cases.make_model("qwen2-tied", folder), "work_dir": folder}
    return run_ranks("option_workers:compare", 2, arguments | {"cases": TWO_RANKS, "resumes": True})


def of(measured: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    found = [rank[name] for rank in measured if name in rank]
    assert found
    return found


@pytest.mark.parametrize("name", variants(TWO_RANKS))
def test_an_option_changes_no_loss_and_no_weight_beyond_the_rounding_of_a_norm(
    measured: list[dict[str, Any]], name: str
) -> None:
    is_the_same(of(measured, name), name)


@pytest.mark.slow
def test_overlap_with_tensor_and_pipeline_parallel_ranks_ends_in_the_same_losses_and_weights(tmp_path: Path) -> None:
    path = actor_cases.make_model("qwen2-tied", tmp_path)
    arguments = {"path": path, "work_dir": tmp_path, "cases": FOUR_RANKS, "resumes": False}
    measured = run_ranks("option_workers:compare", 4, arguments)
    for name in variants(FOUR_RANKS):
        is_the_same(of(measured, name), name)
        is_whole(of(measured, name), name)


def is_the_same(ranks: list[dict[str, Any]], name: str) -> None:
    """Gradients and sums are the same bits; the norm is summed over other shards, and it scales the update."""
    for rank in ranks:
        assert rank["numbers"] < 5e-7, rank
        assert rank["weights"] < 2e-7, rank
        if "overlap" not in str(_options(name)):
            assert rank["numbers"] == rank["weights"] == 0.0, rank


@pytest.mark.parametrize("name", [name for name in variants(TWO_RANKS) if "selective" not in name])
def test_a_checkpoint_holds_whole_weights_and_a_resumed_run_goes_on_with_the_same_numbers(
    measured: list[dict[str, Any]], name: str
) -> None:
    for rank in of(measured, name):
        assert rank["resumed_weights"]
        assert rank["resumed_numbers"] < 5e-7, rank


@pytest.mark.parametrize("name", variants(TWO_RANKS))
def test_the_policy_is_whole_after_its_update_and_only_a_gather_that_was_put_off_leaves_the_reward_model_in_parts(
    measured: list[dict[str, Any]], name: str
) -> None:
    is_whole(of(measured, name), name)


def is_whole(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        assert rank["whole"] == {"policy": True, "reward_model": "overlap_param_gather" not in _options(name)}


def test_buckets_and_the_cpu_optimizer_were_there(measured: list[dict[str, Any]]) -> None:
    assert min(rank["buckets"] for rank in of(measured, "DP2-bf16/both-offloaded")) > 2
    assert {rank["optimizer"] for rank in of(measured, "DP2-bf16/cpu-adam-offloaded")} == {"HybridDeviceOptimizer"}
    assert {rank["optimizer"] for rank in of(measured, "DP2-bf16/both-offloaded")} == {"AdamW"}


def test_a_step_packs_and_moves_its_micro_batches_once_for_all_three_models(measured: list[dict[str, Any]]) -> None:
    for rank in of(measured, "DP2"):
        first, second = rank["passes"][:3], rank["passes"][3:]
        assert len(rank["passes"]) == 6 and first[0] == first[1] == first[2] and second[0] == second[1] == second[2]
        assert rank["moved"] == len(first[0]) + len(second[0])


def _options(name: str) -> dict[str, Any]:
    case, variant = name.split("/")
    return (TWO_RANKS | FOUR_RANKS)[case][2][variant]


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "tp-overlap": ({"tp_comm_overlap": True}, "local", r"tp_comm_overlap=true needs TransformerEngine's layers"),
    "backend": ({"attention_backend": "fused"}, "local", r"attention_backend=fused needs .*: set it to auto"),
    "activations": ({"cpu_offloading_num_layers": 1}, "local", r"cpu_offloading_num_layers=1 needs .*: set it to 0"),
    "fusion": ({"gradient_accumulation_fusion": True}, "local", r"gradient_accumulation_fusion=true needs"),
    "no-apex": ({"gradient_accumulation_fusion": True}, "transformer_engine", r"install apex with --cuda_ext"),
    "no-flash": ({"attention_backend": "flash"}, "transformer_engine", r"flash-attn is not installed"),
    "no-gpu": ({"optimizer_cpu_offload": True}, "local", r"optimizer_cpu_offload=true: this run has no CUDA device"),
    "precision": ({"use_precision_aware_optimizer": True}, "local", r"needs TransformerEngine, which is not installed"),
    "version": (
        {"tp_comm_overlap": True, "tp_comm_overlap_options": {"tp_comm_overlap_xy": True}},
        "transformer_engine",
        r"parallel\.tp_comm_overlap_options: tp_comm_overlap_xy: megatron-core [\d.]+ has no such option: remove it",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_this_machine_cannot_serve_is_refused_by_its_key(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, implementation, message = REFUSED[case]
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=message) as error:
        check_options(ParallelConfig(**options), implementation, is_cuda=implementation != "local")  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_defaults_and_a_fusion_switched_off_are_served_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        monkeypatch.delenv(name, raising=False)
    check_options(ParallelConfig(), "local", is_cuda=False)
    check_options(ParallelConfig(gradient_accumulation_fusion=False), "local", is_cuda=False)
    assert not fuses_weight_gradient(ParallelConfig(), "local")


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is not None, reason="Megatron accepts it")
def test_an_optimizer_that_megatron_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_config, "is_te_min_version", lambda *_: False)  # it compares no version with None
    parallel = ParallelConfig(use_precision_aware_optimizer=True)
    with pytest.raises(UserError, match=r"megatron-core refuses these optimizer settings: .*TransformerEngine"):
        ModelOptimizer(None, OptimizerConfig(), parallel, "bf16", None)  # type: ignore[arg-type]


def test_an_attention_variable_that_contradicts_the_key_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "NVTE_FLASH_ATTN", "0")
    with pytest.raises(UserError, match=r"NVTE_FLASH_ATTN=0 contradicts parallel\.attention_backend=auto.*unset it"):
        check_options(ParallelConfig(), "local", is_cuda=False)


class _FusedAdam(torch.optim.Optimizer):
    """The state of TransformerEngine's, whose CUDA kernels it has not: ``initialize_state`` as from 2.1 on."""

    def __init__(self, params: list[torch.Tensor], store_param_remainders: bool):
        super().__init__(params, {})
        self.store_param_remainders = store_param_remainders

    def initialize_state(self, param: torch.Tensor, store_param_remainders: bool) -> None:
        main = torch.int16 if store_param_remainders else torch.float32
        self.state[param]["master_param"] = torch.zeros_like(param, dtype=main)


class _OlderFusedAdam(_FusedAdam):
    def initialize_state(self, param: torch.Tensor) -> None:  # type: ignore[override]
        super().initialize_state(param, False)


@pytest.mark.parametrize(
    ("make", "remainders", "expected"),
    [
        (_FusedAdam, True, [torch.int16, torch.float32]),
        (_FusedAdam, False, [torch.float32, torch.float32]),
        (_OlderFusedAdam, False, [torch.float32, torch.float32]),
    ],
)
def test_a_precision_aware_optimizer_has_its_state_from_the_start(
    make: type[_FusedAdam], remainders: bool, expected: list[torch.dtype]
) -> None:
    weights = [torch.zeros(4, dtype=torch.bfloat16), torch.zeros(4)]
    config = SimpleNamespace(use_precision_aware_optimizer=True)
    part = SimpleNamespace(optimizer=make(weights, remainders), config=config)
    _allocate_moments(part)
    assert [part.optimizer.state[weight]["master_param"].dtype for weight in weights] == expected
