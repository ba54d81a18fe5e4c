"""Values of closed forms: exact where rational, else 120 digits at fixed sample points; every size bounded beforehand.

Two expressions are equal when they agree to ``AGREEMENT`` relative at every sample point where both are defined over
the reals. A rational number is only ever compared exactly: 0.333 is not 1/3, and no decimal is pi.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any

from megatron_oreal.verifier.grammar import Node, TooLargeError

DIGITS = 120
MAX_EXACT_BITS = 200_000
MAX_EXPONENT_BITS = 1_000_000
MAX_FACTORIAL = 10_000
_NUM_POINTS = 8
_MIN_POINTS = 2


class UndefinedError(ValueError):
    """The expression has no value at this point (division by zero, or no real value where it has symbols)."""


def symbols(node: Node) -> frozenset[str]:
    """Return the names of the free symbols."""
    if node.op == "sym":
        return frozenset((node.value,))
    return frozenset().union(*(symbols(arg) for arg in node.args))


def equal(left: Node, right: Node) -> bool | None:
    """Compare two closed forms; None when no sample point could tell. Raises ``TooLargeError``."""
    names = sorted(symbols(left) | symbols(right))
    if not names:
        exact_left, exact_right = _exact_or_none(left), _exact_or_none(right)
        if exact_left is not None and exact_right is not None:
            return exact_left == exact_right
    agreed = 0
    for point in _points(names):
        try:
            at_left, at_right = _Numeric(point).value(left), _Numeric(point).value(right)
        except UndefinedError:
            continue
        if not agree(at_left, at_right):
            return False
        agreed += 1
        if not names:
            return True
    return True if agreed >= _MIN_POINTS else None


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
    for point in _points(names):
        try:
            at_left, at_right = _Numeric(point).value(left), _Numeric(point).value(right)
        except UndefinedError:
            continue
        if at_left == 0 or at_right == 0:
            return False
        ratios.append(at_left / at_right)
    if len(ratios) < _MIN_POINTS:
        return None
    return all(agree(ratio, ratios[0]) for ratio in ratios)


def agree(left: Any, right: Any) -> bool:
    """Compare two mpmath values to 100 of their 120 digits."""
    mp = _context()
    scale = max(abs(left), abs(right), mp.mpf(10) ** -20)
    return bool(abs(left - right) <= scale * mp.mpf(10) ** (20 - DIGITS))


@lru_cache(maxsize=1)
def _context() -> Any:
    import mpmath  # plain arithmetic never needs it

    context = mpmath.MPContext()
    context.dps = DIGITS
    return context


def _points(names: list[str]) -> list[dict[str, Fraction]]:
    """Return fixed pseudo-random rationals: half of the points positive, half of either sign."""
    if not names:
        return [{}]
    source = random.Random(20250206)
    points = []
    for index in range(_NUM_POINTS):
        positive = index < _NUM_POINTS // 2
        magnitudes = [Fraction(source.randrange(10**6, 4 * 10**6), 999_983) for _ in names]
        signs = [1 if positive else source.choice((-1, 1)) for _ in names]
        points.append({name: sign * size for name, sign, size in zip(names, signs, magnitudes, strict=True)})
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

    def __init__(self, point: Mapping[str, Fraction]) -> None:
        self.mp, self.point = _context(), point

    def value(self, node: Node) -> Any:
        try:
            return self._value(node)
        except (ZeroDivisionError, OverflowError) as error:
            raise UndefinedError(str(error)) from error

    def _value(self, node: Node) -> Any:
        mp = self.mp
        if node.op == "num":
            return self.rational(_bounded(node.value))
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
        if abs(value) and mp.mag(value) > MAX_EXPONENT_BITS:
            raise TooLargeError("a number beyond the numeric range")
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
        return nearest if agree(mp.mpf(nearest), value) else None

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
        return getattr(mp, name)(value)

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
