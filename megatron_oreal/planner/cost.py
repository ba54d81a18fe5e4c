"""What a step costs: rollout, verifier, switch and update put together (``docs/planner.md`` has the formulas)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_oreal.data.lengths import LengthDistribution
from megatron_oreal.planner.assumptions import Assumptions
from megatron_oreal.planner.devices import Device
from megatron_oreal.planner.engine import cache_itemsize, kv_bytes_per_token
from megatron_oreal.planner.placement import ITEMSIZE, Placement
from megatron_oreal.planner.rollout_model import EngineSpeed, RolloutEstimate, simulate_rollout
from megatron_oreal.planner.traffic import ReshardTraffic
from megatron_oreal.planner.types import RankMemory, Setting
from megatron_oreal.planner.update_model import PassTime, UpdateModel

PUBLISHED_STEP_S = 360.0
"""The released code's own step: 7B, 90 steps in about 9 hours on 32 A100 (README of InternLM/OREAL)."""


@dataclass(frozen=True)
class UpdateCost:
    """The update. ``balance``: the most loaded data-parallel rank's work over the mean; ``padding``: share of the
    micro-batches' tokens that no sequence has, those of idle ranks included; ``mfu``: model operations, recompute left
    out, over what all GPUs could do in the update's time.
    """

    passes: Mapping[str, PassTime]
    kept_sequences: int
    kept_tokens: int
    num_microbatches: int
    balance: float
    padding: float
    mfu: float


@dataclass(frozen=True)
class StepCost:
    """Seconds by phase, in the order and by the names of ``telemetry.names`` where it has one.

    ``tokens``: prompt and response tokens of the groups that count; ``tokens_per_s_per_gpu``: these over step time and
    GPUs, the definition of NeMo-RL's performance summary.
    """

    phases: Mapping[str, float]
    rollout: RolloutEstimate
    update: UpdateCost
    tokens: int
    world_size: int

    @property
    def seconds(self) -> float:
        """The step."""
        return sum(self.phases.values())

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Tokens that counted, a second and GPU."""
        return self.tokens / self.seconds / self.world_size


@dataclass(frozen=True)
class Workload:
    """One step's drawn lengths int [groups, K] and which of them are kept, the same for every setting compared."""

    lengths: np.ndarray
    kept: tuple[tuple[int, int], ...]

    @classmethod
    def draw(cls, setting: Setting, distribution: LengthDistribution, assumed: Assumptions) -> Workload:
        """Draw from the config's seed. Kept: the share ``kept_groups`` of the groups that are drawn to the end.

        ``filter: pair`` keeps any two responses of a group, as if length and verdict were independent; ``groups`` all
        K; ``none`` keeps everything.
        """
        rollout, algorithm = setting.config.rollout, setting.config.algorithm
        groups, k = rollout.prompts_per_step + rollout.oversample_prompts, rollout.prompt_repeat_k
        lengths = distribution.draw(groups * k, setting.config.seed).reshape(groups, k)
        if algorithm.filter == "none":
            chosen = [(g, s) for g in range(rollout.prompts_per_step) for s in range(k)]
            return cls(lengths, tuple(chosen))
        generator = np.random.default_rng((setting.config.seed, 1))
        count = max(1, round(assumed.kept_groups * rollout.prompts_per_step))
        kept = []
        for group in range(count):
            samples = range(k) if algorithm.filter == "groups" else generator.choice(k, 2, replace=False).tolist()
            kept += [(group, int(sample)) for sample in samples]
        return cls(lengths, tuple(kept))

    @property
    def responses(self) -> list[int]:
        """Response tokens of every kept sequence."""
        return [int(self.lengths[group, sample]) for group, sample in self.kept]


@dataclass(frozen=True)
class CostModel:
    """The cost of any setting of one workload on one device; rollouts are remembered by what they depend on."""

    device: Device
    assumed: Assumptions
    workload: Workload
    _rollouts: dict[tuple[Any, ...], RolloutEstimate] = field(default_factory=dict)
    _updates: dict[tuple[Any, ...], UpdateCost] = field(default_factory=dict)

    def step(
        self, setting: Setting, placement: Placement, memory: RankMemory | None, traffic: ReshardTraffic
    ) -> StepCost:
        """Predict a step after the policy's freeze. ``memory``: the tightest rank's, for its KV cache and the bytes of
        its offloaded parts; None: a cache that is never full, and nothing offloaded.
        """
        rollout, update = self.rollout(setting, placement, memory), self.update(setting, placement)
        switch = self.switch(setting, placement, memory, traffic)
        assumed = self.assumed
        phases = {"generate": rollout.seconds, "verdicts": assumed.verifier_tail_s, "select": assumed.control_s}
        if "sleep" in switch:
            phases["sleep"] = switch.pop("sleep")
        phases |= {f"update/{name}": each.seconds for name, each in update.passes.items()}
        return StepCost(phases | switch, rollout, update, rollout.counted_tokens, setting.world_size)

    def update(self, setting: Setting, placement: Placement) -> UpdateCost:
        """The three models over the kept sequences."""
        depends = setting.config.model_dump_json(include=_UPDATE_KEYS, exclude={"parallel": {"offload"}})
        key = (placement.grid, placement.ranks_per_node, depends)
        if key not in self._updates:
            sequences, responses = self._kept(setting)
            model = UpdateModel(setting, self.device, self.assumed, placement, sequences, responses)
            self._updates[key] = self._update(setting, model)
        return self._updates[key]

    def _update(self, setting: Setting, model: UpdateModel) -> UpdateCost:
        passes = {"reference": model.reference()}
        if setting.config.model.reward_model:
            passes["reward_model"] = model.reward_model()
        passes["policy"] = model.policy()
        seconds = sum(each.seconds for each in passes.values())
        flops = sum(each.flops for each in passes.values())
        return UpdateCost(
            passes=passes,
            kept_sequences=len(model.sequences),
            kept_tokens=sum(model.sequences),
            num_microbatches=model.plan.num_microbatches,
            balance=model.plan.balance,
            padding=model.plan.padding_share,
            mfu=flops / (seconds * setting.world_size * self.device.flops) if seconds else 0.0,
        )

    def _kept(self, setting: Setting) -> tuple[list[int], list[int]]:
        """Tokens of the kept sequences, whole and of the response, within ``gen_max_length``."""
        prompt = self._prompt_tokens(setting)
        responses = [min(n, setting.config.rollout.gen_max_length - prompt) for n in self.workload.responses]
        return [prompt + n for n in responses], responses

    def _prompt_tokens(self, setting: Setting) -> int:
        """The assumption, or what ``gen_max_new`` tokens leave of ``gen_max_length`` where that is less."""
        rollout = setting.config.rollout
        return max(1, min(round(self.assumed.prompt_tokens), rollout.gen_max_length - rollout.gen_max_new))

    def rollout(self, setting: Setting, placement: Placement, memory: RankMemory | None) -> RolloutEstimate:
        """Simulate the drawing of the workload by this setting's engines."""
        config = setting.config.rollout
        tp = config.engine_tp if placement.is_served else 1
        item = ITEMSIZE[setting.config.model.dtype]
        cache = self._cache_of_use(setting, placement, memory)
        window = config.server.requests_per_server if placement.is_served else None
        key = (tp, len(placement.engines), cache, config.max_running_requests, window)
        if key not in self._rollouts:
            prompt = self._prompt_tokens(setting)
            self._rollouts[key] = simulate_rollout(
                np.minimum(self.workload.lengths, config.gen_max_length - prompt),
                prompt_tokens=prompt,
                speed=EngineSpeed.of(
                    setting.spec, tp, item, self.device, self.assumed, cache_itemsize=cache_itemsize(setting)
                ),
                num_engines=len(placement.engines),
                cache_tokens=cache,
                max_running=config.max_running_requests,
                window=window,
                enough=config.prompts_per_step,
            )
        return self._rollouts[key]

    def cache_tokens(self, setting: Setting, placement: Placement, memory: RankMemory | None) -> int:
        """Tokens that an engine's KV cache holds; without ``memory`` as many as could be of use."""
        if memory is None:
            rollout = setting.config.rollout
            return rollout.max_running_requests * rollout.gen_max_length
        return memory.phase("generate").live.get("KV cache", 0) // _cache_bytes_per_token(setting, placement)

    def _cache_of_use(self, setting: Setting, placement: Placement, memory: RankMemory | None) -> int:
        """``cache_tokens``, no more than all running requests at full length could fill. Rounded down to a thousand
        when it is large, so that settings of a search share a simulation.
        """
        tokens = self.cache_tokens(setting, placement, memory)
        tokens = tokens // 1000 * 1000 if tokens > 100_000 else tokens
        return min(tokens, self.cache_tokens(setting, placement, None))

    def useful_cache_bytes(self, setting: Setting, placement: Placement) -> int:
        """Bytes of a rank's KV cache that responses of full length, as many as may run, would fill."""
        rollout = setting.config.rollout
        return rollout.max_running_requests * rollout.gen_max_length * _cache_bytes_per_token(setting, placement)

    def switch(
        self, setting: Setting, placement: Placement, memory: RankMemory | None, traffic: ReshardTraffic
    ) -> dict[str, float]:
        """Seconds of everything between generation and update that computes nothing, by phase."""
        assumed, parallel = self.assumed, setting.config.parallel
        pcie = self.device.pcie * assumed.pcie_efficiency
        hbm = self.device.hbm * assumed.hbm_efficiency
        phases: dict[str, float] = {}
        if placement.is_served:
            phases["sleep"] = assumed.sleep_s
        # Every offloaded part goes out once and comes back once a step.
        moved = sum(_part_bytes(memory, part) for part in parallel.offload) if memory is not None else 0
        if moved:
            phases["offload and load"] = 2 * moved / pcie
        if placement.is_served:
            phases["publish/wake_weights"] = assumed.wake_weights_s
        phases["publish/transfer"] = traffic.seconds + 2 * traffic.engine / hbm
        if setting.config.rollout.verify_weights:
            phases["publish/digest"] = 2 * traffic.engine / hbm
        phases["publish/load"] = assumed.publish_fixed_s + 2 * traffic.engine / hbm
        if placement.is_served:
            phases["publish/wake_cache"] = assumed.wake_cache_s
        return phases


def _cache_bytes_per_token(setting: Setting, placement: Placement) -> int:
    """Keys and values of one token on one engine rank."""
    if placement.is_served:
        return kv_bytes_per_token(setting)
    spec = setting.spec
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * ITEMSIZE[setting.config.model.dtype]


_UPDATE_KEYS: Any = {"parallel": True, "rollout": {"gen_max_length"}, "model": {"dtype", "reward_model"}}
"""What an update depends on besides the workload."""

_PARTS = {
    "policy": ("policy parameters",),
    "optimizer": ("policy optimizer",),
    "reference": ("reference parameters",),
    "reward_model": ("reward model parameters", "reward model optimizer"),
}
"""Items of memory that each part of ``parallel.offload`` moves; gradients are not kept (``actor/offload.py``)."""


def _part_bytes(memory: RankMemory, part: str) -> int:
    return sum(memory.static.get(item, 0) for item in _PARTS[part])
