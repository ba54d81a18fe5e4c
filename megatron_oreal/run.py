"""Everything that a run consists of, put together from a config and taken apart again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_oreal import platform as platforms
from megatron_oreal.actor.actor import Actor
from megatron_oreal.actor.build import DTYPES
from megatron_oreal.actor.parallel import ParallelGrid, init_parallel
from megatron_oreal.config import Config
from megatron_oreal.config_check import check_config
from megatron_oreal.data.chat import ChatTemplate, drop_long_prompts
from megatron_oreal.data.prompts import load_prompts
from megatron_oreal.data.sampler import PromptOrder, resample_by_pass_rate
from megatron_oreal.data.types import Prompt
from megatron_oreal.errors import UserError
from megatron_oreal.layout import Layout, ModelSpec, embedded_layout, load_model_spec
from megatron_oreal.platform import Platform
from megatron_oreal.rollout.embedded import EmbeddedEngine
from megatron_oreal.rollout.engine import Engine, SamplingParams
from megatron_oreal.rollout.sampler import RolloutSampler
from megatron_oreal.verifier import VerifierPool


@dataclass
class Run:
    """The parts that a training loop moves. ``version``: of the weights in the engines, -1 before the first."""

    config: Config
    spec: ModelSpec
    platform: Platform
    grid: ParallelGrid
    actor: Actor
    engine: Engine
    engine_layout: Layout
    rollouts: RolloutSampler
    chat: ChatTemplate
    order: PromptOrder | None
    held_out: list[Prompt]
    sampling: SamplingParams
    version: int = -1

    @property
    def is_first_rank(self) -> bool:
        """True on the rank that writes and prints."""
        return self.platform.rank == 0

    def publish(self) -> None:
        """Bring the policy's weights into every engine, as the next version."""
        self.version += 1
        self.actor.publish(self.engine_layout, dict(self.engine.weight_buffers()))
        self.engine.load_weights(self.version)

    def say(self, *parts: Any) -> None:
        """Print on the first rank."""
        if self.is_first_rank:
            print(*parts, flush=True)


@contextlib.contextmanager
def open_run(config: Config, *, policy_only: bool = False) -> Iterator[Run]:
    """Build a run on this rank: config and data are checked on every rank before any model is built.

    ``policy_only``: no reference and no reward model (the supervised phase, evaluation). Raises ``UserError`` on all
    ranks when any rank sees a user's mistake.
    """
    platform = platforms.init_distributed(config.device, config.parallel.distributed_timeout_s)
    try:
        spec, chat, order, held_out = platform.fail_together(lambda: _load_inputs(config, platform, policy_only))
        grid = init_parallel(config.parallel, platform)
        actor = Actor(config, spec, grid, platform, policy_only=policy_only)
        engine = EmbeddedEngine(
            spec,
            dtype=DTYPES[config.model.dtype],
            device=platform.device,
            max_running_requests=config.rollout.max_running_requests,
            max_length=config.rollout.gen_max_length,
        )
        with VerifierPool.from_config(config.verifier, stop_words=[config.model.stop_word]) as verifier:
            rollouts = RolloutSampler(engine, verifier, chat, platform)
            sampling = _sampling(config, chat)
            yield Run(
                config,
                spec,
                platform,
                grid,
                actor,
                engine,
                embedded_layout(spec),
                rollouts,
                chat,
                order,
                held_out,
                sampling,
            )
            engine.shutdown()
    finally:
        platforms.shutdown_distributed()


def _load_inputs(
    config: Config, platform: Platform, policy_only: bool
) -> tuple[ModelSpec, ChatTemplate, PromptOrder | None, list[Prompt]]:
    spec = load_model_spec(config.model.path)
    check_config(config, spec, platform.world_size)
    if config.model.reference_path:
        reference = load_model_spec(config.model.reference_path)
        if replace(reference, max_position_embeddings=spec.max_position_embeddings) != spec:
            raise UserError(
                f"model.reference_path={config.model.reference_path!r} is not of the same shape (sizes, rope, norm) as "
                f"model.path={config.model.path!r}: compare their config.json"
            )
    model = config.model
    chat = ChatTemplate.load(
        model.path, stop_word=model.stop_word, chat_template=model.chat_template, system_prompt=model.system_prompt
    )
    if chat.stop_token_id >= spec.vocab_size:
        raise UserError(
            f"model.stop_word={model.stop_word!r} is token {chat.stop_token_id}, beyond vocab_size {spec.vocab_size} "
            f"in {model.path}/config.json: the model can never say it"
        )
    limit = min(config.data.max_prompt_tokens or config.rollout.gen_max_length, config.rollout.gen_max_length - 1)
    order = None
    if not policy_only:
        prompts = _short_prompts(config.data.train, chat, limit, platform)
        if config.data.resample_by_pass_rate:
            prompts = resample_by_pass_rate(prompts, config.data.pass_rate_buckets)
        order = PromptOrder(prompts, config.seed)
    held_out: list[Prompt] = []
    if config.evaluation.data:
        held_out = _short_prompts(config.evaluation.data, chat, limit, platform)[: config.evaluation.max_problems]
    return spec, chat, order, held_out


def _short_prompts(source: str, chat: ChatTemplate, limit: int, platform: Platform) -> list[Prompt]:
    prompts, dropped = drop_long_prompts(load_prompts(source), chat, limit)
    if platform.rank == 0 and dropped:
        print(f"{source}: {dropped} prompts of more than {limit} tokens are left out", flush=True)
    return prompts


def _sampling(config: Config, chat: ChatTemplate) -> SamplingParams:
    rollout = config.rollout
    return SamplingParams(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_new_tokens=rollout.gen_max_new,
        max_length=rollout.gen_max_length,
        stop_token_id=chat.stop_token_id,
    )
