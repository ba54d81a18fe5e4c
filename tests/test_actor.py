"""The actor on real gloo ranks: equal to Hugging Face, independent of how it is sharded and packed, resumable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import actor_cases
import pytest
from dist import run_ranks
from safetensors.torch import load_file

TP1: dict[str, Any] = {}
TP2 = {"tensor_model_parallel_size": 2}
SP2 = TP2 | {"sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = PP2 | {"virtual_pipeline_model_parallel_size": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: actor_cases.make_model(name, folder) for name in actor_cases.MODELS}


@pytest.mark.parametrize(
    ("world", "parallel"),
    [pytest.param(1, TP1, marks=pytest.mark.slow), (2, TP2), pytest.param(2, PP2, marks=pytest.mark.slow)],
    ids=["TP1", "TP2", "PP2"],
)
def test_logps_equal_hugging_face_and_the_export_is_bit_identical(
    models: dict[str, Path], tmp_path: Path, world: int, parallel: dict[str, Any]
) -> None:
    arguments = {"paths": list(models.values()), "work_dir": tmp_path, "parallel": parallel}
    results = run_ranks("actor_cases:compare_with_hf", world, arguments)
    worst = {name: max(result[name] for result in results) for name in models}
    assert all(value > 0 for value in worst.values()), "nothing was compared"
    assert max(worst.values()) < 1e-4, worst
    tp, pp = parallel.get("tensor_model_parallel_size", 1), parallel.get("pipeline_model_parallel_size", 1)
    for name, path in models.items():
        original, exported = (load_file(p / "model.safetensors") for p in (path, tmp_path / f"{name}-{tp}-{pp}"))
        assert original.keys() == exported.keys()
        for tensor in original:
            assert original[tensor].equal(exported[tensor]), f"{name}: {tensor}"


@pytest.fixture(scope="module")
def one_rank(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    arguments = {"path": models["qwen2-tied"], "work_dir": tmp_path_factory.mktemp("one"), "parallel": TP1}
    return run_ranks("actor_cases:three_steps", 1, arguments)[0]


LAYOUTS = {
    "TP2": (2, TP2),
    "TP2-SP": (2, SP2),
    "PP2": (2, PP2),
    "VPP2": (2, VPP2),
    "PP2-uneven": (2, PP2 | {"num_layers_in_first_pipeline_stage": 1}),
    "DP2": (2, TP1),
    "DP2-no-distributed-optimizer": (2, {"use_distributed_optimizer": False}),
    "TP2-PP2-SP": (4, SP2 | PP2),
    "TP4-above-the-KV-heads": (4, {"tensor_model_parallel_size": 4}),
    "one-micro-batch": (1, {"max_tokens_per_microbatch": 4096}),
    "recompute": (1, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}),
}

# CI runs those that the others are made of.
IN_CI = ("VPP2", "DP2", "TP2-PP2-SP")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in IN_CI else [pytest.mark.slow]) for n in LAYOUTS])
def test_losses_and_gradient_norms_do_not_depend_on_the_layout(
    name: str, models: dict[str, Path], one_rank: list[dict[str, float]], tmp_path: Path
) -> None:
    world, parallel = LAYOUTS[name]
    arguments = {"path": models["qwen2-tied"], "work_dir": tmp_path, "parallel": parallel}
    results = run_ranks("actor_cases:three_steps", world, arguments)
    assert all(result == results[0] for result in results), "ranks disagree about the step's numbers"
    assert one_rank[2]["positive"] > 0
    assert one_rank[2]["negative"] > 0
    for step, (ours, theirs) in enumerate(zip(results[0], one_rank, strict=True)):
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=2e-4, abs=1e-7), f"step {step}: {key}"


@pytest.mark.slow
def test_fewer_sequences_than_data_parallel_ranks_give_the_same_step(models: dict[str, Path], tmp_path: Path) -> None:
    arguments = {"path": models["llama"], "work_dir": tmp_path, "count": 1}
    alone = run_ranks("actor_cases:three_steps", 1, arguments | {"parallel": TP1})[0]
    for world, parallel in ((2, TP1), (4, PP2), (4, VPP2), (4, SP2)):
        shared = run_ranks("actor_cases:three_steps", world, arguments | {"parallel": parallel})[0]
        for ours, theirs in zip(shared, alone, strict=True):
            assert ours == pytest.approx(theirs, rel=2e-4, abs=1e-8), parallel


@pytest.mark.slow
def test_paper_mode_does_not_depend_on_the_layout(models: dict[str, Path], tmp_path: Path) -> None:
    arguments = {"path": models["qwen3"], "work_dir": tmp_path, "algorithm": {"mode": "paper"}}
    alone = run_ranks("actor_cases:three_steps", 1, arguments | {"parallel": TP1})[0]
    shared = run_ranks("actor_cases:three_steps", 2, arguments | {"parallel": SP2})[0]
    assert alone[2]["positive"] != 0
    for ours, theirs in zip(shared, alone, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=1e-7)


def test_bf16_trains_with_fp32_gradients(models: dict[str, Path], tmp_path: Path) -> None:
    arguments = {"path": models["llama-tied"], "work_dir": tmp_path, "parallel": SP2}
    bf16 = {"model": {"path": str(models["llama-tied"]), "stop_word": "unused", "dtype": "bf16"}}
    rough = run_ranks("actor_cases:three_steps", 2, arguments | bf16)[0]
    exact = run_ranks("actor_cases:three_steps", 2, arguments)[0]
    assert rough[0]["kl"] == 0
    assert rough[2]["reward_model"] == pytest.approx(exact[2]["reward_model"], rel=0.02)
    assert rough[2]["entropy"] == pytest.approx(exact[2]["entropy"], rel=0.01)


@pytest.mark.parametrize(
    ("world", "parallel"),
    [pytest.param(1, TP1, marks=pytest.mark.slow), pytest.param(2, TP2, marks=pytest.mark.slow), (2, PP2)],
    ids=["TP1", "TP2", "PP2"],
)
def test_first_step_policy_equals_reference_and_engine_equals_actor(
    models: dict[str, Path], tmp_path: Path, world: int, parallel: dict[str, Any]
) -> None:
    arguments = {"path": models["qwen2"], "work_dir": tmp_path, "parallel": parallel}
    for result in run_ranks("actor_cases:first_step_exactness", world, arguments):
        assert result["identical"]
        assert result["kl"] == 0
        assert result["k3"] == 0
        assert result["tokens"] > 50
        assert 0 < result["engine_difference"] < 1e-4


@pytest.mark.slow
def test_two_weight_syncs_under_pp2_reach_the_engine(models: dict[str, Path], tmp_path: Path) -> None:
    arguments = {"path": models["qwen3-tied"], "work_dir": tmp_path, "parallel": PP2}
    assert run_ranks("actor_cases:two_syncs", 2, arguments) == [[True, True]] * 2


RESUMES = {"TP2": (2, TP2, {}), "VPP2-tied-bf16": (2, VPP2, {"dtype": "bf16"}), "DP2-bf16": (2, TP1, {"dtype": "bf16"})}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "VPP2-tied-bf16" else [pytest.mark.slow]) for n in RESUMES]
)
def test_resuming_gives_the_same_bits(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    world, parallel, model = RESUMES[name]
    path = models["qwen2-tied"]
    sections = {"model": {"path": str(path), "stop_word": "unused", "dtype": "fp32"} | model}
    arguments = {"path": path, "work_dir": tmp_path, "parallel": parallel} | sections
    for result in run_ranks("actor_cases:save_and_resume", world, arguments):
        assert result["newest"] == 2
        assert result["position"] == {"at": "two"}
        assert result["same_bits"]
        assert result["straight"] == result["resumed"]
        assert len(result["other_moments"]) >= 2
        assert set(result["other_moments"]) == {actor_cases.OTHER_MOMENTS}, "the config's, not the checkpoint's"


def test_resuming_in_another_layout_gives_the_same_step(models: dict[str, Path], tmp_path: Path) -> None:
    arguments = {"path": models["qwen2"], "work_dir": tmp_path, "parallel": TP2, "resume_parallel": PP2}
    for result in run_ranks("actor_cases:save_and_resume", 2, arguments):
        for (ours, *our_norms), (theirs, *their_norms) in zip(result["resumed"], result["straight"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)
            assert our_norms == pytest.approx(their_norms, rel=1e-3)
