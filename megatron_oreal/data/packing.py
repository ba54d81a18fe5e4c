"""Sequences into micro-batches: which sequence goes where (pure logic), and the flat tensors of one micro-batch."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_oreal.errors import UserError

if TYPE_CHECKING:
    from megatron_oreal.config import ParallelConfig
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


PASS_TOKENS = 512
"""What a pass costs whatever it holds (weights read once, kernels launched), in tokens of matrix multiplication.

At 989 TFLOP/s and 3.35 TB/s (H100's data sheet) reading bf16 weights takes as long as multiplying 300 tokens by them.
"""
_SEARCH_BELOW = 50
"""Micro-batches a further pipeline stage, above which a bubble is below 2 % and not worth a search."""
_FACTORS = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)

Padding = Literal["multiple", "longest", "budget"]


@dataclass(frozen=True, slots=True)
class MicrobatchPlan:
    """``ranks[d][m]``: the ascending sequence indices of micro-batch ``m`` on data-parallel rank ``d``.

    ``tokens[d][m]``: its tokens, padding included. ``balance``: the most loaded rank's work over the mean, 1.0 when
    they are equal or there is nothing to do; ``microbatch_balance``: the same over the micro-batches that hold
    something. ``padding_share``: padding tokens over all tokens. ``bubble_share``: of the slowest rank's time, what its
    pipeline stages wait for each other (0 without a pipeline); stages of equal time are assumed, so that a pass takes
    the sum over its micro-batches, and the heaviest once more for every further stage.
    """

    ranks: list[list[list[int]]]
    tokens: list[list[int]]
    balance: float
    microbatch_balance: float
    padding_share: float
    bubble_share: float

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of every rank, empty ones included."""
        return len(self.ranks[0])

    @property
    def idle_microbatches(self) -> int:
        """Empty micro-batches, over all ranks."""
        return sum(not batch for rank in self.ranks for batch in rank)


def plan_for(parallel: ParallelConfig, lengths: Sequence[int], *, dp_size: int, work: WorkModel) -> MicrobatchPlan:
    """``plan_microbatches`` as a config asks for it."""
    stages = parallel.pipeline_model_parallel_size
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    return plan_microbatches(
        lengths,
        dp_size=dp_size,
        max_tokens=parallel.max_tokens_per_microbatch,
        work=work,
        num_microbatches_multiple_of=stages if interleaved else 1,
        pad_to_multiple_of=parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1,
        # Interleaved stages take one length (actor/build.py), and user buffers are allocated for one.
        padding="longest" if interleaved else "budget" if parallel.tp_comm_overlap else "multiple",
        pipeline_stages=stages,
    )


def plan_microbatches(
    lengths: Sequence[int],
    *,
    dp_size: int,
    max_tokens: int,
    work: WorkModel,
    num_microbatches_multiple_of: int = 1,
    pad_to_multiple_of: int = 1,
    padding: Padding = "multiple",
    pipeline_stages: int = 1,
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

    Over the ranks: longest-processing-time-first (Graham 1969), then exchanges between the most loaded rank and others
    while they lower it. Over a rank's micro-batches: longest-processing-time-first again, into as few as
    first-fit-decreasing needs, or, under ``pipeline_stages``, into more where lighter ones shorten the bubble by more
    than further passes cost. ``padding``: every micro-batch to a multiple, to the rank's longest, or to the budget.

    Raises ``UserError`` when one sequence alone is longer than ``max_tokens``.
    """
    assert min(dp_size, num_microbatches_multiple_of, pad_to_multiple_of, pipeline_stages) >= 1
    assert all(length >= 1 for length in lengths), "a sequence has at least one token"
    room = max_tokens // pad_to_multiple_of * pad_to_multiple_of
    if lengths and max(lengths) > room:
        padded = "" if room == max_tokens else f" (less what pads it to a multiple of {pad_to_multiple_of})"
        raise UserError(
            f"parallel.max_tokens_per_microbatch={max_tokens}{padded} is below the longest sequence of {max(lengths)} "
            "tokens: raise it to at least rollout.gen_max_length"
        )
    costs = [work(length) for length in lengths]
    ranks = _exchanged(_spread(range(len(lengths)), dp_size, costs), costs)
    fewest = [_first_fit_decreasing(rank, lengths, room) for rank in ranks]
    needed = max(1, *map(len, fewest))
    pass_cost = work(PASS_TOKENS) if padding == "longest" or pipeline_stages > 1 else 0

    def fill(count: int) -> tuple[int, list[list[list[int]]]]:
        planned = [_fill(rank, packed, count, lengths, costs, room) for rank, packed in zip(ranks, fewest, strict=True)]
        loads = [[sum(costs[i] for i in batch) for batch in rank] for rank in planned]
        return max(sum(_rank_time(rank, pass_cost, pipeline_stages, padding)) for rank in loads), planned

    most = max(map(len, ranks)) if pipeline_stages - 1 > needed / _SEARCH_BELOW else 0
    counts = {_multiple(needed, num_microbatches_multiple_of)}
    counts |= {_multiple(min(round(needed * f), most), num_microbatches_multiple_of) for f in _FACTORS if most > needed}
    _, planned = min((fill(count) for count in sorted(counts)), key=lambda filled: filled[0])
    return _describe(planned, lengths, costs, room, pad_to_multiple_of, padding, pipeline_stages)


def _multiple(count: int, of: int) -> int:
    return -(-count // of) * of


def _rank_time(loads: Sequence[int], pass_cost: int, stages: int, padding: Padding) -> tuple[int, int]:
    """(work of one stage times stages, wait for the others) of one rank's passes, in units of work."""
    heaviest = max(loads) + pass_cost
    busy = len(loads) * heaviest if padding == "longest" else sum(loads) + len(loads) * pass_cost
    return busy, (stages - 1) * heaviest


def _describe(
    planned: list[list[list[int]]],
    lengths: Sequence[int],
    costs: Sequence[int],
    room: int,
    multiple: int,
    padding: Padding,
    stages: int,
) -> MicrobatchPlan:
    loads = [[sum(costs[i] for i in batch) for batch in rank] for rank in planned]
    tokens = [[max(_multiple(sum(lengths[i] for i in b), multiple), multiple) for b in rank] for rank in planned]
    if padding != "multiple":
        tokens = [[room if padding == "budget" else max(rank)] * len(rank) for rank in tokens]
    busy, wait = max((_rank_time(rank, 0, stages, padding) for rank in loads), key=sum)
    return MicrobatchPlan(
        ranks=planned,
        tokens=tokens,
        balance=_imbalance([sum(rank) for rank in loads]),
        microbatch_balance=_imbalance([load for rank in loads for load in rank if load]),
        padding_share=1.0 - sum(lengths) / sum(map(sum, tokens)),
        bubble_share=wait / (busy + wait) if busy else 0.0,
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
    tokens = [0] * num_bins
    lightest = [(0, b) for b in range(num_bins)]  # a heap
    for i in _heaviest_first(indices, costs):
        full = []
        while room is not None and lightest and tokens[lightest[0][1]] + lengths[i] > room:
            full.append(heapq.heappop(lightest))
        if not lightest:
            break
        load, b = lightest[0]
        heapq.heapreplace(lightest, (load + costs[i], b))
        bins[b].append(i)
        tokens[b] += lengths[i] if room is not None else 0
        for entry in full:
            heapq.heappush(lightest, entry)
    return bins


def _exchanged(bins: list[list[int]], costs: Sequence[int]) -> list[list[int]]:
    """Lower the heaviest bin: move an index to a lighter bin, or swap it for a lighter one, while that helps.

    Ends when no single exchange does, when the heaviest is within 0.1 % of the mean, or after 8 exchanges a bin.
    """
    loads = [sum(costs[i] for i in members) for members in bins]
    for _ in range(8 * len(bins)):
        heavy = max(range(len(bins)), key=lambda b: (loads[b], -b))
        if loads[heavy] * len(bins) <= 1.001 * sum(loads):
            break
        for light in sorted(range(len(bins)), key=lambda b: (loads[b], b)):
            pair = _best_exchange(bins[heavy], bins[light], loads[heavy] - loads[light], costs)
            if pair is not None:
                break
        else:
            break
        give, take = pair
        moved = costs[give] - (0 if take is None else costs[take])
        bins[heavy].remove(give)
        bins[light].append(give)
        if take is not None:
            bins[light].remove(take)
            bins[heavy].append(take)
        loads[heavy] -= moved
        loads[light] += moved
    return bins


def _best_exchange(
    heavy: Sequence[int], light: Sequence[int], gap: int, costs: Sequence[int]
) -> tuple[int, int | None] | None:
    """What to give and take so that ``gap``, heavy's load less light's, becomes smallest; None: nothing does."""
    offers: list[tuple[int, int | None]] = [(0, None), *sorted((costs[i], i) for i in light)]
    prices = [price for price, _ in offers]
    best, found = gap, None
    for give in sorted(heavy):
        middle = bisect.bisect_left(prices, costs[give] - gap / 2)
        for at in (middle - 1, middle):
            if 0 <= at < len(offers) and abs(gap - 2 * (costs[give] - prices[at])) < best:
                best, found = abs(gap - 2 * (costs[give] - prices[at])), (give, offers[at][1])
    return found


def _first_fit_decreasing(indices: Sequence[int], lengths: Sequence[int], room: int) -> list[list[int]]:
    """Pack into few bins of ``room`` tokens: at most 11/9 of the fewest, plus 6/9 (Dósa 2007)."""
    leaves = 1 << max(len(indices) - 1, 0).bit_length()
    free = [room] * (2 * leaves)  # a heap-ordered tree: a node holds the most that a bin below it has free
    bins: list[list[int]] = [[] for _ in range(leaves)]
    for i in sorted(indices, key=lambda i: (-lengths[i], i)):
        node = 1
        while node < leaves:
            node = 2 * node + (free[2 * node] < lengths[i])
        bins[node - leaves].append(i)
        free[node] -= lengths[i]
        while node > 1:
            node //= 2
            free[node] = max(free[2 * node], free[2 * node + 1])
    return [members for members in bins if members]


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
