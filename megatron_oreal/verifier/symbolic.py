r"""math-verify for what the whitelist grammar does not cover: integrals, sums, limits, set differences.

Only math-verify's LaTeX reader is used (an ANTLR grammar). Its plain-expression reader is left out because it ends in
``sympy.parse_expr``, which evaluates Python (and while any of it runs, that evaluation is taken out); so is its unit
stripping, which takes the ``m`` of ``3m`` for metres. Its time limits rest on ``signal.alarm``, which a worker's own
deadline replaces. Decimals are made exact, because math-verify compares floating point numbers to six places.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from typing import Any

from megatron_oreal.verifier.notation import SET_CLOSE, SET_OPEN
from megatron_oreal.verifier.untimed import untimed

MAX_CHARS = 400
_COMMANDS = frozenset((
    "frac", "sqrt", "cdot", "times", "pi", "infty", "pm", "int", "iint", "sum", "prod", "lim", "to",
    "rightarrow", "in", "notin", "setminus", "backslash", "cup", "cap", "subset", "mathbb", "emptyset", "sin",
    "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "ln", "log", "exp",
    "le", "ge", "ne", "lt", "gt", "text", "left", "right", "begin", "end", "alpha", "beta", "gamma", "delta",
    "epsilon", "theta", "lambda", "mu", "nu", "rho", "sigma", "tau", "phi", "varphi", "psi", "omega", "lfloor",
    "rfloor", "lceil", "rceil", "mathrm",
))  # fmt: skip
_CHARACTERS = re.compile(r"[A-Za-z0-9\s\\{}()\[\]+\-*/^_=<>|,.;:&]*")
_TOO_MUCH = re.compile(r"__|\.\s*[A-Za-z_]|\d{7}|\^\s*\{[^{}]*\^|\^\s*\w\s*\^|\^\s*\{?-?\d{4}")


def is_safe(latex: str) -> bool:
    """Tell whether a text is short, of known commands and characters, and without numbers that explode."""
    if len(latex) > MAX_CHARS or not _CHARACTERS.fullmatch(latex) or _TOO_MUCH.search(latex):
        return False
    return all(command in _COMMANDS for command in re.findall(r"\\([A-Za-z]+)", latex))


def to_latex(text: str) -> str:
    """Undo the marks of ``notation.clean``."""
    text = re.sub(r'"([^"]*)"', r"\\text{\1}", text)
    text = text.replace(SET_OPEN, r"\{").replace(SET_CLOSE, r"\}")
    return text.replace("<=", r"\le ").replace(">=", r"\ge ").replace("!=", r"\ne ")


@contextlib.contextmanager
def _numbers_only() -> Iterator[None]:
    """Let sympy make numbers of texts and nothing else.

    Its LaTeX reader turns every number token into ``sympy.Number(text)``, which ends in ``eval`` as any ``sympify`` of
    a text does. Meanwhile sympy's ``eval_expr`` is one that evaluates nothing. For one thread at a time.
    """
    from sympy.parsing import sympy_parser

    original = sympy_parser.eval_expr
    sympy_parser.eval_expr = _literal
    try:
        yield
    finally:
        sympy_parser.eval_expr = original


def _literal(code: str, local_dict: Any, global_dict: Any) -> Any:
    from sympy import Float, Integer

    literal = re.fullmatch(r"\s*(Integer|Float)\s*\(\s*'?([\d.]+(?:[eE][+-]?\d{1,3})?)'?\s*\)\s*", code)
    if literal is None:
        raise ValueError("not a number literal")
    return Integer(int(literal[2])) if literal[1] == "Integer" else Float(literal[2])


def read(text: str) -> Any | None:
    """Return the sympy object that a cleaned text stands for, None when it is not safe or not readable."""
    latex = to_latex(text)
    if not is_safe(latex):
        return None
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    with untimed():  # sympy takes a second to import
        from latex2sympy2_extended import NormalizationConfig
        from math_verify import LatexExtractionConfig, parse
        from sympy import Float, Rational

    normal = NormalizationConfig(basic_latex=True, malformed_operators=True, boxed="none")
    config = LatexExtractionConfig(boxed_match_priority=-1, normalization_config=normal)
    with _numbers_only():
        found = parse(f"${latex}$", [config], fallback_mode="no_fallback", parsing_timeout=None)
    if not found or isinstance(found[0], str):
        return None
    return found[0].xreplace({value: Rational(str(value)) for value in found[0].atoms(Float)})


def equal(gold: Any, answer: Any) -> bool:
    """Compare two sympy objects by math-verify's rules, at 50 digits."""
    from math_verify import verify

    with _numbers_only():
        return bool(verify(gold, answer, float_rounding=50, numeric_precision=50, timeout_seconds=None))
