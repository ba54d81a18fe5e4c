"""The actor's real update on a simulated rank: what is alive in each of its phases."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor

from megatron_oreal.actor import actor as actor_module
from megatron_oreal.actor.actor import Actor
from megatron_oreal.actor.batch import Batch, Microbatch, TrainSequence
from megatron_oreal.actor.build import unwrap
from megatron_oreal.actor.offload import model_part, optimizer_part
from megatron_oreal.actor.optimizer import ModelOptimizer
from megatron_oreal.actor.options import TRANSFORMER_ENGINE_KEYS
from megatron_oreal.actor.schedule import to_device
from megatron_oreal.config import Config
from megatron_oreal.data.packing import PackItem, WorkModel, pack, plan_for
from megatron_oreal.loss import vocab_parallel
from megatron_oreal.planner.simulated import SimulatedRank, simulated_rank
from megatron_oreal.planner.types import Setting
from megatron_oreal.planner.watch import PhaseWatch


@dataclass(frozen=True)
class UpdateMemory:
    """``static``: bytes of each model's parts. ``dynamic``: of everything else at each phase's peak, by item.

    ``between``: bytes that stay alive from one update to the next.
    ``parameters``: names and shapes of each model's parameters, by model.
    """

    coordinates: tuple[int, int, int]
    static: dict[str, int]
    dynamic: dict[str, dict[str, int]]
    between: int
    parameters: dict[str, dict[str, tuple[int, ...]]]


def simulate_update(setting: Setting, rank: int, *, learn: bool = True) -> UpdateMemory:
    """Build a rank's actor on meta tensors and let it learn from one step's sequences (``learn`` False: build only).

    Nothing is offloaded here: what may be in host memory is not alive in a phase, which the caller knows.
    """
    config = _simulated_config(setting)
    with simulated_rank(config.parallel, rank, setting.world_size) as simulated:
        with simulated.storages.making("constants"):
            actor = Actor(config, setting.spec, simulated.grid, simulated.platform)
        static = _assign_static(actor, simulated)
        watch = PhaseWatch(simulated.storages)
        between = 0
        if learn:
            _learn(actor, simulated, setting, watch)
            between = _add_what_stays(actor, watch)
        grid = simulated.grid
        shapes = {name: _shapes(model.parameters()) for name, model in _models(actor).items()}
    dynamic = {
        phase: {item: size for item, size in peak.items() if item not in static and size}
        for phase, peak in watch.peaks.items()
    }
    return UpdateMemory((grid.pp_rank, grid.dp_rank, grid.tp_rank), static, dynamic, between, shapes)


def _simulated_config(setting: Setting) -> Config:
    """Without offloading, and without what this machine's packages cannot serve."""
    parallel: dict[str, Any] = {"offload": [], "optimizer_cpu_offload": False, "use_precision_aware_optimizer": False}
    if setting.implementation == "transformer_engine":
        parallel |= TRANSFORMER_ENGINE_KEYS
        parallel |= {"transformer_impl": "local", "tp_comm_overlap_options": {}, "tp_comm_overlap_cfg": {}}
    return setting.config.model_copy(update={"parallel": setting.config.parallel.model_copy(update=parallel)})


def _learn(actor: Actor, simulated: SimulatedRank, setting: Setting, watch: PhaseWatch) -> None:
    with watch.actor(), _with_shapes(simulated, setting):
        if setting.lengths is None:
            batch = _full_batch(setting, simulated, actor.implementation)
            sequences = [sequence for microbatch in batch.microbatches for sequence in microbatch.sequences]
            actor.make_batch = lambda sequences: batch  # type: ignore[method-assign]
        else:
            sequences = [_sequence(n, setting.prompt_tokens, i) for i, n in enumerate(setting.lengths)]
        actor.update(sequences, setting.config.algorithm.actor_freeze_steps, watch)


def _add_what_stays(actor: Actor, watch: PhaseWatch) -> int:
    """From the second update on: Megatron's stages hold the last micro-batch that they were sent until the next pass.

    ``GPTModel.set_input_tensor`` keeps it, with its gradient. This update was the first: add what models that have not
    run yet in a phase still hold there. Returns the bytes that all of them hold after it.
    """
    order = {"reference": "reference", "reward_model": "reward model", "policy": "policy"}
    models = _models(actor)
    stays = 0
    for phase, name in reversed(order.items()):
        for each in (phase, f"{phase}/step"):
            if each in watch.peaks and stays:
                watch.peaks[each]["activations"] = watch.peaks[each].get("activations", 0) + stays
        for chunk in models[name].chunks if name in models else ():
            tensor = unwrap(chunk).decoder.input_tensor
            leaf = tensor is not None and tensor.is_leaf  # else the model's own, from its embedding
            for held in (tensor, tensor.grad if leaf else None):
                stays += held.untyped_storage().nbytes() if held is not None else 0
    return stays


def microbatches_in_flight(setting: Setting, pp_rank: int) -> int:
    """Micro-batches of the worst case: as many as a stage of the pipeline may hold, and one that follows."""
    parallel = setting.config.parallel
    pp = parallel.pipeline_model_parallel_size
    return 2 * pp if parallel.virtual_pipeline_model_parallel_size else pp - pp_rank + 1


def full_lengths(setting: Setting) -> list[int]:
    """Sequences of a full micro-batch: as long as they may be, then what is left of the budget."""
    longest, budget = setting.config.rollout.gen_max_length, setting.config.parallel.max_tokens_per_microbatch
    lengths = [longest] * (budget // longest)
    rest = budget - sum(lengths)
    return lengths + ([rest] if rest > setting.prompt_tokens + 1 else [])


def _full_batch(setting: Setting, simulated: SimulatedRank, implementation: Any) -> Batch:
    parallel, mode = setting.config.parallel, setting.config.algorithm.mode
    pad = parallel.max_tokens_per_microbatch if parallel.virtual_pipeline_model_parallel_size else 1
    if parallel.sequence_parallel:
        pad = -(-pad // simulated.grid.tp) * simulated.grid.tp
    microbatches = []
    for _ in range(microbatches_in_flight(setting, simulated.grid.pp_rank)):
        sequences = [_sequence(n, setting.prompt_tokens, i) for i, n in enumerate(full_lengths(setting))]
        packed = pack([sequence.item for sequence in sequences], pad_to_multiple_of=pad)
        device = to_device(packed, implementation, simulated.platform, mode=mode)
        microbatches.append(Microbatch(device, sequences))
    # Of no sequence: an update only reports it.
    return Batch(microbatches, plan_for(parallel, [], dp_size=1, work=WorkModel.from_spec(setting.spec)))


def _sequence(length: int, prompt: int, index: int) -> TrainSequence:
    prompt = min(max(prompt, 1), length - 1)
    ids = np.zeros(length, dtype=np.int64)
    return TrainSequence(PackItem(ids[:prompt], ids[prompt:]), 1 if index % 2 else -1, 0.5, 0.5)


def _models(actor: Actor) -> dict[str, Any]:
    models = {"policy": actor.policy, "reference": actor.reference, "reward model": actor.reward_model}
    return {name: model for name, model in models.items() if model is not None}


def _shapes(parameters: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in parameters.items()}


def _assign_static(actor: Actor, simulated: SimulatedRank) -> dict[str, int]:
    storages = simulated.storages
    optimizers: dict[str, ModelOptimizer | None] = {
        "policy": actor.policy_optimizer,
        "reward model": actor.reward_model_optimizer,
    }
    for name, model in _models(actor).items():
        for tensor in model_part(model).tensors:
            storages.assign(tensor, f"{name} parameters")
        optimizer = optimizers.get(name)
        if optimizer is not None:
            for tensor in optimizer_part(model, optimizer).scratch:
                storages.assign(tensor, f"{name} gradients")
            mine = {tensor.untyped_storage()._cdata for tensor in model_part(model).tensors}
            for tensor in _optimizer_tensors(optimizer):
                if tensor.untyped_storage()._cdata not in mine:  # in fp32 the parameters are the optimizer's own
                    storages.assign(tensor, f"{name} optimizer")
    return {item: size for item, size in storages.live.items() if size}


def _optimizer_tensors(optimizer: ModelOptimizer) -> Iterator[Tensor]:
    """Moments and fp32 weights; ``optimizer_part`` tells tensors apart by address, which meta tensors do not have."""
    for part in optimizer.parts:
        yield from (param.data for group in part.optimizer.param_groups for param in group["params"])
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor) and value.numel() > 1)


def _two_chunks(logits: Tensor, wanted: Tensor | None) -> Iterator[slice]:
    """The loss's first row chunks: the others use the same memory."""
    step = vocab_parallel._chunk_rows(logits)
    yield from (slice(start, min(start + step, len(logits))) for start in range(0, len(logits), step)[:2])


@contextlib.contextmanager
def _with_shapes(simulated: SimulatedRank, setting: Setting) -> Iterator[None]:
    """Tell a pipeline the shapes of every pass, and shorten the loss's loop."""
    run, sequence_parallel = actor_module.run_microbatches, setting.config.parallel.sequence_parallel

    def run_microbatches(model: Any, batches: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        ranks = simulated.grid.tp if sequence_parallel else 1
        simulated.shapes.announce([batch.tokens.size(1) // ranks for batch in batches], setting.spec.hidden_size)
        return run(model, batches, *args, **kwargs)

    with (
        mock.patch.object(actor_module, "run_microbatches", run_microbatches),
        mock.patch.object(vocab_parallel, "_row_chunks", _two_chunks),
    ):
        yield
