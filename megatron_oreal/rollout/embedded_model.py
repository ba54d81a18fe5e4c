"""The forward pass of the embedded engine: dense decoder families over a ``KvCache``, in plain PyTorch.

Weights have SGLang's names and fused layout at tensor-parallel size 1, so that one weight plan serves both engines.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_oreal.layout import ModelSpec, embedded_layout
from megatron_oreal.rollout.kv_cache import KvCache, KvPool

_LENGTH_MULTIPLE = 8


def weight_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every weight.

    The rows of ``qkv_proj`` are all query heads, then all keys, then all values; those of ``gate_up_proj`` the gate's,
    then the up projection's. A tied model has no ``lm_head``.
    """
    return embedded_layout(spec).shards[0].shapes


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Tensor
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True, slots=True)
class _Segment:
    """The rows [start, stop) of a decode batch, which are all the rows of one pool."""

    pool: KvPool
    start: int
    stop: int
    length: int
    """Columns that attention reads."""
    write_index: Tensor
    """int64 [rows * kv heads]: where a new key or value goes in the pool, flattened over rows, heads and columns."""
    mask: Tensor
    """[rows * kv heads, query heads a kv head, length]: 0 up to each sequence's position, -inf after it."""


class EmbeddedModel:
    """Weights and the two forward passes. ``max_length`` bounds positions. Call under ``torch.inference_mode``."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device, max_length: int):
        self.spec = spec
        self.dtype = dtype
        self.device = device
        self.weights = {
            name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in weight_shapes(spec).items()
        }
        self._layers = [self._layer(i) for i in range(spec.num_layers)]
        self._head = self.weights["model.embed_tokens.weight" if spec.tied_embeddings else "lm_head.weight"]
        self._cos, self._sin = self._rope_tables(max_length)

    def prefill(self, tokens: Tensor, pool: KvPool, rows: Tensor) -> None:
        """Write keys and values of whole prefixes.

        ``tokens`` int64 [n, width], padded on the right; ``rows`` int64 [n], the prefixes' rows of ``pool``. The
        padding's columns get values too, which the mask hides until decoding overwrites them.
        """
        spec, (n, width) = self.spec, tokens.shape
        group = spec.num_heads // spec.num_kv_heads
        hidden = F.embedding(tokens.flatten(), self.weights["model.embed_tokens.weight"])
        cos, sin = self._cos[:width].repeat(n, 1, 1), self._sin[:width].repeat(n, 1, 1)
        for i, layer in enumerate(self._layers):
            q, k, v = (x.view(n, width, -1, spec.head_dim).transpose(1, 2) for x in self._qkv(layer, hidden, cos, sin))
            for which, new in enumerate((k, v)):
                pool.data[i, which].narrow(2, 0, width).index_copy_(0, rows, new)
            if i == spec.num_layers - 1:
                return
            attention = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=group > 1)
            self._finish_layer(layer, hidden, attention.transpose(1, 2).reshape(n * width, spec.q_size))

    def decode(self, cache: KvCache, tokens: Tensor, positions: Tensor, lengths: list[int]) -> Tensor:
        """Process one token of every sequence and return its logits, float32 [n, vocabulary].

        ``tokens`` and ``positions`` (of those tokens) int64 [n], in the cache's batch order; ``lengths[p]``: the
        largest position in pool p, plus one.
        """
        hidden = F.embedding(tokens, self.weights["model.embed_tokens.weight"])
        cos, sin = self._cos.index_select(0, positions), self._sin.index_select(0, positions)
        segments = self._segments(cache, positions, lengths)
        for i, layer in enumerate(self._layers):
            q, k, v = self._qkv(layer, hidden, cos, sin)
            parts = [
                self._attend(i, s, q[s.start : s.stop], k[s.start : s.stop], v[s.start : s.stop]) for s in segments
            ]
            self._finish_layer(layer, hidden, parts[0] if len(parts) == 1 else torch.cat(parts))
        return F.linear(self._norm(hidden, self.weights["model.norm.weight"]), self._head).float()

    def _qkv(self, layer: _Layer, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [t, heads, head_dim], keys and values [t, kv heads, head_dim] of t tokens, rotated."""
        spec = self.spec
        qkv = F.linear(self._norm(hidden, layer.input_norm), layer.qkv, layer.qkv_bias)
        qkv = qkv.view(-1, spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim)
        rotated = qkv[:, : spec.num_heads + spec.num_kv_heads]
        if layer.q_norm is not None and layer.k_norm is not None:
            q = self._norm(rotated[:, : spec.num_heads], layer.q_norm)
            k = self._norm(rotated[:, spec.num_heads :], layer.k_norm)
            rotated = torch.cat((q, k), dim=1)
        rotated = torch.addcmul(rotated * cos, rotated.roll(spec.head_dim // 2, dims=-1), sin)
        return rotated[:, : spec.num_heads], rotated[:, spec.num_heads :], qkv[:, -spec.num_kv_heads :]

    def _attend(self, i: int, segment: _Segment, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the new keys and values, and attend over all of each sequence's: [rows, q_size].

        Batched products rather than SDPA, which on a CPU costs several times as much for a single query.
        """
        head_dim = self.spec.head_dim
        count = segment.mask.shape[0]
        keys, values = (segment.pool.data[i, which].view(-1, head_dim) for which in (0, 1))
        keys.index_copy_(0, segment.write_index, k.reshape(-1, head_dim))
        values.index_copy_(0, segment.write_index, v.reshape(-1, head_dim))
        shape = (-1, segment.pool.capacity, head_dim)
        keys, values = (x.view(shape)[:count, : segment.length] for x in (keys, values))
        query = q.reshape(count, -1, head_dim)
        scores = torch.baddbmm(segment.mask, query, keys.transpose(1, 2), alpha=head_dim**-0.5)
        probs = torch.softmax(scores, dim=-1, dtype=torch.float32).to(self.dtype)
        return torch.bmm(probs, values).view(segment.stop - segment.start, -1)

    def _finish_layer(self, layer: _Layer, hidden: Tensor, attention: Tensor) -> None:
        """Add the attention's and the MLP's output to ``hidden`` [t, hidden_size] in place."""
        hidden.addmm_(attention, layer.out.t())
        gate_up = F.linear(self._norm(hidden, layer.post_norm), layer.gate_up)
        ffn = self.spec.ffn_hidden_size
        hidden.addmm_(F.silu(gate_up[:, :ffn]) * gate_up[:, ffn:], layer.down.t())

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm with the mean square in float32, rounded before the weight, as in Hugging Face's modules."""
        if x.dtype == torch.float32:
            return F.rms_norm(x, weight.shape, weight, self.spec.norm_eps)
        return F.rms_norm(x.float(), weight.shape, None, self.spec.norm_eps).to(x.dtype) * weight

    def _segments(self, cache: KvCache, positions: Tensor, lengths: list[int]) -> list[_Segment]:
        segments, start = [], 0
        for pool, longest in zip(cache.pools, lengths, strict=True):
            count = len(pool.slots)
            if count == 0:
                continue
            length = min(pool.capacity, -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE)
            here = positions[start : start + count]
            heads, group = self.spec.num_kv_heads, self.spec.num_heads // self.spec.num_kv_heads
            index = torch.arange(0, count * heads * pool.capacity, pool.capacity, device=self.device)
            index += here.repeat_interleave(heads)
            hidden = torch.arange(length, device=self.device) > here[:, None]
            mask = torch.zeros((count, length), dtype=self.dtype, device=self.device).masked_fill_(hidden, -torch.inf)
            mask = mask[:, None].expand(count, heads * group, length).reshape(count * heads, group, length)
            segments.append(_Segment(pool, start, start + count, length, index, mask))
            start += count
        return segments

    def _rope_tables(self, max_length: int) -> tuple[Tensor, Tensor]:
        """Cosine and signed sine of every position, [max_length, 1, head_dim].

        Rotating pairs (i, i + head_dim/2) is x * cos + roll(x, head_dim/2) * sin with the first half's sine negated.
        Angles are float32 products, as in Hugging Face and Megatron, and the tables have the dtype of the activations.
        """
        frequencies = torch.tensor(self.spec.rope.inverse_frequencies(self.spec.head_dim), dtype=torch.float32)
        angles = torch.arange(max_length, dtype=torch.float32)[:, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        tables = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return tables[0][:, None].to(self.device, self.dtype), tables[1][:, None].to(self.device, self.dtype)

    def _layer(self, i: int) -> _Layer:
        weights, prefix = self.weights, f"model.layers.{i}."
        return _Layer(
            input_norm=weights[prefix + "input_layernorm.weight"],
            qkv=weights[prefix + "self_attn.qkv_proj.weight"],
            qkv_bias=weights.get(prefix + "self_attn.qkv_proj.bias"),
            q_norm=weights.get(prefix + "self_attn.q_norm.weight"),
            k_norm=weights.get(prefix + "self_attn.k_norm.weight"),
            out=weights[prefix + "self_attn.o_proj.weight"],
            post_norm=weights[prefix + "post_attention_layernorm.weight"],
            gate_up=weights[prefix + "mlp.gate_up_proj.weight"],
            down=weights[prefix + "mlp.down_proj.weight"],
        )
