"""Draw a step's responses with all servers from one rank, and verify them on all ranks while they still come."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_oreal.data.chat import ChatTemplate
from megatron_oreal.data.types import Prompt, Trajectory
from megatron_oreal.errors import UserError
from megatron_oreal.platform import Platform
from megatron_oreal.rollout.engine import Completion, EngineError, Request, SamplingParams
from megatron_oreal.rollout.fleet import Fleet
from megatron_oreal.rollout.sampler import RolloutSampler
from megatron_oreal.rollout.sglang.dispatcher import Progress
from megatron_oreal.rollout.sglang.engine import SglangEngine
from megatron_oreal.telemetry import progress
from megatron_oreal.verifier import Verifier


@dataclass
class _News:
    """What the first rank tells the others, about once a second. ``chosen``: groups that count, at the end."""

    completions: list[tuple[int, Completion]] = field(default_factory=list)
    chosen: list[int] | None = None
    error: Exception | None = None


class DispatchedSampler(RolloutSampler):
    """One queue over all servers, on the first rank; every rank gets all responses and verifies its groups.

    The first rank passes on what has been completed about once a second, also when that is nothing: the others wait in
    host memory, never longer than that for a first rank that lives, and never in a device collective.
    """

    def __init__(self, fleet: Fleet, verifier: Verifier, chat: ChatTemplate, platform: Platform):
        super().__init__(fleet.engine, verifier, chat, platform)
        self.fleet = fleet

    def sample(
        self,
        prompts: Sequence[Prompt],
        num_samples: int,
        sampling: SamplingParams,
        seed_of: Callable[[int, int], int],
        label: str | None,
        enough: int | None = None,
    ) -> list[Trajectory]:
        """As ``RolloutSampler.sample``. ``enough``: groups after which drawing ends; only these are returned.

        Raises ``EngineError`` on every rank when the servers cannot answer all requests.
        """
        step = _Draw(self, prompts, num_samples, sampling, seed_of, label, enough)
        chosen = step.lead() if self.platform.rank == 0 else step.follow()
        self.await_verdicts(step.mine, None if label is not None else False)
        parts = self.share({key: (each.judgement, each.text) for key, each in step.mine.items()})
        judged = {key: item for part in parts for key, item in part.items()}
        trajectories = [step.trajectories[key] for key in sorted(step.trajectories) if key[0] in chosen]
        for trajectory in trajectories:
            trajectory.judgement, trajectory.text = judged[trajectory.group, trajectory.sample]
        return trajectories


class _Draw:
    """One ``sample`` call on this rank. ``trajectories``: all that are known; ``mine``: those that it verifies."""

    def __init__(
        self,
        sampler: DispatchedSampler,
        prompts: Sequence[Prompt],
        num_samples: int,
        sampling: SamplingParams,
        seed_of: Callable[[int, int], int],
        label: str | None,
        enough: int | None,
    ):
        self.sampler, self.prompts, self.num_samples, self.sampling = sampler, prompts, num_samples, sampling
        self.label, self.enough = label, enough
        keys = [(group, sample) for group in range(len(prompts)) for sample in range(num_samples)]
        encoded = [sampler.chat.encode_prompt(prompt.question) for prompt in prompts]
        self.requests = [Request(encoded[group], seed_of(group, sample)) for group, sample in keys]
        self.keys = keys
        self.trajectories: dict[tuple[int, int], Trajectory] = {}
        self.mine: dict[tuple[int, int], Trajectory] = {}
        self._missing = [num_samples] * len(prompts)
        self._complete: list[int] = []
        self._unsent: list[tuple[int, Completion]] = []
        self._broken = False

    def lead(self) -> set[int]:
        """Draw everything; returns the groups that count."""
        try:
            self._draw()
            groups = self._complete if self.enough is None else self._complete[: self.enough]
            chosen = sorted(groups)
            self._tell(chosen)
            return set(chosen)
        except Exception as error:
            if not self._broken:
                known = isinstance(error, EngineError | UserError)
                self._send(_News(error=error if known else RuntimeError(f"rank 0: {error!r}")))
            raise

    def follow(self) -> set[int]:
        """Take what the first rank draws; returns the groups that count."""
        while True:
            news: _News = self.sampler.platform.broadcast_object(None, what=f"responses from rank 0 ({self.label})")
            if news.error is not None:
                raise news.error
            for index, completion in news.completions:
                self._take(index, completion)
            self._drain()
            if news.chosen is not None:
                return set(news.chosen)

    def _draw(self) -> None:
        engine = self.sampler.engine
        assert isinstance(engine, SglangEngine)
        began, tokens = time.perf_counter(), 0
        shown = False if self.label is None else None
        with progress(self.label or "", total=len(self.requests), unit="responses", enabled=shown) as bar:

            def complete(index: int, completion: Completion) -> None:
                nonlocal tokens
                self._unsent.append((index, completion))
                self._take(index, completion)
                self._drain()
                tokens += len(completion.token_ids)
                bar.update(1, extra=f"{tokens / (time.perf_counter() - began):.0f} tok/s")

            def report(_: Progress) -> None:
                bar.update(0)
                self._tell(None)

            engine.generate(
                self.requests,
                self.sampling,
                complete,
                on_progress=report,
                enough=None if self.enough is None else lambda: len(self._complete) >= (self.enough or 0),
                endpoints=self.sampler.fleet.endpoints,
            )

    def _tell(self, chosen: list[int] | None) -> None:
        completions, self._unsent = self._unsent, []
        self._send(_News(completions, chosen))

    def _send(self, news: _News) -> None:
        if self.sampler.platform.world_size == 1:
            return
        try:
            self.sampler.platform.broadcast_object(news, what="other ranks to take responses")
        except BaseException:
            self._broken = True
            raise

    def _take(self, index: int, completion: Completion) -> None:
        """File a response, and verify it when its group is this rank's."""
        if completion.finish_reason == "abort":  # given up: its group does not count
            return
        group, sample = self.keys[index]
        trajectory = self.sampler.trajectory(group, sample, self.requests[index], completion)
        self.trajectories[group, sample] = trajectory
        self._missing[group] -= 1
        if self._missing[group] == 0:
            self._complete.append(group)
        if group % self.sampler.platform.world_size == self.sampler.platform.rank:
            trajectory.text = self.sampler.chat.decode(completion.token_ids)
            self.mine[group, sample] = trajectory
            self.sampler.submit(self.prompts[group], trajectory)

    def _drain(self) -> None:
        self.sampler.judge(self.mine)
