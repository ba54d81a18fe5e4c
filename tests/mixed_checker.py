"""A ``verifier.checker`` with which a model that can do nothing still has groups of right and wrong answers."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_oreal.verifier.verdict import Judgement, Verdict


def judge_response(
    text: str, stopped: bool, gold: str, finish_words: Sequence[str] = (), stop_words: Sequence[str] = ()
) -> Judgement:
    """Right is a response with an even number of digits."""
    digits = sum(character.isdigit() for character in text)
    return Judgement(Verdict.WRONG if digits % 2 else Verdict.CORRECT, f"{digits} digits", str(digits))
