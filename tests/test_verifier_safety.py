"""Model output is data: it is never run, and no size of it costs more than a moment."""

import subprocess
import sys
import time

import pytest

from megatron_oreal.verifier import symbolic
from megatron_oreal.verifier.rules import check, judge_response
from megatron_oreal.verifier.verdict import Verdict


def _payloads(path):
    touch = f"touch {path}"
    return [
        f"__import__('os').system('{touch}')",
        f"eval(\"__import__('os').system('{touch}')\")",
        f"exec('import os; os.system(\"{touch}\")')",
        f"\\text{{__import__('os').system('{touch}')}}",
        f"\\frac{{__import__('os').system('{touch}')}}{{1}}",
        f"\\operatorname{{__import__('os').system('{touch}')}}",
        f"\\int_0^1 __import__('os').system('{touch}') dx",
        f"x = __import__('os').system('{touch}')",
        f"(1, __import__('os').system('{touch}'))",
        f"{{__import__('os').system('{touch}')}}",
        f"().__class__.__base__.__subclasses__()[0]('{touch}')",
        f"lambda: open('{path}','w')",
        f"\\lim_{{x \\to 0}} open('{path}','w').write('x')",
        "().__class__.__bases__[0].__subclasses__()",
    ]


@pytest.mark.parametrize("number", range(14))
@pytest.mark.parametrize("frame", ["{}", "\\boxed{{{}}}", "The answer is {}", "$\\boxed{{{}}}$", "Answer: ${}$"])
@pytest.mark.parametrize("gold", ["5", "\\int_0^1 x dx"])
def test_code_in_an_answer_is_not_run(tmp_path, number, frame, gold):
    target = tmp_path / "touched"
    judgement = judge_response(frame.format(_payloads(target)[number]), True, gold)
    assert judgement.verdict is not Verdict.CORRECT
    assert not target.exists()


@pytest.mark.parametrize("number", range(14))
def test_code_never_reaches_the_symbolic_reader(number, tmp_path):
    assert not symbolic.is_safe(_payloads(tmp_path / "touched")[number])


def test_python_evaluation_inside_sympy_is_never_reached():
    """Arm a tripwire in sympy's evaluator, then send through every path what the rules accept and reject."""
    script = """
import sympy.parsing.sympy_parser as parser
def tripped(*a, **k):
    raise SystemExit("evaluated: %r" % (a,))
parser.eval = tripped
from megatron_oreal.verifier.rules import check
golds = ["\\\\int_0^1 x dx", "\\\\mathbb{R}\\\\setminus\\\\{2\\\\}", "\\\\sum_{n=1}^{4} n", "5"]
golds += ["\\\\lim_{x \\\\to 0} x"]
answers = ["\\\\int_0^1 y dy", "\\\\mathbb{R}\\\\setminus\\\\{3\\\\}", "\\\\sum_{k=1}^{4} k"]
answers += ["10", "2*(3+4)", "1/2", "x+1", "__import__('os')"]
for gold in golds:
    for answer in answers:
        check(answer, gold)
try:
    parser.parse_expr("1")
except SystemExit:
    print("done")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "done", done.stderr[-2000:]


MONSTERS = [
    "9^{9^{9^9}}", "9^(9^(9^9))", "9**9**9**9", "(9!)!!", "((9!)!)!", "10!^{10!^{10!}}",
    "\\binom{10^9}{5\\cdot 10^8}", "\\exp(\\exp(\\exp(100)))", "2^{10^{12}}", "1e9999", "10^{10^{10}} - 10^{10^{10}}",
    "\\sqrt{9^{9^{9}}}", "\\frac{9^{9^9}}{9^{9^9}}", "x^{10^{12}}", "\\sin(10^{10^{10}})", "\\Gamma(10^{10})",
    "\\operatorname{zeros}(10^6,10^6)", "\\ln(9^{9^{9^9}})", "(10^{6})!", "1.5^{10^9}", "\\pi^{10^{10}}",
    "(" * 900 + "1" + ")" * 900, "-" * 1900 + "1", "{" * 900 + "1" + "}" * 900, "1+" * 900 + "1", "x" * 1999,
    "\\sqrt" * 390 + "2", "|" * 1999, "\\frac" * 390, "1," * 990 + "1", "2^" * 900 + "2", "\\pm" * 600, "(1," * 600,
    "1" * 1999, '"' * 1999, "1 " * 900, "1/" * 900 + "1",
]  # fmt: skip


@pytest.mark.parametrize("monster", MONSTERS, ids=lambda text: text[:40])
@pytest.mark.parametrize("gold", ["5", "\\sqrt{2}+x", "(1,2)"])
def test_a_monster_is_rejected_at_once(monster, gold):
    start = time.perf_counter()
    judgement = check(monster, gold)
    assert time.perf_counter() - start < 3
    assert judgement.verdict is not Verdict.CORRECT


@pytest.mark.parametrize("monster", MONSTERS[:12])
def test_a_monster_as_gold_answer_is_unknown_or_unequal_at_once(monster):
    start = time.perf_counter()
    assert check("5", monster).verdict is not Verdict.CORRECT
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize("answer", ["7" * 10**6, "1+" * 10**6, "\\boxed{" * 10**5, "(" * 10**6, " " * 10**6 + "5x"])
def test_a_million_characters_are_wrong_not_slow(answer):
    start = time.perf_counter()
    judgement = check(answer, "5")
    assert judgement.verdict is Verdict.WRONG
    assert len(judgement.answer) <= 2000
    assert time.perf_counter() - start < 1


def test_two_towers_that_differ_are_not_called_equal():
    assert check("9^{9^{9^{9}}}", "9^{9^{9^{8}}}").verdict is Verdict.UNKNOWN


def test_simple_answers_import_no_sympy_and_no_mpmath():
    script = (
        "import sys; from megatron_oreal.verifier.rules import check\n"
        "pairs = [('5','5'),('1/2','0.5'),('1,000','1000'),('(1,2)','(2,1)'),('x=5','5'),('\\\\frac12','0.5')]\n"
        "for pair in pairs: check(*pair)\n"
        "print([m for m in ('sympy', 'mpmath', 'math_verify', 'torch', 'numpy', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
