"""The dispatcher's bookkeeping: one test for each invariant that its module states, on random and on chosen runs."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_oreal.rollout.sglang.schedule import Assignment, Schedule


def make(groups: int, k: int, engines: int, *, window: int = 4, max_attempts: int = 3, lengths=None) -> Schedule:
    prompts = [group for group in range(groups) for _ in range(k)]
    lengths = lengths or [10] * len(prompts)
    return Schedule(prompts, lengths, engines, window=window, expected_new_tokens=100, max_attempts=max_attempts)


def drain(schedule: Schedule, now: float = 0.0) -> list[tuple[int, int]]:
    given_out = []
    while (assignment := schedule.next(now)) is not None:
        given_out.append((assignment.index, assignment.engine))
    return given_out


class Simulation:
    """A run in which engines fail, leave and return at random; checks the invariants after every event."""

    def __init__(self, seed: int, groups: int, k: int, engines: int, window: int):
        self.rng = np.random.default_rng(seed)
        self.total, self.engines, self.window = groups * k, engines, window
        self.schedule = make(groups, k, engines, window=window, max_attempts=10_000)
        self.flying: dict[int, int] = {}
        self.finished: Counter[int] = Counter()

    def check(self) -> None:
        schedule = self.schedule
        assert schedule.num_in_flight == len(self.flying)
        assert schedule.num_waiting == self.total - len(self.flying) - len(self.finished)
        for engine in range(self.engines):
            mine = {index for index, held in self.flying.items() if held == engine}
            assert schedule.in_flight(engine) == mine
            assert len(mine) <= self.window
        assert all(schedule.engine_of(index) == engine for index, engine in self.flying.items())

    def give_out(self, now: float) -> None:
        while (assignment := self.schedule.next(now)) is not None:
            assert self.schedule.is_in(assignment.engine), "an engine out of rotation was given a request"
            assert assignment.index not in self.flying
            assert not self.finished[assignment.index]
            self.flying[assignment.index] = assignment.engine
            self.check()
        open_engines = [
            e for e in range(self.engines) if self.schedule.is_in(e) and len(self.schedule.in_flight(e)) < self.window
        ]
        due = self.schedule.wait_until()
        if len(open_engines) == self.engines and self.schedule.num_waiting:
            # not work conserving only for retries that are not due
            assert due is not None and due > now

    def event(self, now: float) -> None:
        kind = self.rng.choice(["finish", "fail", "out", "in"], p=[0.8, 0.1, 0.05, 0.05])
        engine = int(self.rng.integers(self.engines))
        if kind in ("finish", "fail") and self.flying:
            index = int(self.rng.choice(sorted(self.flying)))
            del self.flying[index]
            if kind == "finish":
                assert self.schedule.finished(index, int(self.rng.integers(1, 50)))
                assert not self.schedule.finished(index, 1), "a request finished twice"
                self.finished[index] += 1
            else:
                assert self.schedule.failed(index, now + float(self.rng.random()))
        elif kind == "out":
            for index in self.schedule.take_out(engine):
                self.schedule.returned(index)
                del self.flying[index]
        elif kind == "in":
            self.schedule.put_in(engine)
        self.check()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    groups=st.integers(1, 12),
    k=st.integers(1, 8),
    engines=st.integers(1, 5),
    window=st.integers(1, 9),
)
def test_every_request_is_in_one_place_and_finishes_once(seed, groups, k, engines, window):
    run = Simulation(seed, groups, k, engines, window)
    now = 0.0
    for _ in range(100_000):
        run.give_out(now)
        if run.schedule.done:
            break
        run.event(now)
        now += 0.1
        if not any(run.schedule.is_in(engine) for engine in range(engines)):
            run.schedule.put_in(0)
    assert run.schedule.done
    assert run.finished == Counter(range(groups * k))


class Scan(Schedule):
    """The rule by looking at everything: each engine with room in the order of its load, and for it each request."""

    def next(self, now: float = 0.0) -> Assignment | None:
        engines = [e for e, held in enumerate(self._engines) if held.inside and len(held.in_flight) < self.window]
        for engine in sorted(engines, key=lambda e: (self.outstanding_tokens(e), e)):
            index = self.choose(engine, now)
            if index is not None:
                self._engines[engine].in_flight.add(index)
                self._engines[engine].prompt_tokens += self._lengths[index]
                self._where[index] = engine
                self._attempts[index] += 1
                return Assignment(index, engine, self._attempts[index])
        return None

    def choose(self, engine: int, now: float) -> int | None:
        others = any(held.inside for e, held in enumerate(self._engines) if e != engine)
        for retry in sorted(self._retries):
            if retry[0] <= now and not (others and self._avoid.get(retry[1]) == engine):
                self._retries.remove(retry)
                self._retries.sort()
                return retry[1]
        held = self._engines[engine]
        if not held.chunk and self._chunks:
            held.chunk = self._chunks.popleft()
        if held.chunk:
            return held.chunk.popleft()
        full = [other.chunk for other in self._engines if other.chunk and len(other.in_flight) >= self.window]
        return max(full, key=len).pop() if full else None


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    groups=st.integers(1, 12),
    k=st.integers(1, 12),
    engines=st.integers(1, 7),
    window=st.integers(1, 9),
    longest=st.integers(1, 200),
    trouble=st.sampled_from([0.0, 0.05, 0.4]),
)
def test_every_request_goes_where_a_scan_of_all_engines_sends_it(seed, groups, k, engines, window, longest, trouble):
    rng = np.random.default_rng(seed)
    prompts = [group for group in range(groups) for _ in range(k)]
    lengths = rng.integers(1, longest + 1, groups).repeat(k).tolist()
    both = [
        kind(prompts, lengths, engines, window=window, expected_new_tokens=100, max_attempts=10_000)
        for kind in (Schedule, Scan)
    ]
    now = 0.0
    for _ in range(100_000):
        while True:
            given_out, expected = (schedule.next(now) for schedule in both)
            assert given_out == expected
            if given_out is None:
                break
        if both[0].done:
            break
        for _ in range(int(rng.integers(1, 6))):
            flying, engine = sorted(both[0]._where), int(rng.integers(engines))
            kind, tokens, pause = rng.random(), int(rng.integers(1, 400)), float(rng.choice([0.0, 0.1, 0.7]))
            index = int(rng.choice(flying)) if flying else None
            for schedule in both:
                if kind < trouble / 4 and not (schedule.is_in(engine) and schedule._num_inside == 1):
                    for lost in schedule.take_out(engine):
                        schedule.returned(lost)
                elif kind < trouble / 2:
                    schedule.put_in(engine)
                elif kind < trouble and index is not None:
                    assert schedule.failed(index, now + pause)
                elif index is not None:
                    assert schedule.finished(index, tokens)
        now += 0.1
    assert both[0].done and both[1].done


def test_an_engine_never_has_more_than_its_window():
    schedule = make(10, 16, 3, window=7)
    drain(schedule)
    assert [len(schedule.in_flight(engine)) for engine in range(3)] == [7, 7, 7]


def test_an_engine_out_of_rotation_gets_nothing_until_it_returns():
    schedule = make(4, 2, 2)
    assert schedule.take_out(0) == []
    assert {engine for _, engine in drain(schedule)} == {1}
    schedule.put_in(0)
    assert {engine for _, engine in drain(schedule)} == {0}


def test_the_engine_with_fewest_outstanding_tokens_is_served_first():
    lengths = [1000, 10, 10, 10]
    schedule = make(4, 1, 2, lengths=lengths)
    first, second, third, fourth = (schedule.next() for _ in range(4))
    assert first.engine != second.engine
    assert third.engine == second.engine == fourth.engine  # 10 + 10 + 10 prompt tokens against 1000, 100 expected each
    assert schedule.outstanding_tokens(first.engine) == 1000 + 100
    assert schedule.outstanding_tokens(second.engine) == 3 * (10 + 100)


def test_observed_lengths_replace_the_expected_one():
    schedule = make(3, 1, 1)
    drain(schedule)
    assert schedule.outstanding_tokens(0) == 3 * (10 + 100)
    schedule.finished(0, 40)
    assert schedule.outstanding_tokens(0) == 2 * (10 + 40)


@pytest.mark.parametrize("window", [4, 64])
def test_the_samples_of_a_prompt_stay_on_one_engine(window):
    k, engines = 4, 3
    schedule = make(12, k, engines, window=window)
    engine_of: dict[int, int] = {}
    while not schedule.done:
        engine_of |= dict(drain(schedule))
        for engine in range(engines):  # the engines are equally fast: each finishes what it has
            for index in schedule.in_flight(engine):
                schedule.finished(index, 100)
    for group in range(12):
        assert len({engine_of[group * k + i] for i in range(k)}) == 1


def test_fewer_prompts_than_engines_are_cut_so_that_no_engine_stands_idle():
    schedule = make(2, 16, 8, window=64)
    shares = Counter(engine for _, engine in drain(schedule))
    assert shares == Counter(dict.fromkeys(range(8), 4))


def test_an_idle_engine_takes_what_a_full_one_has_no_room_for():
    schedule = make(2, 16, 2, window=8)
    drain(schedule)
    for index in schedule.in_flight(1):
        schedule.finished(index, 100)
    drain(schedule)  # the second half of its own prompt
    for index in schedule.in_flight(1):
        schedule.finished(index, 100)
    taken = drain(schedule)
    assert [engine for _, engine in taken] == [1] * 8
    assert {index // 16 for index, _ in taken} == {0}, "the other engine's prompt"


def test_a_failed_request_goes_to_another_engine_after_its_pause():
    schedule = make(1, 1, 2)
    first = schedule.next(0.0)
    assert schedule.failed(first.index, not_before=5.0)
    assert schedule.wait_until() == 5.0
    assert schedule.next(4.9) is None
    second = schedule.next(5.0)
    assert (second.index, second.attempt) == (first.index, 2)
    assert second.engine != first.engine


def test_a_failed_request_returns_to_the_only_engine():
    schedule = make(1, 1, 2)
    first = schedule.next()
    schedule.take_out(1 - first.engine)
    assert schedule.failed(first.index)
    assert schedule.next().engine == first.engine


def test_attempts_are_counted_and_end_but_a_lost_engine_is_not_the_requests_fault():
    schedule = make(1, 1, 2, max_attempts=2)
    for _ in range(5):
        engine = schedule.next().engine
        for index in schedule.take_out(engine):
            schedule.returned(index)
        schedule.put_in(engine)
    schedule.next()
    assert schedule.failed(0)
    assert schedule.next().attempt == 2
    assert not schedule.failed(0)


def test_a_hundred_thousand_requests_are_scheduled_in_seconds_within_the_windows():
    schedule = make(6250, 16, 32, window=64)
    rng = np.random.default_rng(0)
    count = 0
    flying: list[int] = []
    while not schedule.done:
        flying += [index for index, _ in drain(schedule)]
        assert schedule.num_in_flight == len(flying) <= 32 * 64
        rng.shuffle(flying)
        for index in flying[len(flying) // 2 :]:
            schedule.finished(index, 100)
            count += 1
        del flying[len(flying) // 2 :]
    assert count == 100_000
