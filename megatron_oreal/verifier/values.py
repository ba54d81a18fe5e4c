"""Values of closed forms: exact where rational, else 160 digits or more at fixed sample points; every size bounded.

An answer equals the gold answer when it has the same value at every sample point where the gold answer has a real one.
A rational number is only ever compared exactly: 0.333 is not 1/3, and no decimal is pi. Where numbers far from 1 occur
on the way, digits are added in proportion: e^300 is not e^300 + 1, and e^-1000 is not 0.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any

from megatron_oreal.verifier.grammar import Node, TooLargeError

DIGITS = 160
MAX_DIGITS, MAX_DIGITS_AT_POINTS = 12_000, 800
AGREEMENT = 100
"""Decimal places, beyond those of the smallest number met, to which equal values agree."""
MAX_EXACT_BITS = 200_000
MAX_EXPONENT_BITS = 1_000_000
MAX_FACTORIAL = 10_000
_SIZES = (1, 3, Fraction(1, 3), 30, 700, Fraction(1, 100))
"""Magnitudes of the sample points: every one with positive signs, then with mixed (of one symbol: negative) signs."""
_INTEGERS = (2, 7, 12, 5)
_FAR = 4.0
_MIN_POINTS = 2


class UndefinedError(ValueError):
    """The expression has no value at this point (division by zero, or no real value where it has symbols)."""


def symbols(node: Node) -> frozenset[str]:
    """Return the names of the free symbols."""
    if node.op == "sym":
        return frozenset((node.value,))
    return frozenset().union(*(symbols(arg) for arg in node.args))


def equal(gold: Node, answer: Node) -> bool | None:
    """Compare two closed forms; None when no sample point could tell. Raises ``TooLargeError``.

    Without a value where the gold answer has one, an answer is another function: ln x is not ln |x|. At integers, where
    a removable singularity may lie, such points are left out.
    """
    names = sorted(symbols(gold) | symbols(answer))
    if not names:
        exact_gold, exact_answer = _exact_or_none(gold), _exact_or_none(answer)
        if exact_gold is not None and exact_answer is not None:
            return exact_gold == exact_answer
        return _equal_at({}, gold, answer)
    agreed, too_large = 0, None
    for point in _points(names):
        try:
            outcome = _equal_at(point, gold, answer)
        except TooLargeError as error:
            if not _is_far(point):
                raise
            too_large = error
            continue
        if outcome is False:
            return False
        agreed += outcome is True
    if agreed < _MIN_POINTS and too_large is not None:
        raise too_large
    return True if agreed >= _MIN_POINTS else None


def _is_far(point: Mapping[str, Fraction]) -> bool:
    return any(abs(value) > _FAR for value in point.values())


def _equal_at(point: Mapping[str, Fraction], gold: Node, answer: Node) -> bool | None:
    """Compare at one point; None where the gold answer has no value, or where it would take too many digits to tell."""
    first = _Numeric(point)
    try:
        at_gold = first.value(gold)
    except UndefinedError:
        return None
    try:
        at_answer = first.value(answer)
    except UndefinedError:
        return None if point and all(value.denominator == 1 for value in point.values()) else False
    ten, difference = first.mp.mpf(10), abs(at_gold - at_answer)
    if difference > max(abs(at_gold), abs(at_answer)) * ten**-20 and difference > ten ** (first.top + 40 - DIGITS):
        return False
    digits, tolerance = AGREEMENT + 40 + 2 * first.extent, ten ** -(AGREEMENT + first.extent)
    if digits <= DIGITS:
        return bool(difference <= tolerance)
    if digits > (MAX_DIGITS_AT_POINTS if point else MAX_DIGITS):
        return None
    finer = _Numeric(point, digits)
    try:
        return bool(abs(finer.value(gold) - finer.value(answer)) <= tolerance)
    except UndefinedError:
        return None


def less(left: Node, right: Node) -> bool:
    """Tell whether two real numbers without symbols are in this order; False when one of them is no such number."""
    if symbols(left) | symbols(right):
        return False
    try:
        difference = _Numeric({}).value(right) - _Numeric({}).value(left)
    except (UndefinedError, TooLargeError):
        return False
    return _context().im(difference) == 0 and bool(_context().re(difference) > 0)


def proportional(left: Node, right: Node) -> bool | None:
    """Tell whether ``left`` is a non-zero constant times ``right`` (so that their zeros are the same equation)."""
    names = sorted(symbols(left) | symbols(right))
    if symbols(left) != symbols(right):
        return False
    ratios = []
    for point in _generic_points(names):
        try:
            at_left, at_right = _Numeric(point).value(left), _Numeric(point).value(right)
        except UndefinedError:
            continue
        except TooLargeError:
            if not _is_far(point):
                raise
            continue
        if at_left == 0 or at_right == 0:
            return False
        ratios.append(at_left / at_right)
    if len(ratios) < _MIN_POINTS:
        return None
    return all(agree(ratio, ratios[0]) for ratio in ratios)


def agree(left: Any, right: Any) -> bool:
    """Compare two mpmath values to 60 of their 160 digits, relative to the larger."""
    return bool(abs(left - right) <= max(abs(left), abs(right)) * _context().mpf(10) ** -60)


@lru_cache(maxsize=8)
def _context(digits: int = DIGITS) -> Any:
    import mpmath  # plain arithmetic never needs it

    context = mpmath.MPContext()
    context.dps = digits
    return context


def _points(names: list[str]) -> list[dict[str, Fraction]]:
    """Return the generic points, then points of positive integers."""
    integers = [
        {name: Fraction(_INTEGERS[(first + index) % len(_INTEGERS)]) for index, name in enumerate(names)}
        for first in range(len(_INTEGERS))
    ]
    return [*_generic_points(names), *integers]


def _generic_points(names: list[str]) -> list[dict[str, Fraction]]:
    """Return fixed pseudo-random rationals of every size: half of the points positive, half of mixed signs."""
    source = random.Random(20250206)
    points = []
    for index in range(2 * len(_SIZES)):
        sizes = [_SIZES[index % len(_SIZES)], *source.choices(_SIZES, k=len(names))]
        signs = [1 if index < len(_SIZES) else -1, *source.choices((-1, 1), k=len(names))]
        point = {}
        for name, size, sign in zip(names, sizes, signs, strict=False):
            drawn = Fraction(source.randrange(10**6, 14 * 10**5), 999_983)
            point[name] = (sign if index >= len(_SIZES) else 1) * size * drawn
        points.append(point)
    return points


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _bounded(value: Fraction) -> Fraction:
    if _bits(value) > MAX_EXACT_BITS:
        raise TooLargeError("a number beyond the exact range")
    return value


def _exact_or_none(node: Node) -> Fraction | None:
    try:
        return exact(node)
    except UndefinedError:
        return None


def exact(node: Node) -> Fraction | None:
    """Return the rational value, or None when it is not one that rational arithmetic alone can tell."""
    if node.op == "num":
        return node.value  # type: ignore[no-any-return]
    if node.op in ("sym", "const"):
        return None
    values = [exact(arg) for arg in node.args]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    operation = _EXACT.get(node.op)
    result = operation(*known) if operation else None
    return None if result is None else _bounded(result)


def _add(*terms: Fraction) -> Fraction:
    return sum(terms, Fraction(0))


def _divide(top: Fraction, bottom: Fraction) -> Fraction:
    if bottom == 0:
        raise UndefinedError("division by zero")
    return top / bottom


def _power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator != 1:
        return None
    if base == 0 and exponent <= 0:
        raise UndefinedError("zero to a power that is not positive")
    if base in (0, 1, -1):
        return base ** int(exponent % 2 + 2)
    if abs(exponent) * _bits(base) > 2 * MAX_EXACT_BITS:
        raise TooLargeError("a power beyond the exact range")
    return base ** int(exponent)


def _factorial(value: Fraction) -> Fraction | None:
    if value.denominator != 1:
        return None
    if value < 0:
        raise UndefinedError("factorial of a negative integer")
    if value > MAX_FACTORIAL:
        raise TooLargeError("a factorial beyond the exact range")
    return Fraction(math.factorial(int(value)))


def _binomial(top: Fraction, bottom: Fraction) -> Fraction | None:
    if top.denominator != 1 or bottom.denominator != 1 or top < 0:
        return None
    if bottom < 0 or bottom > top:
        return Fraction(0)
    if min(bottom, top - bottom) * _bits(top) > MAX_EXACT_BITS:
        raise TooLargeError("a binomial coefficient beyond the exact range")
    return Fraction(math.comb(int(top), int(bottom)))


_EXACT: Mapping[str, Callable[..., Fraction | None]] = {
    "add": _add,
    "neg": lambda value: -value,
    "mul": lambda left, right: left * right,
    "div": _divide,
    "pow": _power,
    "abs": abs,
    "floor": lambda value: Fraction(math.floor(value)),
    "ceil": lambda value: Fraction(math.ceil(value)),
    "factorial": _factorial,
    "binom": _binomial,
}


class _Numeric:
    """Evaluates at one point. With symbols the domain is the reals: a root or a logarithm outside it is undefined."""

    def __init__(self, point: Mapping[str, Fraction], digits: int = DIGITS) -> None:
        self.mp = _context(digits if digits == DIGITS else -(-digits // 200) * 200)
        self.point = point
        self.top, self.extent = 0, 0  # decimal exponents met: the largest, and the farthest from 0

    def value(self, node: Node) -> Any:
        try:
            return self._value(node)
        except (ZeroDivisionError, OverflowError) as error:
            raise UndefinedError(str(error)) from error

    def _value(self, node: Node) -> Any:
        mp = self.mp
        if node.op == "num":
            return self.finite(self.rational(_bounded(node.value)))
        if node.op == "sym":
            return self.rational(self.point[node.value])
        if node.op == "const":
            return {"pi": mp.pi, "e": mp.e, "i": mp.mpc(0, 1)}[node.value] + 0
        values = [self._value(arg) for arg in node.args]
        return self.finite(self.apply(node.op, values))

    def rational(self, value: Fraction) -> Any:
        return self.mp.mpf(value.numerator) / value.denominator

    def finite(self, value: Any) -> Any:
        mp = self.mp
        if not mp.isfinite(value):
            raise UndefinedError("not finite")
        if not value:
            return value
        bits = int(mp.mag(value))
        if bits > MAX_EXPONENT_BITS:
            raise TooLargeError("a number beyond the numeric range")
        self.top = max(self.top, bits * 3 // 10 + 1)
        self.extent = max(self.extent, abs(bits) * 31 // 100)
        return value

    def real(self, value: Any) -> Any:
        """With symbols, reject a negative or complex argument of a root or a logarithm."""
        if self.point and (self.mp.im(value) != 0 or self.mp.re(value) < 0):
            raise UndefinedError("not real")
        return value

    def whole(self, value: Any) -> int | None:
        mp = self.mp
        if mp.im(value) != 0 or mp.mag(value) > 60:
            return None
        nearest = int(mp.nint(mp.re(value)))
        return nearest if value == nearest or (nearest and agree(mp.mpf(nearest), value)) else None

    def apply(self, op: str, values: list[Any]) -> Any:
        mp = self.mp
        if op == "add":
            return mp.fsum(values)
        if op == "neg":
            return -values[0]
        if op == "mul":
            return values[0] * values[1]
        if op == "div":
            if values[1] == 0:
                raise UndefinedError("division by zero")
            return values[0] / values[1]
        if op == "pow":
            return self.power(values[0], values[1])
        if op == "root":
            return self.root(values[0], values[1])
        if op in ("factorial", "binom"):
            return self.combinatorial(op, values)
        if op in ("ln", "log10", "log", "logbase"):
            return self.logarithm(op, values)
        if op in ("exp", "sinh", "cosh", "tanh"):
            if abs(values[0]) > MAX_EXPONENT_BITS:
                raise TooLargeError("an exponential beyond the numeric range")
            return getattr(mp, op)(values[0])
        return self.elementary(op, values[0])

    def elementary(self, op: str, value: Any) -> Any:
        mp = self.mp
        if op in ("abs", "floor", "ceil"):
            return {"abs": abs, "floor": mp.floor, "ceil": mp.ceil}[op](value)
        if mp.mag(value) > 4096:
            raise TooLargeError("a function of a number beyond the numeric range")
        name = {"arcsin": "asin", "arccos": "acos", "arctan": "atan"}.get(op, op)
        name = {"arcsinh": "asinh", "arccosh": "acosh", "arctanh": "atanh"}.get(name, name)
        result = getattr(mp, name)(value)
        if self.point and mp.im(result) != 0 and mp.im(value) == 0:
            raise UndefinedError("not real")
        return result

    def power(self, base: Any, exponent: Any) -> Any:
        mp = self.mp
        if base == 0:
            if mp.re(exponent) <= 0:
                raise UndefinedError("zero to a power that is not positive")
            return mp.mpf(0)
        if abs(exponent) * max(abs(mp.mag(base)), 1) > MAX_EXPONENT_BITS:
            raise TooLargeError("a power beyond the numeric range")
        whole = self.whole(exponent)
        if whole is not None:
            return base**whole
        if self.point and mp.im(base) == 0 and base < 0 and mp.im(exponent) == 0:
            for degree in (3, 5, 7, 9):
                if (top := self.whole(exponent * degree)) is not None:
                    return self.root(base, mp.mpf(degree)) ** top
        return mp.power(self.real(base), exponent)

    def root(self, radicand: Any, index: Any) -> Any:
        """Principal root; an odd root of a negative real number is the real one."""
        mp = self.mp
        degree = self.whole(index)
        if degree is None or not 1 <= degree <= 10_000:
            return self.power(radicand, 1 / index)
        if degree % 2 and mp.im(radicand) == 0 and mp.re(radicand) < 0:
            return -mp.power(-radicand, mp.mpf(1) / degree)
        return mp.power(self.real(radicand), mp.mpf(1) / degree) if radicand != 0 else mp.mpf(0)

    def logarithm(self, op: str, values: list[Any]) -> Any:
        mp = self.mp
        if values[0] == 0:
            raise UndefinedError("logarithm of zero")
        top = mp.log(self.real(values[0]))
        if op == "ln":
            return top
        base = mp.mpf(10) if op in ("log", "log10") else self.real(values[1])
        if base in (0, 1):
            raise UndefinedError("base of a logarithm")
        return top / mp.log(base)

    def combinatorial(self, op: str, values: list[Any]) -> Any:
        if any(abs(value) > MAX_FACTORIAL for value in values):
            raise TooLargeError("a factorial beyond the numeric range")
        return self.mp.factorial(values[0]) if op == "factorial" else self.mp.binomial(*values)
