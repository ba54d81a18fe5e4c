"""A step's kept sequences as this rank's packed micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_oreal.actor.parallel import ParallelGrid
from megatron_oreal.actor.schedule import DeviceBatch, to_device
from megatron_oreal.actor.specs import Implementation
from megatron_oreal.config import ParallelConfig
from megatron_oreal.data.packing import PackItem, WorkModel, pack, plan_microbatches
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
    """This rank's micro-batches; ``balance``: the most loaded data-parallel rank's work over the mean."""

    microbatches: list[Microbatch]
    balance: float

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
    pad = grid.tp if parallel.sequence_parallel else 1
    lengths = [sequence.num_tokens for sequence in sequences]
    plan = plan_microbatches(
        lengths,
        dp_size=grid.dp,
        max_tokens=parallel.max_tokens_per_microbatch,
        work=WorkModel.from_spec(spec),
        num_microbatches_multiple_of=grid.pp if grid.vpp else 1,
        pad_to_multiple_of=pad,
    )
    mine = plan.ranks[grid.dp_rank]
    if grid.vpp:
        # Interleaved stages take micro-batches of one length (see actor/build.py): the longest, rounded up.
        longest = max(sum(lengths[i] for i in members) for members in mine)
        pad = max(-(-longest // pad), 1) * pad
    microbatches = []
    for members in mine:
        chosen = [sequences[i] for i in members]
        packed = pack([sequence.item for sequence in chosen], pad_to_multiple_of=pad)
        microbatches.append(Microbatch(to_device(packed, implementation, platform, mode=mode), chosen))
    return Batch(microbatches, plan.balance)
