"""How long a step's rollout takes: continuous batching simulated request by request, each decode step by its roofline.

A decode step of an engine reads its weights once and the KV cache of every running request; its time is linear in the
tokens held, so that the time of many steps between two events (a response ends, a request is admitted, the cache is
full) is a closed form. Requests go to engines by the dispatcher's own ``Schedule``.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_oreal.data.packing import WorkModel
from megatron_oreal.layout import ModelSpec
from megatron_oreal.planner.assumptions import Assumptions
from megatron_oreal.planner.devices import Device
from megatron_oreal.rollout.sglang.schedule import Schedule

HEADROOM_TOKENS = 512
"""An engine admits a request while every running one can still grow by so much; SGLang estimates something alike."""


@dataclass(frozen=True)
class EngineSpeed:
    """One rank of an engine of ``tp`` ranks. Bytes are of this rank; ``per_*_s`` in seconds."""

    step_s: float
    per_request_s: float
    per_context_token_s: float
    matmul_s_per_request: float
    weights_s: float
    prefill_s_per_token: float

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        tp: int,
        itemsize: int,
        device: Device,
        assumed: Assumptions,
        *,
        cache_itemsize: int | None = None,
    ) -> EngineSpeed:
        """Roofline of a dense model: weights and cache over bandwidth, products over FLOP/s, two all-reduces a layer.

        With more ranks than KV heads each rank reads a whole head (``layout/engines.py``). ``cache_itemsize``: bytes of
        an element of the KV cache, ``itemsize`` unless given.
        """
        bandwidth = device.hbm * assumed.decode_hbm_efficiency
        params = WorkModel.from_spec(spec).matmul_params / tp
        kv_heads = max(1.0, spec.num_kv_heads / tp)
        kv_bytes = 2 * spec.num_layers * kv_heads * spec.head_dim * (cache_itemsize or itemsize)
        reduced = 2 * 2 * (tp - 1) / tp * spec.num_layers * spec.hidden_size * itemsize  # bytes a request and step
        flops = device.flops * assumed.prefill_efficiency
        return cls(
            step_s=assumed.decode_step_overhead_s + (2 * spec.num_layers * assumed.engine_allreduce_s if tp > 1 else 0),
            per_request_s=assumed.sampler_s_per_request + reduced / (device.nvlink * assumed.nvlink_efficiency),
            per_context_token_s=kv_bytes / bandwidth,
            matmul_s_per_request=2 * params / flops,
            weights_s=params * itemsize / bandwidth,
            prefill_s_per_token=2 * params / flops + reduced / (device.nvlink * assumed.nvlink_efficiency),
        )

    def steps_s(self, running: int, context: int, steps: int) -> float:
        """Seconds of ``steps`` decode steps of ``running`` requests that hold ``context`` tokens before the first."""
        fixed = self.step_s + running * self.per_request_s + max(self.weights_s, running * self.matmul_s_per_request)
        held = steps * context + running * steps * (steps + 1) / 2
        return steps * fixed + held * self.per_context_token_s


@dataclass(frozen=True)
class RolloutEstimate:
    """A step's drawing. ``finish_s``: when each response ended, ascending; ``lengths`` [groups, K] of all requests.

    ``idle_share``: of the engines' time, waiting for the last one to end. ``first_step_s`` and ``last_step_s``: the
    decode step with most requests running and the last one. ``retracted``: requests put back for want of cache.
    ``counted_tokens``: prompt and response tokens of the groups that count; ``generated_tokens``: of all responses,
    those given up included.
    """

    seconds: float
    prefill_s: float
    finish_s: np.ndarray
    lengths: np.ndarray
    counted_groups: tuple[int, ...]
    counted_tokens: int
    generated_tokens: int
    idle_share: float
    most_running: int
    first_step_s: float
    last_step_s: float
    retracted: int
    cache_tokens: int
    longest: int

    def finished_by(self, share: float) -> float:
        """Seconds until this share of the responses had ended."""
        return float(self.finish_s[max(0, math.ceil(share * len(self.finish_s)) - 1)])


@dataclass
class _Engine:
    speed: EngineSpeed
    cache_tokens: int
    max_running: int
    now: float = 0.0
    steps: int = 0
    base: int = 0  # context held is base + steps * running
    running: dict[int, tuple[int, int]] = field(default_factory=dict)  # request -> (last step, context - steps)
    ends: list[tuple[int, int]] = field(default_factory=list)
    waiting: deque[tuple[int, int, int]] = field(default_factory=deque)  # request, tokens held before, left to draw
    seen: set[int] = field(default_factory=set)
    prefill_s: float = 0.0
    retracted: int = 0
    most_running: int = 0

    @property
    def context(self) -> int:
        return self.base + self.steps * len(self.running)

    def admit(self, group_of: Sequence[int], prompt_tokens: int) -> None:
        """Move waiting requests in while there is room; the first always goes in."""
        while self.waiting and len(self.running) < self.max_running:
            request, held, left = self.waiting[0]
            needed = self.context + held + HEADROOM_TOKENS * (len(self.running) + 1)
            if self.running and needed > self.cache_tokens:
                return
            self.waiting.popleft()
            shared = prompt_tokens if group_of[request] in self.seen else 0
            self.seen.add(group_of[request])
            seconds = (held - shared) * self.speed.prefill_s_per_token
            self.now += seconds
            self.prefill_s += seconds
            self.running[request] = (self.steps + left, held - self.steps)
            self.base += held - self.steps
            heapq.heappush(self.ends, (self.steps + left, request))
            self.most_running = max(self.most_running, len(self.running))

    def steps_to_event(self) -> int:
        """Decode steps until a response ends or the cache is full."""
        count = len(self.running)
        to_end = self.ends[0][0] - self.steps
        room = (self.cache_tokens - self.context) // count
        return to_end if count == 1 else max(1, min(to_end, room))

    def event_time(self) -> float:
        """When that is; infinity for an idle engine."""
        if not self.running:
            return math.inf
        return self.now + self.speed.steps_s(len(self.running), self.context, self.steps_to_event())

    def advance(self, steps: int) -> None:
        self.now += self.speed.steps_s(len(self.running), self.context, steps)
        self.steps += steps

    def advance_to(self, time: float) -> None:
        """Whole decode steps up to ``time``."""
        low, high = 0, self.steps_to_event() if self.running else 0
        while low < high:
            middle = (low + high + 1) // 2
            if self.now + self.speed.steps_s(len(self.running), self.context, middle) <= time:
                low = middle
            else:
                high = middle - 1
        self.advance(low)
        if not self.running:
            self.now = max(self.now, time)

    def take_ended(self) -> list[int]:
        """Remove the responses that end at this step."""
        ended = []
        while self.ends and self.ends[0][0] <= self.steps:
            request = heapq.heappop(self.ends)[1]
            self.base -= self.running.pop(request)[1]
            ended.append(request)
        return ended

    def retract(self) -> None:
        """Put back the requests that have drawn least until the others can go on, as SGLang does."""
        while len(self.running) > 1 and self.context + HEADROOM_TOKENS * len(self.running) // 4 > self.cache_tokens:
            request = min(self.running, key=lambda each: (self.running[each][1], -each))
            end, base = self.running.pop(request)
            self.base -= base
            self.ends.remove((end, request))
            heapq.heapify(self.ends)
            self.waiting.appendleft((request, base + self.steps, end - self.steps))
            self.retracted += 1


def simulate_rollout(
    lengths: np.ndarray,
    *,
    prompt_tokens: int,
    speed: EngineSpeed,
    num_engines: int,
    cache_tokens: int,
    max_running: int,
    window: int | None,
    enough: int,
) -> RolloutEstimate:
    """Draw responses of ``lengths`` int [groups, K] with ``num_engines`` engines of ``cache_tokens`` each.

    ``window``: requests at a server at a time, waiting ones included, given out by the dispatcher; None: the embedded
    engine, where group g belongs to rank g mod ``num_engines`` from the start. ``enough``: complete groups that end
    the drawing. The result depends on the arguments alone.
    """
    groups, k = lengths.shape
    longest = int(lengths.max()) + prompt_tokens
    cache = max(cache_tokens, longest + HEADROOM_TOKENS)
    engines = [_Engine(speed, cache, max_running) for _ in range(num_engines)]
    group_of = np.repeat(np.arange(groups), k).tolist()
    flat = lengths.reshape(-1).tolist()
    draw = _Draw(engines, group_of, flat, prompt_tokens, window)
    finish, counted = draw.run(k, enough)
    end = max(finish.values())
    for engine in engines:  # what is given up has drawn as many tokens as its engine had time for
        engine.advance_to(end)
    given_up = sum(engine.steps + base - prompt_tokens for engine in engines for _, base in engine.running.values())
    first = max(engines, key=lambda engine: engine.most_running)
    return RolloutEstimate(
        seconds=end,
        prefill_s=max(engine.prefill_s for engine in engines),
        finish_s=np.sort(np.array(list(finish.values()))),
        lengths=lengths,
        counted_groups=tuple(sorted(counted)),
        counted_tokens=int(sum(lengths[group].sum() + k * prompt_tokens for group in counted)),
        generated_tokens=sum(flat[request] for request in finish) + given_up,
        idle_share=1 - draw.busy_s / (end * num_engines),
        most_running=first.most_running,
        first_step_s=speed.steps_s(first.most_running, first.most_running * prompt_tokens, 1),
        last_step_s=speed.steps_s(1, longest, 1),
        retracted=sum(engine.retracted for engine in engines),
        cache_tokens=cache_tokens,
        longest=longest,
    )


class _Draw:
    """The event loop: the engine whose next event comes first goes on, and the dispatcher hears of what ended."""

    def __init__(
        self, engines: list[_Engine], group_of: list[int], lengths: list[int], prompt_tokens: int, window: int | None
    ):
        self.engines, self.group_of, self.lengths, self.prompt_tokens = engines, group_of, lengths, prompt_tokens
        self.busy_s = 0.0
        self._events: list[tuple[float, int]] = []
        self._schedule: Schedule | None = None
        if window is None:
            for request, group in enumerate(group_of):
                self._give(request, group % len(engines))
        else:
            expected = sum(lengths) / len(lengths)
            prompts = [prompt_tokens] * len(lengths)
            self._schedule = Schedule(group_of, prompts, len(engines), window=window, expected_new_tokens=expected)
            self._dispatch(0.0)
        for number in range(len(engines)):
            self._restart(number)

    def run(self, k: int, enough: int) -> tuple[dict[int, float], list[int]]:
        """Return when each response ended, and the groups that count, in order of completion."""
        finish: dict[int, float] = {}
        missing = [k] * (len(self.lengths) // k)
        complete: list[int] = []
        while len(complete) < enough:
            _, number = heapq.heappop(self._events)
            engine = self.engines[number]
            begin = engine.now
            engine.advance(engine.steps_to_event())
            self.busy_s += engine.now - begin
            ended = engine.take_ended()
            for request in ended:
                finish[request] = engine.now
                group = self.group_of[request]
                missing[group] -= 1
                if not missing[group]:
                    complete.append(group)
                if self._schedule is not None:
                    self._schedule.finished(request, self.lengths[request])
            if not ended:
                engine.retract()
            self._dispatch(engine.now)
            self._restart(number)
        return finish, complete[:enough]

    def _dispatch(self, now: float) -> None:
        while self._schedule is not None and (given := self._schedule.next()) is not None:
            self._give(given.index, given.engine)
            other = self.engines[given.engine]
            if now > other.now and not other.running:  # it stood idle until now
                other.now = now
                self._restart(given.engine)

    def _give(self, request: int, number: int) -> None:
        self.engines[number].waiting.append((request, self.prompt_tokens, self.lengths[request]))

    def _restart(self, number: int) -> None:
        engine = self.engines[number]
        begin = engine.now
        engine.admit(self.group_of, self.prompt_tokens)
        self.busy_s += engine.now - begin
        if engine.running and not any(each[1] == number for each in self._events):
            heapq.heappush(self._events, (engine.event_time(), number))
