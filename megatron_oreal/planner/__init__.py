"""What a config needs, before a GPU is touched: memory by rank and phase, from Megatron's modules on meta tensors."""

from megatron_oreal.planner.memory import (
    distinct_ranks,
    memory,
    parameter_shapes,
    quick_memory,
    quick_rank_memory,
    rank_memory,
)
from megatron_oreal.planner.types import Phase, RankMemory, Setting

__all__ = [
    "Phase",
    "RankMemory",
    "Setting",
    "distinct_ranks",
    "memory",
    "parameter_shapes",
    "quick_memory",
    "quick_rank_memory",
    "rank_memory",
]
