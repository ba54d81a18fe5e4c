"""Token weights ω⁺, ω⁻ of a pack of sequences from the token reward model's scores (algorithm.md, "Token weights")."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_oreal.errors import UserError
from megatron_oreal.loss.library import kernels_for
from megatron_oreal.loss.segments import Segments, host_lengths, packed_starts
from megatron_oreal.loss.settings import LossSettings


@torch.no_grad()
def token_weights(scores: Tensor, lengths: Sequence[int] | Tensor, settings: LossSettings) -> tuple[Tensor, Tensor]:
    """Compute both weights of every token, as if its sequence were a positive and as if it were a negative.

    With the compiled kernels (``kernels.py``) in one pass, else in PyTorch.

    Args:
        scores: [N], any float type: s_t of the response tokens, sequences one after another; whole sequences, so
            compute weights before a context-parallel split.
        lengths: response lengths, each >= 1, on the host or as a tensor (``cu_seqlens.diff()``).
        settings: ``mode``, ``rescale`` and the thresholds or ratios are used.

    Returns:
        (ω⁺, ω⁻), float32 [N] in [0, 1], detached. Computed in float64, and independent of what else is in the pack.

    Raises:
        UserError: when scores is not 1-D or lengths do not sum to N.

    """
    if scores.dim() != 1:
        raise UserError(f"scores has shape {list(scores.shape)}; it must be 1-D over the response tokens")
    kernels = kernels_for(scores.device) if scores.dtype != torch.float64 else None
    if kernels is not None:
        starts = packed_starts(host_lengths(lengths, len(scores)), scores.device)
        return kernels.token_weights(scores, starts, settings)
    segments = Segments.of(lengths, len(scores), scores.device)
    quality = scores.double()
    if settings.mode == "released":
        quality = _running_mean(quality, segments)
    quality = quality.sigmoid()
    if settings.rescale == "topk":
        positive = _top_scaled(quality, segments, settings.correct_topk_ratio)
        negative = _top_scaled(1 - quality, segments, settings.incorrect_topk_ratio)
    else:
        positive = _above_threshold(quality, settings.correct_threshold)
        negative = _above_threshold(1 - quality, settings.incorrect_threshold)
    return positive.float(), negative.float()


def _running_mean(scores: Tensor, segments: Segments) -> Tensor:
    """c_t = (s_1 + … + s_t)/t, taken relative to s_1, so that equal scores have exactly equal means."""
    first = scores[segments.starts][segments.ids]
    return first + segments.cumulative_sum(scores - first) / (segments.positions + 1)


def _above_threshold(values: Tensor, threshold: float) -> Tensor:
    return ((values - threshold) / (1 - threshold)).clamp(0, 1)


def _top_scaled(values: Tensor, segments: Segments, ratio: float) -> Tensor:
    """Of each sequence the top ⌊ratio·n⌋ values min-max scaled to [0, 1], all 1 when they are equal; the rest 0.

    Two stable sorts order the tokens by (sequence, value descending, position): of equal values the earlier token
    comes first, as in the oracle.
    """
    counts = (segments.lengths.double() * ratio).floor().long()
    by_value = values.argsort(descending=True, stable=True)
    order = by_value[segments.ids[by_value].argsort(stable=True)]
    # `order` lists the sequences in their packed order, so ids, starts and positions index it unchanged
    ranked = values[order]
    high = ranked[segments.starts]
    low = ranked[segments.starts + (counts - 1).clamp(min=0)]
    spread = (high - low)[segments.ids]
    scaled = torch.where(spread == 0, 1.0, (ranked - low[segments.ids]) / spread)
    weights = torch.empty_like(values)
    weights[order] = torch.where(segments.positions < counts[segments.ids], scaled, 0.0)
    # NaN sorts as the largest, so a sequence with one has it in front: it has no top, and nothing hides that
    return weights.masked_fill(high.isnan()[segments.ids], torch.nan)
