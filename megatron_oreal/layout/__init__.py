"""Where every element of every weight lives, and how it gets from one place to another."""

from megatron_oreal.layout.blocks import Block, Layout, Rect, ShardLayout
from megatron_oreal.layout.engines import embedded_layout
from megatron_oreal.layout.execute import Traffic, execute_plan, load_from_hf
from megatron_oreal.layout.export import export_hf
from megatron_oreal.layout.families import hf_tensors
from megatron_oreal.layout.hf import SafetensorsSource, hf_layout
from megatron_oreal.layout.megatron import RankGrid, even_layer_split, megatron_layout, padded_vocab_size, param_key
from megatron_oreal.layout.model_spec import ModelSpec, RopeSpec, load_model_spec
from megatron_oreal.layout.plan import Copy, Plan, PlanStatistics, make_plan

__all__ = [
    "Block",
    "Copy",
    "Layout",
    "ModelSpec",
    "Plan",
    "PlanStatistics",
    "RankGrid",
    "Rect",
    "RopeSpec",
    "SafetensorsSource",
    "ShardLayout",
    "Traffic",
    "embedded_layout",
    "even_layer_split",
    "execute_plan",
    "export_hf",
    "hf_layout",
    "hf_tensors",
    "load_from_hf",
    "load_model_spec",
    "make_plan",
    "megatron_layout",
    "padded_vocab_size",
    "param_key",
]
