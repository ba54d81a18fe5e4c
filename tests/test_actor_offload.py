"""Offloaded parts of the actor: their bytes are really gone from the device, and every bit comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import actor_cases
import pytest
import torch
from dist import run_ranks

from megatron_oreal.actor import offload
from megatron_oreal.actor.actor import Actor
from megatron_oreal.actor.offload import Offloader, Part
from megatron_oreal.actor.parallel import destroy_parallel, init_parallel
from megatron_oreal.layout import load_model_spec
from megatron_oreal.platform import init_distributed, shutdown_distributed

PARTS = ["optimizer", "reward_model", "reference", "policy"]
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "pipeline-bf16": ({"pipeline_model_parallel_size": 2, "use_distributed_optimizer": False}, "bf16"),
    "distributed-optimizer-fp32": ({}, "fp32"),
    "distributed-optimizer-bf16": ({}, "bf16"),
}


def test_views_survive_and_their_storage_is_empty_meanwhile() -> None:
    flat = torch.arange(12.0)
    view, gradients = flat[3:9].view(2, 3), torch.ones(5)
    offloader = Offloader({"a": Part([view, flat], scratch=[gradients]), "b": Part([torch.ones(3)])}, ["a"])
    offloader.offload()
    assert offloader.away == {"a"}
    assert flat.untyped_storage().nbytes() == gradients.untyped_storage().nbytes() == 0
    offloader.offload("a")
    offloader.load("a", "b")
    assert torch.equal(flat, torch.arange(12.0)) and torch.equal(view, torch.arange(3.0, 9.0).view(2, 3))
    view[0, 0] = 99.0
    assert flat[3] == 99.0, "the view must still be one"
    assert torch.equal(gradients, torch.zeros(5))


@pytest.mark.parametrize("slab", [1, 7, 16, 1000])
def test_host_memory_is_slabs_of_one_size_whatever_the_tensors_are(monkeypatch: pytest.MonkeyPatch, slab: int) -> None:
    """A pinned allocation is rounded up to a power of two, so one for each tensor would take up to twice the memory."""
    monkeypatch.setattr(offload, "_SLAB_BYTES", slab)
    allocated: list[int] = []
    empty = torch.empty

    def recorded(size: Any, *args: Any, **options: Any) -> torch.Tensor:
        allocated.extend([size] if options.get("pin_memory") is not None else [])
        return empty(size, *args, **options)

    monkeypatch.setattr(torch, "empty", recorded)
    tensors = [torch.arange(5.0), torch.arange(3, dtype=torch.uint8), torch.arange(7, dtype=torch.bfloat16)]
    copies = [tensor.clone() for tensor in tensors]
    offloader = Offloader({"a": Part(tensors)}, ["a"])
    for _ in range(2):  # the second time into the same memory
        offloader.offload()
        assert all(tensor.untyped_storage().nbytes() == 0 for tensor in tensors)
        offloader.load()
        assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))
        tensors[1].add_(1)
        copies[1].add_(1)
    assert allocated == [slab] * (37 // slab) + [37 % slab] * (37 % slab > 0)


def test_parts_that_are_put_out_leave_at_once_and_those_that_are_known_are_left_alone() -> None:
    flat, other = torch.arange(6.0), torch.ones(3)
    parts = {"a": Part([flat]), "b": Part([other])}
    offloader = Offloader({}, ["a"])
    offloader.put_out(parts)
    assert offloader.away == {"a"}
    assert flat.untyped_storage().nbytes() == 0 and torch.equal(other, torch.ones(3))
    offloader.load("a")
    offloader.put_out(parts)
    assert not offloader.away and torch.equal(flat, torch.arange(6.0))


def update_in_all_ways(path: Path, work_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """Every case without and with offloading: its results, weights and the bytes of its parts while they are away."""
    platform = init_distributed("cpu", 400)
    answers = {}
    for case, (parallel, dtype) in CASES.items():
        answers[case] = []
        for names in ([], PARTS):
            config = actor_cases.make_config(path, work_dir, parallel | {"offload": names}, model={"dtype": dtype})
            grid = init_parallel(config.parallel, platform)
            actor = Actor(config, load_model_spec(path), grid, platform)
            built = actor.offloader.away
            actor.load_hf()
            answers[case].append({"built": built, "loaded": actor.offloader.away} | update_three_times(actor))
            destroy_parallel()
    shutdown_distributed()
    return answers


def update_three_times(actor: Actor) -> dict[str, Any]:
    results = []
    for step in range(3):
        result = actor.update(actor_cases.make_sequences(10), step)
        results.append((result.policy_grad_norm, result.reward_model_grad_norm, result.sums.values))
        actor.offloader.offload()
        away = {part: storage_bytes(actor, part) for part in PARTS}
    actor.offloader.load()
    assert actor.reward_model is not None
    weights = {name: weight.clone() for name, weight in actor.policy.parameters().items()}
    weights |= {f"rm {name}": weight.clone() for name, weight in actor.reward_model.parameters().items()}
    return {"results": results, "weights": weights, "bytes": away}


def storage_bytes(actor: Actor, part: str) -> int:
    tensors = actor._parts()[part]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.tensors + tensors.scratch)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("offload")
    path = actor_cases.make_model("qwen2-tied", folder)
    return run_ranks("test_actor_offload:update_in_all_ways", 2, {"path": path, "work_dir": folder})


@pytest.mark.parametrize("case", CASES)
def test_training_with_everything_offloaded_gives_the_same_bits(answers: list[dict[str, Any]], case: str) -> None:
    for rank in answers:
        stayed, moved = rank[case]
        assert moved["built"] == moved["loaded"] == set(PARTS) and not stayed["built"]
        assert moved["results"] == stayed["results"]
        assert moved["results"][-1][0] > 0
        assert moved["weights"].keys() == stayed["weights"].keys()
        assert [n for n, weight in stayed["weights"].items() if not torch.equal(weight, moved["weights"][n])] == []
        assert min(stayed["bytes"].values()) > 10_000
        assert set(moved["bytes"].values()) == {0}
