"""Bytes by rank and phase: exact from Megatron's modules on meta tensors, quick from closed forms."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import torch.distributed as dist

from megatron_oreal.layout.megatron import RankGrid
from megatron_oreal.planner.activations import backward_pass, forward_pass, offloaded_activations
from megatron_oreal.planner.engine import EngineBytes, engine_bytes
from megatron_oreal.planner.parameters import ModelBytes, frozen_bytes, trained_bytes
from megatron_oreal.planner.phases import compose, host_bytes
from megatron_oreal.planner.types import RankMemory, Setting

_ENGINE_MODEL = ("KV cache", "engine workspace", "reshard buckets", "digest", "reserve")
_TE_MODEL = ("activations", "logits and loss")


def grid_of(setting: Setting) -> RankGrid:
    """Megatron's order of ranks."""
    parallel = setting.config.parallel
    return RankGrid(parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, setting.dp)


def distinct_ranks(setting: Setting) -> list[int]:
    """One rank of every pipeline stage, its first; ranks of a stage differ in no shape.

    (Vocabulary and widths are padded to, or divided by, the tensor-parallel size; of Adam's state the last
    data-parallel ranks may have less, by padding.)
    """
    grid = grid_of(setting)
    return [grid.global_rank(tp_rank=0, pp_rank=stage, dp_rank=0) for stage in range(grid.pp)]


def rank_memory(setting: Setting, rank: int) -> RankMemory:
    """Build the rank's actor of Megatron's modules on meta tensors and count what it makes.

    Torch-native layers run a whole update there, on Megatron's schedules, so that their activations are counted too.
    TransformerEngine's do not exist without CUDA: parameters, gradients and optimizer are of the real modules'
    shapes, activations those of ``activations.py``. Takes seconds; minutes for torch-native layers of a large model.
    """
    return _apart(_rank_memories, setting, (rank,))[0]


def memory(setting: Setting) -> list[RankMemory]:
    """``rank_memory`` of every distinct rank, in rank order."""
    return _apart(_rank_memories, setting, tuple(distinct_ranks(setting)))


def parameter_shapes(setting: Setting, rank: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """Model (``policy``, ``reference``, ``reward model``) -> parameter -> shape, of the modules built on meta tensors.

    Names are those of torch-native layers (``layout.megatron_layout(..., transformer_impl="local")``).
    """
    return _apart(_shapes, setting, (rank,))[0]


def _apart(work: Any, setting: Setting, ranks: tuple[int, ...]) -> Any:
    """Work that simulates ranks: here, or in a process of its own where there is CUDA or a process group."""
    if not (torch.cuda.is_available() or dist.is_initialized()):
        return work(setting, ranks)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_without_cuda) as pool:
        return pool.submit(work, setting, ranks).result()


def _without_cuda() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _shapes(setting: Setting, ranks: tuple[int, ...]) -> list[dict[str, dict[str, tuple[int, ...]]]]:
    from megatron_oreal.planner.update import simulate_update

    return [simulate_update(setting, rank, learn=False).parameters for rank in ranks]


def _rank_memories(setting: Setting, ranks: tuple[int, ...]) -> list[RankMemory]:
    from megatron_oreal.planner.update import simulate_update

    engine, memories = engine_bytes(setting), []
    local = setting.implementation == "local"
    for rank in ranks:
        update = simulate_update(setting, rank, learn=local)
        pp_rank, dp_rank, _ = update.coordinates
        dynamic = update.dynamic if local else _modelled_passes(setting, pp_rank, dp_rank)
        modelled = () if local else _TE_MODEL
        static = dict(update.static)
        if setting.config.parallel.optimizer_cpu_offload or setting.config.parallel.use_precision_aware_optimizer:
            static |= _optimizer_options(setting, pp_rank, dp_rank)
        memories.append(
            _rank_memory(setting, rank, update.coordinates, static, dynamic, engine, modelled, update.between)
        )
    return memories


def _trained(setting: Setting, pp_rank: int, dp_rank: int) -> dict[str, ModelBytes]:
    """Closed forms of the models that are trained, by name."""
    models = {"policy": False} | ({"reward model": True} if setting.config.model.reward_model else {})
    return {name: trained_bytes(setting, pp_rank, dp_rank, score_head=score) for name, score in models.items()}


def _optimizer_options(setting: Setting, pp_rank: int, dp_rank: int) -> dict[str, int]:
    """Adam's state where TransformerEngine's optimizer or the CPU has it, which are not here: in closed form."""
    return {f"{name} optimizer": part.optimizer for name, part in _trained(setting, pp_rank, dp_rank).items()}


def _options_on_host(setting: Setting, pp_rank: int, dp_rank: int) -> dict[str, int]:
    """Host bytes of Adam on the CPU, and of activations that wait there for the backward pass."""
    items = {f"{name} optimizer": part.host for name, part in _trained(setting, pp_rank, dp_rank).items()}
    return items | {"activations": offloaded_activations(setting, pp_rank, dp_rank)}


def quick_rank_memory(setting: Setting, rank: int) -> RankMemory:
    """Closed forms of ``rank_memory``."""
    return _quick(setting, rank, engine_bytes(setting))


def _quick(setting: Setting, rank: int, engine: EngineBytes) -> RankMemory:
    tp_rank, pp_rank, dp_rank = grid_of(setting).coordinates(rank)
    trained = _trained(setting, pp_rank, dp_rank)
    static = _items("policy", trained["policy"]) | _items("reference", frozen_bytes(setting, pp_rank))
    if "reward model" in trained:
        static |= _items("reward model", trained["reward model"])
    dynamic = _modelled_passes(setting, pp_rank, dp_rank)
    return _rank_memory(setting, rank, (pp_rank, dp_rank, tp_rank), static, dynamic, engine, _TE_MODEL)


def _modelled_passes(setting: Setting, pp_rank: int, dp_rank: int) -> dict[str, dict[str, int]]:
    passes = {"reference": forward_pass(setting, pp_rank, dp_rank)}
    if setting.config.model.reward_model:
        passes["reward_model"] = backward_pass(setting, pp_rank, dp_rank, score_head=True)
    passes["policy"] = backward_pass(setting, pp_rank, dp_rank)
    return {name: {"activations": each.activations, "logits and loss": each.logits} for name, each in passes.items()}


def quick_memory(setting: Setting) -> RankMemory:
    """``quick_rank_memory`` of the rank whose peak is highest."""
    engine = engine_bytes(setting)
    return max((_quick(setting, rank, engine) for rank in distinct_ranks(setting)), key=lambda each: each.peak.total)


def _rank_memory(
    setting: Setting,
    rank: int,
    coordinates: tuple[int, int, int],
    static: dict[str, int],
    dynamic: dict[str, dict[str, int]],
    engine: EngineBytes,
    modelled: tuple[str, ...],
    between: int = 0,
) -> RankMemory:
    phases = compose(setting, static, dynamic, engine, between)
    host = Counter(host_bytes(setting, static, engine))
    host.update(_options_on_host(setting, *coordinates[:2]))
    seen = {item for phase in phases for item in phase.live}
    return RankMemory(
        rank,
        *coordinates,
        static,
        phases,
        tuple(item for item in (*modelled, *_ENGINE_MODEL) if item in seen),
        {item: size for item, size in host.items() if size},
    )


def _items(model: str, part: ModelBytes) -> dict[str, int]:
    sizes = {"parameters": part.parameters, "gradients": part.gradients, "optimizer": part.optimizer}
    return {f"{model} {name}": size for name, size in sizes.items() if size}
