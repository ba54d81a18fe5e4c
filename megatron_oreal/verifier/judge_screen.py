r"""Answers that speak to the judge: found before they are sent, since a prompt cannot keep a model from believing them.

A final answer has no business with verdicts, graders, references or instructions. What speaks of them where neither
the question nor the reference answer does is withheld, and the rules' word stands. The words are looked for in the text
as it reads: compatibility forms, look-alike letters, accents, digits for letters, ``\text{}`` and letters set apart are
undone first. This is a list of words: it stops what trainers see most, and paraphrases get past it (docs/verifier.md).
"""

from __future__ import annotations

import base64
import binascii
import re
import unicodedata
from collections.abc import Iterator

from megatron_oreal.verifier.judge_prompt import Case

_THING = (
    r"answers?|options?|choices?|values?|results?|solutions?|numbers?|formulas?|statements?|orders?|units?|signs?|"
    r"expressions?|equations?|to \d+|up to"
)
_NEAR = r"[^.\n]{0,40}?\b"
_WORDS = {
    "verdict": rf"(?<![a-z])(?:in)?correct(?:ness|ly)?(?![a-z])(?! (?:{_THING})\b)|\bverdicts?\b",
    "judge": r"\b(?:judg(?:e|es|ed|ing|ement|ment)|grad(?:er|ers|ing)|evaluators?|scorers?|examiners?|checkers?)\b",
    "reference": r"(?<!of )\breference\b(?! (?:angle|frame|point|line|level|direction|system|plane|circle|triangle)s?"
    r"\b)|\b(?:gold|golden|expected|official|model|target) (?:answer|solution|result|value|standard|label)"
    r"|\bground truth\b|\banswer key\b|\btypos?\b|\bmisprint",
    "ignore": rf"\b(?:ignor|disregard|forget|overrid|bypass)\w*\b{_NEAR}"
    r"(?:above|all|any|anything|before|earlier|everything|instruct\w*|order|preceding|previous|prior|prompt|reference"
    r"|rules?|question|text|told|said)\b|\bdisregard",
    "instruction": r"\binstruct(?:ion|ions|ed)\b|\bprompts?\b|\bnew (?:rule|task|order|policy|system)|\btest mode\b"
    r"|\b(?:developer|debug|admin|sudo|god) mode\b|\bpolicy\b|\bjailbreak",
    "role": r"\bassistant\b|\bchatbot\b|\b(?:system|user|human|developer|model)\s*:|\bsystem (?:prompt|message|note"
    r"|over)|\blanguage model\b|\b(?:llm|ai|gpt)\b(?= |:)",
    "order": rf"\b(?:reply|replies|respond|output|say|print|emit|repeat|decode|declare|return)\b{_NEAR}"
    r"(?:this|it|with|only|the|that|yes|true|equal|same|json|first|object|right)\b",
    "treat": rf"\b(?:treat|consider|regard|accept|count|score|mark|deem|rate|grade|approve|pass)(?:ed|s|ing)?\b{_NEAR}"
    r"(?:this|it|as|equivalent|equal|right|true|same|valid|full)\b|\bfull (?:marks?|credit|score)\b",
    "plea": r"\bplease\b|\bmy job\b|\bshut down\b|\bi beg\b|\bhuman expert\b|\bauthori[sz]e",
    "same": r"\bthe same\b|\b(?:same|equal|identical|equivalent|matche?s?|agrees?|equals)\b[^.\n]{0,20}?\b(?:answer"
    r"|result|given|key|above|asked|both)\b|\bboth\b[^.\n]{0,20}?\b(?:same|equal|agree|equivalent|match)|\bwh(?:atever|ichever)\b",
    "block": r"\b(?:begin|end)(?:ning)? (?:of )?(?:the )?(?:answer|reference|question|data|solution|response|prompt)\b"
    r"|\bnumber of this request\b|\bpredicted end\b",
}
_MARKUP = {
    "chat token": r"<\s*/?\s*\||\|\s*>|<\s*/?\s*(?:s|sop|eo[ahs]|think|tool_call|sys|system|user|assistant|verdict"
    r"|answer|instructions?|(?:start|end)_of_turn|reserved_\d+)\s*>|\[\s*/?\s*(?:inst|gmask|system_prompt|unused_token_\d+)\s*"
    r"\]|<\s*!\s*\[\s*cdata",
    "JSON": r"\"\w+\\?\"\s*:",
}
_OTHER_LANGUAGES = (
    r"正确|錯誤|错误|忽略|无视|無視|指令|参考答案|標準答案|标准答案|裁判|评分|判定|判断为|回答|输出|正解|採点|指示|정답|무시|지시"
    r"|\b(?:ignorier|antworte|bewerte|richtig|korrekt|anweisung|musterl)\w*|\b(?:reponds|repondez|juste|juge|consignes?)\b"
    r"|\b(?:responde|ignora|correcto|correcta|juez|instruccion(?:es)?)\b|игнорир|ответь|верно|правильн|инструкц|судья|эталон"
    r"|صحيح|تجاهل|सही|अनदेखा"
)
_PATTERNS = {name: re.compile(pattern) for name, pattern in (_WORDS | _MARKUP | {"order ": _OTHER_LANGUAGES}).items()}
# Letters of other scripts that look like Latin ones, after case folding.
_LOOK_ALIKES = str.maketrans(
    "авеёікмнорстухїјѕԁԛԝһьгпияαβγεηικνορτυχωϲıᴀᴄᴅᴇɢɪᴊɴᴏʀᴛᴜᴠⲟⲥ",
    "abeeikmhopctyxijsdqwhbrnurabyenikvoptuxwciacdegijnortuvoc",
)
_DIGITS = str.maketrans("013457@$!|", "oieastasil")
_COMMAND = re.compile(r"\\(?:[a-zA-Z]+\*?|.)")
_JOINERS = re.compile(r"[\W_]+")
_SET_APART = re.compile(r"(?<![a-z])[a-z](?:[\W_]{1,4}[a-z](?![a-z])){4,}")
_DISGUISED = re.compile(r"[a-z013457@$!|]*[a-z][013457@$!|]+[a-z][a-z013457@$!|]*")
_SHORT = re.compile(
    r"(?:in)?correct|verdict|judge|grader|reference|ignore|disregard|instructions?|assistant|system|reply"
)
_BASE64 = re.compile(r"[A-Za-z0-9+/]{8,}={0,2}")


def speaks_to_the_judge(case: Case) -> str | None:
    """Return what in the answer of ``case`` is addressed to a judge, None for an ordinary answer.

    A kind of word that the question or the reference answer has itself is ordinary.
    """
    known = None
    for text in _readings(case.answer):
        for name, pattern in _PATTERNS.items():
            found = pattern.search(text)
            if found is None:
                continue
            if known is None:
                known = [*_readings(case.question), *_readings(case.gold)]
            if not any(pattern.search(other) for other in known):
                return f"{name.strip()}: {' '.join(found.group().split())[:40]!r}"
    return None


def _readings(text: str) -> Iterator[str]:
    """Yield the text as a reader could take it, in lower case, from the plain one to the disguised ones."""
    plain = _fold(text)
    yield plain
    latin = plain.translate(_LOOK_ALIKES)
    bare = " ".join(_COMMAND.sub(" ", latin).translate(str.maketrans("{}$~^_", "      ")).split())
    yield latin
    yield bare
    yield _COMMAND.sub("", latin).translate(str.maketrans("", "", "{}$~^_"))
    yield bare[::-1]
    hidden = [_without_digits(found) for found in _DISGUISED.findall(latin)]
    hidden += [_JOINERS.sub("", found) for found in _SET_APART.findall(bare)]
    hidden += _rejoined(bare)
    hidden += _decoded(text)
    if hidden:
        yield " . ".join(hidden)


def _fold(text: str) -> str:
    """Compatibility forms and accents undone, lower case."""
    parts = unicodedata.normalize("NFKD", text)
    return unicodedata.normalize("NFC", "".join(c for c in parts if not unicodedata.combining(c))).casefold()


def _without_digits(word: str) -> str:
    return word.translate(_DIGITS)


def _rejoined(text: str) -> Iterator[str]:
    """Yield the words that a break was put into: "cor rect", "ver-dict"."""
    words = [word for word in _JOINERS.split(text) if word]
    for length in (2, 3):
        for at in range(len(words) - length + 1):
            joined = "".join(words[at : at + length])
            if len(joined) < 13 and _SHORT.fullmatch(joined):
                yield joined


def _decoded(text: str) -> Iterator[str]:
    for found in _BASE64.findall(text):
        try:
            data = base64.b64decode(found + "=" * (-len(found) % 4), validate=True)
        except binascii.Error:
            continue
        if data.isascii() and data.decode("ascii").isprintable():
            yield _fold(data.decode("ascii"))
