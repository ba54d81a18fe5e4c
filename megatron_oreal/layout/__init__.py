"""Where every element of every weight lives, and how it gets from one place to another."""

from megatron_oreal.layout.blocks import Block, Layout, Rect, ShardLayout
from megatron_oreal.layout.digest import Digester, DigestError, DigestReport
from megatron_oreal.layout.directory import NewDirectory
from megatron_oreal.layout.engines import embedded_layout, sglang_layout, sglang_padded_vocab_size
from megatron_oreal.layout.execute import Resharder, Traffic, execute_plan
from megatron_oreal.layout.export import export_hf
from megatron_oreal.layout.families import hf_tensors
from megatron_oreal.layout.hf import SafetensorsSource, hf_layout
from megatron_oreal.layout.load import load_from_hf, open_source
from megatron_oreal.layout.megatron import (
    RankGrid,
    even_layer_split,
    megatron_layout,
    padded_vocab_size,
    param_key,
    pipeline_layer_split,
)
from megatron_oreal.layout.megatron_checkpoint import MegatronSource, is_megatron_checkpoint
from megatron_oreal.layout.model_spec import ModelSpec, RopeSpec, load_model_spec
from megatron_oreal.layout.plan import Copy, Plan, make_plan
from megatron_oreal.layout.statistics import PlanStatistics

__all__ = [
    "Block",
    "Copy",
    "DigestError",
    "DigestReport",
    "Digester",
    "Layout",
    "MegatronSource",
    "ModelSpec",
    "NewDirectory",
    "Plan",
    "PlanStatistics",
    "RankGrid",
    "Rect",
    "Resharder",
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
    "is_megatron_checkpoint",
    "load_from_hf",
    "load_model_spec",
    "make_plan",
    "megatron_layout",
    "open_source",
    "padded_vocab_size",
    "param_key",
    "pipeline_layer_split",
    "sglang_layout",
    "sglang_padded_vocab_size",
]
