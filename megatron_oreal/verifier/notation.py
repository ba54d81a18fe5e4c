"""Notation to one normal form: LaTeX spelling, Unicode, thousands separators, units, and splitting at the top level.

After ``clean``: set braces are the two characters ``SET_OPEN`` and ``SET_CLOSE``, text is in double quotes, a degree
sign is ``°``, a dollar sign of money is ``¤``, and no spacing or sizing command is left.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_oreal.verifier.answer import closing_brace

SET_OPEN, SET_CLOSE = "⦃", "⦄"
CURRENCY = "¤€£¥₹"

_UNICODE = str.maketrans(
    {
        "−": "-", "–": "-", "—": "-", "×": "*", "·": "*", "⋅": "*", "∗": "*", "÷": "/", "∕": "/", "π": r"\pi ",
        "∞": r"\infty ", "√": r"\sqrt ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∓": r"\mp ",
        "∪": r"\cup ", "∈": r"\in ", "∅": r"\emptyset ", "≈": r"\approx ", "²": "^{2}", "³": "^{3}", "º": "°",
        "˚": "°", "％": "%", "，": ",", "（": "(", "）": ")", "：": ":", "；": ";", "＝": "=", "“": "", "”": "",
        '"': "", "′": "'", "\u00a0": " ", "\u202f": " ", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ",
    }
)  # fmt: skip

_END = r"(?![A-Za-z])"
_DECIMAL = r"(?<![\d.])(\d{1,50}\.\d{0,50}"
_DOTS = rf"(?:\.\.\.|…|\\[lc]?dots{_END})"
_REWRITES: list[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (rf"\\(?:left|right){_END}\s*\.", ""),
        (rf"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|nolimits){_END}", ""),
        (r"(?<!\\)(?:\\!|\\[\[\]()])", ""),
        (r"\{,\}", ","),
        (rf"(?<!\\)\\[,;: ]|~|\\(?:quad|qquad|enspace|thinspace){_END}", " "),
        (rf"\\(?:[vh]?phantom|color|[hm]space\*?)\s*\{{[^{{}}]*\}}|\\(?:rm|bf|it){_END}", ""),
        (rf"\\(?:small|normalsize|large|Large|LARGE|huge|Huge|boldmath|bfseries|therefore){_END}", ""),
        (r"\\\\ ?\[ ?-?[\d.]{1,8} ?(?:pt|em|ex|mm|cm)\]|\\cr(?![A-Za-z])", r"\\\\ "),
        (r"\\begin\{(aligned|gathered|split)\}((?:(?!\\\\|\\begin).)*)\\end\{\1\}", r"\2"),
        (r"\\overline\s*\{ ?([A-Z] ?[A-Z]) ?\}", r"\1"),
        (rf"\\overrightarrow{_END}", r"\\vec"),
        (r"\\textcolor\s*\{[^{}]*\}", ""),
        (rf"\{{([^{{}}]*)\\over{_END}([^{{}}]*)\}}", r"\\frac{\1}{\2}"),
        (rf"\{{([^{{}}]*)\\choose{_END}([^{{}}]*)\}}", r"\\binom{\1}{\2}"),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\[dt]binom", r"\\binom"),
        (rf"\\(?:leqslant|leq|le){_END}", "<="),
        (rf"\\(?:geqslant|geq|ge){_END}", ">="),
        (rf"\\lt{_END}", "<"),
        (rf"\\gt{_END}", ">"),
        (rf"\\neq?{_END}|\\not\s*=", "!="),
        (r"\\p?mod\s*\{(\w{1,20})\}|\\p?mod\s+(\w{1,20})|\(\s*(?:\\mod|mod)\s+(\w{1,20})\)", r'"(mod \1\2\3)"'),
        (rf"\\equiv{_END}(?=.*mod)", "="),
        (rf"{_DECIMAL})\\dot\s*\{{?(\d)\}}?", r"\1\\overline{\2}"),
        (rf"{_DECIMAL})\((\d{{1,50}})\)", r"\1\\overline{\2}"),
        (rf"{_DECIMAL}?)(\d)\2{{2,50}}{_DOTS}", r"\1\\overline{\2}"),
        (rf"{_DECIMAL}?)(\d{{2,12}}?)\2{{1,20}}{_DOTS}", r"\1\\overline{\2}"),
        (r"\\\$", "¤"),
        (r"\$", ""),
        (r"\\%", "%"),
        (rf"\^?\s*\{{?\s*\\(?:circ|degree){_END}\s*\}}?", "°"),
        (rf"\\(?:cdot|times|ast){_END}", "*"),
        (rf"\\div{_END}", "/"),
        (rf"\\\{{|\\lbrace{_END}", SET_OPEN),
        (rf"\\\}}|\\rbrace{_END}", SET_CLOSE),
        (rf"\\(?:langle|lparen){_END}", "("),
        (rf"\\(?:rangle|rparen){_END}", ")"),
        (rf"\\[lr]?vert{_END}", "|"),
        (rf"\\(?:varnothing|emptyset){_END}", r"\\emptyset "),
        (r"\\operatorname\s*\{([a-z]+)\}", r"\\\1 "),
    )
]
_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|normal|sf|tt|sc)?|math(?:rm|bf|it|sf|tt|normal)|mbox|hbox|bold|boldsymbol|underline)\s*"
    r"\{([^{}]*)\}"
)
_CHOICES = re.compile(r"\([A-J]\)(?:\s*(?:,|and|or)\s*\(?[A-J]\)?)*|[A-J](?:\s*(?:,|and|or)\s*[A-J])+")
_WORD_LIST = re.compile(r"[A-Za-z]{2,20}(?:\s*(?:,|;|\band\b|\bor\b)\s*[A-Za-z]{2,20})+")
_CONJUNCTION = re.compile(r"\s*,?\s*\b(?:and|or)\b\s*,?\s*", re.IGNORECASE)
_INVISIBLE = re.compile("[\u200b-\u200d\u2060\ufeff\ufe0e\ufe0f\u20e3]")
_DOES_NOT_EXIST = re.compile(r'\s*"?\s*(?:does\s+not\s+exist|DNE)\s*"?\s*', re.IGNORECASE)
_INFINITY = re.compile(r'\s*(?P<sign>[+-]?)\s*"?\s*(?P<word>(?:positive |negative )?infinity)\s*"?\s*', re.IGNORECASE)
_NO_SOLUTION = re.compile(r'\s*"?\s*(?:no\s+(?:real\s+)?solutions?|(?:the\s+)?empty\s+set|none)\s*"?\s*', re.IGNORECASE)
_CLOCK = re.compile(
    r"(?:\\text ?\{)? ?(\d{1,2}) ?(?:: ?(\d\d))? ?(?:\\text ?\{)? ?([ap])\.? ?m\.? ?\}?\.?", re.IGNORECASE
)
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
_SPACED_THOUSANDS = re.compile(r"(?<![\d.])[1-9]\d{0,2}(?: \d{3})+(?!\d| \d)")


def clean(text: str) -> str:
    r"""Normalise notation; linear in the length of ``text``. An enclosing ``\boxed{}`` is opened."""
    # One space for many: the patterns here and in units take time that grows fast with the length of a run of spaces.
    text = re.sub(r"\s+", " ", _INVISIBLE.sub("", text.translate(_UNICODE))).strip().strip("`")
    text = text.removeprefix("**").removesuffix("**").strip()
    for box in (r"\boxed{", r"\fbox{"):
        if text.startswith(box) and closing_brace(text, len(box) - 1) == len(text) - 1:
            text = text[len(box) : -1]
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    clock = _CLOCK.fullmatch(text.strip())
    if clock and (clock[2] or re.search(r"[.AP]|\\text", text)):  # 5am alone is a product
        return f'"{int(clock[1])}:{clock[2] or "00"} {clock[3].lower()}m"'
    text = _TEXT.sub(_quote, _TEXT.sub(_quote, text))
    text = _CONJUNCTION.sub(",", text) if re.search(r"[\d)}\]⦄A-Za-z]\W*\b(?:and|or)\b", text, re.IGNORECASE) else text
    text = text.replace("**", "^").strip()
    text = re.sub(r"(?:\.(?!\d)|[,;:\s]|(?<!\\)\\(?=\s*\Z))+\Z", "", text)
    if _NO_SOLUTION.fullmatch(text) or text.replace(" ", "") in (SET_OPEN + SET_CLOSE, "{}"):
        return r"\emptyset"
    if _DOES_NOT_EXIST.fullmatch(text):
        return '"does not exist"'
    if infinity := _INFINITY.fullmatch(text):
        sign = "-" if infinity["word"].lower().startswith("neg") else ""
        return f"{infinity['sign']}{sign}\\infty"
    return _SPACED_THOUSANDS.sub(lambda match: match.group().replace(" ", ""), text)


def squeeze(text: str) -> str:
    """Remove the spaces that separate nothing (``5 5`` keeps its own)."""
    return re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", text)


def _quote(match: re.Match[str]) -> str:
    content = match.group(1).strip()
    if re.fullmatch(r'"[^"]*"', content):  # \textbf{\text{...}}
        return content
    if not content:
        return " "
    if content.lower() in ("and", "or", ", and", ", or", ",and", ",or"):
        return ","
    if re.fullmatch(r"[\d.,+\-*/^()\s%°¤]+", content) or _CHOICES.fullmatch(content):
        return content
    if unit := re.fullmatch(r"([A-Za-z/^\d ]{1,40}?)\s*,?\s(?:and|or)", content):
        return f'"{unit.group(1)}",'
    if _WORD_LIST.fullmatch(content):
        words = [word.strip() for word in re.split(r"[,;]|\band\b|\bor\b", content)]
        return ",".join(f'"{word}"' for word in words if word)
    return f'"{content}"'


def without_thousands(text: str) -> str:
    """Remove the commas of numbers such as ``1,234,567``."""
    return _THOUSANDS.sub(lambda match: match.group().replace(",", ""), text)


def top_level(text: str) -> Iterator[tuple[int, str]]:
    """Yield (index, character) outside every bracket, brace, quotation and command; unbalanced text yields less."""
    depth, quoted, at = 0, False, 0
    while at < len(text):
        char = text[at]
        if char == "\\":
            if not depth and not quoted:
                yield at, char
            at += 2
            continue
        if char == '"':
            quoted = not quoted
        elif not quoted:
            if char in "([{⦃":
                depth += 1
            elif char in ")]}⦄":
                depth -= 1
            elif depth == 0:
                yield at, char
        at += 1


def split(text: str, separators: str) -> list[str]:
    """Split at the top level at any of the one-character ``separators``."""
    parts, start = [], 0
    for at, char in top_level(text):
        if char in separators:
            parts.append(text[start:at].strip())
            start = at + 1
    return [*parts, text[start:].strip()]


def split_command(text: str, command: str) -> list[str]:
    r"""Split at the top level at a command such as ``\cup``."""
    parts, start = [], 0
    for at, char in top_level(text):
        if char == "\\" and text.startswith(command, at) and not text[at + len(command) :][:1].isalpha():
            parts.append(text[start:at].strip())
            start = at + len(command)
    return [*parts, text[start:].strip()]
