"""Sequences one after another in one packed vector: the indices, and the reductions that never mix two of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_oreal.errors import UserError


def host_lengths(lengths: Sequence[int] | Tensor, num_tokens: int) -> list[int]:
    """Lengths on the host; raises ``UserError`` when one is < 1 or their sum is not ``num_tokens``."""
    host = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
    if any(n < 1 for n in host) or sum(host) != num_tokens:
        raise UserError(f"lengths sum to {sum(host)} for {num_tokens} tokens, the smallest is {min(host, default=0)}")
    return host


def packed_starts(lengths: list[int], device: torch.device) -> Tensor:
    """cu_seqlens int64 [S + 1]: 0, then the running sums of the lengths."""
    return copied(torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int64), device)


def copied(host: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device; to a GPU through pinned memory, so that the host does not wait for the stream."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


@dataclass(frozen=True)
class Segments:
    """S sequences of N tokens in all; every tensor is int64 on one device.

    ``lengths`` [S]; ``starts`` [S], index of each sequence's first token; ``ids`` [N], the sequence of each token;
    ``positions`` [N], 0-based within the sequence; ``longest`` = max(lengths), 0 when there is none.
    """

    lengths: Tensor
    starts: Tensor
    ids: Tensor
    positions: Tensor
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int] | Tensor, num_tokens: int, device: torch.device) -> Segments:
        """Build from response lengths, or ``cu_seqlens.diff()``; lengths on a GPU cost a host synchronisation.

        Raises ``UserError`` when a length is < 1 or their sum is not ``num_tokens``.
        """
        host = host_lengths(lengths, num_tokens)
        length = copied(torch.tensor(host, dtype=torch.int64), device)
        starts = length.cumsum(0) - length
        sequence = torch.arange(len(host), device=device)
        ids = torch.repeat_interleave(sequence, length, output_size=num_tokens)
        positions = torch.arange(num_tokens, device=device) - starts[ids]
        return cls(length, starts, ids, positions, max(host, default=0))

    def cumulative_sum(self, values: Tensor) -> Tensor:
        """Inclusive prefix sums [N] within each sequence.

        A doubling scan, log2(longest) passes: a token's sum adds up its own sequence's values and no others, so it has
        none of the cancellation of a cumulative sum over the pack minus an offset, and its bits do not depend on what
        else is in the pack.
        """
        shift = 1
        while shift < self.longest:
            earlier = torch.zeros_like(values)
            earlier[shift:] = values[:-shift]
            values = values + torch.where(self.positions >= shift, earlier, 0)
            shift *= 2
        return values

    def mean(self, values: Tensor) -> Tensor:
        """Mean [S] of each sequence; differentiable, no atomics."""
        return torch.segment_reduce(values, "mean", lengths=self.lengths, unsafe=True)
