"""Floating-point operations of a step's parts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_oreal.data.packing import WorkModel
from megatron_oreal.layout.model_spec import ModelSpec


@dataclass(frozen=True)
class ModelFlops:
    """Floating-point operations that the models need, by the one formula of ``data.packing.WorkModel``.

    A backward pass is two forwards; what is recomputed does not count. The vocabulary head counts on every position, as
    is usual (the trainer runs it on response positions only). The reward model has one column in its place.
    """

    policy: WorkModel
    reward_model: WorkModel | None

    @classmethod
    def of(cls, spec: ModelSpec, *, has_reward_model: bool) -> ModelFlops:
        """Of a policy (and a reference) of this shape, and its reward model."""
        policy = WorkModel.from_spec(spec)
        head = (spec.vocab_size - 1) * spec.hidden_size
        scorer = WorkModel(policy.matmul_params - head, policy.attention_width)
        return cls(policy, scorer if has_reward_model else None)

    def generation(self, prompt_tokens: int, lengths: Iterable[int]) -> int:
        """One group: its prompt once, and each response's tokens at their positions."""
        prompt = self.policy(prompt_tokens)
        return prompt + sum(self.policy(prompt_tokens + int(length)) - prompt for length in lengths)

    def update(self, sequences: Iterable[int]) -> dict[str, int]:
        """By phase, for sequences of these total lengths: reference 1, reward model 3, policy 3 forwards' worth."""
        lengths = [int(length) for length in sequences]
        forward = sum(map(self.policy, lengths))
        found = {"reference": forward, "policy": 3 * forward}
        if self.reward_model is not None:
            found["reward_model"] = 3 * sum(map(self.reward_model, lengths))
        return found
