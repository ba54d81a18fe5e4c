"""Other ways to compute the OREAL loss of given logits, each as ``total, logp, entropy = way(logits, case)``.

All get the same logits and constants and make the same loss; what they do not offer (entropy, masks, per-token
coefficients) is added around them in plain torch, as their users have to. A way that cannot be imported or does not run
on the device is left out with its reason.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_oreal.loss import TokenCoefficients, Vocabulary, linear_policy_loss, policy_loss
from megatron_oreal.loss.chunked import LEAST_TOKENS

Way = Callable[[Tensor, "Case"], tuple[Tensor, Tensor, Tensor | None]]


@dataclass
class Case:
    """``labels`` int64 [N], ``active`` bool [N] (response positions), ``coefficients`` of N tokens, 0 elsewhere."""

    labels: Tensor
    active: Tensor
    coefficients: TokenCoefficients


def total_of(logp: Tensor, positive_logp: Tensor, case: Case) -> Tensor:
    """The released loss from log-probabilities [N]; positives may come from another pass than the rest."""
    c = case.coefficients
    assert c.kl_anchor is not None
    logp = torch.where(case.active, logp, 0.0)
    delta = torch.where(case.active, c.kl_anchor, 0.0) - logp
    negative = c.negative * (logp - logp.detach()).exp()
    return (
        -c.positive * torch.where(case.active, positive_logp, 0.0) + negative + c.kl * (delta.exp() - delta - 1)
    ).sum()


def ours(logits: Tensor, case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    """``policy_loss``; masked rows are not read."""
    loss = policy_loss(logits, case.labels, case.coefficients, vocab_size=logits.shape[1], active=case.active)
    return loss.total, loss.logp, loss.entropy


def reference_way(logits: Tensor, case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    """Two passes over float32 logits of all positions, prompts included; no entropy.

    The way of InternLM/OREAL's train_oreal.py: ``F.cross_entropy`` for the positives' loss, and log-probabilities
    gathered from a log-softmax for the negatives and the KL term.
    """
    wide = logits.float()
    cross_entropy = F.cross_entropy(wide, case.labels.where(case.active, -100), reduction="none")
    logp = F.log_softmax(wide, dim=-1).gather(1, case.labels.unsqueeze(1)).squeeze(1)
    return total_of(logp, -cross_entropy, case), logp.detach(), None


def plain_formula(logits: Tensor, case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    """One float32 log-softmax, and the entropy from it."""
    log_probability = logits.float().log_softmax(-1)
    logp = log_probability.gather(1, case.labels.unsqueeze(1)).squeeze(1)
    entropy = -(log_probability.detach().exp() * log_probability.detach()).sum(-1)
    return total_of(logp, logp, case), logp.detach(), entropy


@functools.cache
def _compiled() -> Callable[..., Any]:
    def formula(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        log_probability = logits.float().log_softmax(-1)
        logp = log_probability.gather(1, labels.unsqueeze(1)).squeeze(1)
        return logp, -(log_probability.detach().exp() * log_probability.detach()).sum(-1)

    return torch.compile(formula, dynamic=False)


def compile_anew() -> None:
    """Forget compiled code: dynamo gives a function up for good once it has met it under a dispatch mode."""
    torch._dynamo.reset()
    _compiled.cache_clear()


def compiled_formula(logits: Tensor, case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    """torch.compile of the same."""
    logp, entropy = _compiled()(logits, case.labels)
    return total_of(logp, logp, case), logp.detach(), entropy


@torch.no_grad()
def _entropy(logits: Tensor) -> Tensor:
    """Entropy [N] as stacks without a fused one compute it: max, exp, sum, in float32."""
    wide = logits.float()
    shifted = wide - wide.amax(-1, keepdim=True)
    weight = shifted.exp()
    total = weight.sum(-1)
    return total.log() - (weight * shifted).sum(-1) / total


@functools.cache
def _one_rank() -> Any:
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return dist.group.WORLD


def megatron_fused(logits: Tensor, case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    """Megatron's native fused vocab-parallel cross-entropy and, in float32, the entropy."""
    module = importlib.import_module("megatron.core.fusions.fused_cross_entropy")
    entropy = _entropy(logits)
    loss = module.fused_vocab_parallel_cross_entropy(logits.unsqueeze(1), case.labels.unsqueeze(1), _one_rank())
    logp = -loss.squeeze(1)
    return total_of(logp, logp, case), logp.detach(), entropy


def liger(logits: Tensor, case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    """Liger's Triton cross-entropy and, in float32, the entropy."""
    module = importlib.import_module("liger_kernel.transformers.cross_entropy")
    entropy = _entropy(logits)  # before: the forward overwrites the logits with their gradient
    loss = module.LigerCrossEntropyLoss(reduction="none")(logits, case.labels.where(case.active, -100))
    logp = -loss
    return total_of(logp, logp, case), logp.detach(), entropy


def transformer_engine(logits: Tensor, case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    """TransformerEngine's Triton cross-entropy, its gradient in the logits' place where the version can (2.20), and, in
    float32, the entropy.
    """
    function = importlib.import_module("transformer_engine.pytorch.cross_entropy").parallel_cross_entropy
    in_place = {"overwrite_input": True} if "overwrite_input" in inspect.signature(function).parameters else {}
    entropy = _entropy(logits)
    labels = case.labels.where(case.active, -100)  # what it leaves out
    loss = function(logits.unsqueeze(1), labels.unsqueeze(1), 0.0, False, _one_rank(), **in_place)
    logp = -loss.squeeze(1)
    return total_of(logp, logp, case), logp.detach(), entropy


WAYS: dict[str, Way] = {
    "ours": ours,
    "reference": reference_way,
    "plain": plain_formula,
    "torch.compile": compiled_formula,
    "megatron_fused+entropy": megatron_fused,
    "liger+entropy": liger,
    "transformer_engine+entropy": transformer_engine,
}


# --- the head: hidden states and weight in, their gradients out -------------------------------------------------------


def head_ours(hidden: Tensor, weight: Tensor, case: Case) -> Tensor:
    """Response positions only, the GEMM, ``policy_loss``."""
    rows = case.active.nonzero().squeeze(1)
    return policy_loss(
        F.linear(hidden[rows], weight), case.labels[rows], case.coefficients[rows], vocab_size=len(weight)
    ).total


def head_ours_chunked(hidden: Tensor, weight: Tensor, case: Case) -> Tensor:
    """``linear_policy_loss`` in its smallest chunks: never all logits at once.

    The weight has no ``main_grad`` here, so a float32 buffer for its gradient counts as memory of this way.
    """
    rows = case.active.nonzero().squeeze(1)
    return linear_policy_loss(
        *(hidden[rows], weight, case.labels[rows], case.coefficients[rows], Vocabulary(len(weight))),
        chunk_tokens=LEAST_TOKENS,
        upstream=1.0,
    ).total


def head_reference(hidden: Tensor, weight: Tensor, case: Case) -> Tensor:
    """All positions, the GEMM, two float32 passes."""
    return reference_way(F.linear(hidden, weight), case)[0]


def head_cut_cross_entropy(hidden: Tensor, weight: Tensor, case: Case) -> Tensor:
    """Apple's cut-cross-entropy, which never makes the logits; no entropy."""
    module = importlib.import_module("cut_cross_entropy")
    rows = case.active.nonzero().squeeze(1)
    logp = -module.linear_cross_entropy(hidden[rows], weight, case.labels[rows], reduction="none", impl="cce_exact")
    part = Case(case.labels[rows], case.active[rows], case.coefficients[rows])
    return total_of(logp.float(), logp.float(), part)


HEADS: dict[str, Callable[[Tensor, Tensor, Case], Tensor]] = {
    "ours": head_ours,
    "ours_chunked": head_ours_chunked,
    "reference": head_reference,
    "cut_cross_entropy": head_cut_cross_entropy,
}
