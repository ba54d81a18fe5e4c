"""Draw a step's responses with all servers from one rank, and verify them on all ranks while they still come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from megatron_oreal.data.chat import ChatTemplate
from megatron_oreal.data.types import Prompt, Trajectory
from megatron_oreal.errors import UserError
from megatron_oreal.platform import Platform
from megatron_oreal.rollout.draw import Draw, owner_of
from megatron_oreal.rollout.engine import Completion, EngineError, FinishReason, Request, SamplingParams
from megatron_oreal.rollout.fleet import Fleet
from megatron_oreal.rollout.sampler import RolloutSampler
from megatron_oreal.rollout.sglang.dispatcher import Progress
from megatron_oreal.rollout.sglang.engine import SglangEngine
from megatron_oreal.telemetry import progress
from megatron_oreal.verifier import Verifier

ROUND_BYTES = 64 * 2**20
"""Of the responses that the first rank passes on at a time."""
_REASONS: tuple[FinishReason, ...] = get_args(FinishReason)
_HEAD = np.dtype([("index", np.int32), ("tokens", np.int32), ("reason", np.int8), ("kept_mass", np.float64)])


@dataclass
class _News:
    """What the first rank tells all others: ``heads``, of dtype ``_HEAD``, of responses that it is about to send.

    ``chosen``: groups that count, at the end.
    """

    heads: np.ndarray
    chosen: np.ndarray | None = None
    error: Exception | None = None


class DispatchedSampler(RolloutSampler):
    """One queue over all servers, on the first rank; every rank gets the responses to its groups and verifies them.

    The first rank passes on what has been completed about once a second, also when that is nothing: the others wait in
    host memory, never longer than that for a first rank that lives, and never in a device collective. A response goes
    to the one rank that verifies it; all others hear its size alone.
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
    ) -> Draw:
        """As ``RolloutSampler.sample``. ``enough``: groups after which drawing ends; only these are returned.

        Raises ``EngineError`` on every rank when the servers cannot answer all requests.
        """
        kind = _Leader if self.platform.rank == 0 else _Follower
        step = kind(self, prompts, num_samples, label)
        if isinstance(step, _Leader):
            chosen = step.draw_and_send(sampling, seed_of, enough)
        else:
            chosen = step.take_and_verify()
        self.await_verdicts(step.mine, None if label is not None else False)
        return self.share({key: trajectory for key, trajectory in step.mine.items() if key[0] in chosen})


class _Step:
    """One ``sample`` call on this rank; ``mine``: the responses that it verifies."""

    def __init__(self, sampler: DispatchedSampler, prompts: Sequence[Prompt], num_samples: int, label: str | None):
        self.sampler, self.prompts, self.num_samples, self.label = sampler, prompts, num_samples, label
        self.platform = sampler.platform
        self.mine: dict[tuple[int, int], Trajectory] = {}

    def owner(self, index: int) -> int:
        """The rank that verifies a request's response."""
        return owner_of(index // self.num_samples, self.platform.world_size)

    def take(self, index: int, prompt_ids: np.ndarray, completion: Completion) -> None:
        """File a response to one of this rank's groups and have it verified."""
        group, sample = divmod(index, self.num_samples)
        trajectory = self.sampler.trajectory(group, sample, prompt_ids, completion)
        trajectory.text = self.sampler.chat.decode(completion.token_ids)
        self.mine[group, sample] = trajectory
        self.sampler.submit(self.prompts[group], trajectory)


class _Follower(_Step):
    """A rank that waits for the first rank."""

    def take_and_verify(self) -> set[int]:
        """Take what the first rank draws for this rank; returns the groups that count."""
        encoded: dict[int, np.ndarray] = {}
        what = "responses from rank 0" + (f" ({self.label})" if self.label else "")
        while True:
            news: _News = self.platform.broadcast_object(None, what=what)
            if news.error is not None:
                raise news.error
            owners = [self.owner(index) for index in news.heads["index"].tolist()]
            heads = news.heads[np.array(owners, dtype=np.int32) == self.platform.rank]
            size = 8 * int(heads["tokens"].sum())
            payload = self.platform.exchange({}, {0: size}, what)[0]
            for index, completion in _unpacked(heads, payload):
                group = index // self.num_samples
                if group not in encoded:
                    encoded[group] = self.sampler.chat.encode_prompt(self.prompts[group].question)
                self.take(index, encoded[group], completion)
            self.sampler.judge(self.mine)
            if news.chosen is not None:
                return set(news.chosen.tolist())


class _Leader(_Step):
    """The first rank, which draws everything."""

    def __init__(self, sampler: DispatchedSampler, prompts: Sequence[Prompt], num_samples: int, label: str | None):
        super().__init__(sampler, prompts, num_samples, label)
        self._missing = [num_samples] * len(prompts)
        self._complete: list[int] = []
        self._unsent: list[tuple[int, Completion]] = []
        self._broken = False

    def draw_and_send(
        self, sampling: SamplingParams, seed_of: Callable[[int, int], int], enough: int | None
    ) -> set[int]:
        """Draw everything and send it to those who verify it; returns the groups that count."""
        try:
            encoded = [self.sampler.chat.encode_prompt(prompt.question) for prompt in self.prompts]
            requests = [
                Request(prompt_ids, seed_of(group, sample))
                for group, prompt_ids in enumerate(encoded)
                for sample in range(self.num_samples)
            ]
            self._draw(requests, sampling, enough)
            groups = self._complete if enough is None else self._complete[:enough]
            self._tell(np.array(sorted(groups), dtype=np.int32))
            return set(groups)
        except Exception as error:
            if not self._broken:
                known = isinstance(error, EngineError | UserError)
                told = error if known else RuntimeError(f"rank 0: {error!r}")
                self._send(_News(_heads([]), error=told), [])
            raise

    def _draw(self, requests: Sequence[Request], sampling: SamplingParams, enough: int | None) -> None:
        engine = self.sampler.engine
        assert isinstance(engine, SglangEngine)
        began, tokens = time.perf_counter(), 0
        shown = False if self.label is None else None
        with progress(self.label or "", total=len(requests), unit="responses", enabled=shown) as bar:

            def complete(index: int, completion: Completion) -> None:
                nonlocal tokens
                if completion.finish_reason != "abort":  # given up: its group does not count
                    self._file(index, requests[index], completion)
                self.sampler.judge(self.mine)
                tokens += len(completion.token_ids)
                bar.update(1, extra=f"{tokens / (time.perf_counter() - began):.0f} tok/s")

            def report(_: Progress) -> None:
                bar.update(0)
                self._tell(None)

            engine.generate(
                requests,
                sampling,
                complete,
                on_progress=report,
                enough=None if enough is None else lambda: len(self._complete) >= enough,
                endpoints=self.sampler.fleet.endpoints,
                keep=False,  # a step of 16,384 responses is gigabytes, of which this rank verifies a part
            )

    def _file(self, index: int, request: Request, completion: Completion) -> None:
        group = index // self.num_samples
        self._missing[group] -= 1
        if self._missing[group] == 0:
            self._complete.append(group)
        if self.owner(index) == 0:
            self.take(index, request.prompt_ids, completion)
        else:
            self._unsent.append((index, completion))

    def _tell(self, chosen: np.ndarray | None) -> None:
        unsent, self._unsent = self._unsent, []
        rounds = list(_rounds(unsent)) or [[]]
        for number, part in enumerate(rounds, 1):
            self._send(_News(_heads(part), chosen if number == len(rounds) else None), part)

    def _send(self, news: _News, completions: Sequence[tuple[int, Completion]]) -> None:
        if self.platform.world_size == 1:
            return
        by_owner: dict[int, list[np.ndarray]] = {}
        for index, completion in completions:
            by_owner.setdefault(self.owner(index), []).extend(_packed(completion))
        what = "other ranks to take responses"
        try:
            self.platform.broadcast_object(news, what=what)
            self.platform.exchange({rank: np.concatenate(parts) for rank, parts in by_owner.items()}, {}, what)
        except BaseException:
            self._broken = True
            raise


def _heads(completions: Sequence[tuple[int, Completion]]) -> np.ndarray:
    """Of dtype ``_HEAD`` [n]."""
    heads = np.empty(len(completions), dtype=_HEAD)
    for i, (index, each) in enumerate(completions):
        heads[i] = (index, len(each.token_ids), _REASONS.index(each.finish_reason), each.kept_mass)
    return heads


def _rounds(completions: Sequence[tuple[int, Completion]]) -> Iterator[list[tuple[int, Completion]]]:
    """Parts of at most ``ROUND_BYTES``, or of one response."""
    part: list[tuple[int, Completion]] = []
    held = 0
    for each in completions:
        size = 8 * len(each[1].token_ids)
        if part and held + size > ROUND_BYTES:
            yield part
            part, held = [], 0
        part.append(each)
        held += size
    if part:
        yield part


def _packed(completion: Completion) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and log-probabilities, uint8 [4 n] each."""
    return completion.token_ids.astype(np.int32).view(np.uint8), completion.logp.astype(np.float32).view(np.uint8)


def _unpacked(heads: np.ndarray, payload: np.ndarray) -> Iterator[tuple[int, Completion]]:
    """Copies, so that a response that is dropped later does not keep the others of its round."""
    at = 0
    for head in heads:
        size = 4 * int(head["tokens"])
        tokens = payload[at : at + size].view(np.int32).copy()
        logp = payload[at + size : at + 2 * size].view(np.float32).copy()
        yield int(head["index"]), Completion(tokens, logp, _REASONS[head["reason"]], float(head["kept_mass"]))
        at += 2 * size
