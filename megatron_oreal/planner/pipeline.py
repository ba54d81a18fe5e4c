"""How long Megatron's pipeline schedules take: their own order of forwards and backwards, with given times.

No pipeline, 1F1B and interleaved 1F1B of ``megatron.core.pipeline_parallel.schedules`` (0.16): every stage works its
list off in order, and each entry waits for what it needs from a neighbour. Communication is not overlapped with the
stage that waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["F", "B"]


@dataclass(frozen=True, slots=True)
class Op:
    """A forward or backward of micro-batch ``microbatch`` through model chunk ``chunk`` of a stage."""

    kind: Kind
    chunk: int
    microbatch: int


@dataclass(frozen=True, slots=True)
class PipelineTime:
    """``seconds`` from the first op's start to the last one's end; ``busy``: seconds of work, a stage."""

    seconds: float
    busy: tuple[float, ...]

    @property
    def bubble(self) -> float:
        """Share of the stages' time in which they wait: for each other, or because they have less work."""
        return 1 - sum(self.busy) / len(self.busy) / self.seconds if self.seconds else 0.0


def stage_ops(stage: int, pp: int, vpp: int | None, num_microbatches: int, *, forward_only: bool) -> list[Op]:
    """The order in which a stage works; ``vpp`` above 1 needs ``num_microbatches`` to be a multiple of ``pp``."""
    chunks = vpp or 1
    assert chunks == 1 or num_microbatches % pp == 0
    total = num_microbatches * chunks

    def op(kind: Kind, index: int) -> Op:
        if chunks == 1:
            return Op(kind, 0, index)
        round_, place = divmod(index, pp * chunks)
        chunk, offset = divmod(place, pp)
        return Op(kind, chunk if kind == "F" else chunks - 1 - chunk, round_ * pp + offset)

    if forward_only:
        return [op("F", index) for index in range(total)]
    warmup = pp - stage - 1 if chunks == 1 else (pp - stage - 1) * 2 + (chunks - 1) * pp
    warmup = min(warmup if pp > 1 else 0, total)
    ops = [op("F", index) for index in range(warmup)]
    for index in range(warmup, total):
        ops += [op("F", index), op("B", index - warmup)]
    return ops + [op("B", index) for index in range(total - warmup, total)]


def pipeline_time(
    pp: int,
    vpp: int | None,
    num_microbatches: int,
    duration: Callable[[int, Op], float],
    transfer: Callable[[int, int, int], float],
    *,
    forward_only: bool = False,
) -> PipelineTime:
    """Run the schedule. ``duration(stage, op)``, ``transfer(from_stage, to_stage, microbatch)`` in seconds."""
    chunks = vpp or 1
    lists = [stage_ops(stage, pp, vpp, num_microbatches, forward_only=forward_only) for stage in range(pp)]
    done: dict[tuple[int, Op], float] = {}
    clock, busy, position = [0.0] * pp, [0.0] * pp, [0] * pp
    left = sum(map(len, lists))
    while left:
        before = left
        for stage in range(pp):
            while position[stage] < len(lists[stage]):
                op = lists[stage][position[stage]]
                ready = _ready(stage, op, pp, chunks, done, transfer)
                if ready is None:
                    break
                seconds = duration(stage, op)
                clock[stage] = max(clock[stage], ready) + seconds
                busy[stage] += seconds
                done[stage, op] = clock[stage]
                position[stage] += 1
                left -= 1
        assert left < before, "the schedule waits for itself"
    return PipelineTime(max(clock), tuple(busy))


def _ready(
    stage: int,
    op: Op,
    pp: int,
    chunks: int,
    done: dict[tuple[int, Op], float],
    transfer: Callable[[int, int, int], float],
) -> float | None:
    """When an op's input is there; None when that is not known yet."""
    source = _source(stage, op, pp, chunks)
    if source is None:
        return 0.0
    end = done.get(source)
    if end is None or source[0] == stage:
        return end
    return end + transfer(source[0], stage, op.microbatch)


def _source(stage: int, op: Op, pp: int, chunks: int) -> tuple[int, Op] | None:
    """The op whose result an op takes; None at the first chunk's forward."""
    if op.kind == "F":
        if stage > 0:
            return stage - 1, op
        return (pp - 1, Op("F", op.chunk - 1, op.microbatch)) if op.chunk else None
    if stage < pp - 1:
        return stage + 1, op
    if op.chunk < chunks - 1:
        return 0, Op("B", op.chunk + 1, op.microbatch)
    return stage, Op("F", op.chunk, op.microbatch)
