"""The token reward model's loss (algorithm.md, "Losses": reward model)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_oreal.errors import UserError
from megatron_oreal.loss.segments import Segments, copied


@dataclass(frozen=True)
class RewardModelLoss:
    """``total`` 0-d float64, differentiable in the scores; the rest is detached, for logging.

    ``probabilities`` float64 [S]: σ(mean_t s_t). ``num_correct`` 0-d int64: sequences whose reward the reward model
    predicts, positive when the probability is > 0.5 (an untrained head, exactly 0.5, predicts negative).
    """

    total: Tensor
    probabilities: Tensor
    num_correct: Tensor


def reward_model_loss(
    scores: Tensor,
    lengths: Sequence[int] | Tensor,
    rewards: Sequence[float] | Tensor,
    num_sequences_global: int,
) -> RewardModelLoss:
    """(1/S) Σ_i BCE(σ(mean_t s_t), 1[R_i = +1]) over some sequences of the global batch, from the logits of σ.

    Args:
        scores: [N], any float type: s_t of the response tokens, sequences one after another.
        lengths: response lengths, each >= 1; their sum is N.
        rewards: +1 or -1, one a sequence.
        num_sequences_global: S, the kept sequences of the whole global batch.

    Raises:
        UserError: for shapes that do not agree, or ``num_sequences_global`` < the sequences given.

    """
    if scores.dim() != 1:
        raise UserError(f"scores has shape {list(scores.shape)}; it must be 1-D over the response tokens")
    segments = Segments.of(lengths, len(scores), scores.device)
    count = len(segments.lengths)
    reward = torch.as_tensor(rewards, dtype=torch.float64).cpu()
    if reward.shape != (count,) or bool((reward.abs() != 1).any()):
        raise UserError(f"rewards is {reward.tolist()}; it must be +1 or -1 for each of the {count} sequences")
    if num_sequences_global < count:
        raise UserError(f"num_sequences_global is {num_sequences_global}; there are already {count} sequences here")
    label = copied((reward > 0).double(), scores.device)
    mean = segments.mean(scores.double())
    total = F.binary_cross_entropy_with_logits(mean, label, reduction="sum") / max(num_sequences_global, 1)
    predicted = mean.detach() > 0
    return RewardModelLoss(total, mean.detach().sigmoid(), (predicted == (label > 0)).sum())
