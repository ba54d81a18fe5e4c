"""What the cost model takes for granted: named numbers with their units, meanings and sources."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from megatron_oreal.errors import UserError, nearest
from megatron_oreal.planner.types import DEFAULT_RESERVE_BYTES, GIB


def _assume(value: float, unit: str, meaning: str, source: str = "assumed") -> Any:
    return field(default=value, metadata={"unit": unit, "meaning": meaning, "source": source})


@dataclass(frozen=True)
class Assumptions:
    """The cost model's numbers; ``sources`` overrides where a value comes from (a measurement, the command line).

    Efficiencies are achieved over peak, in (0, 1].
    """

    # Work of a step
    kept_groups: float = _assume(
        1.0, "share", "prompts whose responses are neither all correct nor all wrong; 1 is the most work an update has"
    )
    prompt_tokens: float = _assume(
        700.0, "tokens", "a prompt with its system message", "assumed; about 550 of it OREAL's system message"
    )

    # Rollout
    decode_hbm_efficiency: float = _assume(0.75, "of peak", "weights and KV cache read in a decode step")
    decode_step_overhead_s: float = _assume(1.0e-3, "s", "a decode step's launches and scheduling, with CUDA graphs")
    sampler_s_per_request: float = _assume(
        3.0e-5, "s", "top-p over the whole vocabulary, a running request and decode step"
    )
    engine_allreduce_s: float = _assume(1.2e-5, "s", "latency of one small all-reduce inside a node, 2 a layer")
    prefill_efficiency: float = _assume(0.5, "of peak", "matrix products of a prefill")

    # Verifier and control
    verifier_tail_s: float = _assume(1.0, "s", "from the last response to its verdict; earlier ones are overlapped")
    control_s: float = _assume(0.5, "s", "selection, packing, exchange of trajectories and metrics")

    # Update
    matmul_efficiency: float = _assume(
        0.45, "of peak", "forward and backward passes, without communication, bubbles and padding"
    )
    microbatch_overhead_s: float = _assume(3.0e-3, "s", "host work and launches that no kernel hides, a chunk and pass")
    hbm_efficiency: float = _assume(0.8, "of peak", "optimizer, gradients, copies, digests")
    nvlink_efficiency: float = _assume(0.7, "of peak", "collectives and copies inside a node")
    network_efficiency: float = _assume(0.75, "of peak", "collectives and copies between nodes")
    collective_latency_s: float = _assume(2.0e-5, "s", "a collective or message of the trainer")
    tp_overlap: float = _assume(0.6, "share", "of tensor-parallel communication that parallel.tp_comm_overlap hides")
    host_adam_bytes_per_s: float = _assume(
        2.0e10, "bytes/s", "Adam's state on the CPU (parallel.optimizer_cpu_offload), a rank"
    )
    logits_passes: float = _assume(5.0, "passes", "times that the loss reads or writes a chunk of logits, bf16")

    # Switch between training and generation
    pcie_efficiency: float = _assume(0.7, "of peak", "offloaded parts, pinned host memory, all GPUs of a node at once")
    sleep_s: float = _assume(
        2.0,
        "s",
        "pause, flush, release of the engines' memory, and its check",
        "assumed; vllm-project/vime#442 saw 11.2 s",
    )
    wake_weights_s: float = _assume(0.5, "s", "engines take the memory of their weights")
    wake_cache_s: float = _assume(
        1.5,
        "s",
        "engines take the memory of KV caches and CUDA graphs",
        "assumed; vllm-project/vime#442 saw 3.8 s for both",
    )
    publish_fixed_s: float = _assume(0.5, "s", "handshakes of a publish: staging, loader call, acknowledgement")

    # Memory
    reserve: float = _assume(
        DEFAULT_RESERVE_BYTES / GIB,
        "GiB",
        "what no tensor shows: two CUDA contexts, NCCL's buffers, workspaces, what the allocator cannot use",
        "assumed: contexts, NCCL, workspaces, allocator",
    )

    sources: Mapping[str, str] = field(default_factory=dict)

    def override(self, name: str, value: float, source: str) -> Assumptions:
        """The same with one other value. ``UserError`` for an unknown name, or a value that cannot be."""
        known = [each.name for each in fields(self) if each.name != "sources"]
        if name not in known:
            raise UserError(f"{source}: there is no assumption {name!r}{nearest(name, known)}")
        unit = self.unit(name)
        most = 1.0 if unit in ("of peak", "share") else math.inf
        may_be_zero, least = unit in ("s", "passes", "GiB"), 1e-3 if most == 1 else 0.0
        if not (math.isfinite(value) and (value > 0 or may_be_zero) and least <= value <= most):
            limits = (
                "between 0.001 and 1" if most == 1 else f"finite and {'not negative' if may_be_zero else 'above 0'}"
            )
            raise UserError(f"{source}: {name}={value:g} must be {limits}")
        return replace(self, **{name: value}, sources={**self.sources, name: source})

    def unit(self, name: str) -> str:
        """The unit of one of them."""
        return next(each.metadata["unit"] for each in fields(self) if each.name == name)

    def rows(self) -> list[dict[str, Any]]:
        """Name, value, unit, source and meaning of each, in order of definition."""
        return [
            {
                "name": each.name,
                "value": getattr(self, each.name),
                "unit": each.metadata["unit"],
                "source": self.sources.get(each.name, each.metadata["source"]),
                "meaning": each.metadata["meaning"],
            }
            for each in fields(self)
            if each.name != "sources"
        ]


def parse_assumptions(base: Assumptions, texts: Sequence[str]) -> Assumptions:
    """Apply ``--assume NAME=VALUE`` in order; ``UserError`` for what is not of that form."""
    for text in texts:
        name, separator, value = text.partition("=")
        try:
            number = float(value)
        except ValueError:
            separator = ""
        if not separator:
            raise UserError(f"--assume {text!r} is not of the form NAME=NUMBER, for example matmul_efficiency=0.5")
        base = base.override(name.strip(), number, "--assume")
    return base
