"""The policy's loss on vocab-parallel logits: one collective, no second tensor of the logits' size.

Forward reads the logits once and keeps them; backward turns the same storage into their gradient (``fused.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oreal.errors import UserError
from megatron_oreal.loss.coefficients import TokenCoefficients
from megatron_oreal.loss.fused import FusedPolicyLoss, Vocabulary, evaluate_rows


@dataclass(frozen=True)
class PolicyLoss:
    """``total`` (0-d float64, differentiable in the logits) and what it is made of, detached.

    ``positive``, ``negative``, ``kl``: its three parts, 0-d float64, for logging. ``logp``, ``entropy``: [N] float32
    (float64 for float64 logits), log-probability of the label and entropy in nats of the full vocabulary at the
    temperature; 0 in rows that were not read. All have the same bits on every rank of the tensor-parallel group.
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
    active: Tensor | None = None,
    monitor: bool = False,
) -> PolicyLoss:
    """Sum the tokens' losses; ``total`` is already divided by the global normalisers in the coefficients.

    Args:
        logits: [N, width] contiguous, this rank's columns [rank·width, (rank + 1)·width) of the padded vocabulary;
            bf16, float32 or float64. **Consumed**: backward overwrites its storage with the gradient, which has the
            logits' dtype. Nothing else may read it after backward; an op whose own backward needs it raises.
        labels: int64 [N], global ids in [0, vocab_size) (in rows that are not read: anything); the same on all ranks,
            as are the coefficients.
        coefficients: N tokens, see ``make_coefficients``. Rows whose derivative is 0 get exactly zero gradient.
        vocab_size: the valid columns; padding columns from there on take no part and get zero gradient.
        temperature: the logits are divided by it.
        tp_group: Megatron's tensor-parallel group; None or one rank: no collective. Otherwise exactly one all-gather
            of 4 floats a token in forward, none in backward.
        active: bool [N]; other rows are masked: never read, no loss, zero gradient. None: no row is masked.
        monitor: read rows whose coefficients are all 0 as well, for their logp and entropy; else they are treated as
            masked ones.

    NaN and +inf logits make logp and, where a coefficient is not 0, loss and gradient NaN; −inf is a masked column.

    Raises:
        UserError: for shapes, dtypes, layouts or labels that do not fit (labels on a GPU: a device-side assertion).
        RuntimeError: in backward, when the logits are already consumed, or with ``create_graph``.

    """
    vocabulary = Vocabulary(vocab_size, temperature, tp_group)
    _check_logits(logits)
    vocabulary.check(logits.shape[1], labels, len(logits))
    read = rows_to_read(labels, coefficients, active, monitor=monitor)
    return as_policy_loss(FusedPolicyLoss.apply(logits, labels, coefficients, vocabulary, read))


@torch.no_grad()
def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    active: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (logp, entropy) of ``policy_loss``, same bits, without gradient; the logits are left as they are."""
    vocabulary = Vocabulary(vocab_size, temperature, tp_group)
    _check_logits(logits)
    vocabulary.check(logits.shape[1], labels, len(logits))
    rows = evaluate_rows(logits, labels, None, vocabulary, checked_mask(active, labels))
    return rows.logp, rows.entropy


def as_policy_loss(outputs: tuple[Tensor, ...]) -> PolicyLoss:
    """Name what the autograd functions return."""
    total, terms, logp, entropy = outputs
    positive, negative, kl = terms.unbind()
    return PolicyLoss(total, positive, negative, kl, logp, entropy)


def rows_to_read(
    labels: Tensor, coefficients: TokenCoefficients, active: Tensor | None, *, monitor: bool
) -> Tensor | None:
    """The mask of the passes, bool [N]; None: all rows. Raises ``UserError`` for lengths that do not agree."""
    if len(coefficients) != len(labels):
        raise UserError(f"coefficients are of {len(coefficients)} tokens; there are {len(labels)} labels")
    active = checked_mask(active, labels)
    if monitor:
        return active
    loud = coefficients.is_nonzero().to(labels.device)
    return loud if active is None else loud & active


def checked_mask(active: Tensor | None, labels: Tensor) -> Tensor | None:
    """Pass a mask on; raises ``UserError`` for one that is not bool [N]."""
    if active is not None and (active.dtype != torch.bool or active.shape != labels.shape):
        raise UserError(f"active is {active.dtype} {list(active.shape)}; it must be bool {list(labels.shape)}")
    return active


def _check_logits(logits: Tensor) -> None:
    if logits.dim() != 2 or not logits.is_contiguous():
        layout = f"shape {list(logits.shape)}, strides {list(logits.stride())}"
        raise UserError(
            f"logits has {layout}; it must be a contiguous [N, V/tp], because its storage becomes the gradient"
        )
    if logits.dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise UserError(f"logits is {logits.dtype}; it must be bfloat16, float32 or float64")
