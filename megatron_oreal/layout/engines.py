"""The layouts of rollout engines: SGLang's fused parameter names and splits, and the embedded engine's.

Names and splits are those of ``Qwen2ForCausalLM``, ``Qwen3ForCausalLM`` and ``LlamaForCausalLM`` in SGLang 0.5.17:

* ``qkv_proj`` (``QKVParallelLinear``) stacks a rank's query heads, key heads and value heads. Query heads are split
  evenly. Key and value heads are split evenly too while there are as many as ranks; with more ranks than KV heads
  each rank has one whole head, and ``tp / num_kv_heads`` neighbouring ranks hold the same one.
* ``gate_up_proj`` (``MergedColumnParallelLinear``) stacks a rank's rows of gate and of up; ``o_proj`` and
  ``down_proj`` (``RowParallelLinear``) are cut by columns; norms are replicated.
* ``embed_tokens`` and ``lm_head`` (``VocabParallelEmbedding``) are cut by rows, after zero rows were added up to a
  multiple of 64; at TP 1 as well. A tied ``lm_head`` is the embedding, not a parameter of its own.

Pipeline parallelism, data-parallel attention and quantisation of the engine are not described.
"""

from __future__ import annotations

from typing import Literal

from megatron_oreal.errors import UserError
from megatron_oreal.layout.blocks import Layout, ShardBuilder, ShardLayout, Split, add_split, even_rows, vocab_rows
from megatron_oreal.layout.families import (
    EMBEDDING,
    FINAL_NORM,
    LM_HEAD,
    Role,
    embedding,
    final_norm,
    head,
    layer_weights,
)
from megatron_oreal.layout.model_spec import ModelSpec

SGLANG_VOCAB_PADDING = 64
"""``DEFAULT_VOCAB_PADDING_SIZE`` of SGLang."""

_Split = Split | Literal["heads"]
_LAYER: dict[Role, tuple[str, _Split]] = {
    "attention_norm": ("input_layernorm.weight", "replicated"),
    "qkv_weight": ("self_attn.qkv_proj.weight", "heads"),
    "qkv_bias": ("self_attn.qkv_proj.bias", "heads"),
    "q_norm": ("self_attn.q_norm.weight", "replicated"),
    "k_norm": ("self_attn.k_norm.weight", "replicated"),
    "attention_out": ("self_attn.o_proj.weight", "columns"),
    "mlp_norm": ("post_attention_layernorm.weight", "replicated"),
    "gate_up": ("mlp.gate_up_proj.weight", "each_part"),
    "down": ("mlp.down_proj.weight", "columns"),
}


def embedded_layout(spec: ModelSpec) -> Layout:
    """Return the layout of the embedded engine: SGLang's at TP 1 without its vocabulary padding."""
    return Layout("engine tp=1", (_shard(spec, 0, 1, spec.vocab_size),))


def sglang_layout(spec: ModelSpec, *, tp: int, device: Literal["cuda", "cpu"] = "cuda") -> Layout:
    """Return the layout of an SGLang engine of ``tp`` ranks; ``shards[tp_rank]``.

    ``device="cpu"``: SGLang's CPU engine pads the vocabulary to a multiple of ``64 * tp`` where 64 does not do; on a
    GPU it refuses such a ``tp``. Its CPU engine would also pad heads and ``intermediate_size`` that do not divide;
    those are refused here. Raises ``UserError`` for sizes that SGLang refuses.
    """
    _check_sizes(spec, tp)
    padded = sglang_padded_vocab_size(spec.vocab_size, tp=tp, device=device)
    return Layout(f"SGLang tp={tp}", tuple(_shard(spec, rank, tp, padded) for rank in range(tp)))


def sglang_padded_vocab_size(vocab_size: int, *, tp: int, device: Literal["cuda", "cpu"] = "cuda") -> int:
    """Rows of SGLang's embedding over all TP ranks. Raises ``UserError`` when they do not divide into ``tp``."""
    padded = -(-vocab_size // SGLANG_VOCAB_PADDING) * SGLANG_VOCAB_PADDING
    if padded % tp == 0:
        return padded
    if device == "cpu":
        return -(-vocab_size // (SGLANG_VOCAB_PADDING * tp)) * SGLANG_VOCAB_PADDING * tp
    raise UserError(
        f"SGLang's tp_size={tp} does not divide its {padded} vocabulary rows (vocab_size={vocab_size} padded to a "
        f"multiple of {SGLANG_VOCAB_PADDING}): choose a divisor"
    )


def _shard(spec: ModelSpec, tp_rank: int, tp: int, padded_vocab: int) -> ShardLayout:
    builder = ShardBuilder()
    builder.add(EMBEDDING, vocab_rows(embedding(spec), padded_vocab, tp_rank, tp))
    kv_ranks = min(tp, spec.num_kv_heads)
    kv_rank = tp_rank * kv_ranks // tp
    for layer in range(spec.num_layers):
        for role, parts in layer_weights(spec, layer):
            name, kind = _LAYER[role]
            param = f"model.layers.{layer}.{name}"
            if kind != "heads":
                add_split(builder, param, parts, kind, tp_rank, tp)
            else:
                query, *key_value = parts
                rows = [rows for part in key_value for rows in even_rows([part], kv_rank, kv_ranks)]
                builder.add(param, even_rows([query], tp_rank, tp) + rows)
    builder.add(FINAL_NORM, [final_norm(spec)])
    if not spec.tied_embeddings:
        builder.add(LM_HEAD, vocab_rows(head(spec, reward_model=False), padded_vocab, tp_rank, tp))
    return builder.build()


def _check_sizes(spec: ModelSpec, tp: int) -> None:
    key = f"SGLang's tp_size={tp}"
    if tp < 1:
        raise UserError(f"{key} is not a positive number")
    if spec.num_heads % tp:
        raise UserError(f"{key} does not divide num_attention_heads={spec.num_heads}: choose one of its divisors")
    if spec.num_kv_heads % tp and tp % spec.num_kv_heads:
        raise UserError(f"{key} is neither a divisor nor a multiple of num_key_value_heads={spec.num_kv_heads}")
    if spec.ffn_hidden_size % tp:
        raise UserError(f"{key} does not divide intermediate_size={spec.ffn_hidden_size}: choose one of its divisors")
