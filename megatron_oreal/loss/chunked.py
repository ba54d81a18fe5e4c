"""The vocabulary head and the policy's loss together, a chunk of tokens at a time: logits of one chunk live at once.

For long micro-batches at low tensor-parallel sizes, where the logits would not fit. Chunks cost time, not accuracy: the
weight's float32 gradient is read and written once a chunk, 8·V·H bytes beside a chunk's 2·n·V·H floating-point
operations a GEMM, so a chunk has never fewer than ``LEAST_TOKENS`` tokens unless fewer remain in all.

Where the gradient is made
    *In the forward*, when the upstream gradient is known there (``upstream``): 6·n·H·V operations as without chunks.
    The loss sum is normalised by global counts before the forward, so the upstream gradient is the loss scale: 1 for
    bf16 and float32 training. Backward checks it.
    *In the backward* otherwise: each chunk's logits are computed again, 8·n·H·V operations, any upstream gradient.
    Without ``main_grad`` neither is needed: the weight's gradient waits in a float32 buffer for the factor.

``main_grad`` is Megatron's float32 gradient of a parameter, which its DistributedDataParallel and optimizers read. It
is added to here, and autograd is given zeros, so that Megatron's hooks run as for every parameter: they add the zeros
and mark the gradient as ready (``overlap_grad_reduce``). ``grad_added_to_main_grad``, which would spare that addition,
stays as it is: Megatron clears it once a step, and a shorter micro-batch of the step, without chunks, needs it clear.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megatron_oreal.errors import UserError
from megatron_oreal.loss import vocab_parallel
from megatron_oreal.loss.coefficients import TokenCoefficients
from megatron_oreal.loss.fused import Vocabulary, evaluate_rows, passes_for, refuse_second_backward
from megatron_oreal.loss.policy_loss import PolicyLoss, as_policy_loss, checked_mask, rows_to_read

LEAST_TOKENS = 2048
"""Below this a chunk's GEMM cannot hide the traffic of the weight's gradient (36 % of its time at 2048 on an H200)."""

AUTO_BYTES = 4 << 30
"""Logits that ``auto_chunk_tokens`` allows at once, 4 GiB."""

_WEIGHT_BLOCK = 1 << 22
"""Elements of a converted block, where no GEMM adds bf16 products to float32 in one call."""


def auto_chunk_tokens(columns: int, itemsize: int) -> int:
    """Tokens whose logits take ``AUTO_BYTES``, as a multiple of 1024, at least ``LEAST_TOKENS``.

    ``columns``: of this rank, V/tp. It depends on sizes alone, never on free memory, so that all ranks agree.
    """
    return max(AUTO_BYTES // (columns * itemsize) // 1024 * 1024, LEAST_TOKENS)


def chunk_slices(num_tokens: int, chunk_tokens: int) -> list[slice]:
    """Cut [0, num_tokens) into equal chunks of at most ``chunk_tokens``, but never of fewer than ``LEAST_TOKENS``.

    The second rule wins: with ``chunk_tokens`` under 2·``LEAST_TOKENS`` a chunk may be larger. No token: no chunk.
    """
    if num_tokens == 0:
        return []
    count = max(min(-(-num_tokens // chunk_tokens), num_tokens // LEAST_TOKENS), 1)
    bounds = [num_tokens * i // count for i in range(count + 1)]
    return [slice(begin, end) for begin, end in itertools.pairwise(bounds)]


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    coefficients: TokenCoefficients,
    vocabulary: Vocabulary,
    *,
    chunk_tokens: int,
    upstream: float | None = None,
    active: Tensor | None = None,
    monitor: bool = False,
) -> PolicyLoss:
    """``policy_loss`` of hidden @ weight.T without these logits in memory.

    Args:
        hidden: [N, H], the same on all ranks of ``vocabulary.tp_group``; its gradient is this rank's part of the sum
            over them (Megatron's mappings sum it).
        weight: [V/tp, H], this rank's rows, of the same dtype; a leaf when it has ``main_grad``.
        labels: as in ``policy_loss``.
        coefficients: as in ``policy_loss``.
        vocabulary: valid columns, temperature, group. One all-gather a chunk.
        chunk_tokens: see ``chunk_slices``.
        upstream: the gradient that ``total`` will get, when it is known; None: not known.
        active: as in ``policy_loss``.
        monitor: as in ``policy_loss``.

    Raises:
        UserError: for shapes, dtypes or labels that do not fit.
        RuntimeError: in backward, when the upstream gradient is not the announced one (on a GPU a device-side
            assertion), or on a second backward.

    """
    _check(hidden, weight, labels, vocabulary)
    if upstream == 0:
        raise UserError("upstream is 0; announce the gradient that total will get, or None")
    read = rows_to_read(labels, coefficients, active, monitor=monitor)
    slices = chunk_slices(len(hidden), chunk_tokens)
    call = _Call(labels, coefficients, vocabulary, read, slices, upstream, torch.is_grad_enabled())
    return as_policy_loss(_ChunkedPolicyLoss.apply(hidden, weight, call))


@torch.no_grad()
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    vocabulary: Vocabulary,
    *,
    chunk_tokens: int,
    active: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(logp, entropy) of ``linear_policy_loss``, without gradient."""
    _check(hidden, weight, labels, vocabulary)
    slices = chunk_slices(len(hidden), chunk_tokens)
    call = _Call(labels, None, vocabulary, checked_mask(active, labels), slices, None, False)
    buffer = _logits_buffer(hidden, weight, slices)
    logp = hidden.new_empty(len(hidden), dtype=vocab_parallel.accumulation_dtype(hidden))
    entropy = torch.empty_like(logp)
    for rows in slices:
        results = call.evaluate(_project(hidden[rows], weight, buffer), rows)
        logp[rows], entropy[rows] = results.logp, results.entropy
    return logp, entropy


class _Call:
    """The arguments that are no differentiable tensors."""

    def __init__(
        self,
        labels: Tensor,
        coefficients: TokenCoefficients | None,
        vocabulary: Vocabulary,
        read: Tensor | None,
        slices: list[slice],
        upstream: float | None,
        differentiable: bool,
    ):
        self.labels, self.coefficients, self.vocabulary, self.read = labels, coefficients, vocabulary, read
        self.slices, self.upstream, self.differentiable = slices, upstream, differentiable

    def evaluate(self, logits: Tensor, rows: slice) -> Any:
        """``TokenResults`` of one chunk."""
        coefficients = None if self.coefficients is None else self.coefficients[rows]
        return evaluate_rows(
            logits, self.labels[rows], coefficients, self.vocabulary, None if self.read is None else self.read[rows]
        )

    def gradient_(self, logits: Tensor, state: Tensor, rows: slice, grad_out: Tensor | None) -> None:
        """Turn one chunk's logits into their gradient."""
        columns = self.vocabulary.columns(logits.shape[1])
        passes_for(logits).gradient_(logits, self.labels[rows], state, **columns, grad_out=grad_out)


class _WeightGradient:
    """Where the weight's gradient is summed over the chunks: its ``main_grad``, else a float32 buffer."""

    def __init__(self, weight: Tensor):
        self.weight = weight
        self.main_grad: Tensor | None = getattr(weight, "main_grad", None)
        dtype = vocab_parallel.accumulation_dtype(weight)
        self.sum = torch.zeros_like(weight, dtype=dtype) if self.main_grad is None else self.main_grad

    def add(self, gradient: Tensor, hidden: Tensor) -> None:
        """Add gradient.T @ hidden, both [n, ·]."""
        target = self.sum
        if target.dtype == gradient.dtype:
            target.addmm_(gradient.t(), hidden)
        elif target.dtype == torch.float32 and _gemm_adds_to_float32(gradient.device, gradient.dtype):
            torch.addmm(target, gradient.t(), hidden, out_dtype=torch.float32, out=target)
        else:
            wide = hidden.to(target.dtype)
            step = max(_WEIGHT_BLOCK // max(len(hidden), 1), 1)
            for begin in range(0, len(target), step):
                block = slice(begin, begin + step)
                target[block].addmm_(gradient[:, block].t().to(target.dtype), wide)

    def for_autograd(self, factor: Tensor | None) -> Tensor:
        """What autograd gets: zeros for ``main_grad``, else the sum times ``factor`` in the weight's dtype."""
        if self.main_grad is not None:
            return torch.zeros_like(self.weight)
        return (self.sum if factor is None else self.sum.mul_(factor)).to(self.weight.dtype)


@cache
def _gemm_adds_to_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds a product of ``dtype`` to float32 in one GEMM: on CUDA from 2.10 on, so it is tried."""
    if device.type != "cuda":
        return False
    try:
        target = torch.zeros(16, 16, device=device)
        ones = torch.ones(16, 16, device=device, dtype=dtype)
        torch.addmm(target, ones.t(), ones, out_dtype=torch.float32, out=target)
    except (RuntimeError, TypeError):
        return False
    return True


class _ChunkedPolicyLoss(torch.autograd.Function):
    """(hidden, weight, call) -> (total, terms [3], logp, entropy)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, call: _Call) -> tuple[Tensor, ...]:
        in_forward = call.differentiable and (
            call.upstream is not None or not weight.requires_grad or not hasattr(weight, "main_grad")
        )
        state = hidden.new_empty(len(hidden), 4, dtype=vocab_parallel.accumulation_dtype(hidden))
        logp, entropy = state.new_empty(len(hidden)), state.new_empty(len(hidden))
        terms = torch.zeros(3, dtype=torch.float64, device=hidden.device)
        gradients = _Gradients(hidden, weight) if in_forward else None
        scale = None if call.upstream in (None, 1.0) else terms.new_tensor(call.upstream)
        buffer = _logits_buffer(hidden, weight, call.slices)
        for rows in call.slices:
            logits = _project(hidden[rows], weight, buffer)
            results = call.evaluate(logits, rows)
            logp[rows], entropy[rows], state[rows] = results.logp, results.entropy, results.state
            terms += results.terms.sum(dim=1)
            if gradients is not None:
                call.gradient_(logits, results.state, rows, scale)
                gradients.add(logits, rows)
        if call.differentiable:
            ctx.save_for_backward(hidden, weight, state)
        ctx.call, ctx.gradients, ctx.consumed = call, gradients, False
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(terms, logp, entropy)
        return terms.sum(), terms, logp, entropy

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        refuse_second_backward(ctx, "its chunks")
        hidden, weight, state = ctx.saved_tensors
        call, gradients = ctx.call, ctx.gradients
        ctx.gradients = None
        if gradients is not None:
            return *gradients.finish(grad_total, call.upstream), None
        gradients = _Gradients(hidden, weight)
        buffer = _logits_buffer(hidden, weight, call.slices)
        for rows in call.slices:
            logits = _project(hidden[rows], weight, buffer)
            call.gradient_(logits, state[rows], rows, grad_total)
            gradients.add(logits, rows)
        return *gradients.finish(None, None), None


class _Gradients:
    """The gradients of hidden and weight, filled chunk by chunk."""

    def __init__(self, hidden: Tensor, weight: Tensor):
        self.inputs = hidden.detach(), weight.detach()
        self.hidden = torch.empty_like(self.inputs[0]) if hidden.requires_grad else None
        self.weight = _WeightGradient(weight) if weight.requires_grad else None

    def add(self, logits_gradient: Tensor, rows: slice) -> None:
        """Take one chunk's ∂total/∂logits [n, V/tp]."""
        hidden, weight = self.inputs
        if self.hidden is not None:
            torch.mm(logits_gradient, weight, out=self.hidden[rows])
        if self.weight is not None:
            self.weight.add(logits_gradient, hidden[rows])

    def finish(self, grad_total: Tensor | None, upstream: float | None) -> tuple[Tensor | None, Tensor | None]:
        """Scale what was made for ``upstream`` (None: for 1) to ``grad_total``, which must be it for ``main_grad``."""
        factor = None
        if grad_total is not None:
            announced = 1.0 if upstream is None else upstream
            if upstream is not None and self.weight is not None and self.weight.main_grad is not None:
                _require_upstream(grad_total, upstream)
            else:
                factor = grad_total / announced
        hidden = self.hidden
        if hidden is not None and factor is not None:
            hidden = hidden.mul_(factor)
        return hidden, None if self.weight is None else self.weight.for_autograd(factor)


def _require_upstream(grad_total: Tensor, upstream: float) -> None:
    message = f"linear_policy_loss: upstream={upstream} was announced, but total's gradient is another"
    if grad_total.is_cuda:
        torch._assert_async(grad_total == upstream, message)  # no host synchronisation
    elif float(grad_total) != upstream:
        raise RuntimeError(f"{message}, {float(grad_total)}: main_grad is wrong; announce the right one, or None")


def _logits_buffer(hidden: Tensor, weight: Tensor, slices: list[slice]) -> Tensor:
    """Room for the logits of the longest chunk; every chunk uses it."""
    longest = max((rows.stop - rows.start for rows in slices), default=0)
    return hidden.new_empty(longest, len(weight))


def _project(hidden: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    """Hidden @ weight.T [n, V/tp], in the buffer's storage."""
    return torch.mm(hidden.detach(), weight.detach().t(), out=buffer[: len(hidden)])


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, vocabulary: Vocabulary) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise UserError(
            f"hidden is {list(hidden.shape)} and weight {list(weight.shape)}; they must be [N, H] and [V/tp, H]"
        )
    if hidden.dtype != weight.dtype or hidden.dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise UserError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}; both must be bfloat16, float32 or float64"
        )
    vocabulary.check(len(weight), labels, len(hidden))
