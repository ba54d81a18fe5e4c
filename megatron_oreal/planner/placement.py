"""Who stands where: trainer ranks, pipeline stages and engines on nodes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from megatron_oreal.config import ParallelConfig
from megatron_oreal.errors import UserError
from megatron_oreal.layout import ModelSpec, RankGrid, hf_tensors, padded_vocab_size, pipeline_layer_split
from megatron_oreal.planner.types import Setting
from megatron_oreal.rollout.sglang.build import engine_ranks

ITEMSIZE = {"bf16": 2, "fp32": 4}
"""Bytes of a parameter and of an activation, by ``model.dtype``."""


@dataclass(frozen=True)
class Placement:
    """Ranks ``n * ranks_per_node`` to ``(n + 1) * ranks_per_node - 1`` are node n. ``engines[i]``: global ranks."""

    grid: RankGrid
    ranks_per_node: int
    engines: tuple[tuple[int, ...], ...]
    is_served: bool

    @property
    def num_nodes(self) -> int:
        """Nodes, the last one perhaps not full."""
        return -(-self.grid.world_size // self.ranks_per_node)

    def node(self, rank: int) -> int:
        """Node of a global rank."""
        return rank // self.ranks_per_node

    def local_rank(self, rank: int) -> int:
        """Place of a global rank on its node."""
        return rank % self.ranks_per_node

    @cached_property
    def tp_groups(self) -> list[tuple[int, ...]]:
        """Tensor-parallel groups: ``tp`` neighbours each."""
        tp = self.grid.tp
        return [tuple(range(first, first + tp)) for first in range(0, self.grid.world_size, tp)]

    @cached_property
    def tp_crosses_nodes(self) -> bool:
        """Whether some tensor-parallel group does not stay on one node."""
        return any(self.node(group[0]) != self.node(group[-1]) for group in self.tp_groups)

    @cached_property
    def dp_members_a_node(self) -> int:
        """Ranks of one data-parallel group on one node, the fewest of any."""
        tp, dp = self.grid.tp, self.grid.dp
        return max(1, min(dp, math.gcd(self.ranks_per_node, tp * dp) // tp))

    @property
    def dp_crosses_nodes(self) -> bool:
        """Whether a data-parallel group has members on several nodes."""
        return self.grid.dp > self.dp_members_a_node

    def stages_cross_nodes(self, source: int, target: int) -> bool:
        """Whether some message between two pipeline stages leaves a node."""
        return bool(self._crossing_edges(source, target))

    def _crossing_edges(self, source: int, target: int) -> list[tuple[int, int]]:
        """Rank pairs of two stages, of one data-parallel replica each, that are on different nodes."""
        grid = self.grid
        edges = [
            (
                grid.global_rank(tp_rank=tp_rank, pp_rank=source, dp_rank=dp_rank),
                grid.global_rank(tp_rank=tp_rank, pp_rank=target, dp_rank=dp_rank),
            )
            for dp_rank in range(grid.dp)
            for tp_rank in range(grid.tp)
        ]
        return [(a, b) for a, b in edges if self.node(a) != self.node(b)]

    @cached_property
    def pipeline_edges(self) -> tuple[int, int]:
        """Edges between neighbouring stages (rank pairs): all, and those that cross nodes."""
        grid = self.grid
        crossing = sum(len(self._crossing_edges(stage, stage + 1)) for stage in range(grid.pp - 1))
        return (grid.pp - 1) * grid.tp * grid.dp, crossing

    def parameters_of_busiest_rank(self, spec: ModelSpec, parallel: ParallelConfig, *, head: bool) -> int:
        """Parameters of the rank that holds most; ``head`` False: a reward model, without a vocabulary head."""
        return max(self.stage_parameters(spec, parallel, head=head)) // self.grid.tp

    def stage_parameters(self, spec: ModelSpec, parallel: ParallelConfig, *, head: bool) -> list[int]:
        """Parameters of every pipeline stage over all its tensor-parallel ranks, norms counted once."""
        grid = self.grid
        split = pipeline_layer_split(
            spec,
            pp=grid.pp,
            vpp=parallel.virtual_pipeline_model_parallel_size,
            first=parallel.num_layers_in_first_pipeline_stage,
            last=parallel.num_layers_in_last_pipeline_stage,
        )
        one_layer = hf_tensors(replace(spec, num_layers=1))
        layer = sum(math.prod(shape) for name, shape in one_layer.items() if ".layers." in name)
        table = spec.hidden_size * padded_vocab_size(
            spec.vocab_size, tp=grid.tp, vocab_divisor=parallel.make_vocab_size_divisible_by
        )
        counts = [layer * sum(chunks) for chunks in split]
        counts[0] += table
        if head and (grid.pp > 1 or not spec.tied_embeddings):
            counts[-1] += table
        counts[-1] += spec.hidden_size
        return counts

    def describe_rank(self, rank: int) -> dict[str, Any]:
        """Where one rank stands and with whom."""
        tp_rank, pp_rank, dp_rank = self.grid.coordinates(rank)
        grid = self.grid
        number = rank // len(self.engines[0])
        return {
            "rank": rank,
            "node": self.node(rank),
            "local_rank": self.local_rank(rank),
            "tp_rank": tp_rank,
            "pp_rank": pp_rank,
            "dp_rank": dp_rank,
            "tp_group": list(self.tp_groups[rank // grid.tp]),
            "dp_group": [grid.global_rank(tp_rank=tp_rank, pp_rank=pp_rank, dp_rank=d) for d in range(grid.dp)],
            "pp_group": [grid.global_rank(tp_rank=tp_rank, pp_rank=p, dp_rank=dp_rank) for p in range(grid.pp)],
            "engine": number,
            "engine_ranks": list(self.engines[number]),
        }

    def warnings(self) -> list[str]:
        """What works and costs."""
        found = []
        if self.tp_crosses_nodes:
            found.append(
                f"tensor-parallel groups of {self.grid.tp} ranks cross nodes of {self.ranks_per_node}: every layer's "
                "collectives travel over the network; prefer a tensor_model_parallel_size that divides the node"
            )
        return found


def place(setting: Setting) -> Placement:
    """Place a setting's ranks and engines.

    Raises ``UserError`` when the world does not divide, when nodes are not full, or when an engine would span nodes.
    """
    parallel, rollout = setting.config.parallel, setting.config.rollout
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    world, per_node = setting.world_size, setting.ranks_per_node
    if world % (tp * pp):
        raise UserError(
            f"parallel: tensor_model_parallel_size={tp} x pipeline_model_parallel_size={pp} does not divide "
            f"--world-size {world}: plan a multiple of {tp * pp} ranks"
        )
    if world > per_node and world % per_node:
        raise UserError(
            f"--world-size {world} is not a multiple of --ranks-per-node {per_node}: plan whole nodes, or "
            "give the number of GPUs of a node"
        )
    served = rollout.engine == "sglang"
    engines = engine_ranks(world, min(per_node, world), rollout.engine_tp if served else 1)
    grid = RankGrid(tp=tp, pp=pp, dp=world // (tp * pp))
    return Placement(grid, per_node, tuple(map(tuple, engines)), served)
