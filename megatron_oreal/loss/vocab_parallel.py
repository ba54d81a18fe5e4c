"""The three passes of the vocab-parallel op over logits shards, in PyTorch: statistics, combine, gradient in place.

Each pass is one function with a fixed tensor contract, so that a compiled kernel can stand behind the same call.

Notation: x the logits of one row in raw units, T the temperature, m = max x, d = Σ e^((x−m)/T),
t = Σ e^((x−m)/T)·(x−m), y the label. logp = (x_y − m)/T − ln d; entropy = ln d − (t/d)/T. t is taken relative to m, so
nothing cancels when the logits share a large offset.

No pass allocates more than a few row chunks of ``CHUNK_ELEMENTS`` elements beside its [N] vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_oreal.loss.coefficients import TokenCoefficients, TokenTerms, token_terms

CHUNK_ELEMENTS = 1 << 22
"""Logits that one row chunk holds at most (a single longer row is a chunk of its own)."""

_FLOOR = -1e30
"""Stands for x − m of a masked (−inf) logit where it meets a zero factor: 0·(−1e30) is 0, 0·(−inf) is NaN."""


@dataclass(frozen=True)
class CombinedRows:
    """What ``combine`` knows of every row; [N] each, in the statistics' dtype.

    ``maximum`` m and ``sum_exp`` d over the whole vocabulary, ``logp``, ``entropy`` (nats); ``terms`` (float64) when
    coefficients were given.
    """

    maximum: Tensor
    sum_exp: Tensor
    logp: Tensor
    entropy: Tensor
    terms: TokenTerms | None


def accumulation_dtype(logits: Tensor) -> torch.dtype:
    """float32, or float64 for float64 logits."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def row_statistics(logits: Tensor, labels: Tensor, *, vocab_start: int, vocab_size: int, temperature: float) -> Tensor:
    """Read a shard once and return (m, d, t, x_y) of its valid columns, [N, 4] in the accumulation dtype.

    Args:
        logits: [N, width] contiguous, bf16, float32 or float64; not modified.
        labels: int64 [N], global vocabulary ids.
        vocab_start: global id of the shard's first column.
        vocab_size: global columns from here on are padding and take no part.
        temperature: T > 0.

    x_y is −inf where another shard holds the label. A shard with no unmasked column in a row has (−inf, 0, 0, ·).
    NaN and +inf logits make the row's statistics NaN.

    """
    dtype = accumulation_dtype(logits)
    valid = _valid_columns(logits, vocab_start, vocab_size)
    statistics = torch.zeros(len(logits), 4, dtype=dtype, device=logits.device)
    statistics[:, 0::3] = -torch.inf
    if valid == 0:
        return statistics
    for rows in _row_chunks(logits):
        chunk = logits[rows, :valid]
        maximum = chunk.amax(dim=1, keepdim=True).to(dtype)
        shifted = (chunk - maximum.masked_fill(maximum == -torch.inf, 0.0)).clamp_(min=_FLOOR)
        weight = (shifted / temperature).exp_()
        mine, column = _local_labels(labels[rows], vocab_start, valid)
        label_logit = chunk.gather(1, column).to(dtype).masked_fill(~mine, -torch.inf)
        out = statistics[rows]
        out[:, 0:1], out[:, 3:4] = maximum, label_logit
        out[:, 1] = weight.sum(dim=1)
        out[:, 2] = weight.mul_(shifted).sum(dim=1)
    return statistics


def combine(gathered: Tensor, coefficients: TokenCoefficients | None, *, temperature: float) -> CombinedRows:
    """Merge the shards' statistics [TP, N, 4] in rank order, and evaluate the loss of every token.

    Every rank that is given the same bits computes the same bits.
    """
    maximum = gathered[:, :, 0].amax(dim=0)
    shift = (gathered[:, :, 0] - maximum).clamp(min=_FLOOR)
    scale = (shift / temperature).exp()
    sums = scale * gathered[:, :, 1]
    weighted = scale * (gathered[:, :, 2] + gathered[:, :, 1] * shift)
    sum_exp, sum_weighted = sums[0], weighted[0]
    for rank in range(1, len(gathered)):
        sum_exp, sum_weighted = sum_exp + sums[rank], sum_weighted + weighted[rank]
    log_sum = sum_exp.log()
    logp = (gathered[:, :, 3].amax(dim=0) - maximum) / temperature - log_sum
    entropy = log_sum - sum_weighted / sum_exp / temperature
    terms = None if coefficients is None else token_terms(logp, coefficients)
    return CombinedRows(maximum, sum_exp, logp, entropy, terms)


def gradient_(
    logits: Tensor,
    labels: Tensor,
    maximum: Tensor,
    sum_exp: Tensor,
    logp: Tensor,
    derivative: Tensor,
    *,
    vocab_start: int,
    vocab_size: int,
    temperature: float,
) -> None:
    """Overwrite ``logits`` with ∂loss/∂logits = g_t (onehot − softmax)/T (algorithm.md, "Losses").

    Args:
        logits: [N, width] contiguous shard; padding columns become 0.
        labels: int64 [N], global ids.
        maximum: m [N] of ``combine``.
        sum_exp: d [N] of ``combine``.
        logp: [N] of ``combine``.
        derivative: g_t [N] times the upstream gradient, accumulation dtype; rows where it is 0 become exactly 0, even
            when their logits are not finite.
        vocab_start: as in ``row_statistics``.
        vocab_size: as in ``row_statistics``.
        temperature: T.

    The label's entry, g_t (1 − p_y)/T, is formed as −g_t·expm1(logp)/T in the accumulation dtype and rounded once:
    rounding p_y to bf16 before subtracting it from 1 would lose it entirely for a confident token.

    """
    valid = _valid_columns(logits, vocab_start, vocab_size)
    logits[:, valid:] = 0
    if valid == 0:
        return
    for rows in _row_chunks(logits):
        chunk = logits[rows, :valid]
        factor = (derivative[rows] / temperature).unsqueeze(1)
        gradient = (chunk - maximum[rows].unsqueeze(1)).div_(temperature).exp_()
        gradient.mul_(-factor / sum_exp[rows].unsqueeze(1))
        mine, column = _local_labels(labels[rows], vocab_start, valid)
        label_entry = -factor * logp[rows].unsqueeze(1).expm1()
        gradient.scatter_(1, column, torch.where(mine, label_entry, gradient.gather(1, column)))
        chunk.copy_(gradient.masked_fill_(factor == 0, 0.0))


def _valid_columns(logits: Tensor, vocab_start: int, vocab_size: int) -> int:
    return min(max(vocab_size - vocab_start, 0), logits.shape[1])


def _row_chunks(logits: Tensor) -> Iterator[slice]:
    count, width = logits.shape
    step = max(CHUNK_ELEMENTS // max(width, 1), 1)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _local_labels(labels: Tensor, vocab_start: int, valid: int) -> tuple[Tensor, Tensor]:
    """Whether this shard holds each label, and its column (some column where it does not); [rows, 1] both."""
    column = labels - vocab_start
    mine = (column >= 0) & (column < valid)
    return mine.unsqueeze(1), column.clamp(0, valid - 1).unsqueeze(1)
