"""The layout of rollout engines: SGLang's fused parameter names.

``qkv_proj`` stacks all query heads, all key heads, all value heads; ``gate_up_proj`` stacks gate and up. A tied
``lm_head`` is not a parameter of its own.
"""

from __future__ import annotations

from megatron_oreal.layout.blocks import Layout, ShardBuilder
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

_LAYER: dict[Role, str] = {
    "attention_norm": "input_layernorm.weight",
    "qkv_weight": "self_attn.qkv_proj.weight",
    "qkv_bias": "self_attn.qkv_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "attention_out": "self_attn.o_proj.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate_up": "mlp.gate_up_proj.weight",
    "down": "mlp.down_proj.weight",
}


def embedded_layout(spec: ModelSpec) -> Layout:
    """Return the layout of the embedded engine and of SGLang at TP 1: the whole policy on one rank, without padding."""
    builder = ShardBuilder()
    builder.add(EMBEDDING, [embedding(spec)])
    for layer in range(spec.num_layers):
        for role, parts in layer_weights(spec, layer):
            builder.add(f"model.layers.{layer}.{_LAYER[role]}", parts)
    builder.add(FINAL_NORM, [final_norm(spec)])
    if not spec.tied_embeddings:
        builder.add(LM_HEAD, [head(spec, reward_model=False)])
    return Layout("engine tp=1", (builder.build(),))
