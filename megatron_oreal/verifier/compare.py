"""Equality of two shapes, by the conventions that ``rules`` states."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

from megatron_oreal.verifier import grammar, values
from megatron_oreal.verifier.grammar import Node, TooLargeError, UnreadableError
from megatron_oreal.verifier.notation import squeeze
from megatron_oreal.verifier.shape import (
    RATIO,
    Equation,
    Interval,
    Intervals,
    Opaque,
    Scalar,
    Sequence,
    Shape,
    as_intervals,
)
from megatron_oreal.verifier.units import split_unit

T = TypeVar("T")
_WORD = re.compile(r'"\s*(?P<quoted>[A-Za-z]{2,40})\s*"|(?P<bare>[A-Za-z]{2,40})')


class Undecided(Exception):  # noqa: N818  (an outcome, not a mistake)
    """The comparison could not be made: ``side`` is "gold", "answer" or "both", ``cause`` says why."""

    def __init__(self, side: str, cause: Exception) -> None:
        super().__init__(str(cause))
        self.side, self.cause = side, cause


def same(gold: Shape, answer: Shape) -> bool:
    """Tell whether two shapes are equal; raises ``Undecided``, of the gold answer first."""
    for side, shape in (("gold", gold), ("answer", answer)):
        if isinstance(shape, Opaque):
            raise Undecided(side, UnreadableError("structure is not known"))
    if isinstance(gold, Scalar) and isinstance(answer, Scalar):
        return _same_scalar(gold, answer)
    if isinstance(gold, Intervals) or isinstance(answer, Intervals):
        return _same_intervals(as_intervals(gold), as_intervals(answer))
    if isinstance(gold, Sequence) or isinstance(answer, Sequence):
        return _same_sequence(_as_sequence(gold), _as_sequence(answer))
    return _same_equation(gold, answer)


@lru_cache(maxsize=256)
def _parse(text: str) -> Node:
    return grammar.parse(text)


def _node(side: str, text: str) -> Node:
    try:
        return _parse(text)
    except (UnreadableError, TooLargeError) as error:
        raise Undecided(side, error) from error


def _same_scalar(gold: Scalar, answer: Scalar) -> bool:
    if gold.label and answer.label and gold.label != answer.label:
        return _same_relation(gold, answer)
    if ("|" in (answer.label or "") and gold.label is None) or _is_false(answer):  # |x| = 7 leaves the sign open
        return False
    if squeeze(gold.text) == squeeze(answer.text):
        return True
    if (words := _same_words(gold.text, answer.text)) is not None:
        return words
    gold_text, gold_unit = split_unit(gold.text)
    answer_text, answer_unit = split_unit(answer.text)
    if gold_unit and answer_unit and gold_unit != answer_unit:
        return False
    if (answer_unit or "").startswith("base ") and not gold_unit:
        return False
    if answer_unit == "%" and not gold_unit and _is_share(gold_text):
        return _same_value(gold_text, f"({answer_text})/100")
    if _same_value(gold_text, answer_text):
        return True
    # 50% may be given as 50, and 1/2 as 50%: the sign in only one of the two is ignored, and its value is no mistake.
    if gold_unit == "%" and not answer_unit:
        return _same_value(f"({gold_text})/100", answer_text)
    if answer_unit == "%" and not gold_unit:
        return _same_value(gold_text, f"({answer_text})/100")
    return False


def _is_false(answer: Scalar) -> bool:
    """Tell whether a value is said to result from arithmetic that gives another, as in 3 + 5 = 7."""
    if answer.claim is None:
        return False
    try:
        claimed, found = values.exact(_parse(answer.claim)), values.exact(_parse(answer.text))
    except ValueError:
        return False
    return claimed is not None and found is not None and claimed != found


def _same_relation(gold: Scalar, answer: Scalar) -> bool:
    """Compare assignments to different things as equations, y = x with x = y; what cannot be read differs."""
    try:
        return _same_equation(gold, answer)
    except Undecided:
        return False


def _same_words(gold: str, answer: str) -> bool | None:
    """Compare two words, quoted or bare; None where one is none. A bare run of letters is first of all a text.

    A run in capitals names points, so that AB is not ab; letters in another order are no answer without a judge.
    """
    found = _WORD.fullmatch(gold), _WORD.fullmatch(answer)
    if not found[0] or not found[1]:
        return None
    left, right = (match["quoted"] or match["bare"] for match in found if match)
    if left.casefold() == right.casefold():
        return left == right or not (left.isupper() or right.isupper()) or min(len(left), len(right)) > 3
    return False if all(match and match["bare"] and match["bare"].islower() for match in found) else None


def _is_share(text: str) -> bool:
    """Tell whether a value lies strictly between 0 and 1, so that an answer in percent can only mean a hundredth."""
    value = values.exact(_node("gold", text))
    return value is not None and 0 < value < 1


def _same_value(gold: str, answer: str) -> bool:
    gold_node, answer_node = _node("gold", gold), _node("answer", answer)
    try:
        outcome = values.equal(gold_node, answer_node)
    except TooLargeError as error:
        raise Undecided("gold" if _too_large(gold_node) else "answer", error) from error
    if outcome is None:
        raise Undecided("both", UnreadableError("no sample point where both are defined"))
    return outcome


def _too_large(node: Node) -> bool:
    """Tell whether a side is too large by itself; the answer is to blame only where the gold answer is not."""
    try:
        values.equal(node, node)
    except TooLargeError:
        return True
    return False


def _same_intervals(gold: Intervals | None, answer: Intervals | None) -> bool:
    if gold is None or answer is None:
        return False
    gold, answer = _intersected("gold", gold), _intersected("answer", answer)
    if len(gold.parts) != len(answer.parts):
        return False
    return _match(list(gold.parts), list(answer.parts), _same_interval)


def _intersected(side: str, intervals: Intervals) -> Intervals:
    """Read two listed rays that overlap, x > 1 and x < 2, as what both allow: together they would say nothing."""
    if not intervals.listed or len(intervals.parts) != 2:
        return intervals
    down, up = sorted(intervals.parts, key=lambda part: "infty" not in part.low)
    if "infty" not in down.low or "infty" not in up.high or "infty" in down.high or "infty" in up.low:
        return intervals
    if not values.less(_node(side, up.low), _node(side, down.high)):
        return intervals
    return Intervals((Interval(up.low, down.high, up.low_open, down.high_open),))


def _same_interval(gold: Interval, answer: Interval) -> bool:
    if (gold.low_open, gold.high_open) != (answer.low_open, answer.high_open):
        return False
    return _same_scalar(Scalar(gold.low), Scalar(answer.low)) and _same_scalar(Scalar(gold.high), Scalar(answer.high))


def _as_sequence(shape: Shape) -> Sequence:
    """Take one value for a list of one; the empty set is the set of nothing, and so not the set of the empty set."""
    if isinstance(shape, Scalar) and squeeze(shape.text) == "\\emptyset":
        return Sequence("set", ())
    return shape if isinstance(shape, Sequence) else Sequence("list", (shape,))


def _same_sequence(gold: Sequence, answer: Sequence) -> bool:
    if gold.label and answer.label and gold.label != answer.label:
        return False
    kinds = {gold.kind, answer.kind}
    if RATIO in (gold.brackets, answer.brackets):
        return gold.brackets == answer.brackets and _same_ratio(gold.items, answer.items)
    if "tuple" in kinds:
        if "set" in kinds or not _brackets_agree(gold, answer) or len(gold.items) != len(answer.items):
            return False
        return _same_in_order(gold, answer)
    if "set" in kinds:
        gold_items, answer_items = list(gold.items), list(answer.items)
        return _covers(gold_items, answer_items) and _covers(answer_items, gold_items, swap=True)
    if len(gold.items) != len(answer.items):
        return False
    if _names_differ(gold) != _names_differ(answer) and not (_names(gold) and _names(answer)):
        return _same_in_order(gold, answer)
    return _match(list(gold.items), list(answer.items), same)


def _same_ratio(gold: tuple[Shape, ...], answer: tuple[Shape, ...]) -> bool:
    """Compare a : b : c up to a common factor; with two digits in a later term (1:30:00) it is a time, and exact."""
    terms = [(one.text, other.text) for one, other in zip(gold, answer, strict=False)
             if isinstance(one, Scalar) and isinstance(other, Scalar)]  # fmt: skip
    if not len(terms) == len(gold) == len(answer):
        return False
    if all(re.fullmatch(r"\d\d", text) for pair in terms[1:] for text in pair):
        return all(_same_value(*pair) for pair in terms)
    (first, other), *rest = terms
    return all(_same_value(f"({one})*({other})", f"({two})*({first})") for one, two in rest)


def _same_in_order(gold: Sequence, answer: Sequence) -> bool:
    """Compare position by position; ``y = 1, x = 2`` takes its positions from the names: (2, 1)."""
    left, right = (_by_name(side) if _names_differ(side) else side.items for side in (gold, answer))
    return all(same(*pair) for pair in zip(left, right, strict=True))


def _by_name(sequence: Sequence) -> list[Shape]:
    return sorted(sequence.items, key=lambda item: getattr(item, "label", None) or "")


def _brackets_agree(gold: Sequence, answer: Sequence) -> bool:
    """Tell whether both are tuples of the same brackets; a bare list, in order, counts as one in parentheses."""
    if gold.kind != answer.kind:
        return (gold.brackets or answer.brackets) == "()"
    return gold.brackets == answer.brackets


def _names(sequence: Sequence) -> set[str]:
    return {item.label for item in sequence.items if isinstance(item, (Scalar, Sequence)) and item.label}


def _names_differ(sequence: Sequence) -> bool:
    """``x = 1, y = 2`` names different unknowns, so that against bare values the order counts."""
    return len(_names(sequence)) > 1


def _covers(targets: list[Shape], candidates: list[Shape], *, swap: bool = False) -> bool:
    return all(any(same(*((c, t) if swap else (t, c))) for c in candidates) for t in targets)


def _match(gold: list[T], answer: list[T], equal: Callable[[T, T], bool]) -> bool:
    """Pair every item of one list with an equal item of the other; greedy, since equality is an equivalence."""
    rest = list(answer)
    for item in gold:
        for index, candidate in enumerate(rest):
            if equal(item, candidate):
                del rest[index]
                break
        else:
            return False
    return not rest


def _same_equation(gold: Shape, answer: Shape) -> bool:
    """Equations that do not just name a value are equal when the differences of their sides are proportional."""
    gold_node, answer_node = _difference("gold", gold), _difference("answer", answer)
    if gold_node is None or answer_node is None:
        return False
    if len(values.symbols(gold_node)) < 2 and not (isinstance(gold, Equation) and isinstance(answer, Equation)):
        return False
    try:
        outcome = values.proportional(gold_node, answer_node)
    except TooLargeError as error:
        raise Undecided("both", error) from error
    if outcome is None:
        raise Undecided("both", UnreadableError("no sample point where both are defined"))
    return outcome


def _difference(side: str, shape: Shape) -> Node | None:
    if isinstance(shape, Equation):
        left, right = shape.left, shape.right
    elif isinstance(shape, Scalar) and shape.label:
        left, right = shape.label, shape.text
    else:
        return None
    return Node("add", (_node(side, left), Node("neg", (_node(side, right),))))
