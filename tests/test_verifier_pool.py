import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from megatron_oreal.config import VerifierConfig
from megatron_oreal.errors import UserError
from megatron_oreal.verifier import Verdict, VerifierPool, VerifyItem
from megatron_oreal.verifier import pool as pool_module

# An integral on which sympy was still at work after 13 s of CPU time.
HANGING_GOLD = "\\int_0^1 x\\,dx"
HANGING_ANSWER = "So \\boxed{\\int_0^1 \\left(x+1\\right)^{999} \\ln(x+2)^{99} dx}."
ON_DEMAND = "verifier_checkers:on_demand"
LONG_S = 300
"""A deadline, or a wait, that decides nothing, of a machine that stands still for seconds."""


@pytest.fixture(autouse=True)
def _checkers_are_importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(__file__))


def _alive(pid):
    """Tell whether a process runs; a zombie that nobody reaps does not."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter from the read: it went since the open
        return False


def _wait_until(condition, timeout_s=LONG_S):
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.fixture
def clock(monkeypatch):
    """The seconds by which the pool's clock is ahead."""
    ahead = [0.0]
    monkeypatch.setattr(pool_module, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + ahead[0]))
    return ahead


def test_verdicts_come_back_in_the_order_of_the_items_and_are_streamed():
    items = [VerifyItem(i, f"<think>0</think> \\boxed{{{i}}}", str(i - i % 2), stopped=i % 5 != 0) for i in range(500)]
    seen = []
    with VerifierPool.from_config(VerifierConfig(deadline_s=LONG_S)) as pool:
        judgements = pool.verify(items, on_result=lambda item, judgement: seen.append((item.key, judgement)))
        assert len(pool) == 0
    for item, judgement in zip(items, judgements, strict=True):
        if not item.stopped:
            assert judgement.reason == "truncated"
        assert judgement.verdict is (Verdict.CORRECT if item.stopped and item.key % 2 == 0 else Verdict.WRONG)
    assert sorted(key for key, _ in seen) == list(range(500))
    assert dict(seen) == dict(enumerate(judgements))


def test_results_are_ready_while_other_responses_are_still_to_come():
    with VerifierPool(1, LONG_S) as pool:
        assert pool.drain() == []
        pool.submit("a", "\\boxed{1}", "1")
        assert [(key, judgement.verdict) for key, judgement in pool.drain(LONG_S)] == [("a", Verdict.CORRECT)]
        pool.submit("b", "\\boxed{2}", "1")
        pool.submit("c", "\\boxed{1}", "1", stopped=False)
        with pytest.raises(ValueError, match="'b' is in flight"):
            pool.submit("b", "", "1")
        assert {key: judgement.reason for key, judgement in pool.results()} == {"b": "not equal", "c": "truncated"}
        pool.submit("a", "\\boxed{1}", "1")
        assert len(list(pool.results())) == 1


def test_an_item_past_its_deadline_is_unknown_and_its_worker_is_replaced():
    with VerifierPool(1, 1.5) as pool:
        pool.wait_until_ready()
        before = pool.worker_pids
        start = time.monotonic()
        (hang,) = pool.verify([VerifyItem("hang", HANGING_ANSWER, HANGING_GOLD)])
        assert (hang.verdict, hang.reason) == (Verdict.UNKNOWN, "deadline of 1.5 s exceeded")
        assert time.monotonic() - start >= 1.5
        assert pool.worker_pids != before
        assert not any(_alive(pid) for pid in before)


def test_the_items_behind_one_past_its_deadline_are_judged():
    with VerifierPool(1, LONG_S, checker=ON_DEMAND) as pool:
        pool.wait_until_ready()
        (pid,) = pool.worker_pids
        for key, text in [("hang", "sleep 3600"), *((number, "") for number in range(30))]:
            pool.submit(key, text, "1")
        os.kill(pid, signal.SIGALRM)  # as the kernel's timer does
        results = dict(pool.results())
    assert results.pop("hang").reason == f"deadline of {LONG_S} s exceeded"
    assert [judgement.verdict for judgement in results.values()] == [Verdict.WRONG] * 30


def test_the_deadline_holds_where_no_python_code_can_run():
    with VerifierPool(1, 1, checker=ON_DEMAND) as pool:
        (judgement,) = pool.verify([VerifyItem(0, "hold the interpreter lock", "1")])  # of hours
        assert (judgement.verdict, judgement.reason) == (Verdict.UNKNOWN, "deadline of 1 s exceeded")
        assert judgement.seconds < 120


def test_the_deadline_holds_while_nobody_calls_the_pool():
    with VerifierPool(1, 1, checker=ON_DEMAND) as pool:
        pool.wait_until_ready()
        (pid,) = pool.worker_pids
        pool.submit("slow", "sleep 3600", "1")
        assert _wait_until(lambda: not _alive(pid))
        assert pool.drain(LONG_S)[0][1].reason == "deadline of 1 s exceeded"


def test_a_stopped_worker_is_killed_by_the_parent():
    with VerifierPool(1, 1, checker=ON_DEMAND) as pool:
        pool.wait_until_ready()
        os.kill(pool.worker_pids[0], signal.SIGSTOP)
        pool.submit("stuck", "", "1")
        ((_, judgement),) = pool.results()
        assert (judgement.verdict, judgement.reason) == (Verdict.UNKNOWN, "deadline of 1 s exceeded")


def test_the_parent_ends_a_checker_that_ignores_the_alarm():
    with VerifierPool(1, 1, checker=ON_DEMAND) as pool:
        pool.wait_until_ready()
        (judgement,) = pool.verify([VerifyItem(0, "ignore the alarm", "1")])  # and sleep for an hour
        assert (judgement.verdict, judgement.reason) == (Verdict.UNKNOWN, "deadline of 1 s exceeded")
        assert judgement.seconds < 120


def test_no_checker_outlives_its_deadline_by_a_second_even_one_that_ignores_the_alarm(clock):
    with VerifierPool(1, LONG_S, checker=ON_DEMAND) as pool:
        pool.wait_until_ready()
        pool.submit("stays", "ignore the alarm", "1")
        clock[0] = LONG_S / 2
        assert pool.drain() == []
        clock[0] = LONG_S + 1
        ((_, judgement),) = pool.drain()
        assert (judgement.verdict, judgement.reason) == (Verdict.UNKNOWN, f"deadline of {LONG_S} s exceeded")


def test_a_parent_that_stood_still_past_the_deadline_takes_the_verdict_that_has_come_meanwhile(clock, monkeypatch):
    with VerifierPool(1, LONG_S, checker=ON_DEMAND) as pool:
        pool.wait_until_ready()
        before = pool.worker_pids
        waits = pool_module.wait

        def stand_still_behind_the_wait(sources, timeout):
            waits(sources, LONG_S)  # the verdict comes
            clock[0] += LONG_S + 1
            monkeypatch.setattr(pool_module, "wait", waits)
            return []

        monkeypatch.setattr(pool_module, "wait", stand_still_behind_the_wait)
        (judgement,) = pool.verify([VerifyItem(0, "", "1")])
        assert (judgement.verdict, pool.worker_pids) == (Verdict.WRONG, before)


def test_loading_a_library_stops_the_workers_clock_and_what_follows_does_not():
    with VerifierPool(1, LONG_S, checker=ON_DEMAND) as pool:
        (clocks,) = pool.verify([VerifyItem(0, "clocks", "1")])
    before, inside, after = map(float, clocks.reason.split())
    assert LONG_S >= before >= after > 0  # it goes on where it stopped
    assert inside == 0
    with VerifierPool(1, 0.5, checker=ON_DEMAND) as pool:
        (slow,) = pool.verify([VerifyItem(1, "load 0.1 3600", "1")])
    assert (slow.verdict, slow.reason) == (Verdict.UNKNOWN, "deadline of 0.5 s exceeded")


def test_the_parent_lets_a_library_load_past_the_deadline(clock, tmp_path):
    with VerifierPool(1, 60, checker=ON_DEMAND) as pool:
        pool.wait_until_ready()
        pool.submit("loads", f"load until {tmp_path / 'loaded'}", "1")
        assert _wait_until(lambda: pool.drain() == [] and not pool._workers[0].ready)
        clock[0] = 65
        assert pool.drain() == []
        (tmp_path / "loaded").touch()
        assert [judgement.verdict for _, judgement in pool.results()] == [Verdict.WRONG]


def test_the_rules_load_sympy_with_the_clock_stopped():
    script = (
        "import contextlib, sys\nfrom megatron_oreal.verifier import symbolic, untimed\n"
        "@contextlib.contextmanager\ndef around():\n"
        "    before = 'sympy' in sys.modules\n    yield\n    print(before, 'math_verify' in sys.modules)\n"
        "untimed.set_untimed(around)\nassert symbolic.read('\\\\int_0^1 x dx') is not None"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["False", "True"]), done.stderr


def test_a_worker_that_could_not_import_something_is_not_used_again():
    with VerifierPool(1, LONG_S, checker=ON_DEMAND) as pool:
        pool.verify([VerifyItem("start", "", "1")])
        before = pool.worker_pids
        bad, *others = pool.verify([VerifyItem("bad", "import", "1"), *(VerifyItem(i, "", "1") for i in range(5))])
        assert bad.reason.startswith("checker failed: ImportError: cannot import name 'x'")
        assert {judgement.verdict for judgement in others} == {Verdict.WRONG}
        assert not set(before) & set(pool.worker_pids)


def test_the_least_memory_that_the_config_allows_has_room_for_sympy():
    with VerifierPool(1, LONG_S, memory_limit_mb=256) as pool:
        (judgement,) = pool.verify([VerifyItem(0, "\\boxed{\\int_0^1 x\\,dx}", "\\int_0^1 y\\,dy")])
    assert judgement.verdict is Verdict.CORRECT


def test_a_worker_killed_in_the_middle_costs_only_its_item():
    with VerifierPool(2, LONG_S, checker=ON_DEMAND) as pool:
        pool.verify([VerifyItem(i, "", "1") for i in range(8)])
        pool.submit("victim", "sleep 3600", "1")
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
    with VerifierPool(1, LONG_S, checker=ON_DEMAND, memory_limit_mb=512) as pool:
        items = [VerifyItem("bad", text, "1"), *(VerifyItem(i, "", "1") for i in range(10))]
        bad, *others = pool.verify(items)
        assert (bad.verdict, bad.reason) == (Verdict.UNKNOWN, reason)
        assert {judgement.verdict for judgement in others} == {Verdict.WRONG}


def test_the_default_memory_limit_has_room_for_sympy():
    with VerifierPool(1, LONG_S) as pool:
        (judgement,) = pool.verify([VerifyItem(0, "\\boxed{\\int_0^1 x\\,dx}", "\\int_0^1 y\\,dy")])
        assert judgement.verdict is Verdict.CORRECT


def test_workers_that_cannot_start_end_the_pool_with_their_own_words():
    with (
        pytest.raises(UserError, match=r"verifier\.checker='absent:checker' cannot be loaded.*No module named"),
        VerifierPool(2, 5, checker="absent:checker") as pool,
    ):
        pool.verify([VerifyItem(0, "", "1")])


def test_workers_import_neither_torch_nor_the_main_module_of_their_parent():
    with VerifierPool(1, LONG_S, checker="verifier_checkers:modules") as pool:
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
    script = (
        "import os, signal, threading\nfrom megatron_oreal.verifier import VerifierPool, VerifyItem\n"
        "def handlers():\n    return [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGALRM, signal.SIGCHLD)]\n"
        "def descriptors():\n    return sorted(os.listdir('/proc/self/fd'))\n"
        "before = handlers(), threading.enumerate(), descriptors()\n"
        f"with VerifierPool(2, {LONG_S}) as pool:\n"
        "    pool.verify([VerifyItem(0, '\\\\boxed{1}', '1')])\n"
        "    assert (handlers(), threading.enumerate()) == before[:2]\n"
        "    assert descriptors() != before[2]\n"
        "assert (handlers(), threading.enumerate(), descriptors()) == before\nprint('kept')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.split() == ["kept"], done.stderr


def test_workers_ignore_the_interrupt_of_a_terminal():
    with VerifierPool(1, LONG_S) as pool:
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
    with VerifierPool(2, LONG_S, ["</think>"]) as pool:
        judgements = pool.verify([VerifyItem(i, text, "7") for i in range(100)])
    assert {judgement.verdict for judgement in judgements} == {Verdict.CORRECT}
