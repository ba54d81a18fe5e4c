"""The supervised phase: next-token cross-entropy on worked solutions, until the model solves some problems.

OREAL learns from groups with right and wrong answers; a model that solves nothing gives it nothing. The published runs
start from models that went through such a phase; this one makes small ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from megatron_oreal.actor.batch import TrainSequence
from megatron_oreal.algorithm import Stream, mix_seed
from megatron_oreal.config import Config
from megatron_oreal.data.packing import PackItem
from megatron_oreal.data.prompts import load_examples
from megatron_oreal.errors import UserError, of_key
from megatron_oreal.evaluate import evaluate, require_known
from megatron_oreal.run import Run, open_run
from megatron_oreal.telemetry import names, progress


def supervise(config: Config) -> None:
    """Train ``model.path`` on ``sft.data`` and write ``sft.output``; stop early at ``sft.stop_at_pass_rate``.

    Raises ``UserError`` when a key of the ``sft`` section that it needs is missing, and, with the model written, when
    more of an evaluation than ``verifier.max_unknown_share`` is unknown: whether to stop cannot be told from the rest.
    """
    sft = config.sft
    if sft.data is None or sft.output is None:
        missing = "sft.data" if sft.data is None else "sft.output"
        raise UserError(f"{missing} is missing: the supervised phase needs data (JSON lines) and output (a directory)")
    if Path(sft.output).exists():
        raise UserError(f"sft.output={sft.output!r} is there already: remove it or give another directory")
    with open_run(config, policy_only=True, draws=_stops_early(config)) as run:
        run.actor.load_hf()
        examples = run.platform.fail_together(lambda: _examples(config, run))
        batches = _batches(examples, sft.batch_size, config.seed)
        limit = config.verifier.max_unknown_share
        held_out: dict[str, float] = {}
        with progress("supervised phase", total=sft.max_steps, unit="steps") as bar:
            for step in range(sft.max_steps):
                loss, _ = run.actor.supervised_step(next(batches), _learning_rate(config, step))
                bar.update(1, extra=f"{loss:.3f} nats a token")
                if _stops_early(config) and (step + 1) % sft.eval_every == 0:
                    held_out = _evaluate(run, step + 1)
                    solved, unknown = held_out[names.EVAL_PASS_AT_1], held_out[names.EVAL_UNKNOWN_SHARE]
                    if solved >= sft.stop_at_pass_rate or unknown > limit:
                        break
        run.actor.export(sft.output)
        run.say(f"supervised model: {sft.output}")
        if held_out:  # the model is written by now, as far as it has come
            require_known(held_out, limit)


def _learning_rate(config: Config, step: int) -> float:
    """Linear warm-up, then constant: the phase may stop at any step."""
    return config.sft.lr * min(1.0, (step + 1) / max(1, config.sft.warmup_steps))


def _examples(config: Config, run: Run) -> list[TrainSequence]:
    assert config.sft.data is not None
    with of_key("sft.data"):
        examples = load_examples(config.sft.data)
    pairs = [run.chat.encode_example(e.question, e.solution) for e in examples]
    limit = config.parallel.max_tokens_per_microbatch
    longest = max(len(prompt) + len(response) for prompt, response in pairs)
    if longest > limit:
        raise UserError(
            f"{config.sft.data}: an example has {longest} tokens, parallel.max_tokens_per_microbatch={limit}"
        )
    return [
        TrainSequence(PackItem(prompt, response), reward=1, advantage=1.0, pass_rate=math.nan)  # type: ignore[arg-type]
        for prompt, response in pairs
    ]


def _batches(examples: list[TrainSequence], size: int, seed: int) -> Iterator[list[TrainSequence]]:
    """Endless batches, shuffled anew every epoch, the same on every rank."""
    epoch = 0
    queue: list[TrainSequence] = []
    while True:
        while len(queue) < size:
            keys = [mix_seed(Stream.SUPERVISED, seed, epoch, index) for index in range(len(examples))]
            queue += [examples[i] for i in sorted(range(len(examples)), key=keys.__getitem__)]
            epoch += 1
        yield queue[:size]
        queue = queue[size:]


def _stops_early(config: Config) -> bool:
    return config.evaluation.data is not None and config.sft.stop_at_pass_rate < 1.0


def _evaluate(run: Run, step: int) -> dict[str, float]:
    run.publish()
    result = evaluate(run.rollouts, run.held_out, 1, run.sampling, run.config.seed, quiet=True)
    run.sleep()
    run.say(
        f"supervised step {step}: held-out pass@1 sampled {result[names.EVAL_PASS_AT_1]:.3f}, "
        f"greedy {result[names.EVAL_GREEDY]:.3f}"
    )
    return result
