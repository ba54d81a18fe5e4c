"""From a response to the text of its final answer, by one pass of linear searches."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from megatron_oreal.verifier.ending import box_taken_back, denied, final_value, taken_back

MAX_CONCLUSION_CHARS = 50_000
_MAX_STATEMENT_CHARS = 1_000
_MAX_LISTED_BOXES = 20

_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_BARE_BOX = re.compile(r"[^\s{}$]+")
_BETWEEN_BOXES = re.compile(r"(?:[\s,;$.]|\\[()\[\]]|\band\b|\bor\b|\\text\{\s?,?\s?(?:and|or)\s?\}){1,60}")
_SEPARATOR = re.compile(r"[,;]|\band\b|\bor\b")
_STOP_TOKENS = re.compile(r"(?:\s*(?:<\|[^|<>]{1,40}\|>|</s>|<eos>))+\s*\Z")
_STATEMENT = re.compile(
    r"\b(?:answers?|(?:correct|right|best) (?:option|choice))\b(?: to (?:the|this|your) \w{1,20})?[\s*_]{0,4}"
    r"(?:is|are|equals|(?:must|would|should|will) be|:|=)[\s*_:=]{0,6}"
    r"(?:(?:then|therefore|thus|hence|indeed|simply|just|given by|equal to)[\s*_:=,]{1,6})?",
    re.IGNORECASE,
)
_NO_STATEMENT = re.compile(
    r"(?:\b(?:wrong|incorrect|false|not|naive|tempting|mistaken|(?:is|was|are) (?:the|this|that|an))|n['’]t)\s+"
    r"(?:(?:the|an?|correct|right|final)\s+){0,2}\Z",
    re.IGNORECASE,
)
_CONTINUED = re.compile(
    r"[\s*_]{0,4}(?:(?:[A-Za-z]{1,12}\s){0,2}(?:[,;&]\s*(?:and\b|or\b)?|\(?(?:and|or)\b|plus\b|minus\b|times\b)"
    r"[\s*_]{0,4}(?:\$|\\[(\[]|-?\d)|(?:dozen|hundred|thousand|million|billion|trillion)\b)",
    re.IGNORECASE,
)
"""Behind the formula that a statement begins with: what makes it a list, a sum or a multiple, and no whole answer."""
_STATEMENT_END = re.compile(r"\.(?:\s|$)|\n|,?\s(?:because|since|where|which|as)\s|,\s(?:not|rather than)\s|$")


def conclusion(text: str, finish_words: Sequence[str], stop_words: Sequence[str] = ()) -> str:
    """Return what follows the last of ``finish_words`` that occurs (all of ``text`` when none does).

    A trailing stop word (one of ``stop_words``, or any token of the form ``<|...|>``, ``</s>``, ``<eos>``) is removed.
    At most the last 50,000 characters are returned.
    """
    start = max((at + len(word) for word in finish_words if word and (at := text.rfind(word)) >= 0), default=0)
    text = text[start:].rstrip()
    tail = text[max(0, len(text) - MAX_CONCLUSION_CHARS) :]
    for word in stop_words:
        if word:
            tail = tail.removesuffix(word).rstrip()
    last_tokens = tail[-200:]
    return tail[: len(tail) - len(last_tokens)] + _STOP_TOKENS.sub("", last_tokens)


def extract_answer(text: str, finish_words: Sequence[str] = (), stop_words: Sequence[str] = ()) -> str | None:
    r"""Return the final answer of a response, or None when it states none.

    In order: the last complete ``\boxed{...}`` (nested braces; several that only commas, "and" or "or" separate are one
    list), the last "the answer is ..." or "answer: ...", the value that it ends on. An answer that the words around it
    deny ("not 7", "7 is wrong") is none. Only the conclusion counts (see ``conclusion``), and after a box that is never
    closed no value but a stated one.
    """
    text = conclusion(text, finish_words, stop_words)
    boxes, unclosed = _boxes(text)
    while boxes and not text[boxes[-1][1] : boxes[-1][2]].strip():
        boxes.pop()
    if boxes:
        before, after = text[max(0, boxes[-1][0] - 60) : boxes[-1][0]], text[boxes[-1][3] :]
        if denied(before, after) or box_taken_back(after):
            return _last_statement(after)
    return _last_boxes(text, boxes) or _last_statement(text) or (None if unclosed else final_value(text))


def _boxes(text: str) -> tuple[list[tuple[int, int, int, int]], bool]:
    """Return (start, start of the content, its end, end) of every box, and whether one is never closed."""
    closing = _closing_braces(text)
    boxes, unclosed = [], False
    for box in _BOX.finditer(text):
        at = box.end()
        if at < len(text) and text[at] == "{":
            end = closing.get(at)
            if end is None:
                unclosed = True
            else:
                boxes.append((box.start(), at + 1, end, end + 1))
        elif bare := _BARE_BOX.match(text, at):
            boxes.append((box.start(), at, bare.end(), bare.end()))
    return boxes, unclosed


def _last_boxes(text: str, boxes: list[tuple[int, int, int, int]]) -> str | None:
    """Return the content of the last box, with those it is listed with; sliced only where needed."""
    if not boxes:
        return None
    start = boxes[-1][0]
    contents = [text[boxes[-1][1] : boxes[-1][2]].strip()]
    for before, at, end, after in reversed(boxes[:-1][-_MAX_LISTED_BOXES:]):
        if not _BETWEEN_BOXES.fullmatch(text, after, start) or not _SEPARATOR.search(text, after, start):
            break
        contents.append(text[at:end].strip())
        start = before
    return ", ".join(reversed(list(dict.fromkeys(contents))))


def closing_brace(text: str, at: int) -> int | None:
    r"""Return the index of the brace that closes the one at ``at``; ``\{`` and ``\}`` are not braces of a group."""
    return _closing_braces(text).get(at)


def _closing_braces(text: str) -> dict[int, int]:
    closing: dict[int, int] = {}
    opened: list[int] = []
    for brace in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if brace.group() == "{":
            opened.append(brace.start())
        elif brace.group() == "}" and opened:
            closing[opened.pop()] = brace.start()
    return closing


def _last_statement(text: str) -> str | None:
    for statement in reversed(list(_STATEMENT.finditer(text))):
        if _NO_STATEMENT.search(text[max(0, statement.start() - 40) : statement.start()]):
            continue
        rest = text[statement.end() : statement.end() + _MAX_STATEMENT_CHARS]
        if (formula := _whole_formula(rest)) is not None:
            rest = formula
        elif end := _STATEMENT_END.search(rest):
            rest = rest[: end.start()]
        if stated := rest.strip(" \t*_`"):
            after = text[statement.end() :].partition(stated)[2]
            return None if denied("", after) or taken_back(after) else stated
    return None


def _whole_formula(text: str) -> str | None:
    """Return the content of the formula that ``text`` begins with, None without one or where it goes on behind it."""
    for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(opening) and (end := _unescaped(closing).search(text, len(opening))):
            return None if _CONTINUED.match(text, end.end()) else text[len(opening) : end.start()]
    return None


@lru_cache(maxsize=4)
def _unescaped(delimiter: str) -> re.Pattern[str]:
    r"""Match a closing delimiter; ``\$`` is money."""
    return re.compile((r"(?<!\\)" if delimiter[0] == "$" else "") + re.escape(delimiter))
