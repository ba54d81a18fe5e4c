"""The rule checker: is this answer the gold answer?

Conventions: a unit, percent, degree or currency sign that only one of the two has is ignored (but 0.5 is not 0.5%);
"million" is part of the value; a number to a base is not its decimal value, nor is one to a base that only the answer
names; plus-minus stands for both values; order matters in tuples, not in sets or in lists of solutions; ``x = 5`` is 5;
an inequality is its interval; a decimal equals a fraction only exactly; equivalent closed forms are equal, which means:
wherever the gold answer has a real value; the usual range of a variable (all real x, integers k) may be left out.

Plain numbers are decided first, without a parser; then come the structure (``shape``) and the values (``values``);
math-verify sees only what is left (``symbolic``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from megatron_oreal.verifier import symbolic
from megatron_oreal.verifier.answer import extract_answer
from megatron_oreal.verifier.compare import Undecided, same
from megatron_oreal.verifier.grammar import AmbiguousError, TooLargeError, UnreadableError
from megatron_oreal.verifier.notation import clean, squeeze
from megatron_oreal.verifier.quantifier import without_ranges
from megatron_oreal.verifier.shape import read
from megatron_oreal.verifier.verdict import Judgement, Verdict

MAX_ANSWER_CHARS = 2_000

_PLAIN = re.compile(
    r"\$?\s*(?P<sign>[+-]?)\s*(?:\\[dt]?frac\{(?P<top>\d{1,300})\}\{(?P<bottom>\d{1,300})\}"
    r"|(?P<whole>\d{1,3}(?:,\d{3}){1,99}|\d{1,300})(?P<decimals>\.\d{1,300})?(?:\s*/\s*(?P<divisor>\d{1,300}))?)\s*\$?\.?"
)
_GOLD_DESCRIBED = re.compile(r"\(([A-J])\)\s*([^\s(].*)", re.DOTALL)
_GOLD_CHOICE = re.compile(r'[("\s]*([A-J])[)"\s]*')
_CHOICE = re.compile(
    r'"?\s*(?:option|choice|answer)?\s*"?\s*(?:\(\s*(?P<lower>[a-j])\s*\)|\(?\s*(?P<upper>[A-J])\s*(?:\)|(?=[.:"\s]|\Z)))"?'
    r"(?P<rest>\s*\Z|(?<=\)).*|[.:)].*)",
    re.IGNORECASE | re.DOTALL,
)

_OTHER_CHOICE = re.compile(
    r"\(\s*[A-Ja-j]\s*\)|(?<![A-Za-z\\])[A-J](?![A-Za-z]|\s[a-z])|\b(?:not?|wrong|incorrect|false|neither|nor|never)\b|n't\b"
)
_JOINED = re.compile(r'[\s".:)]*(?:[,;&/+]|\band\b|\bor\b)')


def judge_response(
    text: str, stopped: bool, gold: str, finish_words: Sequence[str] = (), stop_words: Sequence[str] = ()
) -> Judgement:
    """Judge one response. One that did not end with its stop token is wrong (algorithm.md, "One step" 2)."""
    if not stopped:
        return Judgement(Verdict.WRONG, "truncated")
    return check(extract_answer(text, finish_words, stop_words), gold)


def check(answer: str | None, gold: str) -> Judgement:
    """Compare an answer, as ``extract_answer`` returns it, with the gold answer."""
    if answer is None or not answer.strip():
        return Judgement(Verdict.WRONG, "no answer")
    if not gold.strip():
        return Judgement(Verdict.UNKNOWN, "gold answer is empty", answer[:MAX_ANSWER_CHARS])
    if answer.strip() == gold.strip():
        return Judgement(Verdict.CORRECT, "equal", answer)
    if len(gold) > MAX_ANSWER_CHARS:
        return Judgement(Verdict.UNKNOWN, "gold answer too long", answer[:MAX_ANSWER_CHARS])
    if len(answer) > MAX_ANSWER_CHARS:
        return Judgement(Verdict.WRONG, "answer too long", answer[:MAX_ANSWER_CHARS])
    plain_gold, plain_answer = plain_number(gold), plain_number(answer)
    if plain_gold is not None and plain_answer is not None:
        return _verdict(plain_gold == plain_answer, answer)
    return _check_notation(answer, clean(answer), clean(gold))


def plain_number(text: str) -> Fraction | None:
    r"""Return the value of an integer, a decimal, ``a/b`` or ``\frac{a}{b}``, None for anything else."""
    match = _PLAIN.fullmatch(text.strip())
    if match is None:
        return None
    if match["top"]:
        top, bottom = Fraction(int(match["top"])), int(match["bottom"])
    else:
        top = Fraction(match["whole"].replace(",", "") + (match["decimals"] or ""))
        bottom = int(match["divisor"] or 1)
    if bottom == 0:
        return None
    return (-top if match["sign"] == "-" else top) / bottom


def _verdict(is_equal: bool, answer: str) -> Judgement:
    return Judgement(Verdict.CORRECT, "equal", answer) if is_equal else Judgement(Verdict.WRONG, "not equal", answer)


def _check_notation(answer: str, text: str, gold: str) -> Judgement:
    if not text:
        return Judgement(Verdict.WRONG, "no answer", answer)
    if squeeze(text) == squeeze(gold):
        return Judgement(Verdict.CORRECT, "equal", answer)
    if choice := _GOLD_CHOICE.fullmatch(gold):
        given = _CHOICE.fullmatch(text)
        if given and (given["upper"] is None or given["upper"].isupper()):
            hedged = _JOINED.match(given["rest"]) or _OTHER_CHOICE.search(given["rest"])
            return _verdict(not hedged and (given["lower"] or given["upper"]).upper() == choice.group(1), answer)
    if (described := _GOLD_DESCRIBED.fullmatch(gold)) and not _GOLD_DESCRIBED.fullmatch(text):
        letter, gold = described.groups()
        if given := _GOLD_CHOICE.fullmatch(text):
            return _verdict(given.group(1) == letter, answer)
    gold, text = without_ranges(gold, text)
    try:
        outcome = _same(text, gold)
    except Undecided as undecided:
        return _ask_math_verify(answer, text, gold, undecided)
    if not outcome and _is_prose(gold):
        return Judgement(Verdict.UNKNOWN, "gold answer is prose", answer)
    return _verdict(outcome, answer)


def _same(text: str, gold: str) -> bool:
    """Compare; a comma before three digits may also separate two numbers of the answer's list."""
    if same(read(gold), read(text)):
        return True
    other = read(text, grouped_digits=False)
    return other != read(text) and same(read(gold), other)


def _ask_math_verify(answer: str, text: str, gold: str, undecided: Undecided) -> Judgement:
    cause = undecided.cause
    if isinstance(cause, TooLargeError):
        if undecided.side == "answer":
            return Judgement(Verdict.WRONG, f"not equal: {cause}", answer)
        return Judgement(Verdict.UNKNOWN, f"gold answer: {cause}", answer)
    if undecided.side == "answer" and isinstance(cause, AmbiguousError):
        return Judgement(Verdict.WRONG, "not equal: answer cannot be read", answer)
    parsed_gold = symbolic.read(gold)
    if parsed_gold is None:
        if undecided.side == "answer" and isinstance(cause, UnreadableError):
            return Judgement(Verdict.WRONG, "not equal: answer cannot be read", answer)
        return Judgement(Verdict.UNKNOWN, "gold answer cannot be read", answer)
    parsed_answer = symbolic.read(text)
    if parsed_answer is None:
        return Judgement(Verdict.WRONG, "not equal: answer cannot be read", answer)
    return _verdict(symbolic.equal(parsed_gold, parsed_answer), answer)


def _is_prose(gold: str) -> bool:
    return len(re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", gold)) >= 3
