"""Everything that a run consists of, put together from a config and taken apart again."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_oreal import platform as platforms
from megatron_oreal.actor.actor import Actor
from megatron_oreal.actor.build import DTYPES
from megatron_oreal.actor.parallel import ParallelGrid, destroy_parallel, init_parallel
from megatron_oreal.actor.publish import PublishReport
from megatron_oreal.config import Config
from megatron_oreal.config_check import check_config
from megatron_oreal.data.chat import ChatTemplate, drop_long_prompts
from megatron_oreal.data.prompts import load_prompts
from megatron_oreal.data.sampler import PromptOrder, resample_by_pass_rate
from megatron_oreal.data.types import Prompt
from megatron_oreal.errors import UserError, of_key
from megatron_oreal.layout import ModelSpec, load_model_spec
from megatron_oreal.platform import Platform
from megatron_oreal.platform.sole import sole_run
from megatron_oreal.preflight.devices import require_gpus
from megatron_oreal.preflight.identity import require_same_ranks
from megatron_oreal.rollout.dispatched import DispatchedSampler
from megatron_oreal.rollout.embedded import EmbeddedEngine
from megatron_oreal.rollout.engine import SamplingParams
from megatron_oreal.rollout.fleet import Fleet, ReleasedMemory
from megatron_oreal.rollout.sampler import RolloutSampler
from megatron_oreal.rollout.sglang import guard
from megatron_oreal.rollout.sglang.build import host_timeout_s, open_sglang_engine
from megatron_oreal.telemetry import PhaseTimers, names
from megatron_oreal.verifier import Verifier

Inputs = tuple[ModelSpec, ChatTemplate, PromptOrder | None, list[Prompt]]
"""The model's shape, its chat template, the prompts in their order, and the held-out ones."""
InputLoader = Callable[[Config, Platform, bool], Inputs]


@dataclass
class Run:
    """The parts that a training loop moves. ``version``: of the weights in the engines, -1 before the first."""

    config: Config
    spec: ModelSpec
    platform: Platform
    grid: ParallelGrid
    actor: Actor
    fleet: Fleet
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

    def sleep(self, timers: PhaseTimers | None = None) -> dict[str, float]:
        """Have servers give their device memory back, for the actors; returns metrics. Embedded engines stay."""
        if not self.fleet.is_served:
            return {}
        timers = timers or PhaseTimers()
        with timers("sleep"):
            released = self.fleet.sleep(timers)
        return {} if released is None else {names.MEMORY_RELEASED: released}

    def publish(self, timers: PhaseTimers | None = None) -> PublishReport:
        """Bring the policy's weights into every engine, as the next version, and wake engines that sleep.

        The version generates once it is verified and every engine has acknowledged it. Device memory changes hands in
        an order in which both sides never need all of theirs: actors out, engine weights in, policy out, caches in.
        """
        timers = timers or PhaseTimers()
        fleet, actor = self.fleet, self.actor
        self.version += 1
        if self.version == 0:  # later a server that has ended is started again
            fleet.wait_ready()
        actor.offloader.offload("optimizer", "reward_model", "reference", timers=timers)
        if fleet.is_served:
            with timers("wake_weights"):
                fleet.wake_weights()
        with timers("load"):
            staging = fleet.stage(self.version)
        report = actor.publish(fleet.engine.layout, staging, self.version, timers)
        with timers("load"):
            fleet.load_weights(self.version)
        if fleet.is_served:
            actor.release_publisher()
            fleet.release_staging()
        actor.offloader.offload("policy", timers=timers)
        if fleet.is_served:
            with timers("wake_cache"):
                fleet.wake_cache()
        if report.digest is not None and report.digest.drifted:
            self.say(f"weights of version {self.version}: tensor-parallel copies differ: {report.digest.drifted}")
        return report

    @contextlib.contextmanager
    def trained_parts(self, timers: PhaseTimers | None = None) -> Iterator[None]:
        """All that training changes in device memory, which engines have to leave for it where it is offloaded."""
        away = self.actor.offloader.away - {"reference"}
        if not away:
            yield
            return
        self.sleep(timers)
        self.actor.offloader.load(*away, timers=timers)
        yield
        self.publish(timers)

    def say(self, *parts: Any) -> None:
        """Print on the first rank."""
        if self.is_first_rank:
            print(*parts, flush=True)


@contextlib.contextmanager
def open_run(
    config: Config, *, policy_only: bool = False, draws: bool = True, load_inputs: InputLoader | None = None
) -> Iterator[Run]:
    """Build a run on this rank: config and data are checked on every rank before any model is built.

    ``policy_only``: no reference and no reward model (the supervised phase, evaluation). ``draws`` False: engines are
    made, but servers are not started until they are used. ``load_inputs``: in place of the config's model directory and
    data, for what has its own. Raises ``UserError`` on all ranks when any rank sees a user's mistake.
    """
    served = config.rollout.engine == "sglang"
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun, when it is killed, leaves its ranks, which hold the devices
        guard.set_parent_death_signal(signal.SIGKILL)
    require_gpus(config.device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    platform = platforms.init_distributed(
        config.device, config.parallel.distributed_timeout_s, host_timeout_s(config) if served else None
    )
    stack = contextlib.ExitStack()
    try:
        require_same_ranks(config, platform)
        load = load_inputs or _load_inputs
        spec, chat, order, held_out = platform.fail_together(lambda: load(config, platform, policy_only))
        if load_inputs is None and not policy_only:  # a run that trains, the only kind that leaves checkpoints
            alone = [sole_run(config.work_path)] if platform.rank == 0 else []
            platform.fail_together(lambda: [stack.enter_context(each) for each in alone])
        fleet = _open_fleet(config, spec, platform)
        stack.callback(fleet.shutdown)
        if draws:
            fleet.start()  # servers start while the rest is built
        verifier = platform.fail_together(lambda: stack.enter_context(_open_verifier(config, platform)))
        grid = init_parallel(config.parallel, platform)
        stack.callback(destroy_parallel)
        if draws and platform.is_cuda:
            # A server sizes its KV cache by the device memory that it finds free; that must not depend on how far
            # the actors have come meanwhile.
            fleet.wait_ready()
            fleet.sleep()
        actor = Actor(config, spec, grid, platform, policy_only=policy_only)
        sampler = DispatchedSampler(fleet, verifier, chat, platform) if served else None
        rollouts = sampler or RolloutSampler(fleet.engine, verifier, chat, platform)
        sampling = _sampling(config, chat)
        yield Run(config, spec, platform, grid, actor, fleet, rollouts, chat, order, held_out, sampling)
    finally:
        stack.close()
        platforms.shutdown_distributed()


def _open_fleet(config: Config, spec: ModelSpec, platform: Platform) -> Fleet:
    """This rank's engine, and how it moves with the others; servers are not started."""
    dtype = DTYPES[config.model.dtype]
    if config.rollout.engine == "sglang":
        served = open_sglang_engine(config, spec, platform, dtype)
        memory = None
        if platform.is_cuda and config.rollout.sglang.get("enable_memory_saver", True):
            least = min(shard.num_elements() for shard in served.layout.shards) * dtype.itemsize
            timeout_s = config.rollout.server.control_timeout_s
            memory = ReleasedMemory.of_device(platform.device, least, timeout_s)
        return Fleet(served, platform, memory=memory)
    engine = EmbeddedEngine(
        spec,
        dtype=dtype,
        device=platform.device,
        max_running_requests=config.rollout.max_running_requests,
        max_length=config.rollout.gen_max_length,
    )
    return Fleet(engine, platform)


def _open_verifier(config: Config, platform: Platform) -> Verifier:
    """Start the verifier and hear every judge host before a model is built. ``UserError`` when none gives a verdict."""
    verifier = Verifier(config.verifier, stop_words=[config.model.stop_word], work_dir=config.work_path)
    try:
        complaints = verifier.check()
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once a node: its ranks have the same network
            for complaint in complaints:
                print(f"warning: rank {platform.rank}: {complaint}", flush=True)
    except BaseException:
        verifier.close()
        raise
    return verifier


def _load_inputs(config: Config, platform: Platform, policy_only: bool) -> Inputs:
    with of_key("model.path"):
        spec = load_model_spec(config.model.path)
    check_config(config, spec, platform.world_size, platform.ranks_per_node)
    if config.model.reference_path:
        with of_key("model.reference_path"):
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
        prompts = _short_prompts("data.train", config.data.train, chat, limit, platform)
        if config.data.resample_by_pass_rate:
            prompts = resample_by_pass_rate(prompts, config.data.pass_rate_buckets)
        order = PromptOrder(prompts, config.seed)
    held_out: list[Prompt] = []
    if config.evaluation.data:
        held_out = _short_prompts("evaluation.data", config.evaluation.data, chat, limit, platform)
        held_out = held_out[: config.evaluation.max_problems]
    return spec, chat, order, held_out


def _short_prompts(key: str, source: str, chat: ChatTemplate, limit: int, platform: Platform) -> list[Prompt]:
    with of_key(key):
        prompts = load_prompts(source)
    prompts, dropped = drop_long_prompts(prompts, chat, limit)
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
