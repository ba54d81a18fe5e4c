"""Sequences into micro-batches: which sequence goes where (pure logic), and the flat tensors of one micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_oreal.errors import UserError

if TYPE_CHECKING:
    from megatron_oreal.data.types import Trajectory
    from megatron_oreal.layout.model_spec import ModelSpec

# Planning


@dataclass(frozen=True, slots=True)
class WorkModel:
    """What a sequence costs: the floating-point operations of one forward pass over it.

    ``matmul_params``: weights that multiply every token (no embedding lookup, norms or biases), each 2 operations a
    token. ``attention_width``: query heads times head dimension, summed over layers; each of the T(T + 1)/2 causal
    (query, key) pairs costs 2 operations a column in QKᵀ and 2 in its product with V. It is the count of Narayanan et
    al. (arXiv 2104.04473, appendix) with the causal half of the attention matrix and grouped-query shapes. Backward
    passes scale both terms alike, so the balance does not depend on them.
    """

    matmul_params: int
    attention_width: int

    @classmethod
    def from_spec(cls, spec: ModelSpec) -> WorkModel:
        """Count for a dense decoder-only model, its vocabulary head included."""
        per_layer = spec.hidden_size * (2 * spec.q_size + 2 * spec.kv_size + 3 * spec.ffn_hidden_size)
        return cls(
            matmul_params=spec.num_layers * per_layer + spec.vocab_size * spec.hidden_size,
            attention_width=spec.num_layers * spec.q_size,
        )

    def __call__(self, length: int) -> int:
        """Return the forward operations of a sequence of ``length`` tokens."""
        return 2 * self.matmul_params * length + 2 * self.attention_width * length * (length + 1)


@dataclass(frozen=True, slots=True)
class MicrobatchPlan:
    """``ranks[d][m]``: the ascending sequence indices of micro-batch ``m`` on data-parallel rank ``d``.

    ``balance``: the most loaded rank's work over the mean, 1.0 when they are equal or there is nothing to do;
    ``microbatch_balance``: the same over the micro-batches that hold something.
    """

    ranks: list[list[list[int]]]
    balance: float
    microbatch_balance: float

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of every rank, empty ones included."""
        return len(self.ranks[0])


def plan_microbatches(
    lengths: Sequence[int],
    *,
    dp_size: int,
    max_tokens: int,
    work: WorkModel,
    num_microbatches_multiple_of: int = 1,
    pad_to_multiple_of: int = 1,
) -> MicrobatchPlan:
    """Distribute sequences of ``lengths`` tokens over data-parallel ranks and their micro-batches.

    Invariants, each with a test of its name:

    * every index appears exactly once: no sequence is repeated to fill a rank;
    * no micro-batch exceeds ``max_tokens``, its padding to ``pad_to_multiple_of`` included;
    * all ranks have the same number of micro-batches, a multiple of ``num_microbatches_multiple_of`` (interleaved
      pipelines need a multiple of the pipeline size; a plain one wastes less with it) and at least that; an empty list
      is a micro-batch of zero weight;
    * ranks are balanced by work: the most loaded is above the mean by less than the largest single sequence;
    * the same input gives the same plan.

    Longest-processing-time-first (Graham 1969) over the ranks, then over each rank's micro-batches.

    Raises ``UserError`` when one sequence alone is longer than ``max_tokens``.
    """
    assert min(dp_size, num_microbatches_multiple_of, pad_to_multiple_of) >= 1
    assert all(length >= 1 for length in lengths), "a sequence has at least one token"
    room = max_tokens // pad_to_multiple_of * pad_to_multiple_of
    if lengths and max(lengths) > room:
        padded = "" if room == max_tokens else f" (less what pads it to a multiple of {pad_to_multiple_of})"
        raise UserError(
            f"parallel.max_tokens_per_microbatch={max_tokens}{padded} is below the longest sequence of {max(lengths)} "
            "tokens: raise it to at least rollout.gen_max_length"
        )
    costs = [work(length) for length in lengths]
    ranks = _spread(range(len(lengths)), dp_size, costs)
    fewest = [_first_fit_decreasing(rank, lengths, room) for rank in ranks]
    needed = max(1, *map(len, fewest))
    count = -(-needed // num_microbatches_multiple_of) * num_microbatches_multiple_of
    planned = [_fill(rank, packed, count, lengths, costs, room) for rank, packed in zip(ranks, fewest, strict=True)]
    return MicrobatchPlan(
        ranks=planned,
        balance=_imbalance([sum(costs[i] for i in rank) for rank in ranks]),
        microbatch_balance=_imbalance([sum(costs[i] for i in batch) for rank in planned for batch in rank if batch]),
    )


def _heaviest_first(indices: Sequence[int], costs: Sequence[int]) -> list[int]:
    return sorted(indices, key=lambda i: (-costs[i], i))


def _spread(
    indices: Sequence[int], num_bins: int, costs: Sequence[int], lengths: Sequence[int] = (), room: int | None = None
) -> list[list[int]]:
    """Give each index, heaviest first, to the lightest bin; with ``room``, the lightest that it fits into.

    Returns fewer indices than given when one did not fit anywhere.
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads, tokens = [0] * num_bins, [0] * num_bins
    for i in _heaviest_first(indices, costs):
        open_bins = [b for b in range(num_bins) if room is None or tokens[b] + lengths[i] <= room]
        if not open_bins:
            break
        lightest = min(open_bins, key=lambda b: (loads[b], b))
        bins[lightest].append(i)
        loads[lightest] += costs[i]
        tokens[lightest] += lengths[i] if lengths else 0
    return bins


def _first_fit_decreasing(indices: Sequence[int], lengths: Sequence[int], room: int) -> list[list[int]]:
    """Pack into few bins of ``room`` tokens: at most 11/9 of the fewest, plus 6/9 (Dósa 2007)."""
    bins: list[list[int]] = []
    free: list[int] = []
    for i in sorted(indices, key=lambda i: (-lengths[i], i)):
        first = next((b for b, tokens in enumerate(free) if lengths[i] <= tokens), None)
        if first is None:
            first = len(bins)
            bins.append([])
            free.append(room)
        bins[first].append(i)
        free[first] -= lengths[i]
    return bins


def _fill(
    indices: Sequence[int],
    packed: list[list[int]],
    count: int,
    lengths: Sequence[int],
    costs: Sequence[int],
    room: int,
) -> list[list[int]]:
    """Arrange one rank's sequences in ``count`` micro-batches: balanced if that fits, else as ``packed`` does."""
    batches = _spread(indices, count, costs, lengths, room)
    if sum(map(len, batches)) < len(indices):
        batches = packed + [[] for _ in range(count - len(packed))]
    heaviest_first = sorted(batches, key=lambda batch: (-sum(costs[i] for i in batch), batch))
    return [sorted(batch) for batch in heaviest_first]


def _imbalance(loads: Sequence[int]) -> float:
    return max(loads) * len(loads) / sum(loads) if sum(loads) else 1.0


# Packing

TokenIds = Sequence[int] | NDArray[np.integer]


@dataclass(frozen=True, slots=True)
class PackItem:
    """One sequence: ``prompt_ids`` [P], P >= 1, and ``response_ids`` [n], n >= 1, of any integer type."""

    prompt_ids: TokenIds
    response_ids: TokenIds

    @classmethod
    def of(cls, trajectory: Trajectory) -> PackItem:
        """Take the tokens of a trajectory."""
        return cls(trajectory.prompt_ids, trajectory.response_ids)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Sequences laid end to end, without padding between them (algorithm.md, "Positions").

    ``tokens``, ``position_ids``: int64 [T]; positions restart at 0 in every sequence. ``cu_seqlens``: int32 [B + 1],
    the boundaries that attention must not cross. Padding, when there is any, is a last sequence of its own: it is in
    ``cu_seqlens`` and in nothing below. Over the N response tokens of all S sequences, in order: ``labels`` int64 [N]
    are the tokens y_t, ``logit_index`` int64 [N] the flat positions whose logits predict them, P + t − 2 within their
    sequence. ``response_lengths``: the S lengths n.
    """

    tokens: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    logit_index: Tensor
    labels: Tensor
    response_lengths: list[int]

    @property
    def max_seqlen(self) -> int:
        """Length of the longest sequence, the padding counted as one."""
        return int(self.cu_seqlens.diff().max())

    def score_index(self, mode: Literal["released", "paper"]) -> Tensor:
        """Return the flat positions int64 [N] that s_t is read at: ``logit_index``, or those of y_t itself."""
        return self.logit_index if mode == "released" else self.logit_index + 1


def pack(items: Sequence[PackItem], *, pad_to_multiple_of: int = 1, pad_token_id: int = 0) -> PackedBatch:
    """Lay ``items`` end to end on the CPU and pad T to a multiple (sequence parallelism needs one of the TP size).

    Without items: a batch of ``pad_to_multiple_of`` padding tokens and N = 0, the micro-batch of an idle rank.
    """
    assert pad_to_multiple_of >= 1
    parts: list[Tensor] = []
    logit_index: list[Tensor] = []
    start = 0
    for item in items:
        prompt, response = len(item.prompt_ids), len(item.response_ids)
        assert min(prompt, response) >= 1, "a sequence needs a prompt token and a response token"
        parts += [_int64(item.prompt_ids), _int64(item.response_ids)]
        logit_index.append(torch.arange(start + prompt - 1, start + prompt + response - 1))
        start += prompt + response
    lengths = [len(item.prompt_ids) + len(item.response_ids) for item in items]
    padding = -start % pad_to_multiple_of if start else pad_to_multiple_of
    if padding:
        parts.append(torch.full((padding,), pad_token_id))
        lengths.append(padding)
    empty = torch.zeros(0, dtype=torch.int64)
    return PackedBatch(
        tokens=torch.cat(parts),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        logit_index=torch.cat([empty, *logit_index]),
        labels=torch.cat([empty, *(_int64(item.response_ids) for item in items)]),
        response_lengths=[len(item.response_ids) for item in items],
    )


def _int64(ids: TokenIds) -> Tensor:
    return torch.as_tensor(ids).to(torch.int64)
