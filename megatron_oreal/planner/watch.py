"""What is alive in each phase of the actor's update: the same watch on real ranks and on simulated ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from megatron_oreal.actor.head import VocabularyHead
from megatron_oreal.actor.optimizer import ModelOptimizer
from megatron_oreal.planner.live import LiveStorages
from megatron_oreal.telemetry import PhaseTimers

UPDATE_PHASES = ("reference", "reward_model", "policy")


class PhaseWatch(PhaseTimers):
    """Timers that keep the peak of every phase of the update, by item; an optimizer's step is one: ``policy/step``."""

    def __init__(self, storages: LiveStorages) -> None:
        super().__init__()
        self._storages = storages
        self.peaks: dict[str, dict[str, int]] = {}
        self._phase = ""

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Watch a phase; others are not told apart."""
        if name not in UPDATE_PHASES:
            yield
            return
        self._phase = name
        self._storages.restart()
        yield
        self._end(name)

    def step(self, run: Callable[..., Any], *args: Any) -> Any:
        """Watch an optimizer's step within a phase."""
        self._end(self._phase)
        self._storages.restart()
        with self._storages.making("optimizer step"):
            result = run(*args)
        self._end(f"{self._phase}/step")
        return result

    def _end(self, name: str) -> None:
        self.peaks.setdefault(name, dict(self._storages.peak))

    @contextlib.contextmanager
    def actor(self) -> Iterator[None]:
        """Scope of an update: name what the vocabulary head and the optimizers make."""
        storages, step = self._storages, ModelOptimizer.step

        def in_head(method: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                with storages.making("logits and loss"):
                    return method(*args, **kwargs)

            return call

        with (
            mock.patch.object(ModelOptimizer, "step", lambda optimizer, lr: self.step(step, optimizer, lr)),
            mock.patch.object(VocabularyHead, "policy_loss", in_head(VocabularyHead.policy_loss)),
            mock.patch.object(VocabularyHead, "token_logprobs", in_head(VocabularyHead.token_logprobs)),
        ):
            yield
