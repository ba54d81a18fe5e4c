r"""The range of a variable that stands behind an answer, as in ``f(x) = 2x - 1 \text{ for all } x \in \mathbb{R}``."""

from __future__ import annotations

import re
from dataclasses import dataclass

_GAP = r"[\s\",(]*"
_SET = r"\\in(?![A-Za-z])\s*(?:\\mathbb)?\s*[{\"]?\s*(?P<range>(?-i:[RZN]))\s*[}\"]?"
_NAMED = r"(?P<range>(?:real(?:\snumber)?|integer|constant)s?)\b"
_VARIABLE = r"\b(?P<variable>[A-Za-z])\b"
_ALL = r"(?:for\s(?:all|any|every|each|some)\b|\\forall)"
_FORMS = [
    re.compile(rf"(?<![\s\",(])[\s\",(]+{form}[\s\")]*\Z", re.IGNORECASE)
    for form in (
        rf"(?:{_ALL}{_GAP}|(?:for|where|with)\b{_GAP})?{_VARIABLE}\s*{_SET}",
        rf"{_ALL}{_GAP}{_NAMED}{_GAP}{_VARIABLE}",
        rf"{_ALL}{_GAP}(?P<range>){_VARIABLE}",
        rf"where\b{_GAP}{_VARIABLE}{_GAP}is\san?\s(?:any\s|arbitrary\s)*{_NAMED}",
    )
]
_COMMAND = re.compile(r"\\[A-Za-z]+")


@dataclass(frozen=True, slots=True)
class _Ranged:
    core: str
    variable: str
    range: str


def without_ranges(gold: str, answer: str) -> tuple[str, str]:
    """Return two texts that ``notation.clean`` has normalised without the ranges behind them, where these agree.

    A range in only one of the two must be the usual one: the integers for k, l, m and n, the real numbers for others.
    """
    of_gold, of_answer = _split(gold), _split(answer)
    if of_gold and of_answer:
        if of_gold.range and of_answer.range and of_gold.range != of_answer.range:
            return gold, answer
        return of_gold.core, of_answer.core
    for one in (of_gold, of_answer):
        if one and one.range not in ("", "Z" if one.variable in "klmn" else "R"):
            return gold, answer
    return of_gold.core if of_gold else gold, of_answer.core if of_answer else answer


def _split(text: str) -> _Ranged | None:
    for form in _FORMS:
        if found := form.search(text):
            core, variable = text[: found.start()], found["variable"]
            if "some" in found.group().lower() and f"({variable})" in core:  # f(x) = x for some x is no function
                return None
            if core.count('"') % 2 or core.count("(") != core.count(")") or variable not in _COMMAND.sub("", core):
                return None
            return _Ranged(core, variable, {"r": "R", "i": "Z", "z": "Z", "n": "N"}.get(found["range"][:1].lower(), ""))
    return None
