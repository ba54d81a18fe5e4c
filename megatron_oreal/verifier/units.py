"""Units of measure at the end (money: also at the start) of a value that ``notation.clean`` has normalised."""

from __future__ import annotations

import re

from megatron_oreal.verifier.notation import CURRENCY

_ALIASES = {
    "°": "degree", "deg": "degree", "centimeter": "cm", "centimetre": "cm", "meter": "m", "metre": "m",
    "kilometer": "km", "kilometre": "km", "millimeter": "mm", "kilogram": "kg", "gram": "g", "second": "s",
    "sec": "s", "minute": "min", "hour": "h", "hr": "h", "feet": "ft", "foot": "ft", "inch": "in", "inche":
    "in", "liter": "l", "litre": "l", "¤": "dollar", "usd": "dollar", "€": "euro", "eur": "euro", "£": "pound",
    "gbp": "pound", "¥": "yen", "₹": "rupee", "percent": "%", "percentage": "%", "pct": "%", "sq": "square",
    "cu": "cubic", "mile/h": "mph", "kmh": "km/h", "kph": "km/h",
}  # fmt: skip
_WORDS = (
    r"degrees?|deg|radians?|rad|percentage|percent|pct|units?|dollars?|cents?|euros?|pounds?|"
    r"yen|rupees?|usd|eur|gbp|cm|mm|km|dm|nm|ft|feet|foot|inch(?:es)?|yards?|miles?|mph|"
    r"kmh|kph|meters?|metres?|centimeters?|centimetres?|kilometers?|kilometres?|millimeters?|kg|"
    r"mg|grams?|kilograms?|lbs?|tons?|liters?|litres?|ml|gallons?|seconds?|secs?|minutes?|"
    r"mins?|hours?|hrs?|days?|weeks?|months?|years?|hz|joules?|watts?|volts?|newtons?|points?|"
    r"people|students?|ways?|times?|sides?|square|cubic|sq|cu"
)
_NO_UNIT = re.compile(
    r"\b(?:not?|non|or|and|if|when|unless|for|is|are|was|than|more|less|fewer|least|most|about|around|approx\w*|roughly|"
    r"nearly|almost|rounded|wrong|incorrect|false|except|without|otherwise|any|all)\b",
    re.IGNORECASE,
)
"""Words that say something about the value, so that what they stand in is no unit."""
_MULTIPLIERS = {"dozen": "12", "hundred": "10^2", "thousand": "10^3", "million": "10^6", "billion": "10^9"}
_MULTIPLIER = re.compile(rf'(?<=[\d}}\s])\s*"?\s*({"|".join(_MULTIPLIERS)})\b\s*', re.IGNORECASE)
_WORD = rf"(?:{_WORDS})(?![A-Za-z])"
_POWER = r"(?:\s*\^\s*\{?[-\d]{1,2}\}?)?"
_QUOTED = rf'"[^"]{{1,60}}"{_POWER}'
_BARE = rf"(?:{_WORD}\.?{_POWER})(?:(?:\s*/\s*|\s+per\s+|\s+)(?:{_WORD}|[smh]\b){_POWER})*"
_SUFFIX = re.compile(
    rf"(?<=[\d)}}\]!\w\s])\s*"
    rf"(?P<unit>°\s*\"?[CF]\"?|{_QUOTED}(?:\s*[*/]?\s*{_QUOTED})*|(?<![A-Za-z\\]){_BARE}|[°%{CURRENCY}])\s*\Z",
    re.IGNORECASE,
)
_LETTER_UNIT = re.compile(
    r"(?P<core>-?[\d.,/]+|-?\\frac\{\d+\}\{\d+\})\s+(?P<unit>(?:[msghlLNJWV]|[mk]?m\s*/\s*[smh])(?:\^\{?\d\}?)?)"
)
_BASE = re.compile(r"(?P<core>[0-9A-Fa-f]+)_\{?(?P<base>\d{1,2}|\"[a-z]+\")\}?\Z")
_BASES = {
    "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9",
    "ten": "10", "twelve": "12", "sixteen": "16",
}  # fmt: skip
_TRIGONOMETRIC = re.compile(r"\\?(?:sin|cos|tan|cot|sec|csc)\b")


def split_unit(text: str) -> tuple[str, str | None]:
    """Return (value, unit); the unit in a canonical spelling, None when there is none or it is the generic "units".

    "million" and the like are part of the value; text such as "or more" is no unit.
    """
    text = text.strip()
    if many := _MULTIPLIER.search(text):
        rest = text[many.end() :].strip()
        rest = f'"{rest}' if rest.endswith('"') and rest.count('"') == 1 and rest != '"' else rest.removeprefix('"')
        text = f"{text[: many.start()]} * {_MULTIPLIERS[many.group(1).lower()]} {rest}".strip()
    if base := _BASE.fullmatch(text):
        name = base["base"].strip('"').lower()
        return base["core"], f"base {_BASES.get(name, name)}"
    if text[:1] in CURRENCY and len(text) > 1:
        return text[1:].strip(), _canonical(text[0])
    if text[:1] == "-" and text[1:2] and text[1] in CURRENCY:
        return "-" + text[2:].strip(), _canonical(text[1])
    if letter := _LETTER_UNIT.fullmatch(text):
        return letter["core"], _canonical(letter["unit"])
    match = _SUFFIX.search(text)
    if not match or match.start() == 0 or not re.search(r"\d|\\pi|\\sqrt", text[: match.start()]):
        return text, None
    unit = match["unit"]
    if _NO_UNIT.search(unit):
        return text, None
    if unit == "°" and _TRIGONOMETRIC.search(text):
        return text, None
    return text[: match.start()].strip(), _canonical(unit)


def _canonical(unit: str) -> str | None:
    unit = re.sub(r'["{}.]', " ", unit.lower())
    unit = re.sub(r"\s*\^\s*", "^", " ".join(unit.split()))
    parts = re.split(r"(\s*/\s*|\s+per\s+|\s+)", unit)
    names, power = [], ""
    for part in parts:
        if not part.strip():
            continue
        if part.strip() in ("/", "per"):
            names.append("/")
            continue
        name, _, exponent = part.partition("^")
        singular = name if len(name) <= 2 else name.removesuffix("s")
        name = _ALIASES.get(name, _ALIASES.get(singular, singular))
        if name in ("square", "cubic"):
            power = "^2" if name == "square" else "^3"
            continue
        names.append(name + (f"^{exponent}" if exponent else power))
        power = ""
    joined = "".join(names)
    joined = _ALIASES.get(joined, joined)
    return None if joined.partition("^")[0] in ("unit", "") else joined
