"""Torch-native modules for Megatron-core layer specs, where TransformerEngine is not used.

Packed sequences lie one after another in ``[t, 1, ...]`` tensors. ``PackedSequences`` describes them to both kinds of
modules: TransformerEngine reads the ``thd`` fields of Megatron's ``PackedSeqParams``, the torch-native attention here
reads a gather plan that turns the pack into a few right-padded batches for one causal SDPA call each.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

# Sequences share one padded batch while the shortest is at least this share of the longest.
_LEAST_FILL = 0.75


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's packed-sequence parameters, and what else a micro-batch tells the model.

    ``batches``: for each padded batch ``(rows, sequences, length)``, ``rows`` int64 [sequences * length] indexing the
    pack; ``unpad`` int64 [t] indexing the concatenated outputs of all batches back into pack order. Empty for
    TransformerEngine. ``read_index`` int64 [n]: the positions whose hidden states reach the head.
    """

    batches: list[tuple[Tensor, int, int]] = field(default_factory=list)
    unpad: Tensor | None = None
    read_index: Tensor | None = None
    head: Any = None


def padded_batches(cu_seqlens: np.ndarray) -> tuple[list[tuple[np.ndarray, int, int]], np.ndarray]:
    """Plan the right-padded batches of a pack; see ``PackedSequences``.

    ``cu_seqlens`` int [b + 1]. With causal attention a padded key lies after every real query of its sequence, so no
    mask is needed; padded rows repeat the sequence's last token and their outputs are dropped.
    """
    lengths = np.diff(cu_seqlens)
    order = [int(i) for i in np.argsort(-lengths, kind="stable") if lengths[i] > 0]
    unpad = np.empty(int(cu_seqlens[-1]), dtype=np.int64)
    batches: list[tuple[np.ndarray, int, int]] = []
    start, base = 0, 0
    while start < len(order):
        longest = int(lengths[order[start]])
        stop = start
        while stop < len(order) and lengths[order[stop]] >= _LEAST_FILL * longest:
            stop += 1
        members = np.array(order[start:stop])
        offsets = np.minimum(np.arange(longest)[None, :], lengths[members, None] - 1)
        rows = cu_seqlens[members, None].astype(np.int64) + offsets
        real = np.arange(longest)[None, :] < lengths[members, None]
        unpad[rows[real]] = base + np.flatnonzero(real)
        batches.append((rows.ravel(), len(members), longest))
        base += rows.size
        start = stop
    return batches, unpad


class PackedAttention(MegatronModule):
    """Core attention over packed sequences through ``scaled_dot_product_attention``; never across a boundary."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_: Any,
    ):
        super().__init__(config=config)
        assert attention_type == "self" and not (attention_dropout or config.attention_dropout)
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> Tensor:
        """``query`` [t, 1, heads, d], ``key`` and ``value`` [t, 1, kv_heads, d] -> [t, 1, heads * d]."""
        assert isinstance(packed_seq_params, PackedSequences) and packed_seq_params.unpad is not None
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        repeat = query.size(1) // key.size(1)
        outputs = []
        for rows, sequences, length in packed_seq_params.batches:
            shape = (sequences, length)
            q = query.index_select(0, rows).unflatten(0, shape).transpose(1, 2)
            k = key.index_select(0, rows).unflatten(0, shape).transpose(1, 2)
            v = value.index_select(0, rows).unflatten(0, shape).transpose(1, 2)
            if repeat > 1:
                k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale)
            outputs.append(out.transpose(1, 2).flatten(0, 1))
        context = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return context.index_select(0, packed_seq_params.unpad).flatten(1).unsqueeze(1)


class RMSNorm(torch.nn.Module):
    """RMSNorm in fp32, output in the input's dtype; its weight is marked for sequence parallelism's reduction."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any):
        super().__init__()
        assert config.normalization == "RMSNorm"
        self.eps = eps
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of ``x``."""
        if x.dtype == self.weight.dtype == torch.float32:
            return F.rms_norm(x, (x.size(-1),), self.weight, self.eps)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)
