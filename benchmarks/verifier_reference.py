"""The way InternLM/OREAL's rule checker calls sympy, written anew for timing: not a checker to use.

Its order (oreal/judgers/utils.py, commit 2859cc0): compare as floats; compare as texts without brackets; else read
both sides with ``parse_latex`` or, failing that, ``parse_expr``, ``simplify`` their difference, and compare ``N`` of
them. One process, no time limit. ``parse_expr`` evaluates Python, so anything but plain mathematics is refused here.

Reads JSON lines ``[response, gold]`` from standard input; prints one JSON object. Needs sympy and, for ``parse_latex``,
antlr4-python3-runtime 4.11 (not the 4.13 of math-verify), so ``benchmarks/verifier.py`` runs it in an environment of
its own.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time

import sympy
from sympy.parsing.latex import parse_latex
from sympy.parsing.sympy_parser import parse_expr

_CHARACTERS = re.compile(r"[0-9A-Za-z\s+\-*/^(){},.=|\\]*")
_WORDS = {"frac", "sqrt", "cdot", "int", "x", "y", "d", "dx", "dy"}


def is_plain(text: str) -> bool:
    text = text.replace("\\int_0", "\\int ")
    return bool(_CHARACTERS.fullmatch(text)) and _WORDS.issuperset(re.findall("[A-Za-z]+", text))


def last_box(text: str) -> str:
    """Search and split the whole response, as the released code does."""
    if not re.search("boxed|box", text):
        return ""
    tail = re.split("boxed|box", text)[-1]
    depth = 0
    for end, char in enumerate(tail):
        depth += {"{": 1, "}": -1}.get(char, 0)
        if depth == 0:
            return tail[1:end].replace(" ", "")
    return ""


def as_float(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def read(text: str) -> object:
    for reader in (parse_latex, parse_expr):
        try:
            return reader(text)
        except Exception:
            continue
    return text


def equal(answer: str, gold: str) -> bool:
    left, right = as_float(answer), as_float(gold)
    if left is not None and right is not None:
        return any(math.isclose(left, right * scale, rel_tol=1e-4) for scale in (1, 0.01, 100))
    bare = str.maketrans("", "", "(){}[]")
    if answer.translate(bare) == gold.translate(bare):
        return True
    if answer[0] == gold[0] == "(":
        pairs = list(zip(answer[1:-1].split(","), gold[1:-1].split(","), strict=False))
        if all(equal(*pair) for pair in pairs):
            return True
    left, right = read(answer), read(gold)
    try:
        if sympy.simplify(left - right) == 0:
            return True
        return math.isclose(sympy.N(left), sympy.N(right), rel_tol=1e-3)
    except Exception:
        return False


def main() -> None:
    items = [json.loads(line) for line in sys.stdin]
    answers = [(last_box(response), gold.replace(" ", "")) for response, gold in items]
    for text in {text for pair in answers for text in pair}:
        if not is_plain(text):
            sys.exit(f"refused, not plain mathematics: {text!r}")
    parse_latex("1")  # its parser is loaded at the first call
    wall, cpu = time.perf_counter(), time.process_time()
    num_equal = sum(equal(last_box(response), gold.replace(" ", "")) for response, gold in items)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(json.dumps({"seconds": wall, "cpu_seconds": cpu, "equal": num_equal, "sympy": sympy.__version__}))


if __name__ == "__main__":
    main()
