"""The three models of OREAL on this rank and what is done with them: score, learn, publish, save.

reference: log-probabilities                       (forward)
reward model: scores, its own loss, its update     (forward and backward; the scores are from before the update)
policy: token weights from those scores, its loss  (forward and backward; forward alone while it is frozen)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_oreal.actor.batch import Batch, Microbatch, TrainSequence, make_batch
from megatron_oreal.actor.build import MegatronModel, build_model
from megatron_oreal.actor.optimizer import ModelOptimizer
from megatron_oreal.actor.parallel import ParallelGrid
from megatron_oreal.actor.schedule import run_microbatches
from megatron_oreal.actor.specs import choose_implementation
from megatron_oreal.algorithm import Normalisers, count_normalisers, learning_rate
from megatron_oreal.config import Config
from megatron_oreal.layout import SafetensorsSource, execute_plan, export_hf, load_from_hf, make_plan, megatron_layout
from megatron_oreal.layout.blocks import Layout
from megatron_oreal.layout.model_spec import ModelSpec
from megatron_oreal.loss import (
    LossSettings,
    make_coefficients,
    policy_loss,
    reward_model_loss,
    token_logprobs,
    token_weights,
)
from megatron_oreal.platform import Platform
from megatron_oreal.telemetry import PhaseTimers


@dataclass
class TokenSums:
    """What one rank adds to the step's statistics; summed over the ranks that speak (``ParallelGrid.speaks``).

    Values stay on the device until ``over_world``: adding one must not make the host wait in the middle of a pipeline.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    logps: list[tuple[Tensor, np.ndarray]] = field(default_factory=list)

    def add(self, name: str, value: Tensor) -> None:
        """Add a 0-d tensor to a sum."""
        self.values[name] = self.values[name] + value.detach() if name in self.values else value.detach()

    def compare(self, logp: Tensor, engine_logp: np.ndarray) -> None:
        """Keep the trainer's and the engine's log-probabilities of the same tokens, both [n]."""
        self.logps.append((logp, engine_logp))

    def over_world(self, grid: ParallelGrid, platform: Platform) -> StepSums:
        """The sums over all data-parallel replicas, the same on every rank (added in rank order)."""
        mine: dict[str, float] = {}
        diffs: list[np.ndarray] = []
        if grid.speaks:
            mine = {name: float(value) for name, value in self.values.items()}
            diffs = [np.abs(logp.float().cpu().numpy() - engine) for logp, engine in self.logps]
        total: dict[str, float] = {}
        every: list[np.ndarray] = []
        for values, arrays in platform.gather_objects((mine, diffs)):
            for name, value in values.items():
                total[name] = total.get(name, 0.0) + value
            every += arrays
        return StepSums(total, every)


@dataclass(frozen=True)
class StepSums:
    """Sums over the global batch by name; ``logp_diffs``: |trainer - engine| of log-probabilities, arrays of [n]."""

    values: dict[str, float]
    logp_diffs: list[np.ndarray]


@dataclass(frozen=True)
class UpdateResult:
    """``counts``: the normalisers. A gradient norm is None, and a rate 0, of a model that did not learn in the step."""

    sums: StepSums
    counts: Normalisers
    balance: float
    policy_grad_norm: float | None
    policy_lr: float
    reward_model_grad_norm: float | None
    reward_model_lr: float


class Actor:
    """Policy, reference and token reward model as Megatron-core models, with their optimizers."""

    def __init__(
        self,
        config: Config,
        spec: ModelSpec,
        grid: ParallelGrid,
        platform: Platform,
        *,
        policy_only: bool = False,
    ):
        self.config, self.spec, self.grid, self.platform = config, spec, grid, platform
        self.settings = LossSettings.from_config(config.algorithm)
        self.implementation = choose_implementation(
            config.parallel.transformer_impl, config.model.dtype, platform.is_cuda
        )
        self.policy = self._build(trainable=True)
        self.policy_layout = self._layout(reward_model=False)
        self.policy_optimizer = self._optimizer(self.policy)
        self.reference: MegatronModel | None = None
        self.reward_model: MegatronModel | None = None
        self.reward_model_optimizer: ModelOptimizer | None = None
        if policy_only:
            return
        self.reference = self._build(trainable=False)
        if config.model.reward_model:
            self.reward_model = self._build(trainable=True, score_head=True)
            self.reward_model_layout = self._layout(reward_model=True)
            self.reward_model_optimizer = self._optimizer(self.reward_model)

    def _build(self, *, trainable: bool, score_head: bool = False) -> MegatronModel:
        return build_model(
            self.spec,
            self.config.parallel,
            self.grid,
            self.platform,
            dtype=self.config.model.dtype,
            implementation=self.implementation,
            trainable=trainable,
            score_head=score_head,
            max_sequence_length=self.config.rollout.gen_max_length,
        )

    def _layout(self, *, reward_model: bool) -> Layout:
        parallel = self.config.parallel
        return megatron_layout(
            self.spec,
            tp=self.grid.tp,
            pp=self.grid.pp,
            vpp=self.grid.vpp,
            vocab_divisor=parallel.make_vocab_size_divisible_by,
            transformer_impl=self.implementation,
            reward_model=reward_model,
        )

    def _optimizer(self, model: MegatronModel) -> ModelOptimizer:
        config = self.config
        return ModelOptimizer(model, config.optimizer, config.parallel, config.model.dtype, self.platform)

    # Weights in

    def load_hf(self) -> None:
        """Load all models from the config's Hugging Face directories; each rank reads only its own bytes."""
        path = self.config.model.path
        self._load(self.policy, self.policy_layout, path)
        self.policy_optimizer.reload_model_params()
        self.load_reference()
        if self.reward_model is not None and self.reward_model_optimizer is not None:
            self._load(self.reward_model, self.reward_model_layout, path)
            self.reward_model_optimizer.reload_model_params()

    def load_reference(self) -> None:
        """Load the frozen reference (a resumed run's too: it is never saved, it never changes)."""
        if self.reference is not None:
            self._load(self.reference, self.policy_layout, self.config.model.reference_path or self.config.model.path)

    def _load(self, model: MegatronModel, layout: Layout, path: str) -> None:
        shard = layout.shards[self.grid.model_index]

        def read() -> None:
            with SafetensorsSource(path) as source:
                load_from_hf(source, shard, model.parameters(), missing_ok={"score.weight"})

        self.platform.fail_together(read)

    # Weights out

    def publish(self, engine_layout: Layout, buffers: dict[str, Tensor]) -> None:
        """Write the policy's current weights into every rank's engine buffers (layout/: plan and execution)."""
        everyone = {0: list(range(self.platform.world_size))}
        plan = make_plan(self.policy_layout, self.grid.ranks().replicas(), engine_layout, everyone)
        execute_plan(plan, self.policy.parameters(), buffers, self.platform.rank)

    def export(self, out_dir: str | Path) -> None:
        """Write the policy as a Hugging Face directory; all ranks take part, none holds the whole model."""
        export_hf(
            out_dir,
            self.spec,
            self.policy_layout,
            self.grid.ranks().replicas(),
            self.policy.parameters(),
            rank=self.platform.rank,
            model_dir=self.config.model.path,
        )

    # Learning

    def make_batch(self, sequences: Sequence[TrainSequence]) -> Batch:
        """Pack sequences into this rank's micro-batches."""
        return make_batch(
            sequences,
            self.spec,
            self.config.parallel,
            self.grid,
            self.implementation,
            self.platform,
            self.config.algorithm.mode,
        )

    def update(self, sequences: Sequence[TrainSequence], step: int, timers: PhaseTimers | None = None) -> UpdateResult:
        """One OREAL update from the kept sequences of the global batch (the same list on every rank, not empty)."""
        assert sequences and self.reference is not None
        timers = timers or PhaseTimers()
        counts = count_normalisers(
            [sequence.reward for sequence in sequences], [len(sequence.item.response_ids) for sequence in sequences]
        )
        batch = self.make_batch(sequences)
        sums = TokenSums()
        with timers("reference"):
            ref_logps = self.reference_logps(batch)
        with timers("reward_model"):
            scores, rm_norm, rm_lr = self._update_reward_model(batch, counts, sums, step)
        frozen = step < self.config.algorithm.actor_freeze_steps
        with timers("policy"):
            norm, lr = self._update_policy(batch, counts, ref_logps, scores, sums, step, frozen=frozen)
        return UpdateResult(sums.over_world(self.grid, self.platform), counts, batch.balance, norm, lr, rm_norm, rm_lr)

    def reference_logps(self, batch: Batch) -> list[Tensor]:
        """The reference's log-probabilities, float32 [n] a micro-batch, on the last stage (elsewhere empty)."""
        assert self.reference is not None
        return [logp for logp, _ in self.logprobs(self.reference, batch)]

    def logprobs(self, model: MegatronModel, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """(log-probability, entropy), float32 [n] each, a micro-batch, on the last stage (elsewhere empty)."""

        def head(index: int, logits: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            labels = batch.microbatches[index].device.labels
            return logits.new_zeros(()), token_logprobs(logits, labels, **self._vocabulary())

        return run_microbatches(model, batch.device_batches, head, self.platform, backward=False)

    def _vocabulary(self) -> dict:
        return {
            "vocab_size": self.spec.vocab_size,
            "temperature": self.config.rollout.temperature,
            "tp_group": self.grid.tp_group,
        }

    def _update_reward_model(
        self, batch: Batch, counts: Normalisers, sums: TokenSums, step: int
    ) -> tuple[list[Tensor | None], float | None, float]:
        if self.reward_model is None or self.reward_model_optimizer is None:
            return [None] * len(batch.microbatches), None, 0.0
        optimizer = self.config.optimizer
        lr = learning_rate(
            step,
            base=optimizer.token_level_rm_lr,
            minimum=optimizer.token_level_rm_lr_min,
            warmup_steps=optimizer.warmup_steps,
            total_steps=self.config.total_steps,
        )

        def head(index: int, scores: Tensor) -> tuple[Tensor, Tensor]:
            microbatch = batch.microbatches[index]
            loss = reward_model_loss(scores, microbatch.device.response_lengths, microbatch.rewards, counts.sequences)
            sums.add("reward_model", loss.total)
            sums.add("reward_model_correct", loss.num_correct)
            return loss.total, scores.detach()

        self.reward_model_optimizer.zero_grad()
        scores = run_microbatches(self.reward_model, batch.device_batches, head, self.platform, backward=True)
        return scores, self.reward_model_optimizer.step(lr), lr

    def _update_policy(
        self,
        batch: Batch,
        counts: Normalisers,
        ref_logps: list[Tensor],
        scores: Sequence[Tensor | None],
        sums: TokenSums,
        step: int,
        *,
        frozen: bool,
    ) -> tuple[float | None, float]:
        algorithm, optimizer = self.config.algorithm, self.config.optimizer
        lr = learning_rate(
            step,
            base=optimizer.actor_lr,
            minimum=optimizer.actor_min_lr,
            warmup_steps=optimizer.warmup_steps,
            total_steps=self.config.total_steps,
            start=algorithm.actor_freeze_steps if optimizer.warmup_after_freeze else 0,
        )

        def head(index: int, logits: Tensor) -> tuple[Tensor, None]:
            return self._policy_head(
                logits, batch.microbatches[index], counts, ref_logps[index], scores[index], sums
            ), None

        if not frozen:
            self.policy_optimizer.zero_grad()
        run_microbatches(self.policy, batch.device_batches, head, self.platform, backward=not frozen)
        return (None, 0.0) if frozen else (self.policy_optimizer.step(lr), lr)

    def _policy_head(
        self,
        logits: Tensor,
        microbatch: Microbatch,
        counts: Normalisers,
        ref_logp: Tensor,
        scores: Tensor | None,
        sums: TokenSums,
    ) -> Tensor:
        """The policy's loss of one micro-batch, from the logits of its response positions [n, vocab / tp]."""
        lengths = microbatch.device.response_lengths
        weights = None if scores is None else token_weights(scores, lengths, self.settings)
        coefficients = make_coefficients(
            lengths,
            microbatch.rewards,
            microbatch.advantages,
            self.settings,
            num_positive_tokens=counts.positive_tokens,
            num_negative_tokens=counts.negative_tokens,
            num_tokens=counts.tokens,
            weights=weights,
            ref_logp=ref_logp,
            pass_rates=microbatch.pass_rates,
            device=logits.device,
        )
        loss = policy_loss(logits, microbatch.device.labels, coefficients, **self._vocabulary())
        sums.add("positive", loss.positive)
        sums.add("negative", loss.negative)
        sums.add("kl", loss.kl)
        sums.add("entropy", loss.entropy.double().sum())
        delta = (ref_logp - loss.logp).double()
        sums.add("k3", (delta.expm1() - delta).sum())
        if weights is not None:
            positive = _token_mask(microbatch, sign=1).to(logits.device)
            for name, weight, mask in (("positive", weights[0], positive), ("negative", weights[1], ~positive)):
                sums.add(f"{name}_weight", (weight * mask).double().sum())
                sums.add(f"{name}_weight_nonzero", ((weight > 0) & mask).sum())
        drawn = [sequence.engine_logp for sequence in microbatch.sequences]
        if drawn and all(logp is not None for logp in drawn):
            engine = np.concatenate([logp for logp in drawn if logp is not None])
            sums.compare(loss.logp, engine)
        return loss.total

    # Supervised phase

    def supervised_step(self, sequences: Sequence[TrainSequence], lr: float) -> tuple[float, float]:
        """One step of next-token cross-entropy on the responses; returns (loss in nats a token, gradient norm)."""
        counts = count_normalisers([1] * len(sequences), [len(sequence.item.response_ids) for sequence in sequences])
        batch = self.make_batch(sequences)
        settings = LossSettings(pos_mult_adv=False, kl_coef=0.0)
        sums = TokenSums()

        def head(index: int, logits: Tensor) -> tuple[Tensor, None]:
            microbatch = batch.microbatches[index]
            coefficients = make_coefficients(
                microbatch.device.response_lengths,
                microbatch.rewards,
                microbatch.advantages,
                settings,
                num_positive_tokens=counts.positive_tokens,
                num_negative_tokens=0,
                num_tokens=counts.tokens,
                device=logits.device,
            )
            vocabulary = self._vocabulary() | {"temperature": 1.0}
            loss = policy_loss(logits, microbatch.device.labels, coefficients, **vocabulary)
            sums.add("loss", loss.total)
            return loss.total, None

        self.policy_optimizer.zero_grad()
        run_microbatches(self.policy, batch.device_batches, head, self.platform, backward=True)
        norm = self.policy_optimizer.step(lr)
        return sums.over_world(self.grid, self.platform).values["loss"], norm


def _token_mask(microbatch: Microbatch, *, sign: int) -> Tensor:
    """Bool [n]: the tokens of sequences with this reward."""
    per_sequence = torch.tensor([reward == sign for reward in microbatch.rewards], dtype=torch.bool)
    return per_sequence.repeat_interleave(torch.tensor(microbatch.device.response_lengths, dtype=torch.int64))
