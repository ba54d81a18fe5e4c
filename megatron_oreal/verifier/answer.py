"""From a response to the text of its final answer, by one pass of linear searches."""

from __future__ import annotations

import re
from collections.abc import Sequence

MAX_CONCLUSION_CHARS = 50_000
_MAX_STATEMENT_CHARS = 1_000

_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_BARE_BOX = re.compile(r"[^\s{}$]+")
_STOP_TOKENS = re.compile(r"(?:\s*(?:<\|[^|<>]{1,40}\|>|</s>|<eos>))+\s*\Z")
_STATEMENT = re.compile(r"\banswer\b[\s*_]{0,4}(?:is|are|:|=)[\s*_:=]{0,6}", re.IGNORECASE)
_STATEMENT_END = re.compile(r"\.(?:\s|$)|\n|$")
_DIGITS = r"\d{1,1000}(?:,\d{3}(?!\d)){0,300}(?:\.\d{1,1000})?"
_NUMBER = re.compile(
    rf"(?:(?<![\w)}}\]])[-−])?(?:\\[dt]?frac\{{-?\d{{1,1000}}\}}\{{-?\d{{1,1000}}\}}|(?<![\w.]){_DIGITS}(?:/{_DIGITS})?)"
)


def conclusion(text: str, finish_words: Sequence[str], stop_words: Sequence[str] = ()) -> str:
    """Return what follows the last of ``finish_words`` that occurs (all of ``text`` when none does).

    A trailing stop word (one of ``stop_words``, or any token of the form ``<|...|>``, ``</s>``, ``<eos>``) is removed.
    At most the last 50,000 characters are returned.
    """
    start = max((at + len(word) for word in finish_words if word and (at := text.rfind(word)) >= 0), default=0)
    tail = text[max(start, len(text) - MAX_CONCLUSION_CHARS) :].rstrip()
    for word in stop_words:
        if word:
            tail = tail.removesuffix(word).rstrip()
    last_tokens = tail[-200:]
    return tail[: len(tail) - len(last_tokens)] + _STOP_TOKENS.sub("", last_tokens)


def extract_answer(text: str, finish_words: Sequence[str] = (), stop_words: Sequence[str] = ()) -> str | None:
    r"""Return the final answer of a response, or None when it states none.

    In order: the last complete ``\boxed{...}`` (nested braces), the last "the answer is ..." or "answer: ...", the last
    number. Only the conclusion counts (see ``conclusion``).
    """
    text = conclusion(text, finish_words, stop_words)
    return _last_box(text) or _last_statement(text) or _last_number(text)


def _last_box(text: str) -> str | None:
    closing = _closing_braces(text)
    for box in reversed(list(_BOX.finditer(text))):
        at = box.end()
        if at < len(text) and text[at] == "{":
            end = closing.get(at)
            content = text[at + 1 : end].strip() if end is not None else ""
        else:
            bare = _BARE_BOX.match(text, at)
            content = bare.group() if bare else ""
        if content:
            return content
    return None


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
        rest = text[statement.end() : statement.end() + _MAX_STATEMENT_CHARS]
        for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
            if rest.startswith(opening) and (end := rest.find(closing, len(opening))) > 0:
                rest = rest[len(opening) : end]
                break
        else:
            end_match = _STATEMENT_END.search(rest)
            rest = rest[: end_match.start()] if end_match else rest
        if rest := rest.strip(" \t*_`"):
            return rest
    return None


def _last_number(text: str) -> str | None:
    numbers = _NUMBER.findall(text[-_MAX_STATEMENT_CHARS * 5 :])
    return numbers[-1] if numbers else None
