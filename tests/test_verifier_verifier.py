"""Rules first, then the judge: who decides what, and that it happens while others still generate."""

import time
from pathlib import Path

import judge_server as servers
import numpy as np
import pytest
from judge_server import JudgeServer

from megatron_oreal.config import VerifierConfig
from megatron_oreal.data.types import Prompt
from megatron_oreal.errors import UserError
from megatron_oreal.rollout.engine import Completion, SamplingParams
from megatron_oreal.rollout.sampler import RolloutSampler
from megatron_oreal.verifier import Verdict, Verifier, VerifyItem

TESTS = Path(__file__).parent
ITEMS = {
    "rules correct": VerifyItem("rules correct", "\\boxed{12}", "12"),
    "judge correct": VerifyItem("judge correct", "\\boxed{a dozen, that is twelve}", "twelve"),
    "judge wrong": VerifyItem("judge wrong", "\\boxed{thirteen}", "twelve"),
    "truncated": VerifyItem("truncated", "\\boxed{surely twelve}", "twelve", stopped=False),
    "empty": VerifyItem("empty", "thinking twelve </think> <|im_end|>", "twelve"),
    "stated nowhere": VerifyItem("stated nowhere", "</think> So there are twelve of them.", "twelve"),
}


def config(*hosts, **keys):
    """Its limits decide nothing, of a machine that stands still for seconds."""
    judge = {"cache": None, "connect_timeout_s": 200, "timeout_s": 200, "deadline_s": 300, "retry_delay_s": 0.01}
    tree = {"hosts": list(hosts), "num_processes": 1, "deadline_s": 300, "judge": judge | keys.pop("judge", {})}
    return VerifierConfig.model_validate(tree | keys)


def verify(config):
    with Verifier(config, stop_words=["<|im_end|>"]) as verifier:
        found = verifier.verify(list(ITEMS.values()))
        return dict(zip(ITEMS, found, strict=True)), verifier.stats()


def test_rules_decide_what_they_call_correct_and_the_judge_the_rest():
    with JudgeServer() as server:
        found, stats = verify(config(server.host))
    assert {key: judgement.verdict.value for key, judgement in found.items()} == {
        "rules correct": "correct",
        "judge correct": "correct",
        "judge wrong": "wrong",
        "truncated": "wrong",
        "empty": "wrong",
        "stated nowhere": "correct",
    }
    assert {key for key, judgement in found.items() if judgement.decided_by == "judge"} == {
        "judge correct",
        "judge wrong",
        "stated nowhere",
    }
    assert found["judge wrong"].answer == "thirteen"
    assert stats.requests == len(server.payloads) == 3


def test_without_a_judge_the_rules_word_stands():
    found, stats = verify(config())
    assert {judgement.decided_by for judgement in found.values()} == {"rules"}
    assert found["rules correct"].verdict is Verdict.CORRECT
    assert found["judge wrong"].verdict is Verdict.WRONG
    assert found["truncated"].reason == "truncated"
    assert stats is None


def test_a_judge_that_fails_leaves_what_the_rules_called_wrong_unknown_and_nothing_else():
    with JudgeServer(servers.status(500)) as server:
        found, _ = verify(config(server.host, judge={"max_retries": 0}))
    unknown = {key for key, judgement in found.items() if judgement.verdict is Verdict.UNKNOWN}
    assert unknown == {"judge correct", "judge wrong", "stated nowhere"}


def test_what_timed_out_in_the_rules_goes_to_the_judge(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    slow = {"checker": "verifier_checkers:on_demand", "deadline_s": 0.5}
    with Verifier(config(**slow)) as verifier:
        (judgement,) = verifier.verify([VerifyItem(0, "sleep 3600 twelve", "twelve")])
        assert (judgement.verdict, judgement.reason) == (Verdict.UNKNOWN, "deadline of 0.5 s exceeded")
    with JudgeServer() as server, Verifier(config(server.host, **slow)) as verifier:
        (judgement,) = verifier.verify([VerifyItem(0, "sleep 3600 twelve", "twelve")])
    assert (judgement.verdict, judgement.decided_by) == (Verdict.CORRECT, "judge")
    assert judgement.seconds >= 0.5


def test_a_checker_is_told_the_question_when_it_asks_and_may_answer_with_a_bool_or_none(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    items = [VerifyItem(n, text, "g", question="q") for n, text in enumerate(["true", "false", "none", "number", "q"])]
    items.append(VerifyItem("cut", "true", "g", stopped=False, question="q"))
    with Verifier(config(checker="verifier_checkers:with_question")) as verifier:
        found = verifier.verify(items)
    assert [judgement.verdict.value for judgement in found] == [
        "correct",
        "wrong",
        "unknown",
        "unknown",
        "correct",
        "wrong",
    ]
    assert (found[2].reason, found[5].reason) == ("checker undecided", "truncated")
    assert found[3].reason.startswith(
        "checker failed: TypeError: a checker returns a Judgement, a bool or None, not int"
    )


@pytest.mark.parametrize(
    ("checker", "said"), [("absent_module:check", "No module named 'absent_module'"), ("json:absent", "no attribute")]
)
def test_a_checker_that_cannot_be_loaded_is_refused_before_anything_is_verified(checker, said):
    with pytest.raises(UserError, match=f"verifier\\.checker='{checker}' cannot be loaded by the workers: .*{said}"):
        Verifier(config(checker=checker))


def test_handing_a_response_in_costs_next_to_nothing():
    text = "reasoning " * 5000 + "\\boxed{7}"
    with Verifier(config()) as verifier:
        costs = []
        for n in range(300):
            began = time.thread_time()
            verifier.submit(n, text, "7")
            costs.append(time.thread_time() - began)
        assert {judgement.verdict for _, judgement in verifier.results()} == {Verdict.CORRECT}
    assert sorted(costs)[len(costs) // 2] < 0.002


def test_verdicts_are_made_without_anyone_calling_the_verifier():
    with JudgeServer() as server, Verifier(config(server.host)) as verifier:
        verifier.submit("a", "\\boxed{thirteen}", "twelve")
        end = time.monotonic() + 300
        while not server.payloads and time.monotonic() < end:
            time.sleep(0.01)
        assert len(server.payloads) == 1
        with pytest.raises(ValueError, match="'a' is in flight"):
            verifier.submit("a", "", "1")
        assert [key for key, _ in verifier.results()] == ["a"]
        assert len(verifier) == 0


def test_close_in_the_middle_leaves_no_thread_and_no_process():
    import threading

    before = set(threading.enumerate())
    with JudgeServer(servers.hang) as server:
        verifier = Verifier(config(server.host))
        pids = verifier._pool.worker_pids
        for n in range(50):
            verifier.submit(n, "\\boxed{thirteen}", "twelve")
        verifier.close()
        verifier.close()
        with pytest.raises(RuntimeError, match="closed"):
            verifier.submit("b", "", "1")
    assert {thread.name for thread in set(threading.enumerate()) - before}.isdisjoint({"judge", "verifier"})
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


class OneRank:
    """A world of one, without torch."""

    rank, world_size = 0, 1

    def gather_objects(self, item, what=""):
        return [item]


class Words:
    """A chat format of one token a word; the stop token is 0."""

    def encode_prompt(self, question):
        return np.array([1], dtype=np.int32)

    def decode(self, ids):
        return {5: "\\boxed{surely twelve}", 6: "\\boxed{thirteen}"}[int(ids[0])]


class WaitingEngine:
    """Finishes its first response, then generates on until a condition holds."""

    def __init__(self, condition):
        self.condition = condition
        self.held = False

    def generate(self, requests, sampling, on_complete):
        done = [Completion(np.array([token, 0], np.int32), np.zeros(2, np.float32), "stop") for token in (5, 6)]
        on_complete(0, done[0])
        end = time.monotonic() + 300
        while not self.condition() and time.monotonic() < end:
            time.sleep(0.01)
        self.held = self.condition()
        on_complete(1, done[1])
        return done


def test_the_judge_is_asked_about_a_response_while_the_next_is_still_generated():
    with JudgeServer() as server, Verifier(config(server.host)) as verifier:
        engine = WaitingEngine(lambda: len(server.payloads) == 1)
        sampler = RolloutSampler(engine, verifier, Words(), OneRank())
        sampling = SamplingParams(1.0, 1.0, 0, 4, 8, 0)
        prompts = [Prompt("a", "How many are a dozen?", "twelve")]
        drawn = sampler.sample(prompts, 2, sampling, lambda group, sample: 0, None)
    assert engine.held
    assert [t.judgement.verdict for t in drawn.own] == [Verdict.CORRECT, Verdict.WRONG]
    assert drawn.samples.rows["reward"].tolist() == [1, -1]
    assert sampler.judge_stats.requests == 2
    assert servers.block_of(server.payloads[0], "QUESTION") == "How many are a dozen?"
