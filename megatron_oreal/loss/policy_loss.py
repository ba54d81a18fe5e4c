"""The policy's loss on vocab-parallel logits: one collective, no second tensor of the logits' size.

Forward reads the logits once and keeps them; backward turns the same storage into their gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oreal.errors import UserError
from megatron_oreal.loss import vocab_parallel
from megatron_oreal.loss.coefficients import TokenCoefficients


@dataclass(frozen=True)
class PolicyLoss:
    """``total`` (0-d float64, differentiable in the logits) and what it is made of, detached.

    ``positive``, ``negative``, ``kl``: its three parts, 0-d float64, for logging. ``logp``, ``entropy``: [N] float32
    (float64 for float64 logits), log-probability of the label and entropy in nats of the full vocabulary at the
    temperature. All have the same bits on every rank of the tensor-parallel group.
    """

    total: Tensor
    positive: Tensor
    negative: Tensor
    kl: Tensor
    logp: Tensor
    entropy: Tensor


def policy_loss(
    logits: Tensor,
    labels: Tensor,
    coefficients: TokenCoefficients,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
) -> PolicyLoss:
    """Sum the tokens' losses; ``total`` is already divided by the global normalisers in the coefficients.

    Args:
        logits: [N, width] contiguous, this rank's columns [rank·width, (rank + 1)·width) of the padded vocabulary;
            bf16, float32 or float64. **Consumed**: backward overwrites its storage with the gradient, which has the
            logits' dtype. Nothing else may read it after backward; an op whose own backward needs it raises.
        labels: int64 [N], global ids in [0, vocab_size) of every row, also of rows with zero coefficients; the same
            on all ranks, as are the coefficients.
        coefficients: N tokens, see ``make_coefficients``. Rows whose derivative is 0 get exactly zero gradient.
        vocab_size: the valid columns; padding columns from there on take no part and get zero gradient.
        temperature: the logits are divided by it.
        tp_group: Megatron's tensor-parallel group; None or one rank: no collective. Otherwise exactly one all-gather
            of 4 floats a token in forward, none in backward.

    NaN and +inf logits make logp and, where a coefficient is not 0, loss and gradient NaN; −inf is a masked column.

    Raises:
        UserError: for shapes, dtypes, layouts or labels that do not fit (labels on a GPU: a device-side assertion).
        RuntimeError: in backward, when the logits are already consumed, or with ``create_graph``.

    """
    _check_arguments(logits, labels, vocab_size, temperature, tp_group)
    if len(coefficients) != len(labels):
        raise UserError(f"coefficients are of {len(coefficients)} tokens; there are {len(labels)} labels")
    return PolicyLoss(*_PolicyLossFunction.apply(logits, labels, coefficients, vocab_size, temperature, tp_group))


@torch.no_grad()
def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (logp, entropy) of ``policy_loss``, same bits, without gradient; the logits are left as they are."""
    _check_arguments(logits, labels, vocab_size, temperature, tp_group)
    rows = _forward_rows(logits, labels, None, vocab_size, temperature, tp_group)
    return rows.logp, rows.entropy


class _PolicyLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        coefficients: TokenCoefficients,
        vocab_size: int,
        temperature: float,
        tp_group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, ...]:
        rows = _forward_rows(logits, labels, coefficients, vocab_size, temperature, tp_group)
        assert rows.terms is not None
        positive, negative, kl = rows.terms.positive.sum(), rows.terms.negative.sum(), rows.terms.kl.sum()
        ctx.save_for_backward(
            logits, labels, rows.maximum, rows.sum_exp, rows.logp, rows.terms.derivative.to(rows.logp.dtype)
        )
        ctx.shard = {
            "vocab_start": _rank(tp_group) * logits.shape[1],
            "vocab_size": vocab_size,
            "temperature": temperature,
        }
        ctx.consumed = False
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(positive, negative, kl, rows.logp, rows.entropy)
        return positive + negative + kl, positive, negative, kl, rows.logp, rows.entropy

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("policy_loss has no second derivative; call backward without create_graph")
        if ctx.consumed:
            raise RuntimeError(
                "policy_loss: a second backward, but the first one overwrote the logits with their gradient"
            )
        logits, labels, maximum, sum_exp, logp, derivative = ctx.saved_tensors
        ctx.consumed = True
        buffer = logits.detach()  # same storage and version counter: others who saved the logits are told by autograd
        vocab_parallel.gradient_(
            buffer, labels, maximum, sum_exp, logp, derivative * grad_total.to(derivative.dtype), **ctx.shard
        )
        return buffer, None, None, None, None, None


def _forward_rows(
    logits: Tensor,
    labels: Tensor,
    coefficients: TokenCoefficients | None,
    vocab_size: int,
    temperature: float,
    tp_group: dist.ProcessGroup | None,
) -> vocab_parallel.CombinedRows:
    """Statistics of this shard, the one collective, and the merge."""
    statistics = vocab_parallel.row_statistics(
        logits,
        labels,
        vocab_start=_rank(tp_group) * logits.shape[1],
        vocab_size=vocab_size,
        temperature=temperature,
    )
    world = _world_size(tp_group)
    gathered = statistics.unsqueeze(0)
    if world > 1 and len(statistics):  # every rank has the same N
        gathered = statistics.new_empty(world, *statistics.shape)
        dist.all_gather_into_tensor(gathered.flatten(0, 1), statistics, group=tp_group)
    return vocab_parallel.combine(gathered, coefficients, temperature=temperature)


def _rank(tp_group: dist.ProcessGroup | None) -> int:
    return 0 if tp_group is None else dist.get_rank(tp_group)


def _world_size(tp_group: dist.ProcessGroup | None) -> int:
    return 1 if tp_group is None else dist.get_world_size(tp_group)


def _check_arguments(
    logits: Tensor, labels: Tensor, vocab_size: int, temperature: float, tp_group: dist.ProcessGroup | None
) -> None:
    if logits.dim() != 2 or not logits.is_contiguous():
        layout = f"shape {list(logits.shape)}, strides {list(logits.stride())}"
        raise UserError(
            f"logits has {layout}; it must be a contiguous [N, V/tp], because its storage becomes the gradient"
        )
    if logits.dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise UserError(f"logits is {logits.dtype}; it must be bfloat16, float32 or float64")
    if labels.dtype != torch.int64 or labels.shape != logits.shape[:1]:
        raise UserError(f"labels is {labels.dtype} {list(labels.shape)}; it must be int64 [{len(logits)}]")
    if not temperature > 0:
        raise UserError(f"temperature is {temperature}; it must be > 0")
    padded = logits.shape[1] * _world_size(tp_group)
    if not 0 < vocab_size <= padded:
        raise UserError(f"vocab_size is {vocab_size}; it must be in [1, {padded}], the columns of all ranks")
    in_vocabulary = ((labels >= 0) & (labels < vocab_size)).all()
    if labels.is_cuda:
        torch._assert_async(in_vocabulary, f"a label is outside [0, {vocab_size})")  # no host synchronisation
    elif not in_vocabulary:
        outside = labels[(labels < 0) | (labels >= vocab_size)][0]
        raise UserError(f"label {int(outside)} is outside the vocabulary [0, {vocab_size})")
