"""The planner's data: a setting that may be run, and the bytes that each of its ranks needs in every phase of a step.

Functions over them, all in ``planner/memory.py``::

    distinct_ranks(setting: Setting) -> list[int]            one rank of every pipeline stage: no other shapes exist
    rank_memory(setting: Setting, rank: int) -> RankMemory   Megatron's modules and schedule on meta tensors
    memory(setting: Setting) -> list[RankMemory]             of all distinct ranks, in rank order
    quick_memory(setting: Setting) -> RankMemory             of the rank that needs most: closed forms, milliseconds
    quick_rank_memory(setting: Setting, rank: int) -> RankMemory
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from megatron_oreal.config import Config
from megatron_oreal.layout import ModelSpec

GIB = 2**30
DEFAULT_RESERVE_BYTES = 3 * GIB
"""Assumed for what no tensor shows: CUDA contexts of trainer and engine (about 0.5 GiB each), NCCL's buffers, cuBLAS
workspaces, and what the caching allocator cannot use."""

PHASES = ("start", "generate", "reference", "reward_model", "policy", "publish", "checkpoint")
"""Phases of a run in their order; sub-phases are named ``publish/transfer``."""


@dataclass(frozen=True)
class Setting:
    """A config on a world, and what is assumed about the device.

    ``device``: "cuda" plans for a GPU, wherever the plan is made; "cpu" for gloo ranks (tests, the quick start).
    ``device_memory_bytes``: of one device; 0: unknown (nothing is compared, and SGLang's KV cache cannot be sized).
    ``reserve_bytes``: an assumption, listed as the item ``reserve`` of every phase on a GPU.
    ``lengths``: tokens (prompt and response) of the kept sequences of one step. None: the worst case, every
    micro-batch full at ``parallel.max_tokens_per_microbatch`` and the loss reading every position, with as many
    micro-batches as the pipeline can hold at a time.
    ``prompt_tokens``: of each of ``lengths`` that the loss does not read.
    """

    config: Config
    spec: ModelSpec
    world_size: int
    ranks_per_node: int
    implementation: Literal["transformer_engine", "local"] = "transformer_engine"
    device: Literal["cuda", "cpu"] = "cuda"
    device_memory_bytes: int = 0
    reserve_bytes: int = DEFAULT_RESERVE_BYTES
    lengths: tuple[int, ...] | None = None
    prompt_tokens: int = 0

    @property
    def dp(self) -> int:
        """Data-parallel size."""
        parallel = self.config.parallel
        return self.world_size // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)


@dataclass(frozen=True)
class Phase:
    """Bytes on the device at the phase's peak, by item.

    Items: ``policy parameters``, ``policy gradients``, ``policy optimizer``, ``reference parameters``,
    ``reward model parameters``, ``reward model gradients``, ``reward model optimizer``, ``model building`` (a copy of
    the parameters while DDP makes its buffers), ``activations``, ``logits and loss``, ``optimizer step``,
    ``engine weights``, ``KV cache``, ``engine workspace``, ``staging``, ``reshard buckets``, ``digest``, ``reserve``.
    Items of 0 bytes are left out.
    """

    name: str
    live: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.live.values())


@dataclass(frozen=True)
class RankMemory:
    """One rank. ``static``: bytes of what exists all the time or waits in host memory, by the names of ``Phase``.

    ``modelled``: items whose bytes come from a formula instead of from tensors that were made.
    ``host``: bytes of host memory that offloaded parts and staging take, by item.
    """

    rank: int
    pp_rank: int
    dp_rank: int
    tp_rank: int
    static: Mapping[str, int]
    phases: tuple[Phase, ...]
    modelled: tuple[str, ...] = ()
    host: Mapping[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.total)

    def phase(self, name: str) -> Phase:
        """The phase of this name; ``KeyError`` when the run has none (no reward model, for example)."""
        for phase in self.phases:
            if phase.name == name:
                return phase
        raise KeyError(name)
