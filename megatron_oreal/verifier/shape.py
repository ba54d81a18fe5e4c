"""The outer structure of an answer: one value, an equation, a list, set, tuple or matrix, or a union of intervals."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from megatron_oreal.verifier.notation import SET_CLOSE, SET_OPEN, split, split_command, top_level, without_thousands

_MAX_DEPTH = 8
_MAX_ITEMS = 200
RATIO = "::"
"""The brackets of a tuple that is a ratio of three or more terms."""


@dataclass(frozen=True, slots=True)
class Scalar:
    """One value; ``label`` is what it is assigned to ("x" of ``x = 5``, "x+y" of ``x + y = 5``), None without one.

    ``claim`` is the arithmetic that it is said to result from ("2 + 3" of ``2 + 3 = 5``).
    """

    text: str
    label: str | None = None
    claim: str | None = None


@dataclass(frozen=True, slots=True)
class Equation:
    """An equation that is not an assignment."""

    left: str
    right: str


@dataclass(frozen=True, slots=True)
class Opaque:
    """Something whose structure is not known here (an inequality in two variables, a set difference)."""

    text: str


@dataclass(frozen=True, slots=True)
class Sequence:
    """``kind`` is "list" (solutions, no brackets), "set" or "tuple"; order matters in a tuple only."""

    kind: str
    items: tuple[Shape, ...]
    brackets: str = ""
    label: str | None = None


@dataclass(frozen=True, slots=True)
class Interval:
    """``low`` and ``high`` are the texts of the end points."""

    low: str
    high: str
    low_open: bool
    high_open: bool


@dataclass(frozen=True, slots=True)
class Intervals:
    """A union of intervals, in any order; ``listed`` when it stood as a list of inequalities, such as x > 1, x < 2."""

    parts: tuple[Interval, ...]
    listed: bool = False


Shape = Scalar | Equation | Opaque | Sequence | Intervals

_SUBSCRIPT = re.compile(r"_(?:\{[^{}]*\}|\w)")
_APPLICATION = re.compile(r"(?<=[A-Za-z'])\s*\(\s*-?\w+(?:\s*,\s*-?\w+)*\s*\)")
_QUOTED = re.compile(r'"[^"]*"')
_LABEL = re.compile(r"(?:[A-Za-z'(),|\s+*\-]|\\[a-zA-Z]+)+")
_VALUE_COMMAND = re.compile(r"\\?(?:frac|sqrt|sin|cos|tan|log|ln|binom|pi|pm|mp|infty)(?![a-z])|-?\s*\\?(?:e|i)\s*\Z")
_COMPOUND = re.compile(r"(?:[a-z|\s+*\-]|\\(?!angle|triangle)[a-zA-Z]+(?![a-zA-Z]))+|[A-Z](?:\s*[+*\-]\s*[A-Z])+")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_DENIAL = re.compile(r"\b(?:not|non|wrong|incorrect|false|except|without|twice|other)\b", re.IGNORECASE)
_DISTANCE = re.compile(r"\|\s*[A-Za-z]\s*(?:(?P<sign>[+-])\s*(?P<center>[^|\s][^|]*))?\|")
_SYMBOL = re.compile(r"\\?[A-Za-z]+'*")
_REALS = re.compile(r'\\mathbb\s*\{?R\}?|"?\s*all\s+real\s+numbers\s*"?', re.IGNORECASE)
_REALS_WITHOUT = re.compile(r"\\mathbb\s*\{?R\}?\s*\\(?:setminus|backslash)\s*⦃([^⦃⦄]+)⦄")
_LITERAL = re.compile(r"-?\d+")
_COMPARISON = re.compile(r"<=|>=|<|>")
_MATRIX = re.compile(r"\\begin\{([pbvBV]?(?:small)?matrix|array)\}(?:\{[clr|\s]*\})?(.*)\\end\{\1\}", re.DOTALL)
_SCALED = re.compile(
    r"(?P<factor>-?\s*(?:[\d./]+|\\frac\s*(?:\{[^{}]*\}\s*\{[^{}]*\}|\d\d)|\\sqrt\s*(?:\{[^{}]*\}|\d)|[a-zA-Z])?)\s*\*?\s*"
    r"(?P<matrix>\\begin\{[pbB]?(?:small)?matrix\}.*)",
    re.DOTALL,
)
"""One factor before a matrix that is none of the determinants."""
_PLAIN = re.compile(r"-?\d{1,20}(?:\.\d{1,20})?")


def read(text: str, *, grouped_digits: bool = True) -> Shape:
    """Read the structure of a text that ``notation.clean`` has normalised.

    ``grouped_digits``: a comma before three digits belongs to the number (``1,234``) wherever no bracket is in the way.
    """
    if grouped_digits and not re.search(r"[(\[⦃]|\A\{", text):
        text = without_thousands(text)
    return _read(text, 0)


def _read(text: str, depth: int) -> Shape:
    text = text.strip()
    if depth > _MAX_DEPTH:
        return Opaque(text)
    if (without := _REALS_WITHOUT.fullmatch(text)) and len(split(without.group(1), ",;")) == 1:
        return all_but(without.group(1).strip())
    if "\\setminus" in text or "\\cap" in text or "\\int" in text or "\\sum" in text:
        return Opaque(text)
    elements = split(text, ",;")
    if len(elements) > _MAX_ITEMS:
        return Opaque(text)
    values = [value for element in elements for value in _both_signs(element)]
    if len(values) > 1:
        items = tuple(_read(value, depth + 1) for value in values if value)
        if items and all(isinstance(item, Intervals) for item in items):
            parts = tuple(part for item in items if isinstance(item, Intervals) for part in item.parts)
            return Intervals(parts, listed=True)
        return Sequence("list", items)
    return _read_relation(text, depth)


def _both_signs(text: str) -> list[str]:
    r"""Expand ``a \pm b`` to its two values; several signs in one value are taken together, ``\mp`` the other way."""
    if "\\pm" not in text and "\\mp" not in text:
        return [text]
    upper = re.sub(r"\\mp(?![a-z])", "-", re.sub(r"\\pm(?![a-z])", "+", text))
    lower = re.sub(r"\\mp(?![a-z])", "+", re.sub(r"\\pm(?![a-z])", "-", text))
    return [upper, lower]


def _read_relation(text: str, depth: int) -> Shape:
    belongs = split_command(text, "\\in")
    if len(belongs) == 2 and label_of(belongs[0]) is not None:
        return _read(belongs[1], depth + 1)
    union = split_command(text, "\\cup")
    if len(union) > 1:
        parts = [as_intervals(_read(part, depth + 1)) for part in union]
        if any(part is None for part in parts):
            return Opaque(text)
        return Intervals(tuple(interval for part in parts if part for interval in part.parts))
    near = split_command(text, "\\approx")
    if len(near) == 2:
        rounded_only = not near[0] or label_of(near[0]) is not None
        if rounded_only and _LITERAL.fullmatch(near[1]):
            return Opaque(text)  # a rounded whole number is not said to be the value
        if all(map(_PLAIN.fullmatch, near)) and abs(float(near[0]) - float(near[1])) > abs(float(near[0])) / 20:
            return Opaque(text)  # 7 is not about 8
        text = near[1] if rounded_only else near[0]
    if any(char in "<>!" for _, char in top_level(text)) and re.search("[<>]|!=", text):
        return _read_inequality(text)
    sides = _sides(text)
    if len(sides) == 1:
        return _read_brackets(text, depth)
    return _read_equation(sides, depth)


def _sides(text: str) -> list[str]:
    sides, start = [], 0
    for at, char in top_level(text):
        if char == "=" and text[at - 1 : at] not in ("!", "<", ">"):
            sides.append(text[start:at].strip(" &"))
            start = at + 1
    return [*sides, text[start:].strip(" &")]


def label_of(text: str) -> str | None:
    """Return what names a value: "x" for a symbol or an application such as f(x), "" for any other name, else None."""
    text = text.strip()
    if not text or _VALUE_COMMAND.match(text):
        return None
    bare = _QUOTED.sub("a", _APPLICATION.sub("", _SUBSCRIPT.sub("", text))).strip()
    if not _LABEL.fullmatch(bare) or bare.startswith("-") or _VALUE_COMMAND.search(bare):
        return None
    if '"' in text and (_DENIAL.search(text) or re.search("[a-z]", _COMMAND.sub("", _QUOTED.sub("", text)))):
        return None  # "twice" x and everything "except" are no names
    return "".join(text.split()) if _SYMBOL.fullmatch(bare) and '"' not in text else ""


def _read_equation(sides: list[str], depth: int) -> Shape:
    label = label_of(sides[0])
    if label is None and len(sides) == 2 and label_of(sides[1]) is not None and re.search(r"\d", sides[0]):
        label, sides = label_of(sides[1]), [sides[1], sides[0]]
    if label is None and re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", sides[0])):
        return Equation(sides[0], sides[-1]) if len(sides) == 2 else Opaque("=".join(sides))
    if label is None and _LITERAL.fullmatch(sides[0]) and _LITERAL.fullmatch(sides[-1]) and sides[0] != sides[-1]:
        return Equation(sides[0], sides[-1])
    if label == "" and _COMPOUND.fullmatch(_SUBSCRIPT.sub("", sides[0])):
        label = "".join(sides[0].split())
    value = _read(sides[-1], depth + 1)
    if isinstance(value, (Scalar, Sequence)) and label:
        return replace(value, label=label)
    return replace(value, claim=sides[0]) if isinstance(value, Scalar) and label is None else value


def _read_inequality(text: str) -> Shape:
    marks = _COMPARISON.findall(text)
    sides = [side.strip() for side in _COMPARISON.split(text)]
    if distance := _DISTANCE.fullmatch(sides[0]) if len(sides) == 2 else None:
        return _read_distance(distance, sides[1], marks[0])
    other_than = re.split(r"!=", text)
    if len(other_than) == 2 and not marks and label_of(other_than[0]) and label_of(other_than[1]) is None:
        return all_but(other_than[1].strip())
    if len({mark[0] for mark in marks}) != 1 or "!" in text or "=" in "".join(sides):
        return Opaque(text)
    if marks[0][0] == ">":
        sides, marks = sides[::-1], marks[::-1]
    opens = ["=" not in mark for mark in marks]
    if len(sides) == 3 and label_of(sides[1]):
        return Intervals((interval(sides[0], sides[2], opens[0], opens[1]),))
    if len(sides) == 2 and label_of(sides[0]) and label_of(sides[1]) is None:
        return Intervals((interval("-\\infty", sides[1], True, opens[0]),))
    if len(sides) == 2 and label_of(sides[1]) and label_of(sides[0]) is None:
        return Intervals((interval(sides[0], "\\infty", opens[0], True),))
    return Opaque(text)


def _read_distance(distance: re.Match[str], radius: str, mark: str) -> Shape:
    """Read ``|x - c| < r`` as the interval around c, ``|x - c| > r`` as what lies outside it."""
    center = f"{'+' if distance['sign'] == '-' else '-'}({distance['center']})" if distance["sign"] else ""
    low, high, is_open = f"-({radius}){center}", f"({radius}){center}", "=" not in mark
    if mark[0] == "<":
        return Intervals((interval(low, high, is_open, is_open),))
    return Intervals((interval("-\\infty", low, True, is_open), interval(high, "\\infty", is_open, True)))


def all_but(point: str) -> Intervals:
    """Build the real numbers without one."""
    return Intervals((interval("-\\infty", point, True, True), interval(point, "\\infty", True, True)))


def interval(low: str, high: str, low_open: bool, high_open: bool) -> Interval:
    """Build an interval; an infinite end is always open."""
    return Interval(low, high, low_open or "infty" in low, high_open or "infty" in high)


def _read_brackets(text: str, depth: int) -> Shape:
    if matrix := _MATRIX.fullmatch(text):
        rows = [row for row in re.split(r"\\\\", matrix.group(2)) if row.strip()]
        read_rows = [
            Sequence("tuple", tuple(_read(cell, depth + 1) for cell in row.split("&")), brackets="row") for row in rows
        ]
        return Sequence("tuple", tuple(read_rows), brackets="||" if matrix.group(1)[0] in "vV" else "matrix")
    if (scaled := _SCALED.fullmatch(text)) and (matrix := _MATRIX.fullmatch(scaled["matrix"])):
        return _multiplied(_read_brackets(matrix.group(), depth), "-1" if scaled["factor"] == "-" else scaled["factor"])
    if _REALS.fullmatch(text):
        return Intervals((interval("-\\infty", "\\infty", True, True),))
    if len(parts := split(text, ":")) > 2 and all(parts):
        return Sequence("tuple", tuple(_read(part, depth + 1) for part in parts), brackets=RATIO)
    if len(text) < 2 or not _encloses(text):
        return Scalar(text)
    inner, brackets = text[1:-1], text[0] + text[-1]
    if brackets == SET_OPEN + SET_CLOSE or (brackets == "{}" and len(split(inner, ",;")) > 1):
        return _read_set(inner, depth)
    values = split(inner, ",;")
    if brackets not in ("()", "[]", "(]", "[)"):
        return Scalar(text)
    if len(values) == 1:
        if "\\pm" in inner or "\\mp" in inner or brackets not in ("()", "[]"):
            return Scalar(text)
        nested = _read(inner, depth + 1)
        return nested if not isinstance(nested, Scalar) or nested.label else Scalar(inner.strip())
    return Sequence("tuple", tuple(_read(value, depth + 1) for value in values), brackets=brackets)


def _multiplied(shape: Shape, factor: str) -> Shape:
    """Multiply every entry of a matrix."""
    if isinstance(shape, Sequence):
        return replace(shape, items=tuple(_multiplied(item, factor) for item in shape.items))
    return Scalar(f"({factor})*({shape.text})") if isinstance(shape, Scalar) and shape.label is None else Opaque(factor)


def _read_set(inner: str, depth: int) -> Shape:
    such_that = split(inner.replace("\\mid", "|"), "|:")
    if len(such_that) == 2 and label_of(split_command(such_that[0], "\\in")[0]) is not None:
        return _read(such_that[1], depth + 1)
    content = _read(inner, depth + 1)
    if isinstance(content, Sequence) and content.kind == "list":
        return replace(content, kind="set")
    return Sequence("set", (content,))


def _encloses(text: str) -> bool:
    """Tell whether the first character opens a bracket that the last one closes."""
    if text[0] not in "([{⦃" or text[-1] not in ")]}⦄":
        return False
    depth = 0
    for at, char in enumerate(text):
        depth += (char in "([{⦃") - (char in ")]}⦄")
        if depth == 0:
            return at == len(text) - 1
    return False


def as_intervals(shape: Shape) -> Intervals | None:
    """Read a pair as an interval, and a set of single values as closed intervals of no length."""
    if isinstance(shape, Intervals):
        return shape
    if not isinstance(shape, Sequence) or not all(isinstance(item, Scalar) for item in shape.items):
        return None
    texts = [item.text for item in shape.items if isinstance(item, Scalar)]
    if shape.kind == "set":
        return Intervals(tuple(interval(text, text, False, False) for text in texts))
    if shape.kind == "tuple" and len(texts) == 2 and len(shape.brackets) == 2 and shape.brackets[0] in "([":
        return Intervals((interval(texts[0], texts[1], shape.brackets[0] == "(", shape.brackets[1] == ")"),))
    return None
