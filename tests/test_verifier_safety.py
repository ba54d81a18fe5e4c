"""Model output is data: it is never run, and no size of it costs more than a moment."""

import contextlib
import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_oreal.config import VerifierConfig
from megatron_oreal.verifier import VerifierPool, VerifyItem, symbolic
from megatron_oreal.verifier.rules import check, judge_response
from megatron_oreal.verifier.verdict import Verdict

FINISH_WORDS = VerifierConfig().thinking_finish_words


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
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.strip() == "done", done.stderr[-2000:]


@pytest.fixture(scope="module")
def sympy_is_loaded():
    """Its first import compiles for ten seconds and more."""
    assert symbolic.read("\\int_0^1 x dx") is not None


MONSTERS = [
    "9^{9^{9^9}}", "9^(9^(9^9))", "9**9**9**9", "(9!)!!", "((9!)!)!", "10!^{10!^{10!}}",
    "\\binom{10^9}{5\\cdot 10^8}", "\\exp(\\exp(\\exp(100)))", "2^{10^{12}}", "1e9999", "10^{10^{10}} - 10^{10^{10}}",
    "\\sqrt{9^{9^{9}}}", "\\frac{9^{9^9}}{9^{9^9}}", "x^{10^{12}}", "\\sin(10^{10^{10}})", "\\Gamma(10^{10})",
    "\\operatorname{zeros}(10^6,10^6)", "\\ln(9^{9^{9^9}})", "(10^{6})!", "1.5^{10^9}", "\\pi^{10^{10}}",
    "(" * 900 + "1" + ")" * 900, "-" * 1900 + "1", "{" * 900 + "1" + "}" * 900, "1+" * 900 + "1", "x" * 1999,
    "\\sqrt" * 390 + "2", "|" * 1999, "\\frac" * 390, "1," * 990 + "1", "2^" * 900 + "2", "\\pm" * 600, "(1," * 600,
    "1" * 1999, '"' * 1999, "1 " * 900, "1/" * 900 + "1",
    "5" + " " * 1900 + "x", "5" + "\t" * 1900 + "million", "\\text{a" + " " * 1900 + "and b}", "5 million" * 220,
    "\\pmod{" * 300, "a,b" * 600, "x>1," * 400 + "x<2", "{" * 900 + "\\over" + "}" * 900,
]  # fmt: skip


@pytest.mark.parametrize("monster", MONSTERS, ids=lambda text: text[:40])
@pytest.mark.parametrize("gold", ["5", "\\sqrt{2}+x", "(1,2)"])
def test_a_monster_is_rejected_at_once(monster, gold, sympy_is_loaded):
    start = time.thread_time()
    judgement = check(monster, gold)
    assert time.thread_time() - start < 5
    assert judgement.verdict is not Verdict.CORRECT


@pytest.mark.parametrize("monster", MONSTERS[:12])
def test_a_monster_as_gold_answer_is_unknown_or_unequal_at_once(monster, sympy_is_loaded):
    start = time.thread_time()
    assert check("5", monster).verdict is not Verdict.CORRECT
    assert time.thread_time() - start < 5


@pytest.mark.parametrize("answer", ["7" * 10**6, "1+" * 10**6, "\\boxed{" * 10**5, "(" * 10**6, " " * 10**6 + "5x"])
def test_a_million_characters_are_wrong_not_slow(answer, sympy_is_loaded):
    start = time.thread_time()
    judgement = check(answer, "5")
    assert judgement.verdict is Verdict.WRONG
    assert len(judgement.answer) <= 2000
    assert time.thread_time() - start < 5


def test_two_towers_that_differ_are_not_called_equal():
    assert check("9^{9^{9^{9}}}", "9^{9^{9^{8}}}").verdict is Verdict.UNKNOWN


def test_simple_answers_import_no_sympy_and_no_mpmath():
    script = (
        "import sys; from megatron_oreal.verifier.rules import check\n"
        "pairs = [('5','5'),('1/2','0.5'),('1,000','1000'),('(1,2)','(2,1)'),('x=5','5'),('\\\\frac12','0.5')]\n"
        "for pair in pairs: check(*pair)\n"
        "print([m for m in ('sympy', 'mpmath', 'math_verify', 'torch', 'numpy', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "[]"


HOSTILE = Path(__file__).parent / "data/verifier_hostile.jsonl"
DEADLINE_S, MEMORY_MB = 1.0, 1024
RECORD = struct.Struct("ddQ")
"""Of ``verifier_watched``."""


def _hostile(canary):
    """Return (kind, response, gold); a response is a text or a list of texts and ``[text, count]`` repetitions."""
    rows = []
    for line in HOSTILE.read_text().splitlines():
        row = json.loads(line)
        parts = row["response"] if isinstance(row["response"], list) else [row["response"]]
        text = "".join(part if isinstance(part, str) else part[0] * part[1] for part in parts)
        rows.append((row["kind"], text.replace("@CANARY@", str(canary)), row["gold"]))
    return rows


class _Observer(threading.Thread):
    """Looks at the workers from outside: what CPU time one item has taken, the highest resident memory.

    CPU time, because a worker that the machine lets stand still outlives any limit in seconds.
    """

    def __init__(self, pool, folder):
        super().__init__(daemon=True)
        self.pool, self.folder = pool, folder
        self.cpu_s, self.peak_mb, self.done = {}, 0.0, False

    def run(self):
        while not self.done:
            for pid in self.pool.worker_pids:
                with contextlib.suppress(OSError, IndexError, ValueError, struct.error):
                    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                    used = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
                    status = Path(f"/proc/{pid}/status").read_text()
                    if "State:\tZ" in status:
                        continue
                    self.peak_mb = max(self.peak_mb, int(status.split("VmHWM:")[1].split()[0]) / 1024)
                    began, _, number = RECORD.unpack((self.folder / str(pid)).read_bytes())  # behind ``used``
                    if number:
                        self.cpu_s[number] = max(self.cpu_s.get(number, 0.0), used - began)
            time.sleep(0.02)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exception):
        self.done = True
        self.join()


@pytest.fixture
def watched(tmp_path, monkeypatch):
    folder = tmp_path / "watch"
    folder.mkdir()
    monkeypatch.setenv("VERIFIER_WATCH", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    return folder


def test_the_hostile_set_is_large_and_of_every_kind():
    kinds = Counter(kind for kind, _, _ in _hostile("x"))
    assert sum(kinds.values()) >= 200
    assert len(kinds) >= 12
    assert min(kinds.values()) >= 10
    documents = "".join(path.read_text() for path in (HOSTILE.parents[2] / "docs").glob("*.md"))
    assert f"{HOSTILE.name}`: {sum(kinds.values())} responses" in documents


def test_no_hostile_response_runs_code_outlives_its_deadline_takes_memory_or_disturbs_its_batch(watched, tmp_path):
    canary = tmp_path / "canary"
    hostile = _hostile(canary)
    items = []
    for number, (kind, text, gold) in enumerate(hostile):
        items.append(VerifyItem((kind, number), text, gold))
        if number % 4 == 0:
            items.append(VerifyItem(("ordinary", number), f"so \\boxed{{{number}\\sqrt{{8}}}}", f"{2 * number}\\sqrt2"))
    items = [replace(item, question=str(number)) for number, item in enumerate(items, 1)]
    ended = {}
    with (
        VerifierPool(2, DEADLINE_S, FINISH_WORDS, memory_limit_mb=MEMORY_MB, checker="verifier_watched:judge") as pool,
        _Observer(pool, watched) as observer,
    ):
        judgements = pool.verify(items, lambda item, _: ended.setdefault(int(item.question), time.monotonic()))
    began = {number: at for _, at, number in (RECORD.unpack(file.read_bytes()) for file in watched.iterdir()) if number}
    killed = set()
    for number, (item, judgement) in enumerate(zip(items, judgements, strict=True), 1):
        if judgement.verdict is Verdict.UNKNOWN:
            killed.add(number)
            assert judgement.reason == f"deadline of {DEADLINE_S:g} s exceeded", (item.key, item.text[:200], judgement)
            assert judgement.seconds < 60
        if item.key[0] == "ordinary" and number in killed:  # only when the machine let its worker stand still
            stood_s = ended[number] - began[number] - observer.cpu_s.get(number, 0.0)
            assert stood_s > DEADLINE_S / 2, (item, judgement)
        elif item.key[0] == "ordinary":
            assert judgement.verdict is Verdict.CORRECT, (item, judgement)
        else:
            assert judgement.verdict is not Verdict.CORRECT, (item.key, item.text[:200], judgement)
    assert killed & observer.cpu_s.keys()
    assert max(observer.cpu_s.values()) < DEADLINE_S + 1
    assert 20 < observer.peak_mb < MEMORY_MB
    assert not canary.exists()


@pytest.mark.parametrize(
    "text",
    [
        "1 + 1",
        "__import__('os').system('true')",
        "open('{}', 'w')",
        "__import__('socket').socket()",
        "__import__('os').fork()",
    ],
)
def test_the_watch_catches_a_checker_that_evaluates_answers(text, watched, tmp_path):
    with VerifierPool(1, 300, checker="verifier_watched:evaluate") as pool:
        (judgement,) = pool.verify([VerifyItem(0, text.format(tmp_path / "written"), "2")])
    assert judgement.reason == "worker ended with status 99"
    assert not (tmp_path / "written").exists()
