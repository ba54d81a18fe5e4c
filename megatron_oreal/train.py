"""OREAL's loop: every phase one named call and one timer.

prompts -> rollouts -> verdicts -> groups -> pairs -> token weights -> losses -> optimizer -> reshard -> (next step)
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_oreal.actor.batch import TrainSequence
from megatron_oreal.algorithm import Kept, request_seed, select
from megatron_oreal.checkpoint import Checkpoints
from megatron_oreal.config import Config
from megatron_oreal.config_check import check_training_paths
from megatron_oreal.data.packing import PackItem
from megatron_oreal.errors import UserError
from megatron_oreal.evaluate import evaluate, require_known
from megatron_oreal.rollout.draw import Draw, Samples
from megatron_oreal.run import Run, open_run
from megatron_oreal.step_metrics import (
    publish_metrics,
    rollout_metrics,
    throughput_metrics,
    unknown_causes,
    update_metrics,
    verdict_metrics,
    verification_metrics,
)
from megatron_oreal.telemetry import MetricLogger, PhaseTimers, StepTable, names, summary, write_report


def train(config: Config) -> None:
    """Train for ``total_steps`` steps, or from the newest checkpoint in ``work_dir`` to there."""
    check_training_paths(config)
    with open_run(config) as run:
        checkpoints = Checkpoints(config.work_path, config.checkpoint.keep, run.platform)
        first_step = _restore(run, checkpoints)
        timers = PhaseTimers(run.platform.synchronize)
        table = StepTable(enabled=run.is_first_rank)
        logger = run.platform.fail_together(
            lambda: MetricLogger(
                config.work_dir, config.telemetry, run.is_first_rank, first_step, config.model_dump(mode="json")
            )
        )
        with logger:
            run.publish()
            timers.reset()
            for step in range(first_step, config.total_steps):
                metrics = _evaluate_when_due(run, timers, step, last=False)
                metrics |= train_step(run, timers, step)
                metrics |= timers.collect()
                metrics |= throughput_metrics(metrics) | verification_metrics(metrics)
                # Logged before it is saved: a run that is cut off in between logs the step again, and loses nothing.
                logger.log(step, metrics)
                table.row(step, metrics)
                _require_agreement(config, step, metrics)
                with timers("checkpoint"):  # counted in the next step's record
                    _save_when_due(run, checkpoints, step + 1)
            final = _evaluate_when_due(run, timers, config.total_steps, last=True)
            if final:
                logger.log(config.total_steps, final | timers.collect())
        _finish(run)
        if final:  # the model is trained and saved by now: only the number is worth nothing
            require_known(final, config.verifier.max_unknown_share)


def train_step(run: Run, timers: PhaseTimers, step: int) -> dict[str, float]:
    """One step of algorithm.md; returns its metrics. A step that keeps nothing makes no update, and says so."""
    config, rollout = run.config, run.config.rollout
    assert run.order is not None
    prompts = run.order.take(rollout.prompts_per_step + rollout.oversample_prompts)
    with timers("generate"):
        drawn = run.rollouts.sample(
            prompts,
            rollout.prompt_repeat_k,
            run.sampling,
            lambda group, sample: request_seed(config.seed, step, group, sample),
            f"step {step} generate",
            enough=rollout.prompts_per_step if rollout.oversample_prompts else None,
        )
    with timers("select"):
        rewards = drawn.samples.rewards(rollout.prompt_repeat_k)
        algorithm = config.algorithm
        kept = select(
            rewards,
            filter=algorithm.filter,
            shaping=algorithm.reward_shaping_type,
            run_seed=config.seed,
            step=step,
        )
        metrics, statistics = rollout_metrics(drawn.samples, rewards, kept)
        metrics |= verdict_metrics(drawn.samples, run.rollouts.judge_stats)
        if config.telemetry.save_trajectories:
            drawn.write(config.work_path / "trajectories" / f"step_{step:06d}.jsonl", prompts)
        _require_known(config, drawn.samples)
    if kept:
        metrics |= run.sleep(timers)
        with timers("update"):
            result = run.actor.update(_sequences(drawn, kept, rollout.prompt_repeat_k), step, timers)
        metrics |= update_metrics(result)
        if result.policy_grad_norm is not None or run.fleet.is_served:  # servers have slept, and lost their weights
            with timers("publish"):
                metrics |= publish_metrics(run.publish(timers))
    else:
        run.say(
            f"step {step}: no group kept ({statistics.groups_all_correct} all correct, {statistics.groups_all_wrong} "
            f"all wrong, {statistics.groups_few_known} with fewer than two known verdicts): no update"
        )
    return metrics


def _sequences(drawn: Draw, kept: Sequence[Kept], k: int) -> list[TrainSequence]:
    chosen = drawn.fetch([item.group * k + item.sample for item in kept])
    return [
        TrainSequence(PackItem.of(t), item.reward, item.advantage, item.pass_rate, t.engine_logp)
        for t, item in zip(chosen, kept, strict=True)
    ]


def _require_known(config: Config, samples: Samples) -> None:
    limit = config.verifier.max_unknown_share
    share = int((samples.rows["reward"] == 0).sum()) / max(len(samples), 1)
    if share > limit:
        causes, example = unknown_causes(samples)
        counts = ", ".join(f"{count} x {cause}" for cause, count in causes[:5])
        raise UserError(
            f"verifier.max_unknown_share={limit}: {share:.0%} of this step's {len(samples)} verdicts are unknown "
            f"({counts}; for example {example!r}); training on the rest would be biased: repair that, or raise the "
            "limit"
        )


def _require_agreement(config: Config, step: int, metrics: Mapping[str, float]) -> None:
    limit, mean = config.rollout.max_logp_difference, metrics.get(names.LOGP_DIFF_MEAN)
    if limit is not None and mean is not None and not mean <= limit:
        raise UserError(
            f"rollout.max_logp_difference={limit:g}: in step {step} the engine's log-probabilities differ from the "
            f"trainer's by {mean:.3g} nats in the mean (99.9th percentile {metrics[names.LOGP_DIFF_P999]:.3g}, maximum "
            f"{metrics[names.LOGP_DIFF_MAX]:.3g}): the engine does not draw from the policy that is trained (other "
            "precision, kernels or arguments in rollout.sglang); mend that, or raise the limit (null: no limit)"
        )


def _restore(run: Run, checkpoints: Checkpoints) -> int:
    """Load weights: from the newest checkpoint when resuming, else from the Hugging Face directory."""
    step = checkpoints.newest()
    if step is not None and not run.config.checkpoint.resume:
        raise UserError(
            f"checkpoint.resume=false, but {checkpoints.path(step)} is there: remove it, set resume=true or use "
            "another work_dir"
        )
    if step is None:
        run.actor.load_hf()
        return 0
    if step > run.config.total_steps:
        raise UserError(
            f"total_steps={run.config.total_steps}: {checkpoints.path(step)} has seen {step} steps: raise it, remove "
            "that checkpoint or use another work_dir"
        )
    run.actor.load_reference()
    position = checkpoints.load(run.actor, step)
    assert run.order is not None
    run.order.load_state_dict(position["prompts"])
    run.say(f"resumed from {checkpoints.path(step)}")
    return step


def _save_when_due(run: Run, checkpoints: Checkpoints, step: int) -> None:
    every = run.config.checkpoint.every
    if every and (step % every == 0 or step == run.config.total_steps):
        assert run.order is not None
        position: dict[str, Any] = {"prompts": dict(run.order.state_dict())}
        with run.trained_parts():
            checkpoints.save(run.actor, step, position)


def _evaluate_when_due(run: Run, timers: PhaseTimers, step: int, *, last: bool) -> dict[str, float]:
    evaluation = run.config.evaluation
    due = last or step == 0 or (evaluation.every and step % evaluation.every == 0)
    if not run.held_out or not due:
        return {}
    with timers("evaluate"):
        result = evaluate(run.rollouts, run.held_out, evaluation.num_samples, run.sampling, run.config.seed)
    if not last:
        require_known(result, run.config.verifier.max_unknown_share)
    return result


def _finish(run: Run) -> None:
    """Export the policy and draw the report; print where they are and what the run has shown."""
    config = run.config
    if config.checkpoint.export_hf:
        path, fresh = config.work_path / "hf", config.work_path / "hf.new"
        if run.is_first_rank:
            shutil.rmtree(fresh, ignore_errors=True)
        run.platform.barrier()
        run.sleep()
        run.actor.export(fresh)
        if run.is_first_rank:  # only now may an earlier export of this work_dir go
            shutil.rmtree(path, ignore_errors=True)
            fresh.rename(path)
        run.say(f"export: {path}")
    if run.is_first_rank:
        print(summary(config.work_dir))
        print(f"curves: {write_report(config.work_dir)}", flush=True)
