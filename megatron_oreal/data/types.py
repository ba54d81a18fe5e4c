"""Plain data that the rooms hand to each other."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from megatron_oreal.verifier.verdict import Judgement


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem. ``pass_rate`` in [0, 1] is what an earlier sampling measured, None when unknown."""

    id: str
    question: str
    gold_answer: str
    pass_rate: float | None = None


@dataclass(slots=True)
class Trajectory:
    """One sampled response to one prompt of a step.

    ``group``: index of the prompt within the step; ``sample``: 0 <= sample < prompt_repeat_k. ``prompt_ids`` int32 [P];
    ``response_ids`` int32 [n], the stop token included; ``engine_logp`` float32 [n], full vocabulary at the sampling
    temperature. ``stopped`` is True when the response ended with the stop token. ``judgement`` is filled in by the
    verifier.
    """

    group: int
    sample: int
    prompt_ids: np.ndarray
    response_ids: np.ndarray
    engine_logp: np.ndarray
    stopped: bool
    judgement: Judgement | None = None
    kept_mass: float = 1.0
    text: str = field(default="", repr=False)

    @property
    def num_tokens(self) -> int:
        """Prompt and response tokens together."""
        return len(self.prompt_ids) + len(self.response_ids)
