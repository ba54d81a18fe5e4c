"""The judge against a real server that misbehaves on purpose: every item ends, in time, and never wrongly *wrong*."""

import asyncio
import contextlib
import queue
import random
import re
import socket
import threading
import time

import judge_server as servers
import pytest
from judge_server import JudgeServer

from megatron_oreal.config import VerifierConfig
from megatron_oreal.verifier.judge import Judge
from megatron_oreal.verifier.verdict import Judgement, Verdict

RULES = Judgement(Verdict.WRONG, "not equal", "x")
SLACK_S = 60.0  # a loaded machine
RIGHT, WRONG = "\\boxed{surely twelve}", "\\boxed{surely thirteen}"


def settings(*hosts, **judge):
    """A config with pauses of milliseconds, and limits that no machine is too slow for; ``judge`` overrides keys."""
    keys = {"timeout_s": 120.0, "deadline_s": 240.0, "connect_timeout_s": 120.0, "retry_delay_s": 0.01, "cache": None}
    names = [host.host if isinstance(host, JudgeServer) else host for host in hosts]
    return VerifierConfig.model_validate({"hosts": names, "judge": keys | judge})


class Bench:
    """A judge and what it has decided, each key counted."""

    def __init__(self, config, **options):
        self.results = queue.SimpleQueue()
        self.judge = Judge(config, lambda key, judgement: self.results.put((key, judgement)), **options)
        self.limit = config.judge.deadline_s + SLACK_S

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.judge.close()

    def collect(self, count, limit=None):
        """The next ``count`` judgements by key; fails when one is late, or comes twice."""
        end = time.monotonic() + (limit or self.limit)
        found = {}
        for _ in range(count):
            key, judgement = self.results.get(timeout=max(0.01, end - time.monotonic()))
            assert key not in found
            found[key] = judgement
        return found

    def ask(self, *responses, gold="twelve", question="How many?"):
        """Judgements on responses, in order."""
        for key, response in enumerate(responses):
            self.judge.submit(key, question, gold, response, RULES)
        found = self.collect(len(responses))
        assert self.results.empty()
        return [found[key] for key in range(len(responses))]


def ask(config, *responses, **options):
    with Bench(config) as bench:
        return bench.ask(*responses, **options)


def test_verdicts_are_the_judges_and_equal_cases_in_flight_are_asked_once():
    all_are_in = threading.Event()

    async def wait_for_all(payload, request):
        while not all_are_in.is_set():
            await asyncio.sleep(0.01)
        return await servers.slow(0.1)(payload, request)

    with JudgeServer(wait_for_all) as server, Bench(settings(server, concurrency_per_host=50)) as bench:
        for key, response in enumerate([RIGHT, WRONG] * 20):
            bench.judge.submit(key, "How many?", "twelve", response, RULES)
        stats, end = bench.judge.stats(), time.monotonic() + SLACK_S
        while stats.shared < 38 and time.monotonic() < end:
            time.sleep(0.01)
            stats += bench.judge.stats()
        all_are_in.set()
        found = bench.collect(40)
        stats += bench.judge.stats()
    judgements = [found[key] for key in range(40)]
    assert [(j.verdict, j.reason) for j in judgements[:2]] == [
        (Verdict.CORRECT, "judge: correct"),
        (Verdict.WRONG, "judge: wrong"),
    ]
    assert [j.verdict for j in judgements] == [Verdict.CORRECT, Verdict.WRONG] * 20
    assert {j.decided_by for j in judgements} == {"judge"}
    assert len(server.payloads) == stats.requests == 2
    assert stats.shared == 38
    assert len(stats.latencies) == 2 and min(stats.latencies) > 0.09
    assert not stats.unknown


def test_a_request_is_one_user_message_at_temperature_0_with_few_tokens_and_the_discovered_model():
    with JudgeServer(models=("first", "second")) as server:
        ask(settings(server), RIGHT, question="How many eggs are a dozen?")
    (payload,) = server.payloads
    assert (payload["model"], payload["temperature"], payload["max_tokens"]) == ("first", 0.0, 64)
    assert payload["stream"] is False
    assert servers.block_of(payload, "QUESTION") == "How many eggs are a dozen?"
    assert servers.block_of(payload, "REFERENCE ANSWER") == "twelve"
    assert servers.block_of(payload, "ANSWER") == "surely twelve"
    schema = payload["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["verdict"]["enum"] == ["CORRECT", "INCORRECT"]
    assert payload["chat_template_kwargs"] == {"enable_thinking": False}


BROKEN = {
    "hangs": (servers.hang, "judge deadline"),
    "hangs after its headers": (servers.hang_after_headers, "judge deadline"),
    "is too slow": (servers.slow(3600), "judge deadline"),
    "drips bytes for ever": (servers.drip, "judge deadline"),
    "sends a body without end": (servers.flood, "judge reply: .*more than 256 KiB"),
    "resets the connection": (servers.reset, "judge unreachable"),
    "resets in the middle of the body": (servers.reset_in_the_body, "judge unreachable"),
    "answers 500": (servers.status(500, text="boom"), "judge refused: .*HTTP 500"),
    "answers 503": (servers.status(503), "judge refused: .*HTTP 503"),
    "answers 401": (servers.status(401), "judge refused: .*HTTP 401 .*api_key_env"),
    "answers 404": (servers.status(404, text='{"message": "no such model"}'), "judge refused: .*404 .no such model"),
    "answers 400 to everything": (servers.status(400, text='{"error": {"message": "too long"}}'), "400 .too long"),
    "answers 204": (servers.status(204), "judge refused: .*HTTP 204"),
    "always answers 429": (servers.status(429), "judge deadline: no verdict within .*HTTP 429"),
    "always asks to wait": (servers.status(429, {"Retry-After": "86400"}), "judge deadline: .*HTTP 429"),
    "asks to wait with 503": (servers.status(503, {"Retry-After": "1000"}), "judge deadline: .*HTTP 503"),
    "has a senseless Retry-After": (servers.status(429, {"Retry-After": "soon \u221e"}), "judge deadline: .*429"),
    "redirects": (servers.status(307, {"Location": "http://127.0.0.1:9/v1"}), "judge refused: .*redirects to"),
    "redirects to itself": (servers.status(302, {"Location": "/v1/chat/completions"}), "judge refused: .*redirects"),
    "sends no JSON": (servers.body(b"<html>"), "judge reply: .*not a JSON object"),
    "sends nothing": (servers.body(b""), "judge reply: .*not a JSON object"),
    "sends half of it": (servers.body(b'{"choices": [{"mess'), "judge reply: .*not a JSON object"),
    "sends a bomb of brackets": (servers.body(b"[" * 200_000), "judge reply: .*not a JSON object"),
    "sends a huge number": (servers.body(b'{"choices": ' + b"9" * 100_000 + b"}"), "judge reply"),
    "sends bad UTF-8": (servers.body(b'{"choices": "\xff"}'), "judge reply: .*not a JSON object"),
    "sends compressed rubbish": (servers.body(b"\x1f\x8b\x00", **{"Content-Encoding": "gzip"}), "judge reply"),
    "sends no choices": (servers.body(b'{"choices": []}'), "judge reply: .*no single choice"),
    "sends choices of null": (servers.body(b'{"choices": null}'), "judge reply: .*no single choice"),
    "sends a choice of null": (servers.body(b'{"choices": [null]}'), "judge reply: .*no single choice"),
    "sends a message of null": (servers.body(b'{"choices": [{"message": null}]}'), "judge reply: .*empty"),
    "sends an error with 200": (servers.body(b'{"error": {"message": "oom"}}'), "judge reply: .*no single choice .oom"),
    "sends null": (servers.saying(None), "judge reply: .*empty"),
    "sends a list": (servers.saying([{"type": "text", "text": "CORRECT"}]), "judge reply"),
    "sends white space": (servers.saying(" \n "), "judge reply: .*empty"),
    "says CORRECT": (servers.saying("CORRECT"), "judge reply: .*not one of the two verdicts but 'CORRECT'"),
    "says A": (servers.saying("A"), "judge reply"),
    "explains": (servers.saying("The answer is CORRECT, since both are twelve."), "judge reply"),
    "never stops thinking": (servers.saying("<think> hm", "length"), "judge reply: .*cut off"),
}


@pytest.mark.parametrize(("respond", "reason"), BROKEN.values(), ids=BROKEN.keys())
def test_a_judge_that_fails_is_unknown_with_its_reason_in_time(respond, reason):
    limits = {"timeout_s": 0.2, "deadline_s": 2.0 if "HTTP" in reason or "429" in reason else 0.8}
    limits = limits if "deadline" in reason else {}
    with JudgeServer(respond) as server:
        judgements = ask(settings(server, max_retries=1, model="m", **limits), RIGHT, WRONG, "\\boxed{7}")
    for judgement in judgements:
        assert judgement.verdict is Verdict.UNKNOWN
        assert judgement.decided_by == "judge"
    assert any(re.search(reason, judgement.reason) for judgement in judgements), [j.reason for j in judgements]


def test_at_the_deadline_the_reason_is_what_the_server_did_and_not_only_that_time_is_up():
    """Whether the request ran out of its time first or, after a pause of the machine, the item."""
    limits = {"deadline_s": 1, "max_retries": 0, "model": "m"}
    with JudgeServer(servers.honest) as server, Bench(settings(server, **limits)) as bench:
        assert bench.judge.check() == []  # a connection is open: a pause does not keep the next request from one
        server.respond = servers.hang
        (judgement,) = bench.ask(RIGHT)
    said = r"http://\S+: no whole reply within [\d.]+ s"
    assert re.fullmatch(rf"judge deadline: ({said}|no verdict within 1 s \({said}\))", judgement.reason)


def test_nothing_is_scored_wrong_because_the_judge_failed_and_nothing_is_lost_or_comes_twice():
    """A host in another mood at every request; the verdict, where there is one, is the honest judge's."""
    rng = random.Random(0)
    moods = [respond for name, (respond, _) in BROKEN.items() if "wait" not in name]

    async def moody(payload, request):
        return await (servers.honest if rng.random() < 0.6 else rng.choice(moods))(payload, request)

    texts = [text.replace("surely", f"surely {n}") for n in range(40) for text in (RIGHT, WRONG)]
    with JudgeServer(moody) as server:
        judgements = ask(settings(server, timeout_s=1, max_retries=1, deadline_s=120, concurrency_per_host=8), *texts)
    for number, judgement in enumerate(judgements):
        assert judgement.verdict in (Verdict.UNKNOWN, (Verdict.CORRECT, Verdict.WRONG)[number % 2]), judgement
    counts = {verdict: sum(j.verdict is verdict for j in judgements) for verdict in Verdict}
    assert sum(counts.values()) == 80
    assert min(counts.values()) >= 5, counts


@pytest.mark.parametrize("bad", [servers.hang, servers.reset, servers.status(500), servers.status(429)])
def test_the_load_moves_away_from_a_bad_host_and_every_item_gets_its_verdict(bad):
    limits = {"timeout_s": 1.0} if bad is servers.hang else {}
    with JudgeServer(bad) as worse, JudgeServer() as better, Bench(settings(worse, better, **limits)) as bench:
        judgements = bench.ask(*(f"\\boxed{{{n} twelve}}" for n in range(40)))
        stats = bench.judge.stats()
    assert {j.verdict for j in judgements} == {Verdict.CORRECT}
    assert len(better.payloads) == 40 or bad is servers.hang  # a loaded machine may be late as well
    assert stats.requests == len(better.payloads) + len(worse.payloads)
    assert len(worse.payloads) < 30


def test_a_retry_goes_to_a_host_that_the_item_has_not_failed_on():
    with contextlib.ExitStack() as stack:
        bad = [stack.enter_context(JudgeServer(servers.status(500))) for _ in range(4)]
        good = stack.enter_context(JudgeServer())
        for _ in range(3):
            with Bench(settings(*bad, good, max_retries=4)) as bench:
                assert bench.ask(RIGHT)[0].verdict is Verdict.CORRECT
            assert max(len(server.payloads) for server in bad) <= 1
            for server in bad:
                server.payloads.clear()


def test_a_host_that_comes_back_is_used_again():
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(JudgeServer(servers.status(500)))
        other = stack.enter_context(JudgeServer(servers.slow(0.02)))
        with Bench(settings(server, other, concurrency_per_host=2)) as bench:
            bench.ask(*(f"\\boxed{{{n} twelve}}" for n in range(20)))
            server.respond = servers.honest
            before = len(server.payloads)
            for part in range(20):
                bench.ask(*(f"\\boxed{{{part} {n} twelve}}" for n in range(100, 120)))
                if len(server.payloads) > before + 10:
                    break
            assert len(server.payloads) > before + 10


def test_items_wait_for_a_single_host_that_dies_in_the_middle_and_comes_back():
    with JudgeServer(servers.slow(0.05)) as server:
        config = settings(server, concurrency_per_host=4, max_retries=50)
        with Bench(config) as bench:
            for key in range(40):
                bench.judge.submit(key, "?", "twelve", f"\\boxed{{{key} twelve}}", RULES)
            found = bench.collect(8)
            server.stop()
            time.sleep(0.3)
            server.start()
            found |= bench.collect(32)
    assert found.keys() == set(range(40))
    assert {j.verdict for j in found.values()} == {Verdict.CORRECT}


def test_items_of_a_host_that_dies_for_good_are_unknown_in_time():
    replies = [servers.honest] * 8
    with JudgeServer(servers.in_turn(*replies, servers.hang)) as server:
        config = settings(server, deadline_s=4, concurrency_per_host=4)
        with Bench(config) as bench:
            for key in range(60):
                bench.judge.submit(key, "?", "twelve", f"\\boxed{{{key} twelve}}", RULES)
            found = bench.collect(8)
            server.stop()
            found |= bench.collect(52)
            server.start()
    assert {j.verdict for j in found.values()} == {Verdict.CORRECT, Verdict.UNKNOWN}
    reasons = {j.reason for j in found.values() if j.verdict is Verdict.UNKNOWN}
    assert any(server.host in reason for reason in reasons)


def test_a_server_that_is_down_for_longer_than_all_retries_take_costs_no_verdict():
    """A request that finds no connection is no attempt: the one item in flight waits for the server's new start."""
    with JudgeServer() as server, Bench(settings(server, max_retries=1, model="m")) as bench:
        server.stop()
        bench.judge.submit(0, "?", "twelve", RIGHT, RULES)
        time.sleep(0.8)
        assert bench.results.empty()
        server.start()
        (judgement,) = bench.collect(1).values()
    assert judgement.verdict is Verdict.CORRECT


def test_an_equal_case_in_flight_that_runs_out_of_its_time_costs_a_later_one_no_verdict():
    respond = servers.in_turn(servers.hang, servers.honest)
    with JudgeServer(respond) as server, Bench(settings(server, deadline_s=3, model="m")) as bench:
        bench.judge.submit("first", "?", "twelve", RIGHT, RULES)
        bench.judge._config = settings(server, deadline_s=120, model="m")  # the second one has more time left
        bench.judge.submit("second", "?", "twelve", RIGHT, RULES)
        found = bench.collect(2)
        stats = bench.judge.stats()
    assert {key: judgement.verdict for key, judgement in found.items()} == {
        "first": Verdict.UNKNOWN, "second": Verdict.CORRECT,
    }  # fmt: skip
    assert (stats.requests, stats.shared) == (2, 1)


def test_a_host_that_takes_no_connection_is_unreachable_in_time():
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        at = listener.getsockname()
        with contextlib.ExitStack() as fillers:  # a full backlog drops further SYNs, as a firewall does
            for _ in range(4):
                filler = fillers.enter_context(socket.socket())
                filler.setblocking(False)
                filler.connect_ex(at)
            (judgement,) = ask(
                settings(f"127.0.0.1:{at[1]}", connect_timeout_s=0.1, timeout_s=2, deadline_s=2, max_retries=1), RIGHT
            )
    assert judgement.verdict is Verdict.UNKNOWN
    assert "no connection within 0." in judgement.reason


def test_concurrency_keeps_to_its_limit_a_host_and_uses_it():
    with JudgeServer(servers.slow(0.05)) as server:
        ask(settings(server, concurrency_per_host=3), *(f"\\boxed{{{n} twelve}}" for n in range(30)))
    assert server.most_at_once == 3


def test_the_released_names_give_num_processes_times_concurrency_per_proc_in_flight():
    with JudgeServer(servers.slow(0.1)) as one, JudgeServer(servers.slow(0.1)) as other:
        config = settings(one, other).model_copy(update={"num_processes": 2, "concurrency_per_proc": (3, 8)})
        ask(config, *(f"\\boxed{{{n} twelve}}" for n in range(40)))
    assert (one.most_at_once, other.most_at_once) == (3, 3)


def test_retry_after_is_obeyed_and_costs_no_attempt():
    respond = servers.in_turn(servers.status(429, {"Retry-After": "1"}), servers.honest)
    with JudgeServer(respond) as server, Bench(settings(server, max_retries=0)) as bench:
        began = time.monotonic()
        (judgement,) = bench.ask(RIGHT)
    assert judgement.verdict is Verdict.CORRECT
    assert time.monotonic() - began >= 1.0


def test_an_api_key_comes_from_the_environment_and_is_sent_to_no_other_place(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", " s3cret\n")
    with JudgeServer() as server:
        ask(settings(server, api_key_env="JUDGE_KEY"), RIGHT)
        ask(settings(server), WRONG)
    assert server.headers[0]["Authorization"] == "Bearer s3cret"
    assert "Authorization" not in server.headers[1]


# Constrained output


def accepting(*fields, response_format=None):
    """A server that answers 400 to fields that it does not know, as strict ones do."""
    known = {"model", "messages", "temperature", "max_tokens", "stream", *fields}

    async def respond(payload, request):
        form = payload.get("response_format", {}).get("type")
        if payload.keys() - known or form not in (None, response_format):
            return await servers.status(400, text='{"error": {"message": "unknown field"}}')(payload, request)
        return await servers.honest(payload, request)

    return respond


OFF = ("chat_template_kwargs", "enable_thinking")


@pytest.mark.parametrize(
    ("respond", "sent"),
    [
        (accepting("response_format", *OFF, response_format="json_schema"), {"response_format", *OFF}),
        (accepting("response_format", response_format="json_schema"), {"response_format"}),
        (accepting("regex", "guided_regex", "structured_outputs", *OFF), {"regex", "structured_outputs", *OFF}),
        (accepting("response_format", *OFF, response_format="regex_schema"), {"response_format", *OFF}),
        (accepting(*OFF), set(OFF)),
        (accepting(), set()),
    ],
    ids=["everything", "OpenAI", "regex", "lmdeploy's regex", "no constraint", "nothing but OpenAI's fields of old"],
)
def test_a_refused_request_form_falls_back_and_is_remembered(respond, sent):
    with JudgeServer(respond) as server, Bench(settings(server)) as bench:
        assert bench.ask(RIGHT)[0].verdict is Verdict.CORRECT
        first = len(server.payloads)
        assert sent <= server.payloads[-1].keys()
        assert [j.verdict for j in bench.ask("\\boxed{no}", "\\boxed{not}")] == [Verdict.WRONG] * 2
        assert len(server.payloads) == first + 2


def test_a_single_request_that_every_form_is_refused_for_changes_nothing():
    async def respond(payload, request):
        if "monstrous" in servers.block_of(payload, "ANSWER"):
            return await servers.status(400, text='{"message": "context too long"}')(payload, request)
        return await servers.honest(payload, request)

    with JudgeServer(respond) as server, Bench(settings(server, max_retries=0)) as bench:
        (monster,) = bench.ask("\\boxed{monstrous}")
        assert (monster.verdict, "context too long" in monster.reason) == (Verdict.UNKNOWN, True)
        assert bench.ask(RIGHT)[0].verdict is Verdict.CORRECT
        assert "response_format" in server.payloads[-1]


@pytest.mark.parametrize(("constrained", "field"), [("json_schema", "response_format"), ("regex", "regex")])
def test_a_chosen_constraint_is_the_only_one(constrained, field):
    with JudgeServer() as server:
        ask(settings(server, constrained=constrained), RIGHT)
    assert field in server.payloads[0]


def test_a_thinking_model_may_think_when_the_config_says_so():
    async def respond(payload, request):
        thought = "<think>CORRECT? {}</think>\n" + servers.verdict_text(payload, "INCORRECT")
        return servers.completion(thought)

    with JudgeServer(respond) as server:
        (judgement,) = ask(settings(server, thinking=True, max_tokens=2048), RIGHT)
    assert judgement.verdict is Verdict.WRONG
    assert server.payloads[0]["max_tokens"] == 2048
    assert not {"chat_template_kwargs", "enable_thinking"} & server.payloads[0].keys()


# Votes


@pytest.mark.parametrize(
    ("replies", "verdict"),
    [
        (["CORRECT", "CORRECT", "INCORRECT"], Verdict.CORRECT),
        (["INCORRECT", "CORRECT", "INCORRECT"], Verdict.WRONG),
        (["INCORRECT", "dunno", "INCORRECT"], Verdict.WRONG),
        (["CORRECT", "dunno", "INCORRECT"], Verdict.UNKNOWN),
        (["dunno", "dunno", "CORRECT"], Verdict.UNKNOWN),
    ],
)
def test_a_majority_of_all_votes_decides_and_no_majority_is_unknown(replies, verdict):
    turns = servers.in_turn(*(servers.always(reply) for reply in replies))
    with JudgeServer(turns) as server:
        (judgement,) = ask(settings(server, votes=3, max_retries=0), RIGHT)
    assert judgement.verdict is verdict
    if verdict is Verdict.UNKNOWN:
        assert judgement.reason.startswith("judge votes: no majority of 3")


def test_a_server_started_again_with_another_model_is_asked_for_its_name_again():
    async def respond(payload, request):
        if payload["model"] not in server.models:
            return await servers.status(404)(payload, request)
        return await servers.honest(payload, request)

    with JudgeServer(respond) as server, Bench(settings(server)) as bench:
        assert bench.ask(RIGHT)[0].verdict is Verdict.CORRECT
        server.models = ("another",)
        assert bench.ask("\\boxed{1 twelve}")[0].verdict is Verdict.CORRECT


def test_close_in_the_middle_of_everything_ends_the_thread_at_once():
    threads = set(threading.enumerate())
    with JudgeServer(servers.hang) as server:
        bench = Bench(settings(server, timeout_s=600, deadline_s=600))
        for key in range(50):
            bench.judge.submit(key, "?", "twelve", f"\\boxed{{{key}}}", RULES)
        time.sleep(0.2)
        began = time.monotonic()
        bench.judge.close()
        bench.judge.close()
        assert time.monotonic() - began < SLACK_S
    assert {thread for thread in threading.enumerate() if thread.name == "judge"} <= threads


@pytest.mark.parametrize("response", ["", "  \n", "</think>  ", "\u200b\u200b", "thinking about twelve </think>\n"])
def test_an_empty_answer_never_reaches_the_judge(response):
    with JudgeServer(servers.always("CORRECT")) as server:
        (judgement,) = ask(settings(server), response)
    assert judgement == RULES
    assert server.payloads == []
