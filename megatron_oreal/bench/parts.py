"""The parts of a step, each measured on all ranks: what is timed, and which figures come of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from megatron_oreal.actor.build import DTYPES
from megatron_oreal.actor.publish import Publisher, PublishReport, WholeStaging
from megatron_oreal.algorithm import request_seed
from megatron_oreal.bench.figures import Better, Figure
from megatron_oreal.bench.flops import ModelFlops
from megatron_oreal.bench.workload import DrawnOutcomes, Workload
from megatron_oreal.layout.megatron import padded_vocab_size
from megatron_oreal.loss import LossSettings, auto_chunk_tokens, make_coefficients, policy_loss
from megatron_oreal.rollout.draw import owner_of
from megatron_oreal.rollout.engine import Completion, EngineError, Request, SamplingParams
from megatron_oreal.rollout.sglang.engine import SglangEngine
from megatron_oreal.run import Run
from megatron_oreal.telemetry import PhaseTimers, names
from megatron_oreal.train import train_step

T = TypeVar("T")
TAIL_SHARE = 0.1
"""The tail of a rollout begins when fewer than this share of its responses are unfinished."""


@dataclass(frozen=True)
class Measured:
    """One entry a repeat. ``seconds`` from barrier to barrier; ``phases``: of the slowest rank, by the timers' names;

    ``results``: this rank's own.
    """

    seconds: list[float]
    phases: list[dict[str, float]]
    results: list[Any]

    def phase(self, name: str) -> list[float]:
        """Seconds of one phase in every repeat, 0 where it was not entered."""
        return [phases.get(names.phase_metric(name), 0.0) for phases in self.phases]


@dataclass
class Bench:
    """What the parts share. ``peak_flops``: dense operations a second of one device in the model's dtype, if known."""

    run: Run
    workload: Workload
    flops: ModelFlops
    peak_flops: float | None
    warmup: int
    repeats: int
    figures: list[Figure] = field(default_factory=list)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    _engines_awake: bool = False
    _steps: int = 0

    def measure(self, body: Callable[[int, PhaseTimers], T]) -> Measured:
        """Run ``body(i, timers)`` on all ranks, ``warmup`` times for nothing and ``repeats`` times measured."""
        platform, found = self.run.platform, Measured([], [], [])
        for i in range(self.warmup + self.repeats):
            timers = PhaseTimers(platform.synchronize)
            if platform.is_cuda and i == self.warmup:
                torch.cuda.reset_peak_memory_stats()
            platform.synchronize()
            platform.barrier()
            timers.reset()
            began = time.perf_counter()
            result = body(i, timers)
            platform.synchronize()
            platform.barrier()
            seconds, phases = time.perf_counter() - began, timers.collect()
            if i < self.warmup:
                continue
            every = platform.gather_objects((seconds, phases))
            found.seconds.append(max(each for each, _ in every))
            entered = {name for _, own in every for name in own}
            found.phases.append({name: max(own.get(name, 0.0) for _, own in every) for name in entered})
            found.results.append(result)
        return found

    def add(self, part: str, name: str, unit: str, better: Better | None, values: Sequence[float]) -> None:
        """Keep a figure."""
        self.figures.append(Figure(part, name, unit, better, tuple(float(value) for value in values)))

    def add_rates(self, part: str, prefix: str, seconds: Sequence[float], tokens: int, flops: int | None) -> None:
        """Seconds, tokens a second and a GPU (tokens / (seconds x GPUs)), and what share of the peak that is."""
        world = self.run.platform.world_size
        self.add(part, f"{prefix}seconds", "s", "lower", seconds)
        self.add(part, f"{prefix}tokens_per_s_gpu", "tokens/s/GPU", "higher", [tokens / s / world for s in seconds])
        if flops is not None:
            self.add_flops(part, prefix, [flops / s / world for s in seconds])

    def add_flops(self, part: str, prefix: str, rates: Sequence[float]) -> None:
        """Model operations a second of one GPU, and, where its peak is known, their share of it."""
        self.add(part, f"{prefix}tflops_gpu", "TFLOP/s/GPU", "higher", [rate / 1e12 for rate in rates])
        if self.peak_flops is not None:
            self.add(part, f"{prefix}mfu", "share", "higher", [rate / self.peak_flops for rate in rates])

    def add_phases(self, part: str, measured: Measured, prefix: str = "") -> None:
        """Every phase below ``prefix`` as a detail."""
        skipped = (names.TIME_STEP, names.TIME_OTHER)
        entered = {name for phases in measured.phases for name in phases if name not in skipped}
        for name in sorted(entered):
            phase = name.removeprefix(names.TIME)
            if phase.startswith(prefix):
                self.add(part, f"phase {phase}", "s", None, measured.phase(phase))

    def note(self, part: str, **facts: Any) -> None:
        """Keep what is the same in every repeat."""
        self.facts.setdefault(part, {}).update(facts)

    def note_memory(self, part: str) -> None:
        """Peak memory of the part, of the rank that needs most: torch's allocator on CUDA, None on a CPU."""
        peaks: dict[str, int | None] = {"allocated": None, "reserved": None}
        if self.run.platform.is_cuda:
            own = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            every = self.run.platform.gather_objects(own)
            peaks = {name: max(values) for name, values in zip(peaks, zip(*every, strict=True), strict=True)}
        self.note(part, peak_memory_bytes=peaks, mfu_peak_flops=self.peak_flops)

    def wake(self) -> None:
        """Bring engines to where they generate with current weights."""
        if not self._engines_awake:
            self.run.publish()
        self._engines_awake = True

    def sleep(self) -> None:
        """Leave the device to the actors."""
        if self.run.fleet.is_served and self._engines_awake:
            self.run.sleep()
            self._engines_awake = False

    def next_step(self) -> int:
        """A step's number that is not used yet and in which the policy learns."""
        self._steps += 1
        return self.workload.first_step + self._steps - 1


def rollout(bench: Bench) -> None:
    """All responses of a step, from engines that have current weights; no verification."""
    bench.wake()
    run, work = bench.run, bench.workload
    groups, samples = work.num_prompts, run.config.rollout.prompt_repeat_k
    lengths = work.lengths[:groups]

    def body(i: int, timers: PhaseTimers) -> tuple[float, list[float]]:
        keys = [(g, k) for g in range(groups) for k in range(samples)]
        seeds = {key: request_seed(run.config.seed, i, *key) for key in keys}
        limits = {seeds[key]: int(lengths[key]) for key in keys}
        # New prompts each time: an engine's prefix cache must not know them, nor those of the prefill alone.
        prompts = {(which, g): work.prompt_ids((2 * i + which) * groups + g) for which in (0, 1) for g in range(groups)}
        first = [Request(prompts[0, g], g) for g in range(groups) if _draws(run, g)]
        every = [Request(prompts[1, g], seeds[g, k]) for g, k in keys if _draws(run, g)]
        with timers("prefill"):
            _generate(run, first, replace(run.sampling, max_new_tokens=1, new_tokens_by_seed=None))
        run.platform.barrier()
        done: list[float] = []
        began = time.perf_counter()
        with timers("generate"):
            completions = _generate(
                run,
                every,
                replace(run.sampling, new_tokens_by_seed=limits),
                lambda _index, _completion: done.append(time.perf_counter() - began),
            )
            run.platform.barrier()
        drawn = [len(completion.token_ids) for completion in completions]
        _require_lengths(completions, [limits[request.seed] for request in every])
        times = sorted(t for part in run.platform.gather_objects(done) for t in part)
        return sum(run.platform.gather_objects(sum(drawn))), times

    measured = bench.measure(body)
    bench.note_memory("rollout")
    seconds, tokens = measured.phase("generate"), int(lengths.sum())
    assert all(total == tokens for total, _ in measured.results)
    flops = sum(bench.flops.generation(work.prompt_tokens, row) for row in lengths)
    bench.add_rates("rollout", "output_", seconds, tokens, flops)
    bench.add("rollout", "output_tokens_per_s", "tokens/s", "higher", [tokens / s for s in seconds])
    every = tokens + groups * samples * work.prompt_tokens
    world = run.platform.world_size
    bench.add("rollout", "tokens_per_s_gpu", "tokens/s/GPU", "higher", [every / s / world for s in seconds])
    prefill = measured.phase("prefill")
    bench.add_rates("rollout", "prefill_", prefill, groups * work.prompt_tokens, None)
    unfinished = [times[int((1 - TAIL_SHARE) * len(times))] for _, times in measured.results]
    tail = [max(0.0, s - first) for s, first in zip(seconds, unfinished, strict=True)]
    bench.add("rollout", "tail_seconds", "s", None, tail)
    bench.add("rollout", "tail_share", "share", None, [t / s for t, s in zip(tail, seconds, strict=True)])
    bench.note("rollout", output_tokens=tokens, prompt_and_output_tokens=every, requests=groups * samples)
    bench.note("rollout", prefill_tokens=groups * work.prompt_tokens, model_flops=flops, tail_below=TAIL_SHARE)


def _require_lengths(completions: Sequence[Completion], lengths: Sequence[int]) -> None:
    """Raise ``EngineError`` for responses that are not as long as they were asked for: their time says nothing."""
    pairs = list(zip(completions, lengths, strict=True))
    other = [completion for completion, length in pairs if len(completion.token_ids) != length]
    if other:
        aborted = sum(completion.finish_reason == "abort" for completion in other)
        raise EngineError(
            f"rollout: {len(other)} of {len(pairs)} responses do not have the length that was asked for "
            f"({aborted} of them aborted): the engines cannot serve this workload; see their logs"
        )


def _draws(run: Run, group: int) -> bool:
    """Whether this rank's engine call has a group's requests: the first rank's has all where engines are servers."""
    if run.fleet.is_served:
        return run.is_first_rank
    return owner_of(group, run.platform.world_size) == run.platform.rank


def _generate(
    run: Run,
    requests: list[Request],
    sampling: SamplingParams,
    on_complete: Callable[[int, Completion], None] | None = None,
) -> list[Completion]:
    engine = run.fleet.engine
    if not requests:
        return []
    if isinstance(engine, SglangEngine):
        return engine.generate(requests, sampling, on_complete, endpoints=run.fleet.endpoints)
    return engine.generate(requests, sampling, on_complete)


def update(bench: Bench) -> None:
    """The actor's update from the sequences that OREAL keeps of a step: reference, reward model, policy."""
    bench.sleep()
    run, step = bench.run, bench.next_step()
    sequences = bench.workload.sequences(step)
    measured = bench.measure(lambda _, timers: run.actor.update(sequences, bench.next_step(), timers))
    bench.note_memory("update")
    tokens = sum(sequence.num_tokens for sequence in sequences)
    flops = bench.flops.update(sequence.num_tokens for sequence in sequences)
    bench.add_rates("update", "", measured.seconds, tokens, sum(flops.values()))
    bench.add("update", "tokens_per_s", "tokens/s", "higher", [tokens / s for s in measured.seconds])
    for phase, count in flops.items():
        bench.add_rates("update", f"{phase}_", measured.phase(phase), tokens, count)
    plan = measured.results[0].plan
    bench.note("update", tokens=tokens, sequences=len(sequences), model_flops=flops)
    bench.note("update", microbatches=plan.num_microbatches, idle_microbatches=plan.idle_microbatches)
    bench.note("update", balance=plan.balance, microbatch_balance=plan.microbatch_balance)
    bench.note("update", padding_share=plan.padding_share, bubble_share=plan.bubble_share)


def loss(bench: Bench) -> None:
    """The policy's loss and its gradient on one chunk of logits at the config's vocabulary and tensor-parallel size."""
    bench.sleep()
    run = bench.run
    parallel, grid, device = run.config.parallel, run.grid, run.platform.device
    padded = padded_vocab_size(run.spec.vocab_size, tp=grid.tp, vocab_divisor=parallel.make_vocab_size_divisible_by)
    width, dtype = padded // grid.tp, DTYPES[run.config.model.dtype]
    most = parallel.loss_chunk_tokens or auto_chunk_tokens(width, dtype.itemsize)
    rows = min(parallel.max_tokens_per_microbatch, most) // 2 * 2
    generator = torch.Generator(device).manual_seed(run.config.seed)
    labels = torch.randint(0, run.spec.vocab_size, (rows,), generator=generator, device=device)
    half = rows // 2
    coefficients = make_coefficients(
        [half, half],
        [1, -1],
        [0.5, -0.5],
        LossSettings.from_config(run.config.algorithm),
        num_positive_tokens=half,
        num_negative_tokens=half,
        num_tokens=rows,
        scores=torch.randn(rows, generator=generator, device=device),
        ref_logp=torch.full((rows,), -2.0, device=device),
        pass_rates=[0.5, 0.5],
        device=device,
    )
    logits = torch.empty(rows, width, dtype=dtype, device=device)
    leaf = logits.normal_(std=2.0, generator=torch.Generator(device).manual_seed(grid.tp_rank)).requires_grad_()

    def body(_: int, timers: PhaseTimers) -> None:
        with torch.no_grad():
            leaf.normal_(std=2.0)
            leaf.grad = None
        with timers("loss"):
            policy_loss(
                leaf,
                labels,
                coefficients,
                vocab_size=run.spec.vocab_size,
                temperature=run.config.rollout.temperature,
                tp_group=grid.tp_group,
                monitor=True,
            ).total.backward()

    measured = bench.measure(body)
    bench.note_memory("loss")
    seconds = measured.phase("loss")
    # Every tensor-parallel group has its own rows.
    bench.add_rates("loss", "", seconds, rows * run.platform.world_size // grid.tp, None)
    moved = 3 * leaf.nbytes
    bench.add("loss", "three_pass_gb_per_s_gpu", "GB/s/GPU", "higher", [moved / s / 1e9 for s in seconds])
    bench.note("loss", rows=rows, columns=width, vocab_size=run.spec.vocab_size, dtype=run.config.model.dtype)


def reshard(bench: Bench) -> None:
    """The policy's weights from Megatron's layout into the engines' layout, with and without comparing digests.

    Into tensors of the engines' shapes on the ranks' own devices; what engines do with them is part of ``switch``.
    """
    bench.sleep()
    run, actor, layout = bench.run, bench.run.actor, bench.run.fleet.engine.layout
    actor.offloader.offload("optimizer", "reward_model", "reference")
    actor.offloader.load("policy")
    platform, dtype = run.platform, DTYPES[run.config.model.dtype]
    shapes = layout.shards[platform.rank % len(layout.shards)].shapes
    buffers = {name: torch.empty(shape, dtype=dtype, device=platform.device) for name, shape in shapes.items()}
    staging = WholeStaging(buffers, dtype)
    engine_bytes = sum(platform.gather_objects(sum(tensor.nbytes for tensor in buffers.values())))
    for label, verify in (("", False), ("verified_", True)):
        publisher = Publisher(
            actor.policy_layout,
            layout,
            run.grid,
            platform,
            groups=staging.groups,
            wire_dtype=dtype,
            verify=verify,
        )

        def body(_: int, timers: PhaseTimers, publisher: Publisher = publisher) -> PublishReport:
            return publisher.publish(0, actor.policy.parameters(), staging, timers)

        measured = bench.measure(body)
        bench.add("reshard", f"{label}seconds", "s", "lower", measured.seconds)
        if verify:
            bench.add("reshard", "verified_digest_seconds", "s", None, measured.phase("digest"))
        else:
            rates = [engine_bytes / s / 1e9 / platform.world_size for s in measured.seconds]
            bench.add("reshard", "gb_per_s_gpu", "GB/s/GPU", "higher", rates)
            received = measured.results[0].received_max
            bench.note("reshard", engine_bytes=engine_bytes, received_bytes_max=received)
        publisher.release()
    bench.note_memory("reshard")


def switch(bench: Bench) -> None:
    """Engines out, actors in as an update needs them, policy published, engines in: a step's change without work."""
    bench.wake()
    run = bench.run
    offloader = run.actor.offloader

    def body(_: int, timers: PhaseTimers) -> None:
        run.sleep(timers)
        with timers("update"):
            for part in ("reference", "reward_model"):
                with timers(part), offloader.resident(part, timers):
                    pass
            with timers("policy"):
                offloader.load("policy", "optimizer", timers=timers)
        with timers("publish"):
            run.publish(timers)

    measured = bench.measure(body)
    bench.note_memory("switch")
    bench.add("switch", "seconds", "s", "lower", measured.seconds)
    bench.add_phases("switch", measured)
    bench.note("switch", servers=len(run.fleet.endpoints), offload=list(run.config.parallel.offload))


def step(bench: Bench) -> None:
    """``train_step`` as it is, with drawn outcomes in the place of the verdicts that the verifier has just found."""
    bench.wake()
    run, work = bench.run, bench.workload
    verifier = run.rollouts.verifier
    run.rollouts.verifier = DrawnOutcomes(verifier, work.correct)  # type: ignore[assignment]
    sampling, steps = run.sampling, []

    def body(_: int, timers: PhaseTimers) -> dict[str, float]:
        number = bench.next_step()
        steps.append(number)
        run.sampling = replace(sampling, new_tokens_by_seed=work.limits(number))
        return train_step(run, timers, number)

    try:
        measured = bench.measure(body)
    finally:
        run.rollouts.verifier, run.sampling = verifier, sampling
    bench.note_memory("step")
    metrics, counted = measured.results, steps[bench.warmup :]
    lengths = work.lengths[: work.num_prompts]
    every = [int(each[names.TOKENS_ALL]) for each in metrics]
    oversampled = bool(run.config.rollout.oversample_prompts)
    if not oversampled:
        assert set(every) == {int(lengths.sum()) + lengths.size * work.prompt_tokens}
    world = run.platform.world_size
    bench.add("step", "seconds", "s", "lower", measured.seconds)
    rates = [tokens / s for tokens, s in zip(every, measured.seconds, strict=True)]
    bench.add("step", "tokens_per_s", "tokens/s", "higher", rates)
    bench.add("step", "tokens_per_s_gpu", "tokens/s/GPU", "higher", [rate / world for rate in rates])
    samples = [lengths.size / s / world for s in measured.seconds]
    bench.add("step", "samples_per_s_gpu", "samples/s/GPU", "higher", samples)
    if not oversampled:  # which groups came first, and so their lengths, is not known else
        drawn = sum(bench.flops.generation(work.prompt_tokens, row) for row in lengths)
        learned = [sum(bench.flops.update(work.kept_lengths(number)).values()) for number in counted]
        per_s = [(drawn + more) / s / world for more, s in zip(learned, measured.seconds, strict=True)]
        bench.add_flops("step", "", per_s)
        bench.note("step", model_flops_rollout=drawn, model_flops_update=learned)
    bench.add_phases("step", measured)
    bench.note("step", tokens=every, kept_sequences=[int(each[names.SEQUENCES_KEPT]) for each in metrics])


MEASURES: dict[str, Callable[[Bench], None]] = {
    "rollout": rollout,
    "update": update,
    "loss": loss,
    "reshard": reshard,
    "switch": switch,
    "step": step,
}
