import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from megatron_oreal.config import VerifierConfig
from megatron_oreal.errors import UserError
from megatron_oreal.verifier import Verdict, VerifierPool, VerifyItem

# Two integrals that differ: sympy looks for closed forms far longer than any deadline here.
HANGING_GOLD = "\\int_0^1 \\frac{\\sin(x^3+1)}{\\ln(x^2+2)+\\sqrt{x^5+x+1}} dx"
HANGING_ANSWER = "\\boxed{\\int_0^1 \\frac{\\sin(x^3)\\cos(x^2)}{\\ln(x+2)+e^{x}} dx}"
ON_DEMAND = "verifier_checkers:on_demand"


@pytest.fixture(autouse=True)
def _checkers_are_importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(__file__))


def _alive(pid):
    """Tell whether a process runs; a zombie that nobody reaps does not."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait_until(condition, timeout_s=10):
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def test_verdicts_come_back_in_the_order_of_the_items_and_are_streamed():
    items = [VerifyItem(i, f"<think>0</think> \\boxed{{{i}}}", str(i - i % 2), stopped=i % 5 != 0) for i in range(500)]
    seen = []
    with VerifierPool.from_config(VerifierConfig()) as pool:
        judgements = pool.verify(items, on_result=lambda item, judgement: seen.append((item.key, judgement)))
        assert len(pool) == 0
    for item, judgement in zip(items, judgements, strict=True):
        if not item.stopped:
            assert judgement.reason == "truncated"
        assert judgement.verdict is (Verdict.CORRECT if item.stopped and item.key % 2 == 0 else Verdict.WRONG)
    assert sorted(key for key, _ in seen) == list(range(500))
    assert dict(seen) == dict(enumerate(judgements))


def test_results_are_ready_while_other_responses_are_still_to_come():
    with VerifierPool(1, 5) as pool:
        assert pool.drain() == []
        pool.submit("a", "\\boxed{1}", "1")
        assert [(key, judgement.verdict) for key, judgement in pool.drain(30)] == [("a", Verdict.CORRECT)]
        pool.submit("b", "\\boxed{2}", "1")
        pool.submit("c", "\\boxed{1}", "1", stopped=False)
        with pytest.raises(ValueError, match="'b' is in flight"):
            pool.submit("b", "", "1")
        assert {key: judgement.reason for key, judgement in pool.results()} == {"b": "not equal", "c": "truncated"}
        pool.submit("a", "\\boxed{1}", "1")
        assert len(list(pool.results())) == 1


def test_an_item_past_its_deadline_is_unknown_and_its_worker_is_replaced():
    with VerifierPool(1, 1.5) as pool:
        pool.verify([VerifyItem("start", "\\boxed{1}", "1")])
        before = pool.worker_pids
        start = time.monotonic()
        items = [VerifyItem("hang", HANGING_ANSWER, HANGING_GOLD)]
        items += [VerifyItem(i, f"\\boxed{{{i}}}", str(i)) for i in range(30)]
        hang, *others = pool.verify(items)
        assert (hang.verdict, hang.reason) == (Verdict.UNKNOWN, "deadline of 1.5 s exceeded")
        assert 1.4 < time.monotonic() - start < 15
        assert {judgement.verdict for judgement in others} == {Verdict.CORRECT}
        assert pool.worker_pids != before
        assert not any(_alive(pid) for pid in before)


def test_the_deadline_holds_where_no_python_code_can_run():
    with VerifierPool(1, 1, checker=ON_DEMAND) as pool:
        start = time.monotonic()
        (judgement,) = pool.verify([VerifyItem(0, "hold the interpreter lock", "1")])
        assert (judgement.verdict, judgement.reason) == (Verdict.UNKNOWN, "deadline of 1 s exceeded")
        assert time.monotonic() - start < 10


def test_the_deadline_holds_while_nobody_calls_the_pool():
    with VerifierPool(1, 1, checker=ON_DEMAND) as pool:
        pool.verify([VerifyItem("start", "", "1")])
        (pid,) = pool.worker_pids
        pool.submit("slow", "sleep 60", "1")
        assert _wait_until(lambda: not _alive(pid), 5)
        assert pool.drain(5)[0][1].reason == "deadline of 1 s exceeded"


def test_a_stopped_worker_is_killed_by_the_parent():
    with VerifierPool(1, 1, checker=ON_DEMAND) as pool:
        pool.verify([VerifyItem("start", "", "1")])
        os.kill(pool.worker_pids[0], signal.SIGSTOP)
        pool.submit("stuck", "", "1")
        ((_, judgement),) = pool.results()
        assert (judgement.verdict, judgement.reason) == (Verdict.UNKNOWN, "deadline of 1 s exceeded")


def test_no_checker_outlives_its_deadline_by_a_second_even_one_that_ignores_the_alarm():
    with VerifierPool(1, 1, checker=ON_DEMAND) as pool:
        pool.verify([VerifyItem("start", "", "1")])
        start = time.monotonic()
        (judgement,) = pool.verify([VerifyItem(0, "ignore the alarm", "1")])
        assert (judgement.verdict, judgement.reason) == (Verdict.UNKNOWN, "deadline of 1 s exceeded")
        assert time.monotonic() - start < 2.5


def test_loading_a_library_does_not_count_and_what_follows_does():
    with VerifierPool(1, 0.5, checker=ON_DEMAND) as pool:
        loaded, slow = pool.verify([VerifyItem(0, "load 2 0", "1"), VerifyItem(1, "load 0.1 60", "1")])
    assert loaded.verdict is Verdict.WRONG
    assert (slow.verdict, slow.reason) == (Verdict.UNKNOWN, "deadline of 0.5 s exceeded")


def test_the_rules_load_sympy_with_the_clock_stopped():
    script = (
        "import contextlib, sys\nfrom megatron_oreal.verifier import symbolic, untimed\n"
        "@contextlib.contextmanager\ndef around():\n"
        "    before = 'sympy' in sys.modules\n    yield\n    print(before, 'math_verify' in sys.modules)\n"
        "untimed.set_untimed(around)\nassert symbolic.read('\\\\int_0^1 x dx') is not None"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.split(), done.stderr) == (["False", "True"], "")


def test_a_worker_that_could_not_import_something_is_not_used_again():
    with VerifierPool(1, 20, checker=ON_DEMAND) as pool:
        pool.verify([VerifyItem("start", "", "1")])
        before = pool.worker_pids
        bad, *others = pool.verify([VerifyItem("bad", "import", "1"), *(VerifyItem(i, "", "1") for i in range(5))])
        assert bad.reason.startswith("checker failed: ImportError: cannot import name 'x'")
        assert {judgement.verdict for judgement in others} == {Verdict.WRONG}
        assert not set(before) & set(pool.worker_pids)


def test_the_least_memory_that_the_config_allows_has_room_for_sympy():
    with VerifierPool(1, 60, memory_limit_mb=256) as pool:
        (judgement,) = pool.verify([VerifyItem(0, "\\boxed{\\int_0^1 x\\,dx}", "\\int_0^1 y\\,dy")])
    assert judgement.verdict is Verdict.CORRECT


def test_a_worker_killed_in_the_middle_costs_only_its_item():
    with VerifierPool(2, 30, checker=ON_DEMAND) as pool:
        pool.verify([VerifyItem(i, "", "1") for i in range(8)])
        pool.submit("victim", "sleep 60", "1")
        time.sleep(0.3)
        for pid in pool.worker_pids:
            os.kill(pid, signal.SIGKILL)
        for i in range(20):
            pool.submit(i, "", "1")
        results = dict(pool.results())
        assert (results["victim"].verdict, results["victim"].reason) == (Verdict.UNKNOWN, "worker killed by SIGKILL")
        assert [results[i].verdict for i in range(20)].count(Verdict.WRONG) >= 19
        assert len(pool.worker_pids) == 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("segfault", "worker killed by SIGSEGV"),
        ("exit", "worker ended with status 3"),
        ("raise", "checker failed: KeyError: 'broken checker'"),
        ("allocate", "memory limit of the worker exceeded"),
    ],
)
def test_a_failing_item_is_unknown_and_the_ones_behind_it_are_judged(text, reason):
    with VerifierPool(1, 20, checker=ON_DEMAND, memory_limit_mb=512) as pool:
        items = [VerifyItem("bad", text, "1"), *(VerifyItem(i, "", "1") for i in range(10))]
        bad, *others = pool.verify(items)
        assert (bad.verdict, bad.reason) == (Verdict.UNKNOWN, reason)
        assert {judgement.verdict for judgement in others} == {Verdict.WRONG}


def test_the_default_memory_limit_has_room_for_sympy():
    with VerifierPool(1, 60) as pool:
        (judgement,) = pool.verify([VerifyItem(0, "\\boxed{\\int_0^1 x\\,dx}", "\\int_0^1 y\\,dy")])
        assert judgement.verdict is Verdict.CORRECT


def test_workers_that_cannot_start_end_the_pool_with_their_own_words():
    with (
        pytest.raises(UserError, match=r"verifier\.checker='absent:checker' cannot be loaded.*No module named"),
        VerifierPool(2, 5, checker="absent:checker") as pool,
    ):
        pool.verify([VerifyItem(0, "", "1")])


def test_workers_import_neither_torch_nor_the_main_module_of_their_parent():
    with VerifierPool(1, 5, checker="verifier_checkers:modules") as pool:
        (judgement,) = pool.verify([VerifyItem(0, "", "1")])
    modules = set(judgement.reason.split())
    assert "megatron_oreal.verifier.rules" in modules
    assert modules.isdisjoint({"torch", "numpy", "pydantic", "sympy", "pytest", "multiprocessing.spawn"})


def test_close_ends_the_workers_and_may_be_called_again():
    pool = VerifierPool(2, 5)
    pids = pool.worker_pids
    pool.submit("a", "", "1")
    pool.close()
    pool.close()
    assert not any(_alive(pid) for pid in pids)
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit("b", "", "1")


def test_the_parent_keeps_its_signal_handlers_threads_and_descriptors():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGALRM, signal.SIGCHLD)}
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with VerifierPool(2, 5) as pool:
        pool.verify([VerifyItem(0, "\\boxed{1}", "1")])
        assert {number: signal.getsignal(number) for number in handlers} == handlers
        assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_workers_ignore_the_interrupt_of_a_terminal():
    with VerifierPool(1, 5) as pool:
        pool.verify([VerifyItem(0, "\\boxed{1}", "1")])
        os.kill(pool.worker_pids[0], signal.SIGINT)
        (judgement,) = pool.verify([VerifyItem(1, "\\boxed{1}", "1")])
        assert judgement.verdict is Verdict.CORRECT


@pytest.mark.parametrize("text", ["", "sleep 3600"], ids=["idle", "busy"])
def test_no_worker_outlives_a_parent_that_was_killed(text):
    script = (
        "import sys, time\nfrom megatron_oreal.verifier import VerifierPool, VerifyItem\n"
        "pool = VerifierPool(2, 3600, checker='verifier_checkers:on_demand')\n"
        "pool.verify([VerifyItem(i, '', '1') for i in range(10)])\n"
        "[pool.submit(i, sys.argv[1], '1') for i in range(2)]\n"
        "print(*pool.worker_pids, flush=True)\ntime.sleep(3600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, text], stdout=subprocess.PIPE, text=True)
    try:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(_alive(pid) for pid in pids)
    finally:
        parent.kill()
        parent.communicate()
    assert _wait_until(lambda: not any(_alive(pid) for pid in pids))


def test_long_responses_do_not_block_either_side():
    text = "reasoning " * 20_000 + "</think> \\boxed{7}"
    with VerifierPool(2, 20, ["</think>"]) as pool:
        judgements = pool.verify([VerifyItem(i, text, "7") for i in range(100)])
    assert {judgement.verdict for judgement in judgements} == {Verdict.CORRECT}
