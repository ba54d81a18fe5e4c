"""A step's kept sequences as this rank's packed micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_oreal.actor.parallel import ParallelGrid
from megatron_oreal.actor.schedule import DeviceBatch, to_device
from megatron_oreal.actor.specs import Implementation
from megatron_oreal.config import ParallelConfig
from megatron_oreal.data.packing import MicrobatchPlan, PackItem, WorkModel, pack, plan_for
from megatron_oreal.layout.model_spec import ModelSpec
from megatron_oreal.loss.settings import Mode
from megatron_oreal.platform import Platform


@dataclass(frozen=True)
class TrainSequence:
    """One sequence to train on: ``item``'s tokens, and what the losses need to know of it.

    ``reward`` +1 or -1; ``engine_logp`` float32 [n], None when no engine drew it (supervised data).
    """

    item: PackItem
    reward: int
    advantage: float
    pass_rate: float
    engine_logp: np.ndarray | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt and response tokens."""
        return len(self.item.prompt_ids) + len(self.item.response_ids)


@dataclass(frozen=True)
class Microbatch:
    """A packed micro-batch on the device and the sequences in it (none: an idle rank's, of zero weight)."""

    device: DeviceBatch
    sequences: list[TrainSequence]

    @property
    def rewards(self) -> list[int]:
        """+1 or -1, one a sequence."""
        return [sequence.reward for sequence in self.sequences]

    @property
    def advantages(self) -> list[float]:
        """One a sequence."""
        return [sequence.advantage for sequence in self.sequences]

    @property
    def pass_rates(self) -> list[float]:
        """One a sequence."""
        return [sequence.pass_rate for sequence in self.sequences]


@dataclass(frozen=True)
class Batch:
    """This rank's micro-batches, on the device once for all passes of a step; ``plan``: those of all ranks."""

    microbatches: list[Microbatch]
    plan: MicrobatchPlan

    @property
    def device_batches(self) -> list[DeviceBatch]:
        """What the schedule runs."""
        return [microbatch.device for microbatch in self.microbatches]


def make_batch(
    sequences: Sequence[TrainSequence],
    spec: ModelSpec,
    parallel: ParallelConfig,
    grid: ParallelGrid,
    implementation: Implementation,
    platform: Platform,
    mode: Mode,
) -> Batch:
    """Plan the same micro-batches on every rank and pack those of this rank's data-parallel index."""
    lengths = [sequence.num_tokens for sequence in sequences]
    plan = plan_for(parallel, lengths, dp_size=grid.dp, work=WorkModel.from_spec(spec))
    microbatches = []
    for members, tokens in zip(plan.ranks[grid.dp_rank], plan.tokens[grid.dp_rank], strict=True):
        chosen = [sequences[i] for i in members]
        packed = pack([sequence.item for sequence in chosen], pad_to_multiple_of=tokens)
        microbatches.append(Microbatch(to_device(packed, implementation, platform, mode=mode), chosen))
    return Batch(microbatches, plan)
