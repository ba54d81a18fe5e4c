"""The autograd function of the policy's loss on vocab-parallel logits: two reads and one write of them in all.

forward    statistics of this rank's columns (one read), one all-gather of 16 bytes a token, combine
backward   the logits' storage becomes their gradient (one read, one write), no collective

The passes are the CUDA kernels' (``kernels.py``) where they are there, else PyTorch's (``vocab_parallel.py``); this
file is the same for both.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oreal.errors import UserError
from megatron_oreal.loss import vocab_parallel
from megatron_oreal.loss.coefficients import TokenCoefficients
from megatron_oreal.loss.kernels import TokenResults
from megatron_oreal.loss.library import choose_kernels


class Passes(Protocol):
    """The three passes; ``Kernels`` has them as methods, the module ``vocab_parallel`` as functions."""

    def row_statistics(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        vocab_start: int,
        vocab_size: int,
        temperature: float,
        active: Tensor | None = None,
        status: Tensor | None = None,
    ) -> Tensor:
        """One read of a shard: (m, d, t, x_y) [N, 4]."""

    def combine(
        self,
        gathered: Tensor,
        coefficients: TokenCoefficients | None,
        *,
        temperature: float,
        active: Tensor | None = None,
    ) -> TokenResults:
        """Merge the statistics [TP, N, 4]; loss and derivative of every token."""

    def gradient_(
        self,
        logits: Tensor,
        labels: Tensor,
        state: Tensor,
        *,
        vocab_start: int,
        vocab_size: int,
        temperature: float,
        grad_out: Tensor | None = None,
    ) -> None:
        """Overwrite the logits with their gradient."""


@cache
def _say_that_kernels_are_missing(line: str) -> None:
    warnings.warn(f"the loss runs without its CUDA kernels, many times slower: {line}", RuntimeWarning, stacklevel=4)


def passes_for(logits: Tensor) -> Passes:
    """The compiled kernels for this device and dtype, else PyTorch; on a GPU without kernels it says so, once."""
    passes: Passes = vocab_parallel
    if logits.dtype != torch.float64:  # for gradient checks; the kernels take bf16 and float32
        choice = choose_kernels(logits.device)
        if choice.kernels is not None:
            passes = choice.kernels
        elif logits.is_cuda:
            _say_that_kernels_are_missing(choice.line)
    return passes


@dataclass(frozen=True)
class Vocabulary:
    """Which columns the logits have, and at which temperature they are read.

    ``vocab_size``: valid columns of all ranks of ``tp_group`` (None: one rank); padding columns from there on take no
    part. ``temperature`` > 0 divides the logits. Raises ``UserError`` for a value out of range.
    """

    vocab_size: int
    temperature: float = 1.0
    tp_group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"temperature is {self.temperature}; it must be > 0")

    @property
    def ranks(self) -> int:
        """Size of the tensor-parallel group."""
        return 1 if self.tp_group is None else dist.get_world_size(self.tp_group)

    def columns(self, width: int) -> dict[str, Any]:
        """The keywords of the passes for this rank's ``width`` columns."""
        rank = 0 if self.tp_group is None else dist.get_rank(self.tp_group)
        return {"vocab_start": rank * width, "vocab_size": self.vocab_size, "temperature": self.temperature}

    def check(self, width: int, labels: Tensor, num_rows: int) -> None:
        """Raise ``UserError`` for a width or labels that do not fit (a label's value: ``check_labels``)."""
        if labels.dtype != torch.int64 or labels.shape != (num_rows,):
            raise UserError(f"labels is {labels.dtype} {list(labels.shape)}; it must be int64 [{num_rows}]")
        padded = width * self.ranks
        if not 0 < self.vocab_size <= padded:
            raise UserError(f"vocab_size is {self.vocab_size}; it must be in [1, {padded}], the columns of all ranks")


def evaluate_rows(
    logits: Tensor,
    labels: Tensor,
    coefficients: TokenCoefficients | None,
    vocabulary: Vocabulary,
    active: Tensor | None,
) -> TokenResults:
    """Statistics of this shard, the one collective, and the merge; rows that are not ``active`` are not read.

    A label outside the vocabulary in an active row raises ``UserError`` on a CPU, on every rank alike and before the
    collective; on a GPU, where the host must not wait for it, a device-side assertion fails.
    """
    passes = passes_for(logits)
    message = f"a label is outside the vocabulary [0, {vocabulary.vocab_size})"
    status = None
    if logits.is_cuda and passes is not vocab_parallel:
        status = torch.zeros(1, dtype=torch.int32, device=logits.device)
    else:
        outside = (labels < 0) | (labels >= vocabulary.vocab_size)
        if active is not None:
            outside &= active
        if logits.is_cuda:
            torch._assert_async(~outside.any(), message)
        elif bool(outside.any()):
            raise UserError(f"label {int(labels[outside][0])} is outside the vocabulary [0, {vocabulary.vocab_size})")
    columns = vocabulary.columns(logits.shape[1])
    statistics = passes.row_statistics(logits, labels, **columns, active=active, status=status)
    if status is not None:
        torch._assert_async(status == 0, message)
    gathered = statistics.unsqueeze(0)
    if vocabulary.ranks > 1 and len(statistics):  # every rank has the same N
        gathered = statistics.new_empty(vocabulary.ranks, *statistics.shape)
        dist.all_gather_into_tensor(gathered.flatten(0, 1), statistics, group=vocabulary.tp_group)
    return passes.combine(gathered, coefficients, temperature=vocabulary.temperature, active=active)


class FusedPolicyLoss(torch.autograd.Function):
    """(logits, labels, coefficients, vocabulary, active) -> (total, terms [3], logp, entropy); total alone has a
    gradient, once, and in the logits' storage.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        coefficients: TokenCoefficients,
        vocabulary: Vocabulary,
        active: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Leave the logits as they are."""
        rows = evaluate_rows(logits, labels, coefficients, vocabulary, active)
        assert rows.terms is not None
        terms = rows.terms.sum(dim=1)
        ctx.save_for_backward(logits, labels, rows.state)
        ctx.vocabulary, ctx.consumed = vocabulary, False
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(terms, rows.logp, rows.entropy)
        return terms.sum(), terms, rows.logp, rows.entropy

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """Turn the logits into their gradient."""
        refuse_second_backward(ctx, "the logits with their gradient")
        logits, labels, state = ctx.saved_tensors
        buffer = logits.detach()  # same storage and version counter: others who saved the logits are told by autograd
        columns = ctx.vocabulary.columns(logits.shape[1])
        passes_for(logits).gradient_(buffer, labels, state, **columns, grad_out=grad_total)
        if passes_for(logits) is not vocab_parallel:
            torch.autograd.graph.increment_version(buffer)  # a kernel's write, which autograd cannot see
        return buffer, None, None, None, None


def refuse_second_backward(ctx: Any, what: str) -> None:
    """Raise RuntimeError for ``create_graph`` and for a backward of what the first one overwrote."""
    if torch.is_grad_enabled():
        raise RuntimeError("policy_loss has no second derivative; call backward without create_graph")
    if ctx.consumed:
        raise RuntimeError(f"policy_loss: a second backward, but the first one overwrote {what}")
    ctx.consumed = True
