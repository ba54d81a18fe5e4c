"""The three passes of the vocab-parallel op over logits shards, in PyTorch: statistics, combine, gradient in place.

The functions have the signatures of the compiled kernels' methods (``kernels.Kernels``); ``fused.py`` calls either.

Notation: x the logits of one row in raw units, T the temperature, m = max x, d = Σ e^((x−m)/T),
t = Σ e^((x−m)/T)·(x−m), y the label. logp = (x_y − m)/T − ln d; entropy = ln d − (t/d)/T. t is taken relative to m, so
nothing cancels when the logits share a large offset.

No pass allocates more than three row chunks of ``CHUNK_ELEMENTS`` elements beside its [N] vectors. e^(z/T) is taken as
2^(z·log2(e)/T): torch's exp2 costs a third of its exp on a CPU.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_oreal.loss.coefficients import TokenCoefficients, token_terms
from megatron_oreal.loss.kernels import TokenResults

CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 22}
"""Logits that one row chunk holds at most (a single longer row is a chunk of its own): a CPU's is to stay in its
second- and third-level caches from the first to the last operation on it, a GPU's is to fill the device."""

_FLOOR = -1e30
"""Stands for x − m of a masked (−inf) logit where it meets a zero factor: 0·(−1e30) is 0, 0·(−inf) is NaN."""

Rows = slice | Tensor
"""Rows of one chunk: a slice, or int64 indices where they do not follow one another."""


def accumulation_dtype(logits: Tensor) -> torch.dtype:
    """float32, or float64 for float64 logits."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def row_statistics(
    logits: Tensor,
    labels: Tensor,
    *,
    vocab_start: int,
    vocab_size: int,
    temperature: float,
    active: Tensor | None = None,
    status: Tensor | None = None,
) -> Tensor:
    """Read a shard once and return (m, d, t, x_y) of its valid columns, [N, 4] in the accumulation dtype.

    Args:
        logits: [N, width] contiguous, bf16, float32 or float64; not modified.
        labels: int64 [N], global vocabulary ids.
        vocab_start: global id of the shard's first column.
        vocab_size: global columns from here on are padding and take no part.
        temperature: T > 0.
        active: bool [N]; other rows take no part, whatever is in them, and their statistics are those of a certain
            token, (0, 1, 0, 0). On a CPU they are not read. None: all rows.
        status: unused; labels are checked before.

    x_y is −inf where another shard holds the label. A shard with no unmasked column in a row has (−inf, 0, 0, ·).
    NaN and +inf logits make the row's statistics NaN.

    """
    dtype = accumulation_dtype(logits)
    valid = _valid_columns(logits, vocab_start, vocab_size)
    maximum = torch.full((len(logits), 1), -torch.inf, dtype=dtype, device=logits.device)
    label_logit = maximum.clone()
    sum_exp, weighted = torch.zeros_like(maximum), torch.zeros_like(maximum)
    if valid:
        scratch = _Scratch(logits, valid)
        with _one_thread(logits):
            for rows in _row_chunks(logits, active):
                chunk = logits[rows, :valid]
                shifted, weight = scratch.pair(len(chunk))
                wide = chunk if chunk.dtype == dtype else shifted.copy_(chunk)
                highest = wide.amax(dim=1, keepdim=True)
                torch.sub(wide, highest.clamp(min=_FLOOR), out=shifted).clamp_(min=_FLOOR)
                torch.mul(shifted, math.log2(math.e) / temperature, out=weight)
                scratch.exp2_(weight)
                maximum[rows] = highest
                sum_exp[rows] = weight.sum(dim=1, keepdim=True)
                weighted[rows] = weight.mul_(shifted).sum(dim=1, keepdim=True)
        mine, column = _local_labels(labels, vocab_start, valid)
        label_logit = logits.gather(1, column).to(dtype).masked_fill_(~mine, -torch.inf)
    statistics = torch.cat((maximum, sum_exp, weighted, label_logit), dim=1)
    if active is not None:
        statistics = torch.where(active.unsqueeze(1), statistics, statistics.new_tensor((0.0, 1.0, 0.0, 0.0)))
    return statistics


def combine(
    gathered: Tensor, coefficients: TokenCoefficients | None, *, temperature: float, active: Tensor | None = None
) -> TokenResults:
    """Merge the shards' statistics [TP, N, 4] in rank order, and evaluate the loss of every token.

    Every rank that is given the same bits computes the same bits. Rows that are not ``active`` get zeros.
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
    if active is not None:  # a row that is not read counts once for each rank in the sums
        logp, entropy = torch.where(active, logp, 0.0), torch.where(active, entropy, 0.0)
    terms, derivative = None, torch.zeros_like(logp)
    if coefficients is not None:
        of_token = token_terms(logp, coefficients)
        terms = torch.stack((of_token.positive, of_token.negative, of_token.kl))
        derivative = of_token.derivative.to(logp.dtype)
        if active is not None:
            terms = torch.where(active, terms, 0.0)
            derivative = torch.where(active, derivative, 0.0)
    return TokenResults(torch.stack((maximum, sum_exp, derivative, logp), dim=1), logp, entropy, terms)


def gradient_(
    logits: Tensor,
    labels: Tensor,
    state: Tensor,
    *,
    vocab_start: int,
    vocab_size: int,
    temperature: float,
    grad_out: Tensor | None = None,
) -> None:
    """Overwrite ``logits`` with ∂loss/∂logits = g_t (onehot − softmax)/T (algorithm.md, "Losses").

    Args:
        logits: [N, width] contiguous shard; padding columns become 0.
        labels: int64 [N], global ids.
        state: (m, d, g, logp) [N, 4] of ``combine``; rows where g·grad_out is 0 become exactly 0, whatever was in
            them. On a CPU they are not read.
        vocab_start: as in ``row_statistics``.
        vocab_size: as in ``row_statistics``.
        temperature: T.
        grad_out: 0-d upstream gradient; None: 1.

    The label's entry, g_t (1 − p_y)/T, is formed as −g_t·expm1(logp)/T in the accumulation dtype and rounded once:
    rounding p_y to bf16 before subtracting it from 1 would lose it entirely for a confident token.

    """
    maximum, sum_exp, derivative, logp = state.unbind(dim=1)
    if grad_out is not None:
        derivative = derivative * grad_out.to(derivative.dtype)
    valid = _valid_columns(logits, vocab_start, vocab_size)
    if valid < logits.shape[1]:
        logits[:, valid:] = 0
    if valid == 0:
        return
    silent = (derivative == 0).unsqueeze(1)
    for rows in _row_chunks(logits, silent[:, 0]) if not logits.is_cuda else ():
        _store(logits, rows, valid, 0)
    maximum = maximum.unsqueeze(1)
    share = (-derivative / temperature / sum_exp).unsqueeze(1)
    scratch = _Scratch(logits, valid)
    with _one_thread(logits):
        for rows in _row_chunks(logits, ~silent[:, 0]):
            chunk = logits[rows, :valid]
            gradient, _ = scratch.pair(len(chunk))
            wide = chunk if chunk.dtype == gradient.dtype else gradient.copy_(chunk)
            torch.sub(wide, maximum[rows], out=gradient).mul_(math.log2(math.e) / temperature)
            scratch.exp2_(gradient)
            gradient.mul_(share[rows])
            if logits.is_cuda:
                gradient.masked_fill_(silent[rows], 0.0)
            _store(logits, rows, valid, gradient)
    mine, column = _local_labels(labels, vocab_start, valid)
    entry = (-derivative * logp.expm1() / temperature).unsqueeze(1).to(logits.dtype)
    logits.scatter_(1, column, torch.where(mine & ~silent, entry, logits.gather(1, column)))


class _Scratch:
    """Two buffers of one row chunk in the accumulation dtype, used again for every chunk.

    Rows are padded to whole vectors of the widest CPU, because torch's exp2 rounds the last elements of a buffer, which
    fill no vector, in another way: so a row's bits do not depend on the rows that share its chunk.
    """

    _VECTOR = 64

    def __init__(self, logits: Tensor, valid: int):
        self.valid = valid
        self.stride = -(-valid // self._VECTOR) * self._VECTOR
        shape = (2, min(_chunk_rows(logits), len(logits)), self.stride)
        self.buffers = torch.zeros(shape, dtype=accumulation_dtype(logits), device=logits.device)

    def pair(self, rows: int) -> tuple[Tensor, Tensor]:
        """Two [rows, valid] views."""
        return self.buffers[0, :rows, : self.valid], self.buffers[1, :rows, : self.valid]

    def exp2_(self, view: Tensor) -> None:
        """2^x in place, of a view made by ``pair``, padding included."""
        view.as_strided((len(view), self.stride), (self.stride, 1)).exp2_()


def _valid_columns(logits: Tensor, vocab_start: int, vocab_size: int) -> int:
    return min(max(vocab_size - vocab_start, 0), logits.shape[1])


def _chunk_rows(logits: Tensor) -> int:
    elements = CHUNK_ELEMENTS["cuda" if logits.is_cuda else "cpu"]
    return max(elements // max(logits.shape[1], 1), 1)


@contextlib.contextmanager
def _one_thread(logits: Tensor) -> Iterator[None]:
    """Run torch's CPU operations on one thread, as torchrun's ranks do anyway.

    They are many and short, to stay in a core's caches; a second thread gains next to nothing, and where another
    process keeps a core busy the threads wait for each other after every one of them: the loss took ten times longer.
    """
    threads = torch.get_num_threads()
    if logits.is_cuda or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _row_chunks(logits: Tensor, wanted: Tensor | None) -> Iterator[Rows]:
    """Chunks of the wanted rows; on a GPU of all rows, because the host must not wait to learn which are wanted."""
    step = _chunk_rows(logits)
    if wanted is None or logits.is_cuda or bool(wanted.all()):
        yield from (slice(start, min(start + step, len(logits))) for start in range(0, len(logits), step))
        return
    for rows in wanted.nonzero().flatten().split(step):
        if len(rows):
            first, last = int(rows[0]), int(rows[-1])
            yield slice(first, last + 1) if last - first + 1 == len(rows) else rows


def _store(logits: Tensor, rows: Rows, valid: int, values: Tensor | float) -> None:
    """Write [rows, valid] values; a slice without a temporary."""
    if isinstance(rows, slice) and isinstance(values, Tensor):
        logits[rows, :valid].copy_(values)
    else:
        logits[rows, :valid] = values.to(logits.dtype) if isinstance(values, Tensor) else values


def _local_labels(labels: Tensor, vocab_start: int, valid: int) -> tuple[Tensor, Tensor]:
    """Whether this shard holds each label, and its column (some column where it does not); [rows, 1] both."""
    column = labels - vocab_start
    mine = (column >= 0) & (column < valid)
    return mine.unsqueeze(1), column.clamp(0, valid - 1).unsqueeze(1)
