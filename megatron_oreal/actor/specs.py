"""Which modules a Megatron-core transformer layer is built of: TransformerEngine's, or torch-native ones."""

from __future__ import annotations

import importlib.util
from typing import Literal

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_oreal.actor.local_modules import PackedAttention, RMSNorm
from megatron_oreal.errors import UserError

Implementation = Literal["transformer_engine", "local"]


def choose_implementation(requested: str, dtype: str, is_cuda: bool) -> Implementation:
    """Resolve ``parallel.transformer_impl``; ``UserError`` when TransformerEngine is asked for and cannot be had.

    Its fused attention over packed sequences takes bf16 alone, so fp32 is torch-native.
    """
    obstacle = None
    if not is_cuda:
        obstacle = "this run has no CUDA device"
    elif importlib.util.find_spec("transformer_engine") is None:
        obstacle = "the package is not installed"
    elif dtype == "fp32":
        obstacle = "model.dtype=fp32, and its attention over packed sequences takes bf16 only"
    if requested == "transformer_engine" and obstacle:
        raise UserError(f"parallel.transformer_impl=transformer_engine: {obstacle}; set it to auto or local")
    return "local" if requested == "local" or obstacle else "transformer_engine"


def _local_layer_spec(qk_norm: bool) -> ModuleSpec:
    norm = RMSNorm if qk_norm else IdentityOp
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=PackedAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=norm,
                    k_layernorm=norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ),
            mlp_bda=get_bias_dropout_add,
            # Checkpoints carry TransformerEngine's names, so both implementations read each other's.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def layer_spec(
    config: TransformerConfig, implementation: Implementation, *, qk_norm: bool, num_layers: int
) -> ModuleSpec | TransformerBlockSubmodules:
    """The spec of ``num_layers`` layers and the final norm for ``GPTModel``."""
    if implementation == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_norm)
    return TransformerBlockSubmodules(layer_specs=[_local_layer_spec(qk_norm)] * num_layers, layer_norm=RMSNorm)
