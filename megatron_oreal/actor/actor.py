"""The three models of OREAL on this rank and what is done with them: score, learn, publish, save.

reference: log-probabilities                       (forward)
reward model: scores, its own loss, its update     (forward and backward; the scores are from before the update)
policy: token weights from those scores, its loss  (forward and backward; forward alone while it is frozen)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_oreal.actor.batch import Batch, Microbatch, TrainSequence, make_batch
from megatron_oreal.actor.build import DTYPES, MegatronModel, build_model
from megatron_oreal.actor.head import VocabularyHead
from megatron_oreal.actor.offload import Offloader, Part, merged, model_part, optimizer_part
from megatron_oreal.actor.optimizer import ModelOptimizer
from megatron_oreal.actor.options import check_options
from megatron_oreal.actor.parallel import ParallelGrid
from megatron_oreal.actor.publish import Publisher, PublishReport, Staging, WholeStaging
from megatron_oreal.actor.schedule import run_microbatches
from megatron_oreal.actor.specs import choose_implementation
from megatron_oreal.actor.sums import StepSums, TokenSums
from megatron_oreal.algorithm import Normalisers, count_normalisers, learning_rate
from megatron_oreal.config import Config
from megatron_oreal.data.packing import MicrobatchPlan
from megatron_oreal.layout import export_hf, load_from_hf, megatron_layout, open_source, pipeline_layer_split
from megatron_oreal.layout.blocks import Layout
from megatron_oreal.layout.model_spec import ModelSpec
from megatron_oreal.loss import (
    LossSettings,
    Vocabulary,
    make_coefficients,
    reward_model_loss,
)
from megatron_oreal.loss.segments import copied
from megatron_oreal.platform import Platform
from megatron_oreal.telemetry import PhaseTimers


@dataclass(frozen=True)
class UpdateResult:
    """``counts``: the normalisers; ``plan``: the micro-batches of all data-parallel ranks.

    A gradient norm is None, and a rate 0, of a model that did not learn in the step.
    """

    sums: StepSums
    counts: Normalisers
    plan: MicrobatchPlan
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
        check_options(config.parallel, self.implementation, platform.is_cuda)
        self._publisher: Publisher | None = None
        self.reference: MegatronModel | None = None
        self.reward_model: MegatronModel | None = None
        self.reward_model_optimizer: ModelOptimizer | None = None
        # A model that is offloaded leaves before the next is built, so that the device never has to hold them all.
        self.offloader = Offloader({}, config.parallel.offload)
        self.policy = self._build(trainable=True)
        self.policy_layout = self._layout(reward_model=False)
        self.policy_optimizer = self._optimizer(self.policy)
        self.offloader.put_out(self._parts())
        if not policy_only:
            self.reference = self._build(trainable=False)
            self.offloader.put_out(self._parts())
            if config.model.reward_model:
                self.reward_model = self._build(trainable=True, score_head=True)
                self.reward_model_layout = self._layout(reward_model=True)
                self.reward_model_optimizer = self._optimizer(self.reward_model)
                self.offloader.put_out(self._parts())

    def _parts(self) -> dict[str, Part]:
        """What may wait in host memory of the models that are built, by the names of ``parallel.offload``.

        The reward model has its optimizer.
        """
        parts = {
            "policy": model_part(self.policy),
            "optimizer": optimizer_part(self.policy, self.policy_optimizer),
        }
        if self.reference is not None:
            parts["reference"] = model_part(self.reference)
        if self.reward_model is not None and self.reward_model_optimizer is not None:
            optimizer = optimizer_part(self.reward_model, self.reward_model_optimizer)
            parts["reward_model"] = merged(model_part(self.reward_model), optimizer)
        return parts

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
            layer_split=pipeline_layer_split(
                self.spec,
                pp=self.grid.pp,
                vpp=self.grid.vpp,
                first=parallel.num_layers_in_first_pipeline_stage,
                last=parallel.num_layers_in_last_pipeline_stage,
            ),
        )

    def _optimizer(self, model: MegatronModel) -> ModelOptimizer:
        config = self.config
        return ModelOptimizer(model, config.optimizer, config.parallel, config.model.dtype, self.platform)

    # Weights in

    def load_hf(self) -> None:
        """Load all models from the directories that the config names; each rank reads only its own part.

        One after the other: what is offloaded is on the device while its weights are read, and leaves again.
        """
        path = self._initial_weights
        with self.offloader.resident("policy"), self.offloader.resident("optimizer"):
            self._load(self.policy, self.policy_layout, path)
            self.policy_optimizer.reload_model_params()
        self.load_reference()
        if self.reward_model is not None and self.reward_model_optimizer is not None:
            with self.offloader.resident("reward_model"):
                self._load(self.reward_model, self.reward_model_layout, path)
                self.reward_model_optimizer.reload_model_params()

    def load_reference(self) -> None:
        """Load the frozen reference (a resumed run's too: it is never saved, it never changes)."""
        if self.reference is not None:
            with self.offloader.resident("reference"):
                path = self.config.model.reference_path or self._initial_weights
                self._load(self.reference, self.policy_layout, path)

    @property
    def _initial_weights(self) -> str:
        return self.config.model.megatron_checkpoint or self.config.model.path

    def _load(self, model: MegatronModel, layout: Layout, path: str) -> None:
        shard = layout.shards[self.grid.model_index]

        def read() -> None:
            with open_source(path, self.spec) as source:
                load_from_hf(source, shard, model.parameters(), missing_ok={"score.weight"})

        self.platform.fail_together(read)

    # Weights out

    def publish(
        self,
        engine_layout: Layout,
        buffers: Mapping[str, Tensor] | Staging,
        version: int = 0,
        timers: PhaseTimers | None = None,
    ) -> PublishReport:
        """Write the policy's current weights into every rank's engine buffers, as ``version``.

        ``buffers``: all of them, or where they are staged group by group. Planned by the first call, and again only for
        another engine layout, dtype or grouping. Raises ``DigestError`` on every rank when ``rollout.verify_weights``
        finds that an engine does not hold what the trainer holds.
        """
        timers = timers or PhaseTimers()
        self.offloader.load("policy")
        with timers("plan"):
            staging: Staging = (
                WholeStaging(buffers, DTYPES[self.config.model.dtype]) if isinstance(buffers, Mapping) else buffers
            )
            if self._publisher is None or not self._publisher.serves(engine_layout, staging):
                self._publisher = Publisher(
                    self.policy_layout,
                    engine_layout,
                    self.grid,
                    self.platform,
                    groups=staging.groups,
                    wire_dtype=staging.dtype,
                    verify=self.config.rollout.verify_weights,
                )
        return self._publisher.publish(version, self.policy.parameters(), staging, timers)

    def release_publisher(self) -> None:
        """Give back the memory that publishing staged weights in (before the engines allocate their KV cache)."""
        if self._publisher is not None:
            self._publisher.release()

    def export(self, out_dir: str | Path) -> None:
        """Write the policy as a Hugging Face directory; all ranks take part, none holds the whole model."""
        self.offloader.load("policy")
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
        with timers("reference"), self.offloader.resident("reference", timers):
            ref_logps = self.reference_logps(batch)
        with timers("reward_model"), self.offloader.resident("reward_model", timers):
            scores, rm_norm, rm_lr = self._update_reward_model(batch, counts, sums, step)
        frozen = step < self.config.algorithm.actor_freeze_steps
        with timers("policy"):
            self.offloader.load("policy", *([] if frozen else ["optimizer"]), timers=timers)
            norm, lr = self._update_policy(batch, counts, ref_logps, scores, sums, step, frozen=frozen)
        return UpdateResult(sums.over_world(self.grid, self.platform), counts, batch.plan, norm, lr, rm_norm, rm_lr)

    def reference_logps(self, batch: Batch) -> list[Tensor]:
        """The reference's log-probabilities, float32 [n] a micro-batch, on the last stage (elsewhere empty)."""
        assert self.reference is not None
        return [logp for logp, _ in self.logprobs(self.reference, batch)]

    def logprobs(self, model: MegatronModel, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """(log-probability, entropy), float32 [n] each, a micro-batch, on the last stage (elsewhere empty)."""

        def head(index: int, output: VocabularyHead) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            labels = batch.microbatches[index].device.labels
            return output.hidden.new_zeros(()), output.token_logprobs(labels, self._vocabulary())

        return run_microbatches(model, batch.device_batches, head, self.platform, backward=False)

    def _vocabulary(self, temperature: float | None = None) -> Vocabulary:
        """``temperature``: default the rollout's."""
        return Vocabulary(
            self.spec.vocab_size,
            self.config.rollout.temperature if temperature is None else temperature,
            self.grid.tp_group,
        )

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

        def head(index: int, output: VocabularyHead) -> tuple[Tensor, None]:
            return self._policy_head(
                output, batch.microbatches[index], counts, ref_logps[index], scores[index], sums
            ), None

        if not frozen:
            self.policy_optimizer.zero_grad()
        run_microbatches(self.policy, batch.device_batches, head, self.platform, backward=not frozen)
        return (None, 0.0) if frozen else (self.policy_optimizer.step(lr), lr)

    def _policy_head(
        self,
        output: VocabularyHead,
        microbatch: Microbatch,
        counts: Normalisers,
        ref_logp: Tensor,
        scores: Tensor | None,
        sums: TokenSums,
    ) -> Tensor:
        """The policy's loss of one micro-batch, from the vocabulary head over its response positions."""
        lengths = microbatch.device.response_lengths
        coefficients = make_coefficients(
            lengths,
            microbatch.rewards,
            microbatch.advantages,
            self.settings,
            num_positive_tokens=counts.positive_tokens,
            num_negative_tokens=counts.negative_tokens,
            num_tokens=counts.tokens,
            scores=scores,
            ref_logp=ref_logp,
            pass_rates=microbatch.pass_rates,
            device=output.hidden.device,
        )
        # Entropy and the gap to the engine are reported of every response token, so rows of zero weight are read too.
        loss = output.policy_loss(microbatch.device.labels, coefficients, self._vocabulary(), monitor=True)
        sums.add("positive", loss.positive)
        sums.add("negative", loss.negative)
        sums.add("kl", loss.kl)
        sums.add("entropy", loss.entropy.double().sum())
        delta = (ref_logp - loss.logp).double()
        sums.add("k3", (delta.expm1() - delta).sum())
        weights = coefficients.weights
        if weights is not None:
            positive = copied(_token_mask(microbatch, sign=1), output.hidden.device)
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
        self.offloader.load("policy", "optimizer")
        counts = count_normalisers([1] * len(sequences), [len(sequence.item.response_ids) for sequence in sequences])
        batch = self.make_batch(sequences)
        settings = LossSettings(pos_mult_adv=False, kl_coef=0.0)
        sums = TokenSums()

        def head(index: int, output: VocabularyHead) -> tuple[Tensor, None]:
            microbatch = batch.microbatches[index]
            coefficients = make_coefficients(
                microbatch.device.response_lengths,
                microbatch.rewards,
                microbatch.advantages,
                settings,
                num_positive_tokens=counts.positive_tokens,
                num_negative_tokens=0,
                num_tokens=counts.tokens,
                device=output.hidden.device,
            )
            loss = output.policy_loss(microbatch.device.labels, coefficients, self._vocabulary(temperature=1.0))
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
