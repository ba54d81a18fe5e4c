"""What every rollout engine can do, and the data that goes in and out of it.

An engine turns token prompts into token responses with the newest published policy. The embedded engine and SGLang
implement the same protocol and pass the same contract tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from torch import Tensor

from megatron_oreal.layout import Layout

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample; the names are the engines'.

    ``temperature == 0`` is greedy. ``top_k == 0`` and ``top_p == 1`` switch the filters off. A response ends with the
    stop token, which is part of it, or after ``max_new_tokens``, or when prompt + response reach ``max_length`` tokens.
    ``stop_token_id is None`` never stops early. ``new_tokens_by_seed``: for benchmarks, a limit of each request's own,
    1 or more, by its seed: with it and without a stop token every response has a length that is known beforehand.
    """

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    max_length: int
    stop_token_id: int | None
    new_tokens_by_seed: Mapping[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One sample to draw. ``prompt_ids`` int32 [P], P >= 1. ``seed`` fixes the sample whatever else is in the batch."""

    prompt_ids: np.ndarray
    seed: int

    def limit(self, sampling: SamplingParams) -> int:
        """Return the most tokens that the response may have, 1 or more."""
        room = min(sampling.max_new_tokens, sampling.max_length - len(self.prompt_ids))
        return room if sampling.new_tokens_by_seed is None else min(room, sampling.new_tokens_by_seed[self.seed])


@dataclass(frozen=True, slots=True)
class Completion:
    """One response of n tokens.

    ``token_ids`` int32 [n] (the stop token included); ``logp`` float32 [n], the log-probability of each token over the
    full vocabulary at the sampling temperature, before top-p and top-k (at temperature 0: at temperature 1);
    ``kept_mass``: mean over tokens of the probability mass that top-p/top-k kept, 1.0 when both are off.
    ``"length"`` means that a limit cut it; ``"abort"`` that the engine gave it up: never trained on.
    """

    token_ids: np.ndarray
    logp: np.ndarray
    finish_reason: FinishReason
    kept_mass: float = 1.0


@dataclass(frozen=True, slots=True)
class Health:
    """``version``: of the weights that would answer now (-1: none yet); ``awake``: False between sleep and wake."""

    ok: bool
    version: int
    awake: bool
    detail: str = ""


class Engine(Protocol):
    """A rollout engine. Every method raises ``EngineError`` when the engine cannot do what was asked.

    ``layout`` says what stands in its weight buffers; ``layout.shards[i]`` is its tensor-parallel rank ``i``.
    """

    @property
    def layout(self) -> Layout:
        """Return where every element of every buffer comes from."""
        ...

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingParams,
        on_complete: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Draw one response per request, in request order.

        ``on_complete(i, completion)`` is called as soon as request ``i`` is done, while others still generate.
        Raises ``EngineError`` when asleep or before the first ``load_weights``.
        """
        ...

    def weight_buffers(self) -> Mapping[str, Tensor]:
        """Return the tensors, in the engine's own layout and names, that the next version is written into.

        For a rank that holds one shard of the engine; ``weight_shards`` is for any.
        """
        ...

    def weight_shards(self) -> Mapping[int, Mapping[str, Tensor]]:
        """Return the buffers of every shard that this rank writes, by the engine's tensor-parallel rank."""
        ...

    def load_weights(self, version: int) -> object:
        """Make what stands in ``weight_shards()`` the weights that generate, as ``version``, newer than the last."""
        ...

    def sleep(self) -> None:
        """Give back what only generation needs (KV cache, and weights where the engine can). Idempotent."""
        ...

    def wake(self) -> None:
        """Undo ``sleep``; generation works again once weights of a current version are loaded. Idempotent."""
        ...

    def health(self) -> Health:
        """Answer at once, in any state."""
        ...

    def shutdown(self) -> None:
        """Release everything. Idempotent."""
        ...


class EngineError(RuntimeError):
    """The engine cannot do what was asked; the message says in which state it was."""
