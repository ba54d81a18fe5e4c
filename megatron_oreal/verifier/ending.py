"""The value that a response ends on when it marks none as its answer, and whether it takes an answer back.

A number counts only as the whole right-hand operand: what is returned runs from the last word of prose (or the start
of its statement) to the end of the sentence, so that ``$x^2$``, ``3 * 10^8``, ``x > 7`` and ``4 million`` come out
whole and are compared as what they are.
"""

from __future__ import annotations

import re

_MAX_CHARS = 1_000
_MAX_WORDS_AFTER = 4
_CLOSERS = re.compile(r"(?:\s|\*\*|`|\\\]|\\\)|\$\$?\s*\\(?:blacksquare|square|qed|Box)\s*\$\$?|[■□∎])+\Z")
_SENTENCE = re.compile(r"(?<=[.?!;])\s(?=\S)|\n")
_MATHEMATICS = re.compile(r"\$[^$]{1,800}\$|\\\([^$]{1,800}?\\\)|\\\[[^$]{1,800}?\\\]")
_WORD = re.compile(r"(?<![A-Za-z\\'’])[A-Za-z'’]{2,}(?![A-Za-z_^({\[])")
_JOINING = frozenset(("and", "or", "pi", "sqrt", "ln", "log", "sin", "cos", "tan", "exp"))
_CLAUSE = re.compile(r"[,;:]\s")
_NOT_A_VALUE = re.compile(
    r"\b(?:not|no|nor|neither|never|cannot|without|except|least|most|than|between|about|around|roughly|nearly|almost|"
    r"approximately|either|unless|if|wrong|incorrect|false)\b|n['’]t\b",
    re.IGNORECASE,
)
"""Words of a clause after which its last number is no plain value: a negation, a bound, a condition."""
_INTRODUCED = re.compile(
    r"(?:\b(?:is|are|was|were|be|equals?|gets?|gives?|gave|yields?|leaves?|left with|us with|makes?|becomes?|obtains?|"
    r"finds?|found|have|has|had|so|that|thus|hence|therefore|then|conclude|answer|result|total|sum|needs?|takes?|costs?|"
    r"(?:comes?|amounts?|adds? up|sums?|equal|reduces|simplifies|evaluates|leads) to|"
    r"(?:ratio|total|sum|value|probability|answer|result|length|area|volume|maximum|minimum|average|mean) of|"
    r"out (?:as|to be))|\b[A-Za-z]{1,20}['’]s)\Z",
    re.IGNORECASE,
)
"""What may stand right before a value; after any other word ("divisible by 12", "Theorem 3") none is stated."""
_NAMED = re.compile(r"[\s$*\\\[({]*(?:[=:]|\\?[A-Za-z]\w{0,9}\s*=)")
_AFTER = re.compile(
    r"(?:\s+(?:left|altogether|overall|in\s(?:all|total))|,?\s+as\s(?:required|desired|claimed|wanted|expected)|"
    r"\s+is\s(?:the|our|my)\s(?:(?:final|correct|required|desired|right)\s)?(?:answer|one|result|solution))\Z"
)
_ENCLOSED = re.compile(r"[(\[]\s*[\d.]+\s*[)\]]")

_DENIED_BEFORE = re.compile(
    r"(?:\b(?:not|never|cannot|nor|neither|(?:wrong|incorrect|false)\s+(?:final\s+)?(?:answers?|results?|values?))|"
    r"n['’]t)(?:\s+(?:think|believe|say|mean|claim)(?:\s+that)?(?:\s+it)?)?(?:\s+(?:be|is|are|equal|equals|was))?[\s$:*]*\Z",
    re.IGNORECASE,
)
_DENIED_AFTER = re.compile(
    r"[\s$.*)]{0,6}(?:(?:is|was|are|would be|must be|seems|looks)\s+(?:\w+\s+){0,2}?|"
    r",\s*(?:which|but (?:that|this|it)) is (?:\w+\s+)?)(?:not|wrong|incorrect|false|invalid|impossible|mistaken)\b|"
    r"[\s$.*)]{0,6}(?:can(?:not|['’]t| not)|is(?:n['’]t| not)|fails?)\b",
    re.IGNORECASE,
)
_TAKEN_BACK = re.compile(
    r"\b(?:actually,?\s+(?:no|it|that|the)|scratch that|correction\b|(?:that|this|it) (?:is|was) (?:wrong|incorrect|"
    r"a mistake|not right)|(?:i|we) (?:made|was|were) (?:a mistake|an error|wrong)|wait, no)",
    re.IGNORECASE,
)
_BOX_TAKEN_BACK = re.compile(
    r"(?:\A|[.!?\n])[\s$*)\]}\\]*(?:(?:wait|hm+|oh|no|sorry|but)\b[\s,.!:–—-]*)*"
    r"(?:\bactually,?\s+(?:no\b|(?:it|that|the answer)\s+(?:should|must)\b)|\bscratch that|\bcorrection:|\bwait, no\b|"
    r"\b(?:that|this|it) (?:is|was) (?:wrong|incorrect|a mistake|not right)\b(?! to\b)|"
    r"\b(?:i|we) (?:made (?:a mistake|an error)|(?:was|were) wrong)\b)",
    re.IGNORECASE,
)
"""At the start of a sentence only: behind a box others' mistakes are told as well ("many get 8, but that is wrong")."""


def denied(before: str, after: str) -> bool:
    """Tell whether the words around an answer deny it: "not 7", "7 is wrong"."""
    return bool(_DENIED_BEFORE.search(before[-60:]) or _DENIED_AFTER.match(after[:120]))


def taken_back(after: str) -> bool:
    """Tell whether what follows a stated answer takes it back: "Actually no: it is 8"."""
    return bool(_TAKEN_BACK.search(after[:2_000]))


def box_taken_back(after: str) -> bool:
    """Tell whether a sentence behind a box takes its content back."""
    return bool(_BOX_TAKEN_BACK.search(re.sub(r"\s*\n\s*", "\n", after[:2_000].strip())))


def final_value(text: str) -> str | None:
    """Return the value that the last sentence ends on, None where it ends on none, in a question or in a denial."""
    text = text[-5 * _MAX_CHARS :].rstrip()
    text = _CLOSERS.sub("", text[-_MAX_CHARS:])
    if not text or text.endswith("?"):
        return None
    sentence = _SENTENCE.split(text)[-1].strip()
    if sentence.endswith(".") and not sentence.endswith(".."):
        sentence = sentence[:-1]
    sentence = _AFTER.sub("", _CLOSERS.sub("", sentence))
    digits = [match.end() for match in re.finditer(r"\d", sentence)]
    if not digits:
        return None
    start = _operand_start(sentence, digits[-1])
    clause = list(_CLAUSE.finditer(sentence, 0, start))
    if _NOT_A_VALUE.search(sentence, clause[-1].end() if clause else 0, start):
        return None
    before = sentence[max(0, start - 60) : start].rstrip(" ,:;*_$([")
    if before and not _INTRODUCED.search(before) and not _NAMED.match(sentence[start:]):
        return None
    value = sentence[start:].strip(" \t*_`").removeprefix("\\[").removeprefix("\\(").lstrip("=:≈, ")
    if len(re.findall(r"[A-Za-z]{2,}", sentence[digits[-1] :])) > _MAX_WORDS_AFTER:
        return None
    if not value or value[0] in "<>≤≥≠/^,;)}]!" or _ENCLOSED.fullmatch(value) or value.startswith(("\\le", "\\ge")):
        return None
    return value


def _operand_start(sentence: str, end: int) -> int:
    """Return where the operand that holds the last digit starts: after the last word of prose before it."""
    prose = _MATHEMATICS.sub(lambda match: "$" + "0" * (len(match.group()) - 2) + "$", sentence)
    words = [word for word in _WORD.finditer(prose, 0, end) if word.group().lower() not in _JOINING]
    return words[-1].end() if words else 0
