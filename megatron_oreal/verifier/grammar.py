r"""A whitelist grammar for closed forms, and their values.

Model output is never handed to anything that evaluates Python (``sympy.sympify`` and ``parse_expr`` do): this parser
knows numbers, symbols, arithmetic and a fixed table of functions, in LaTeX or in plain notation, and rejects the rest.
Nothing is computed here (``values`` does that), so that a tower of powers costs nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

MAX_NUMBER_CHARS = 1_000
_MAX_DEPTH = 60
_MAX_NODE_DEPTH = 120


class UnreadableError(ValueError):
    """The text is not in the grammar."""


class AmbiguousError(UnreadableError):
    """The text is notation that readers take differently."""


class TooLargeError(ValueError):
    """The value, or one on the way to it, lies outside the bounds of this room."""


@dataclass(frozen=True, slots=True)
class Node:
    """One operation: ``op`` over ``args``; ``value`` is the ``Fraction`` of a "num", the name of a "sym" or "const"."""

    op: str
    args: tuple[Node, ...] = ()
    value: Any = None
    depth: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        depth = 1 + max((arg.depth for arg in self.args), default=0)
        if depth > _MAX_NODE_DEPTH:
            raise UnreadableError("nested too deeply")
        object.__setattr__(self, "depth", depth)


_FUNCTION_NAMES = (
    "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "arcsinh",
    "arccosh", "arctanh", "ln", "exp", "log",
)  # fmt: skip
_FUNCTIONS = {name: name for name in _FUNCTION_NAMES} | {
    "lg": "log10", "asin": "arcsin", "acos": "arccos", "atan": "arctan", "arsinh": "arcsinh", "arcosh": "arccosh",
}  # fmt: skip
_INVERSE = {"sin": "arcsin", "cos": "arccos", "tan": "arctan", "sinh": "arcsinh", "cosh": "arccosh", "tanh": "arctanh"}
_GREEK = frozenset((
    "alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "zeta", "eta", "theta", "vartheta", "iota",
    "kappa", "lambda", "mu", "nu", "xi", "rho", "sigma", "tau", "upsilon", "phi", "varphi", "chi", "psi",
    "omega", "Gamma", "Delta", "Theta", "Lambda", "Xi", "Pi", "Sigma", "Phi", "Psi", "Omega", "infty",
    "emptyset", "ell", "hbar",
))  # fmt: skip
_NUMBER = re.compile(r"(\d*)\.(\d*)\\overline\{(\d+)\}|(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,4}(?!\d))?")
_MIXED_PART = re.compile(r"\s*(?:\\frac\s*\{(\d+)\}\s*\{(\d+)\}|\\frac\s*(\d)(\d)|(?<=\s)(\d+)/(\d+)(?!\d))")
_SUBSCRIPT = re.compile(r"_(?:\{([\w+\-, ]{1,20})\}|(\w))")
_ARROW = re.compile(r"\s*\{\s*([A-Za-z]{1,3})\s*\}|\s*([A-Za-z])")
_CLOSING = {"(": ")", "[": "]", "{": "}"}

_MINUS_ONE = Node("neg", (Node("num", value=Fraction(1)),))
_ARTICLE = re.compile(r"\A(?:an?|the) (?=\w{2})")
_NAME = re.compile(r"\\?([A-Za-z]+)")


def number(text: str) -> Fraction:
    """Return the exact value of an unsigned decimal, in scientific notation or with an overlined period."""
    if len(text) > MAX_NUMBER_CHARS:
        raise TooLargeError("a number of too many digits")
    match = _NUMBER.fullmatch(text)
    if not match:
        raise UnreadableError("not a number")
    if period := match.group(3):
        whole, fixed = match.group(1) or "0", match.group(2)
        tail = Fraction(int(period), 10 ** len(fixed) * (10 ** len(period) - 1))
        return int(whole) + (Fraction(int(fixed), 10 ** len(fixed)) if fixed else 0) + tail
    return Fraction(text if text[-1] != "." else text[:-1])


def parse(text: str) -> Node:
    """Parse a closed form that ``notation.clean`` has normalised; raises ``UnreadableError`` or ``TooLargeError``."""
    parser = _Parser(text)
    node = parser.expression()
    if parser.peek():
        raise UnreadableError(f"unexpected {parser.peek()!r}")
    return node


class _Parser:
    def __init__(self, text: str) -> None:
        self.text, self.at, self.depth, self.bars = text, 0, 0, 0

    def peek(self) -> str:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        return self.text[self.at] if self.at < len(self.text) else ""

    def accept(self, token: str) -> bool:
        self.peek()
        if self.text.startswith(token, self.at):
            self.at += len(token)
            return True
        return False

    def expect(self, token: str) -> None:
        if not self.accept(token):
            raise UnreadableError(f"expected {token!r}")

    def deeper(self) -> None:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise UnreadableError("nested too deeply")

    def expression(self) -> Node:
        self.deeper()
        terms = [self.term()]
        while (sign := self.peek()) in ("+", "-"):
            self.at += 1
            term = self.term()
            terms.append(term if sign == "+" else Node("neg", (term,)))
        self.depth -= 1
        return terms[0] if len(terms) == 1 else Node("add", tuple(terms))

    def term(self) -> Node:
        left = self.factor()
        while True:
            if self.accept("*"):
                left = Node("mul", (left, self.factor()))
            elif self.accept("/") or (self.text.count(":") == 1 and self.accept(":")):
                left = Node("div", (left, self.factor()))
            elif self.starts_operand():
                if self.peek().isdigit() and self.text[self.at - 1] != "!":
                    raise AmbiguousError("two numbers without an operator")
                left = Node("mul", (left, self.factor()))
            else:
                return left

    def starts_operand(self) -> bool:
        at = self.peek()
        if self.text.startswith(("\\rfloor", "\\rceil"), self.at):
            return False
        return bool(at) and (at.isalnum() or at in '([{\\"' or (at == "|" and not self.bars))

    def factor(self) -> Node:
        sign = self.peek()
        if sign and sign in "+-":
            self.at += 1
            self.deeper()
            node = self.factor()
            self.depth -= 1
            return node if sign == "+" else Node("neg", (node,))
        return self.postfix(self.operand())

    def postfix(self, node: Node) -> Node:
        while at := self.peek():
            if at == "^":
                self.at += 1
                node = Node("pow", (node, self.exponent()))
            elif at == "!":
                self.at += 1
                if self.peek() == "!":
                    raise UnreadableError("double factorial")
                node = Node("factorial", (node,))
            elif at == "%":
                self.at += 1
                node = Node("div", (node, Node("num", value=Fraction(100))))
            elif at == "°":
                self.at += 1
                node = Node("mul", (node, Node("div", (Node("const", value="pi"), Node("num", value=Fraction(180))))))
            else:
                break
        return node

    def exponent(self) -> Node:
        self.deeper()
        if self.accept("-"):
            node = Node("neg", (self.exponent(),))
        else:
            self.accept("+")
            node = self.operand()
            if self.accept("^"):
                node = Node("pow", (node, self.exponent()))
        self.depth -= 1
        return node

    def operand(self) -> Node:
        at = self.peek()
        if at.isdigit() or at == ".":
            return self.number()
        if at in ("(", "[", "{"):
            return self.group(at)
        if at == "|" and not self.bars:
            self.at += 1
            self.bars += 1
            node = Node("abs", (self.expression(),))
            self.expect("|")
            self.bars -= 1
            return node
        if at == '"':
            return self.quoted()
        if at == "\\":
            return self.command()
        if at.isalpha() and at.isascii():
            return self.letters()
        raise UnreadableError(f"unexpected {at!r}" if at else "incomplete")

    def group(self, opening: str) -> Node:
        self.expect(opening)
        bars, self.bars = self.bars, 0
        node = self.expression()
        self.expect(_CLOSING[opening])
        self.bars = bars
        return node

    def number(self) -> Node:
        match = _NUMBER.match(self.text, self.at)
        if not match:
            raise UnreadableError("not a number")
        self.at = match.end()
        value = number(match.group())
        mixed = _MIXED_PART.match(self.text, self.at)
        if mixed and match.group().isdigit():
            top, bottom = (int(part[:MAX_NUMBER_CHARS]) for part in mixed.groups() if part)
            if 0 < top < bottom:
                self.at = mixed.end()
                value += Fraction(top, bottom)
        return Node("num", value=value)

    def quoted(self) -> Node:
        end = self.text.find('"', self.at + 1)
        if end < 0:
            raise UnreadableError("unbalanced text")
        word = self.text[self.at + 1 : end].strip()
        self.at = end + 1
        if not word:
            raise UnreadableError("empty text")
        return self.symbol(word if len(word) == 1 else "word " + _ARTICLE.sub("", word.casefold()))

    def symbol(self, name: str) -> Node:
        if subscript := _SUBSCRIPT.match(self.text, self.at):
            self.at = subscript.end()
            name += "_" + (subscript.group(1) or subscript.group(2)).replace(" ", "")
        while self.at < len(self.text) and self.text[self.at] == "'":
            self.at += 1
            name += "'"
        if name in ("e", "i"):
            return Node("const", value=name)
        return Node("sym", value=name)

    def letters(self) -> Node:
        """Read letters: a known name, a word (4 letters or more, or with a capital among several), or one symbol."""
        end = self.at
        while end < len(self.text) and self.text[end].isascii() and self.text[end].isalpha():
            end += 1
        run = self.text[self.at : end]
        if run in ("pi", "sqrt", "infinity", "binom") or run in _FUNCTIONS:
            self.at = end
            self.deeper()
            node = self.named(run)
            self.depth -= 1
            return node
        if len(run) >= 4 or (len(run) >= 2 and not run.islower()):
            self.at = end
            return self.symbol("word " + (run.casefold() if not run.isupper() else run))
        self.at += 1
        return self.symbol(run[0])

    def command(self) -> Node:
        match = _NAME.match(self.text, self.at)
        if not match:
            raise UnreadableError("unknown command")
        self.at = match.end()
        self.deeper()
        node = self.named(match.group(1))
        self.depth -= 1
        return node

    def named(self, name: str) -> Node:
        if name == "pi":
            return Node("const", value="pi")
        if name in ("infty", "infinity"):
            return Node("sym", value="infty")
        if name in _GREEK:
            return self.symbol("\\" + name)
        if name == "frac":
            return Node("div", (self.argument(), self.argument()))
        if name == "binom":
            return Node("binom", (self.argument(), self.argument()))
        if name == "sqrt":
            index = self.group("[") if self.peek() == "[" else Node("num", value=Fraction(2))
            return Node("root", (self.operand(), index))
        if name in ("lfloor", "lceil"):
            node = Node(name[1:], (self.expression(),))
            self.expect("\\r" + name[1:])
            return node
        if name in _FUNCTIONS:
            return self.function(_FUNCTIONS[name])
        if name == "vec" and (arrow := _ARROW.match(self.text, self.at)):
            self.at = arrow.end()
            return self.symbol(f"\\vec {arrow[1] or arrow[2]}")
        raise UnreadableError(f"unknown command \\{name}")

    def argument(self) -> Node:
        r"""Read one argument of ``\frac``: a group, one digit, one letter or one command."""
        at = self.peek()
        if at.isdigit():
            self.at += 1
            return Node("num", value=Fraction(int(at)))
        if at == "{":
            return self.group("{")
        if at.isalpha() and at.isascii():
            self.at += 1
            return self.symbol(at)
        if at == "\\":
            return self.command()
        raise UnreadableError("missing argument")

    def function(self, name: str) -> Node:
        base, power = None, None
        while (mark := self.peek()) and mark in "_^":
            self.at += 1
            if mark == "_" and name == "log" and base is None:
                base = self.argument()
            elif mark == "^" and power is None:
                power = self.exponent()
            else:
                raise UnreadableError(f"unexpected {mark!r}")
        if power == _MINUS_ONE and name in _INVERSE:
            name, power = _INVERSE[name], None
        if self.peek() in ("(", "{", "["):
            arg = self.group(self.peek())
        else:
            arg = self.postfix(self.operand())
            while self.starts_operand() and not self.peek().isdigit() and not self.at_function():
                arg = Node("mul", (arg, self.postfix(self.operand())))
        node = Node("logbase", (arg, base)) if base is not None else Node(name, (arg,))
        return Node("pow", (node, power)) if power is not None else node

    def at_function(self) -> bool:
        match = _NAME.match(self.text, self.at)
        return match is not None and match.group(1) in _FUNCTIONS
