import pytest

from megatron_oreal.verifier.rules import check, judge_response
from megatron_oreal.verifier.verdict import Verdict

CORRECT, WRONG, UNKNOWN = Verdict.CORRECT, Verdict.WRONG, Verdict.UNKNOWN

# (answer, gold); the groups are the conventions of rules.py
EQUAL = {
    "numbers": [
        ("5", "5"), ("5.0", "5"), ("+5", "5"), ("-5", "-5"), ("−5", "-5"), ("1,234,567", "1234567"),
        ("1{,}000", "1000"), ("1\\,000\\,000", "1000000"), ("10\\!000", "10000"), ("1,234.5", "1234.5"),
        ("0.5", "\\frac{1}{2}"), (".5", "1/2"), ("\\frac{2}{4}", "\\frac{1}{2}"), ("\\dfrac{1}{2}", "\\tfrac12"),
        ("-\\frac{1}{2}", "\\frac{-1}{2}"), ("1/2", "0.50"), ("0.\\overline{3}", "\\frac13"),
        ("0.1\\overline{6}", "1/6"), ("1e3", "1000"), ("1.5 \\times 10^{3}", "1500"), ("2.5\\cdot 10^{-3}", "0.0025"),
        ("$5$", "5"), ("\\(5\\)", "5"), ("\\boxed{5}", "5"), ("007", "7"), ("5.", "5"),
        ("2\\frac{1}{2}", "\\frac{5}{2}"), ("2 1/2", "2.5"), ("-1\\frac{3}{4}", "-1.75"), ("2^{10}", "1024"),
        ("5!", "120"), ("\\binom{10}{3}", "120"), ("\\frac{2023!}{2021!}", "2023 \\cdot 2022"), ("|{-3}|", "3"),
        ("\\lfloor 3.7 \\rfloor", "3"), ("½", "0.5"), ("3{,}141", "3141"), ("\\left(5\\right)", "5"),
        ("\\frac{1,000}{2}", "500"), ("0.(3)", "1/3"), ("0.\\dot{3}", "1/3"), ("0.333\\ldots", "1/3"),
        ("0.1666...", "1/6"), ("1.2323...", "\\frac{122}{99}"), ("{3 \\over 7}", "\\frac37"), ("{5 \\choose 2}", "10"),
        ("\\frac{10!}{7!3!}", "120"),
        ("\\color{red}{12}", "12"), ("\\textcolor{red}{12}", "12"), ("\\phantom{0}5", "5"), ("\\underline{5}", "5"),
        ("\\ 8\\ ", "8"), ("1:2", "1/2"),
    ],
    "units": [
        ("5\\text{ cm}", "5"), ("5 cm", "5"), ("5", "5\\text{ cm}"), ("5\\mathrm{~km/h}", "5"), ("60^\\circ", "60"),
        ("60", "60^{\\circ}"), ("60 degrees", "60^\\circ"), ("\\$5", "5"), ("5 dollars", "\\$5"),
        ("\\$1,250.50", "1250.5"), ("€7", "7"), ("12 \\text{ apples}", "12"), ("25\\text{ cm}^2", "25"),
        ("25 cm^2", "25\\text{ cm}^{2}"), ("7 units", "7"), ("5\\text{ meters}", "5\\text{ m}"),
        ("36\\pi \\text{ cubic inches}", "36\\pi"), ("5 m", "5"), ("20 miles per hour", "20 mph"),
        ("2516_8", "2516_{8}"), ("2516_8", "2516_{\\text{eight}}"),
        ("2516", "2516_8"), ("9 square units", "9"), ("\\frac{3}{4} \\text{ hours}", "0.75"),
        ("45^{\\circ}\\text{C}", "45"), ("2\\text{ million}", "2000000"), ("\\$2.4\\text{ million}", "2,400,000"),
        ("2 \\text{ dozen}", "24"), ("5 \\pmod 7", "5"), ("x \\equiv 5 \\pmod{7}", "5 \\pmod 7"),
        ("5 \\text{ cm and } 6 \\text{ cm}", "5, 6"),
    ],
    "percent": [
        ("50\\%", "50"), ("50", "50\\%"), ("50\\%", "0.5"), ("\\frac{1}{2}", "50\\%"), ("12.5 percent", "12.5\\%"),
    ],
    "plus-minus": [
        ("\\pm 3", "3, -3"), ("-3, 3", "\\pm 3"), ("1 \\pm \\sqrt{2}", "1+\\sqrt{2}, 1-\\sqrt{2}"),
        ("±2", "\\{2,-2\\}"), ("x = \\pm 5", "5, -5"), ("1 \\mp 2", "1 \\pm 2"), ("(\\pm 1, 0)", "(1,0), (-1,0)"),
    ],
    "sets and lists": [
        ("2, 1", "1, 2"), ("1 and 2", "1,2"), ("1 \\text{ or } 2", "2, 1"), ("\\{3,1,2\\}", "\\{1,2,3\\}"),
        ("{1, 2}", "\\{2, 1\\}"), ("\\left\\{1,2\\right\\}", "1, 2"), ("x=1, x=2", "1,2"),
        ("x = 1 \\text{ or } x = 2", "2,1"), ("x=1,2", "1,2"), ("\\{1, 1, 2\\}", "\\{1, 2\\}"),
        ("100,200", "200, 100"), ("1,2, and 3", "3,2,1"), ("\\emptyset", "\\{\\}"), ("no solution", "\\varnothing"),
        ("\\{\\frac12, \\sqrt{4}\\}", "\\{2, 0.5\\}"), ("y=2, x=1", "x=1, y=2"),
        ("1,000, 2,000", "2000, 1000"), ("\\text{blue and red}", "\\text{red, blue}"), ("\\text{(A) and (C)}", "A, C"),
    ],
    "tuples": [
        ("(1,2)", "(1, 2)"), ("\\left(\\frac{1}{2}, 3\\right)", "(0.5,3)"), ("(x,y)=(1,2)", "(1,2)"),
        ("1,2", "(1,2)"), ("x=1, y=2", "(1,2)"), ("(1,2),(3,4)", "(3,4),(1,2)"), ("\\langle 1,2\\rangle", "(1,2)"),
        ("(3, \\pi)", "\\left( 3, \\pi \\right)"),
        ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{bmatrix}1\\\\ 2\\end{bmatrix}"),
        ("\\begin{pmatrix}1 & \\sqrt4\\\\3&4\\end{pmatrix}", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}"),
    ],
    "assignments": [
        ("x = 5", "5"), ("5", "x=5"), ("x=5", "x = 5.0"), ("f(x) = x^2+1", "x^2 + 1"), ("5 = x", "5"), ("a+b=7", "7"),
        ("x=2+3=5", "5"), ("\\text{Area} = 12", "12"), ("\\angle ABC = 60^\\circ", "60"), ("x_1 = 4", "4"),
        ("P(A)=\\frac12", "0.5"), ("y = 2x+1", "2x - y + 1 = 0"), ("x^2+y^2=4", "2x^2 + 2y^2 - 8 = 0"),
        ("m \\in \\{1,2\\}", "\\{1,2\\}"),
    ],
    "intervals": [
        ("x > 2", "(2, \\infty)"), ("(2,\\infty)", "x>2"), ("1 < x \\le 3", "(1,3]"), ("3 \\ge x > 1", "(1,3]"),
        ("x \\leq 4", "(-\\infty,4]"), ("x \\in [1,2]", "1 \\le x \\le 2"),
        ("x<1 \\text{ or } x>2", "(-\\infty,1)\\cup(2,\\infty)"), ("2 < x", "x > 2"),
        ("(2,\\infty)\\cup(-\\infty,1)", "(-\\infty,1) \\cup (2,\\infty)"), ("[0, \\frac{1}{2})", "[0,0.5)"),
        ("(1,2)", "1<x<2"), ("\\{x \\mid x > 2\\}", "(2,\\infty)"), ("\\mathbb{R}", "(-\\infty, \\infty)"),
        ("\\text{all real numbers}", "\\mathbb{R}"),
        ("\\mathbb{R} \\setminus \\{2\\}", "\\mathbb{R}\\setminus\\{2\\}"),
        ("x \\ne 2", "\\mathbb{R}\\setminus\\{2\\}"), ("x \\neq 0", "(-\\infty,0)\\cup(0,\\infty)"),
        ("x>5, x<7", "(5,7)"), ("x < 7 \\text{ and } x > 5", "5<x<7"), ("x<1, x>2", "(-\\infty,1)\\cup(2,\\infty)"),
    ],
    "closed forms": [
        ("\\sqrt{8}", "2\\sqrt{2}"), ("\\frac{1}{\\sqrt2}", "\\frac{\\sqrt{2}}{2}"),
        ("\\sqrt{3+2\\sqrt2}", "1+\\sqrt2"), ("2pi", "2\\pi"), ("sqrt(2)/2", "\\frac{\\sqrt2}{2}"),
        ("\\sin 30^\\circ", "\\frac12"), ("\\cos\\frac{\\pi}{3}", "1/2"), ("(x+1)^2", "x^2+2x+1"),
        ("\\ln 8", "3\\ln 2"), ("\\log_2 8", "3"), ("e^{i\\pi}", "-1"), ("\\sin^2 x + \\cos^2 x", "1"),
        ("x(x-1)", "x^2-x"), ("\\frac{x^2-1}{x-1}", "x+1"), ("\\sqrt[3]{27}", "3"), ("3+4i", "4i+3"),
        ("\\tan^{-1} 1", "\\frac{\\pi}{4}"), ("2^{n+1}", "2 \\cdot 2^n"), ("\\frac{a+b}{2}", "\\frac{1}{2}(a+b)"),
        ("\\sqrt{ab}", "\\sqrt{a}\\sqrt{b}"), ("n!", "n \\cdot (n-1)!"), ("x^{2/3}", "\\sqrt[3]{x^2}"),
        ("\\int_0^1 x\\,dx", "\\int_0^1 y\\,dy"), ("16^{16^{16}}", "16^{16^{16}}"),
        ("\\frac{1}{2}\\ln|x| + C", "\\ln|x|/2 + C"), ("\\frac{\\sqrt{5}-1}{4}", "\\sin \\frac{\\pi}{10}"),
    ],
    "letters and words": [
        ("A", "A"), ("(A)", "A"), ("A.", "(A)"), ("\\text{A}", "A"), ("\\textbf{(B)}\\ 12", "B"), ("(b)", "B"),
        ("C) 5 apples", "C"), ("Option D", "D"), ("A, C", "C, A"), ("Yes", "yes"), ("\\text{Evelyn}", "Evelyn"),
        ("A", "(A) 5"), ("5", "\\textbf{(A)}\\ 5"), ("even", "\\text{even}"), ("x", "x"),
        ("\\text{Option D}", "D"), ("\\text{Choice (D)}", "D"), ("\\textbf{\\text{Evelyn}}", "Evelyn"),
    ],
    "sizes, rows and wrappers": [
        ("\\Large 12", "12"), ("{\\large\\bf 12}", "12"), ("\\bold{12}", "12"), ("\\mathbf{\\text{12}}", "12"),
        ("\\hspace{1mm}12", "12"), ("\\therefore 12", "12"), ("\\begin{aligned} x &= 12 \\end{aligned}", "12"),
        ("\\begin{pmatrix}1\\\\[4pt]2\\end{pmatrix}", "\\begin{bmatrix}1\\\\2\\end{bmatrix}"),
        ("\\begin{pmatrix}1\\cr 2\\end{pmatrix}", "\\begin{bmatrix}1\\\\2\\end{bmatrix}"),
        ("\\begin{psmallmatrix}1\\\\2\\end{psmallmatrix}", "\\begin{bmatrix}1\\\\2\\end{bmatrix}"),
        ("\\frac{1}{2}\\begin{pmatrix}1&0\\\\0&-1\\end{pmatrix}", "\\begin{pmatrix}0.5&0\\\\0&-\\frac12\\end{pmatrix}"),
        ("-\\begin{pmatrix}1\\\\-2\\end{pmatrix}", "\\begin{pmatrix}-1\\\\2\\end{pmatrix}"),
        ("\\overline{AB} = 12", "12"), ("\\overrightarrow{b}+\\overrightarrow{a}", "\\vec{a}+\\vec b"),
        ("13 \\text{ (cm)}", "13"), ("16\\,\\text{m}\\cdot\\text{s}^{-1}", "16 \\text{ m/s}"),
        ("3\\!:\\!55 \\text{ p.m.}", "\\text{3:55 PM}"), ("6 \\text{ am}", "6:00 a.m."),
        ("6 AM", "6 a.m."), ("5ma", "5am"), ("\\approx 0.667", "0.667"),
    ],
    "ranges of variables": [
        ("f(x)=2x-1 \\text{ for all } x \\in \\mathbb{R}", "f(x) = 2x-1"), ("f(x)=x, \\forall x", "f(x)=x"),
        ("x \\text{ for all real numbers } x", "f(x)=x"), ("k\\pi, k \\in \\mathbb{Z}", "k\\pi"),
        ("k\\pi \\quad (k \\in \\mathbb{Z})", "x = k\\pi, k\\in\\mathbb Z"),
        ("k\\pi \\text{ where } k \\text{ is an integer}", "k\\pi, k\\in\\mathbb Z"),
        ("f(x)=x+c, c \\in \\mathbb{R}", "f(x)=x+c"), ("f(x)=cx \\text{ for some constant } c", "cx"),
    ],
}  # fmt: skip

DIFFERENT = {
    "numbers": [
        ("0.333", "1/3"), ("1/3", "0.3333333333333333"), ("-5", "5"), ("5", "-5"), ("1e3", "100"), ("100", "1e3"),
        ("12", "21"), ("1,234", "1235"), ("0.5", "0.05"), ("3.14", "\\pi"), ("3.14159265358979323846", "\\pi"),
        ("22/7", "\\pi"), ("2\\frac12", "1"), ("1.41421356", "\\sqrt{2}"), ("5", "5.0001"), ("0.9999999", "1"),
        ("10^{-30}", "0"), ("10^{60}+1", "10^{60}"), ("12", "1, 2"), ("2^{100}", "2^{100}+1"), ("1.0000001", "1"),
        ("\\frac{1}{2}", "\\frac{2}{1}"), ("23", "2 \\cdot 3"), ("2/0", "2"),
    ],
    "units": [
        ("5 cm", "5 m"), ("5\\text{ kg}", "5\\text{ g}"), ("6 cm", "5"), ("\\$5", "\\$6"), ("€5", "\\$5"),
        ("25\\text{ cm}^2", "25\\text{ cm}^3"), ("3m", "3"), ("2t", "2"), ("5c", "5"), ("2516_7", "2516_8"),
        ("60^\\circ", "\\frac{\\pi}{3}"), ("1 m", "100 cm"),
        ("5\\text{ is not the answer}", "5"), ("5\\text{ or more}", "5"), ("3\\text{ if even}", "3"),
        ("2\\text{ million}", "2"),
        ("5 \\text{ approximately}", "5"), ("45^\\circ F", "45^\\circ C"), ("5 \\pmod 8", "5 \\pmod 7"),
    ],
    "percent": [
        ("50\\%", "5"), ("0.5\\%", "50"), ("5\\%", "50\\%"), ("0.5", "0.5\\cdot 100"),
    ],
    "plus-minus": [
        ("3", "\\pm 3"), ("\\pm 3", "3"), ("\\pm 3", "3, 3"), ("1 \\pm 2", "3, 1"), ("\\pm\\sqrt2", "\\pm\\sqrt3"),
    ],
    "sets and lists": [
        ("1", "1, 2"), ("1,2,3", "1,2"), ("1,2", "1,3"), ("\\{1,2\\}", "\\{1,2,3\\}"), ("1, 1", "1, 2"),
        ("\\{1,2\\}", "(1,2)"), ("x=2, y=1", "x=1, y=2"), ("\\emptyset", "0"), ("1,2", "12"), ("2, 2", "2"),
        ("1 and 2", "1"), ("3", "1+2, 3"), ("\\{\\emptyset\\}", "\\emptyset"), ("red and blue", "red"),
        ("1,000, 2,000", "1000"),
    ],
    "tuples": [
        ("(2,1)", "(1,2)"), ("(1,2,3)", "(1,2)"), ("[1,2]", "(1,2)"), ("2,1", "(1,2)"), ("(1,2)", "[1,2)"),
        ("y=1, x=2", "(1,2)"), ("(1,234)", "1234"), ("(1,2),(3,4)", "(1,2),(4,3)"),
        ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{pmatrix}1&3\\\\2&4\\end{pmatrix}"),
    ],
    "assignments": [
        ("x=5", "y=5"), ("x=5", "6"), ("x^2=4", "4"), ("2x=10", "x=5"), ("2x=10", "10"), ("y=2x+1", "y=2x-1"),
        ("f(x)=x", "x^2"), ("x+5", "5"), ("5=6", "6"), ("1=2", "2"),
    ],
    "intervals": [
        ("x \\ge 2", "(2,\\infty)"), ("x<2", "x>2"), ("(1,2)", "1 \\le x \\le 2"), ("(1,3)", "(1,2)"),
        ("[1,\\infty)", "(1,\\infty)"), ("(-\\infty,1)", "(-\\infty,1)\\cup(2,\\infty)"), ("x>2", "2"),
        ("\\mathbb{R}\\setminus\\{2\\}", "\\mathbb{R}\\setminus\\{3\\}"),
        ("x \\ne 1", "x \\ne -1"), ("x \\ne 1", "1"), ("x>5, x<7", "(-\\infty,7)\\cup(5,\\infty)"),
        ("x>7, x<5", "(5,7)"),
    ],
    "closed forms": [
        ("\\sqrt{2}+\\sqrt{3}", "\\sqrt{5}"), ("(x+1)^2", "x^2+1"), ("x", "y"), ("x", "X"), ("|x|", "x"),
        ("\\sqrt{x^2}", "x"), ("2^{n}", "n^{2}"), ("x^2", "x^2 + C"), ("\\sin x", "\\cos x"),
        ("\\ln 2", "\\log_{10} 2"), ("\\frac{1}{x+1}", "\\frac1x+1"), ("3+4i", "3-4i"), ("\\infty", "-\\infty"),
        ("\\int_0^1 x\\,dx", "\\int_0^1 x^2\\,dx"), ("x_1", "x_2"), ("e^{\\pi\\sqrt{163}}", "262537412640768744"),
    ],
    "letters and words": [
        ("A", "B"), ("(A)", "B"), ("A", "C, A"), ("B) 5", "A"), ("Yes", "No"), ("Monday", "Tuesday"), ("ACB", "ABC"),
        ("5", "A"), ("A", "5"), ("B", "(A) 5"), ("(B) 5", "(A) 5"), ("a", "B"), ("infinitely many", "\\text{none}"),
    ],
    "nothing": [
        ("", "5"), ("   ", "5"), ("$$", "5"), ("\\frac{", "5"), ("5 5", "55"), ("\\frac123", "1/23"), ("???", "5"),
        ("\\text{}", "5"),
    ],
}  # fmt: skip


def _table(groups):
    return [
        pytest.param(*pair, id=f"{name}: {pair[0]} | {pair[1]}") for name, pairs in groups.items() for pair in pairs
    ]


@pytest.mark.parametrize(("answer", "gold"), _table(EQUAL))
def test_equal_answers_are_correct(answer, gold):
    judgement = check(answer, gold)
    assert judgement.verdict is CORRECT, judgement


@pytest.mark.parametrize(("answer", "gold"), _table(DIFFERENT))
def test_different_answers_are_wrong(answer, gold):
    judgement = check(answer, gold)
    assert judgement.verdict is WRONG, judgement


@pytest.mark.parametrize(
    "gold",
    [
        "\\frac{1",
        "",
        "\\nonsense{3}{4}",
        "the series converges for all real numbers",
        "\\Gamma(z) \\mathcal{L}",
        "5" * 3000,
    ],
)
def test_a_gold_answer_that_cannot_be_read_gives_unknown(gold):
    assert check("7", gold).verdict is UNKNOWN


@pytest.mark.parametrize("gold", ["\\nonsense{3}{4}", "the series converges for all real numbers"])
def test_the_very_text_of_an_unreadable_gold_answer_is_correct(gold):
    assert check(gold, gold).verdict is CORRECT


@pytest.mark.parametrize("share", ["0.5", "\\frac12", "0.01"])
def test_a_share_is_not_so_many_percent_but_percent_may_be_given_without_the_sign(share):
    assert check(share + "\\%", share).verdict is WRONG
    assert check(share, share + "\\%").verdict is CORRECT
    assert check("5\\%", "5").verdict is CORRECT


def test_no_answer_is_wrong_and_says_so():
    assert (check(None, "5").verdict, check(None, "5").reason) == (WRONG, "no answer")
    judgement = judge_response("I do not know.", True, "5")
    assert (judgement.verdict, judgement.reason, judgement.answer) == (WRONG, "no answer", None)


def test_a_statement_of_two_formulas_is_a_list_of_both():
    response = "So the solutions follow. The answers are $2$ and $3$."
    assert judge_response(response, True, "2").verdict is WRONG
    assert judge_response(response, True, "3, 2").verdict is CORRECT


def test_a_truncated_response_is_wrong_whatever_it_says():
    judgement = judge_response("\\boxed{5}", False, "5")
    assert (judgement.verdict, judgement.reason) == (WRONG, "truncated")
    assert judge_response("\\boxed{5}", True, "5").verdict is CORRECT


@pytest.mark.parametrize(
    ("left", "right"),
    _table({name: pairs for name, pairs in DIFFERENT.items() if name not in ("nothing", "letters and words")}),
)
def test_wrong_stays_wrong_when_gold_and_answer_change_places(left, right):
    assert check(right, left).verdict is not CORRECT
