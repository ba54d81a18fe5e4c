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
_MEASURES = (
    r"degrees?|deg|radians?|rad|percentage|percent|pct|units?|dollars?|cents?|euros?|pounds?|"
    r"yen|rupees?|usd|eur|gbp|cm|mm|km|dm|nm|ft|feet|foot|inch(?:es)?|yards?|miles?|mph|"
    r"kmh|kph|meters?|metres?|centimeters?|centimetres?|kilometers?|kilometres?|millimeters?|millimetres?|kg|"
    r"mg|grams?|kilograms?|milligrams?|lbs?|ounces?|oz|tons?|tonnes?|liters?|litres?|ml|milliliters?|millilitres?|"
    r"gallons?|quarts?|pints?|seconds?|secs?|minutes?|mins?|hours?|hrs?|days?|weeks?|months?|years?|decades?|hz|khz|mhz|"
    r"joules?|kj|watts?|kw|volts?|amperes?|amps?|ohms?|newtons?|pascals?|kpa|moles?|mol|kelvins?|celsius|fahrenheit|"
    r"knots?|acres?|hectares?|bits?|bytes?|square|cubic|sq|cu"
)
_COUNTED = (
    r"points?|people|persons?|students?|pupils?|children|boys?|girls?|men|women|adults?|teachers?|players?|members?|"
    r"friends?|workers?|employees?|customers?|passengers?|voters?|guests?|teams?|groups?|classes|families|couples?|"
    r"pairs?|ways?|times?|sides?|edges?|vertices|faces?|diagonals?|angles?|triangles?|squares?|rectangles?|circles?|"
    r"lines?|segments?|regions?|solutions?|roots?|integers?|numbers?|primes?|divisors?|factors?|digits?|terms?|"
    r"elements?|subsets?|functions?|permutations?|combinations?|arrangements?|outcomes?|possibilities|pieces?|parts?|"
    r"steps?|moves?|turns?|rounds?|games?|matches|tosses|rolls?|trials?|trips?|laps?|rows?|columns?|cells?|cubes?|"
    r"tiles?|blocks?|bricks?|boxes|bags?|baskets?|bottles?|cans?|cups?|glasses|jars?|books?|pages?|words?|letters?|"
    r"stamps?|cards?|coins?|dice|pennies|nickels?|dimes|tickets?|seats?|chairs?|tables?|rooms?|houses?|floors?|cars?|"
    r"bikes?|bicycles?|buses|trains?|balls?|marbles?|beads?|toys?|pencils?|pens?|crayons?|apples?|oranges?|bananas?|"
    r"pears?|peaches|grapes|berries|cherries|lemons?|eggs?|cookies|cakes?|pies|pizzas?|slices?|candies|sweets|"
    r"chocolates?|sandwiches|flowers?|roses|trees?|plants?|seeds?|animals?|dogs?|cats?|cows?|horses?|sheep|pigs?|"
    r"chickens?|birds?|fish|ducks?|rabbits?|frogs?|bees|ants|legs?|heads?|shirts?|socks?|shoes?|hats?|tickets?|calls?|"
    r"messages?|hits?|votes?|shots?|goals?|wins|calories|items?|objects?|sheets?|stones?|sticks?|chips?|gifts?"
)
_QUALIFIERS = (
    r"different|distinct|possible|total|ordered|red|blue|green|white|black|yellow|whole|full|new|such|"
    r"real|positive|prime|valid"
)
"""What may stand before something counted and says no more than that."""
_MULTIPLIERS = {
    "dozen": "12", "hundred": "10^2", "thousand": "10^3", "million": "10^6", "billion": "10^9",
    "trillion": "10^12", "lakh": "10^5", "crore": "10^7",
}  # fmt: skip
_MULTIPLIER = re.compile(rf'(?<=[\d}}\s])\s*"?\s*({"|".join(_MULTIPLIERS)})\b\s*', re.IGNORECASE)
_WORD = rf"(?:{_MEASURES}|{_COUNTED})(?![A-Za-z])"
_POWER = r"(?:\s*\^\s*\{?[-\d]{1,2}\}?)?"
_QUOTED = rf'"[^"]{{1,60}}"{_POWER}'
_LETTER = r"(?:in\.?|[msghlLNJWVACFKT]|[mk][NJWVg]|MJ|MW|Pa|eV|µm)(?![A-Za-z])"
_MEASURE = rf"(?:{_WORD}\.?|{_LETTER}){_POWER}"
_BARE = (
    rf"(?:(?:{_QUALIFIERS})\s+){{0,2}}(?:{_WORD}\.?{_POWER})"
    rf"(?:(?:\s*/\s*|\s+per\s+|\s+)(?:{_WORD}|[smhg]\b){_POWER}){{0,3}}"
)
_SUFFIX = re.compile(
    rf"(?<=[\d)}}\]!\w\s])\s*"
    rf"(?P<unit>°\s*\"?[CF]\"?|{_QUOTED}(?:\s*[*/]?\s*{_QUOTED})*|(?<![A-Za-z\\]){_BARE}|[°%{CURRENCY}])\s*\Z",
    re.IGNORECASE,
)
_NAMED = re.compile(
    rf"\s*(?:(?i:{_BARE})|\(mod \w{{1,20}}\)|(?:different|distinct|possible) [a-z]{{3,30}}s|"
    rf"{_MEASURE}(?:\s*(?:/|\*|\s+per\s+|\s)\s*{_MEASURE}){{0,3}}|°?\s?[CF]|[°%{CURRENCY}])\s*"
)
_INCOMPLETE = re.compile(r'\b(?:square|cubic|sq|cu|(?:square|cube)\s+roots?)"?\s*\Z', re.IGNORECASE)
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

    Only measures and things commonly counted are units: "million" and the like are part of the value, and any other
    text ("squared", "or more", "halves") stays, so that the value is not taken for the bare number.
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
    if _INCOMPLETE.search(unit):
        return text, None
    if '"' in unit and not _NAMED.fullmatch(_unenclosed(" ".join(unit.replace('"', " ").split()))):
        return text, None
    if unit == "°" and _TRIGONOMETRIC.search(text):
        return text, None
    return text[: match.start()].strip(), _canonical(unit)


def _unenclosed(unit: str) -> str:
    """Remove the brackets of ``(cm)``."""
    return unit[1:-1] if re.fullmatch(r"\([^()]*\)", unit) and not unit.startswith("(mod ") else unit


def _canonical(unit: str) -> str | None:
    unit = re.sub(r'["{}.]', " ", unit.lower())
    unit = _unenclosed(re.sub(r"\s*\^\s*", "^", " ".join(unit.split())))
    parts = re.split(r"(\s*/\s*|\s+per\s+|\s+)", unit)
    names, power = [], ""
    for part in parts:
        if part.strip() in ("", "*"):
            continue
        if part.strip() in ("/", "per"):
            names.append("/")
            continue
        name, _, exponent = part.partition("^")
        if exponent.startswith("-") and names:
            names.append("/")
            exponent = exponent.removeprefix("-").removeprefix("1")
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
