"""The judge: a language model behind one or more servers, asked from a thread of its own.

It decides what the rules do not call correct, unless the answer speaks to it (``judge_screen``). A failure of any kind
is *unknown* with its reason, never *wrong*, and comes within ``verifier.judge.deadline_s`` of the submission.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_oreal.config import VerifierConfig
from megatron_oreal.errors import UserError
from megatron_oreal.verifier.judge_cache import JudgeCache, cache_key
from megatron_oreal.verifier.judge_client import JudgeClient, JudgeError
from megatron_oreal.verifier.judge_hosts import Host
from megatron_oreal.verifier.judge_prompt import Case, make_case
from megatron_oreal.verifier.judge_screen import speaks_to_the_judge
from megatron_oreal.verifier.judge_stats import DEADLINE, VOTES, JudgeStats, StatsBox
from megatron_oreal.verifier.verdict import Judgement, Verdict

Result = Callable[[Hashable, Judgement], None]
_PROBE = Case("What is 2 + 2?", "4", "4")
_CLOSE_S = 5.0
_MARGIN_S = 0.2
"""Beyond the deadline the client is given to say by itself why it has no verdict."""
_FOUND = {Verdict.CORRECT: "judge: correct", Verdict.WRONG: "judge: wrong"}


class Judge:
    """Judges in a thread with an event loop; use as a context manager. Only ``submit`` and ``stats`` are hot.

    ``on_result(key, judgement)`` is called in that thread, once for every ``submit``. ``stop_words`` as for the pool.
    Raises ``UserError`` when the cache cannot be opened.
    """

    def __init__(
        self, config: VerifierConfig, on_result: Result, *, stop_words: Sequence[str] = (), cache: Path | None = None
    ) -> None:
        self._config, self._on_result, self._stop_words = config, on_result, tuple(stop_words)
        self._stats = StatsBox()
        self._cache = JudgeCache(cache) if cache is not None else None
        self._tasks: set[asyncio.Task[None]] = set()
        self._running: dict[Case, asyncio.Task[Judgement]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="judge", daemon=True)
        self._started: Future[JudgeClient] = Future()
        self._thread.start()
        self._client = self._started.result()

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def submit(self, key: Hashable, question: str, gold: str, response: str, rules: Judgement) -> None:
        """Queue a response and return at once. ``rules``: what they said, kept where there is nothing to compare."""
        deadline = time.monotonic() + self._config.judge.deadline_s
        self._loop.call_soon_threadsafe(self._accept, key, question, gold, response, rules, deadline)

    def stats(self) -> JudgeStats:
        """Return the counts since the last call."""
        return self._stats.take()

    def check(self) -> list[str]:
        """Ask every host for its model and for one easy verdict; return a line of complaint for each that fails.

        Raises ``UserError`` naming every host and what it answered when none gives a verdict.
        """
        limit = self._config.judge.timeout_s + _CLOSE_S
        answers = asyncio.run_coroutine_threadsafe(self._probe_all(), self._loop).result(limit)
        self._stats.take()
        bad = [f"{host.url}: {problem}" for host, problem in answers if problem is not None]
        if len(bad) == len(answers):
            raise UserError(
                f"verifier.hosts: none of the {len(bad)} judge hosts gives a verdict ({'; '.join(bad)}): start them, "
                "or set verifier.hosts=[] to go by the rules alone"
            )
        return [f"judge host {line}" for line in bad]

    def close(self) -> None:
        """Drop what is in flight and end the thread; may be called again."""
        if self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # the loop has just ended by itself
                self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_CLOSE_S)
        if self._cache is not None and not self._thread.is_alive():
            self._cache.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            client = self._loop.run_until_complete(self._open())
        except BaseException as error:
            self._started.set_exception(error)
            self._loop.close()
            return
        self._started.set_result(client)
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(self._finish(client))
            self._loop.close()

    async def _open(self) -> JudgeClient:
        return JudgeClient(self._config, self._stats)

    @staticmethod
    async def _finish(client: JudgeClient) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await client.close()

    async def _probe_all(self) -> list[tuple[Host, str | None]]:
        hosts = self._client.pool.hosts
        return list(zip(hosts, await asyncio.gather(*(self._client.probe(h, _PROBE) for h in hosts)), strict=True))

    def _accept(self, key: Hashable, *arguments: Any) -> None:
        task = self._loop.create_task(self._judge(key, *arguments))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _judge(
        self, key: Hashable, question: str, gold: str, response: str, rules: Judgement, deadline: float
    ) -> None:
        """Bring one item to its end, whatever happens."""
        began = time.monotonic()
        try:
            judge, words = self._config.judge, self._config.thinking_finish_words
            case = make_case(question, gold, response, words, self._stop_words, judge.max_answer_chars)
            spoken = speaks_to_the_judge(case) if case is not None and judge.screen_answers else None
            if spoken is not None:
                self._stats.add("withheld")
                judgement = replace(rules, reason=f"{rules.reason}; not sent: speaks to the judge ({spoken})")
            else:
                judgement = rules if case is None else await self._decide(case, rules, deadline)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # a defect of ours costs a verdict, never the item
            judgement = Judgement(Verdict.UNKNOWN, f"judge failed: {type(error).__name__}: {error}"[:300], rules.answer)
        if judgement.verdict is Verdict.UNKNOWN:
            self._stats.unknown(judgement.cause)
        seconds = rules.seconds + time.monotonic() - began
        self._on_result(key, Judgement(judgement.verdict, judgement.reason, judgement.answer, seconds))

    async def _decide(self, case: Case, rules: Judgement, deadline: float) -> Judgement:
        """Share the work of equal cases in flight: samples of one prompt often end in the same wrong answer.

        A case that came before this one and has run out of its time says nothing when this one has time left.
        """
        shared = False
        while True:
            leader = self._running.get(case)
            leads = leader is None
            if leader is None:
                leader = self._loop.create_task(self._ask(case, deadline))
                self._running[case] = leader
                leader.add_done_callback(lambda _: self._running.pop(case, None))
            elif not shared:
                shared = True
                self._stats.add("shared")
            done, _ = await asyncio.wait([leader], timeout=max(0.0, deadline - time.monotonic()) + 2 * _MARGIN_S)
            found = leader.result() if done else Judgement(Verdict.UNKNOWN, str(self._client.out_of_time()))
            is_late = found.verdict is Verdict.UNKNOWN and found.cause == DEADLINE
            if leads or not done or not is_late or time.monotonic() >= deadline:
                break
        return Judgement(found.verdict, found.reason, rules.answer or case.answer)

    async def _ask(self, case: Case, deadline: float) -> Judgement:
        votes = self._config.judge.votes
        verdict = self._cached(case)
        if verdict is not None:
            return self._from_cache(verdict)
        asked = [self._loop.create_task(self._vote(case, deadline)) for _ in range(votes)]
        counts: Counter[Verdict] = Counter()
        errors: list[JudgeError] = []
        try:
            for vote in asyncio.as_completed(asked):
                try:
                    verdict, model = await vote
                except JudgeError as error:
                    errors.append(error)
                    continue
                if model is None:
                    return self._from_cache(verdict)
                counts[verdict] += 1
                if counts[verdict] > votes // 2:
                    self._store(case, model, verdict)
                    return Judgement(verdict, _FOUND[verdict])
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        if votes == 1 or not counts:
            return Judgement(Verdict.UNKNOWN, str(errors[0]))
        tally = f"{counts[Verdict.CORRECT]} correct, {counts[Verdict.WRONG]} wrong, {len(errors)} without a verdict"
        return Judgement(Verdict.UNKNOWN, f"{VOTES}: no majority of {votes} ({tally}: {errors[0]})")

    def _from_cache(self, verdict: Verdict) -> Judgement:
        self._stats.add("cache_hits")
        return Judgement(verdict, f"{_FOUND[verdict]} (cached)")

    async def _vote(self, case: Case, deadline: float) -> tuple[Verdict, str | None]:
        """Ask once. The client keeps to the deadline by itself; this holds whatever a server does to it."""
        try:
            left = max(0.0, deadline - time.monotonic())
            return await asyncio.wait_for(
                self._client.ask(case, deadline, lambda: self._cached(case)), left + _MARGIN_S
            )
        except TimeoutError:
            raise self._client.out_of_time() from None

    def _cached(self, case: Case) -> Verdict | None:
        if self._cache is None:
            return None
        votes = self._config.judge.votes
        found = (self._cache.get(cache_key(case, model, votes)) for model in self._client.models)
        return next((verdict for verdict in found if verdict is not None), None)

    def _store(self, case: Case, model: str, verdict: Verdict) -> None:
        if self._cache is not None:
            with contextlib.suppress(OSError):  # a full disk: the verdict stands, the next run asks again
                self._cache.put(cache_key(case, model, self._config.judge.votes), verdict)
