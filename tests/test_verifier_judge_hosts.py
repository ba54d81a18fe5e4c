"""Addresses of judge hosts and the other keys of a judge: what is accepted, and the line for what is not."""

import contextlib
import datetime
import email.utils
import re
import socket

import judge_server as servers
import pytest
from judge_server import JudgeServer
from test_verifier_judge import RIGHT, Bench, settings

from megatron_oreal.config import VerifierConfig
from megatron_oreal.config_check import check_config
from megatron_oreal.config_load import parse_config, parse_verifier
from megatron_oreal.errors import UserError
from megatron_oreal.layout.model_spec import ModelSpec, RopeSpec
from megatron_oreal.verifier.judge_hosts import base_url, judge_contradictions, retry_after_s
from megatron_oreal.verifier.verdict import Verdict

SPEC = ModelSpec("llama", 2, 8, 8, 2, 2, 4, 10, 1024, 1e-6, True, False, False, RopeSpec(1e4))


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("10.0.0.1:8000", "http://10.0.0.1:8000/v1"),
        ("judge", "http://judge/v1"),
        (" localhost:8000/ ", "http://localhost:8000/v1"),
        ("http://judge:8000", "http://judge:8000/v1"),
        ("http://judge:8000/v1", "http://judge:8000/v1"),
        ("https://judge.example/v1/", "https://judge.example/v1"),
        ("https://gateway.example/openai", "https://gateway.example/openai/v1"),
        ("[::1]:8000", "http://[::1]:8000/v1"),
        ("HTTP://Judge:8000", "http://judge:8000/v1"),
    ],
)
def test_an_address_with_or_without_scheme_and_v1(host, url):
    assert base_url(host) == url


@pytest.mark.parametrize(
    "host",
    ["", "x.x.x.x:xxxx", "a:99999", "ftp://a:1", "http://", "://a", "http://user:key@a:1", "http://a:1/v1?k=1", "a b:1",
     "http://a:1/v1#x", "http://a:1/v1/chat/completions", "[::1:80", "http:///v1", "unix:///tmp/s"],
)  # fmt: skip
def test_what_is_no_address_is_refused_in_one_line_that_shows_one(host):
    with pytest.raises(UserError, match=re.escape(f"verifier.hosts: {host!r} ")) as caught:
        base_url(host)
    assert "give host:port or a URL such as http://10.0.0.1:8000/v1" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"hosts": ["a:1", "http://a:1/v1"]}, "http://a:1/v1 is there twice"),
        ({"judge": {"votes": 4}}, "verifier.judge.votes=4 can end in a tie"),
        ({"judge": {"timeout_s": 10, "deadline_s": 5}}, "verifier.judge.timeout_s=10 of one request exceeds"),
        ({"judge": {"thinking": True}}, "verifier.judge.thinking=true with max_tokens=64 cuts the thinking off"),
        ({"judge": {"max_tokens": 3}}, "verifier.judge.max_tokens=3 cannot hold a verdict"),
        ({"hosts": ["a:1"], "judge": {"api_key_env": "NO_SUCH_KEY"}}, "api_key_env='NO_SUCH_KEY': no such variable"),
        ({"checker": "os.path.join"}, "verifier.checker='os.path.join' is not of the form module:function"),
        ({"checker": ":f"}, "is not of the form module:function"),
    ],
)
def test_a_contradiction_among_the_keys_is_said(tree, said):
    assert [line for line in judge_contradictions(parse_verifier(tree)) if said in line]


def test_the_defaults_contradict_nothing():
    assert list(judge_contradictions(VerifierConfig())) == []
    assert list(judge_contradictions(parse_verifier({"hosts": ["a:1"], "judge": None}))) == []


@pytest.mark.parametrize(
    ("value", "sizes"), [("8", (4, 4)), ("1", (1, 1)), ("[3, 8]", (3, 8)), ("9", (4, 5))], ids=["8", "1", "pair", "9"]
)
def test_concurrency_per_proc_is_a_pair_or_a_number_as_in_the_released_code(value, sizes):
    assert parse_verifier({}, [f"concurrency_per_proc={value}"]).concurrency_per_proc == sizes


@pytest.mark.parametrize("value", ["0", "[0, 8]", "eight", "[8]", "true"])
def test_another_concurrency_per_proc_is_refused(value):
    with pytest.raises(UserError, match=r"^verifier\.concurrency_per_proc"):
        parse_verifier({}, [f"concurrency_per_proc={value}"])


def test_keys_that_contradict_the_rest_of_the_config_are_refused_before_training():
    def check(**verifier):
        model = {"path": "m", "stop_word": "<|end|>"}
        rest = {"data": {"train": "t"}, "rollout": {"gen_max_new": 8, "gen_max_length": 64}}
        check_config(parse_config({"work_dir": "w", "model": model, "verifier": verifier} | rest), SPEC, 1)

    check(hosts=["a:1"], stop_word="<|end|>")
    check(judge={"deadline_s": 1800})
    for verifier, said in (
        ({"stop_word": "END"}, "verifier.stop_word='END' is not model.stop_word='<|end|>'"),
        ({"hosts": ["a:1"], "judge": {"deadline_s": 1800}}, "is not below parallel.distributed_timeout_s=1800"),
        ({"hosts": ["x.x.x.x:xxxx"]}, "verifier.hosts: 'x.x.x.x:xxxx' is no address"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            check(**verifier)


def test_a_server_that_breaks_on_constrained_output_is_found_out_by_the_check():
    async def respond(payload, request):
        broken = "response_format" in payload or "regex" in payload
        return await (servers.status(500) if broken else servers.honest)(payload, request)

    with JudgeServer(respond) as server, Bench(settings(server)) as bench:
        assert bench.judge.check() == []
        before = len(server.payloads)
        assert bench.ask(RIGHT)[0].verdict is Verdict.CORRECT
        assert len(server.payloads) == before + 1


# The check at the start


def test_check_names_every_host_and_what_it_answered_when_none_gives_a_verdict():
    with contextlib.ExitStack() as stack:
        taken = stack.enter_context(socket.socket())
        taken.bind(("127.0.0.1", 0))  # and not listening
        nobody = f"127.0.0.1:{taken.getsockname()[1]}"
        first = stack.enter_context(JudgeServer(models=None))
        second = stack.enter_context(JudgeServer(servers.saying("yes")))
        bench = stack.enter_context(Bench(settings(first, second, nobody)))
        with pytest.raises(UserError) as caught:
            bench.judge.check()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("verifier.hosts: none of the 3 judge hosts gives a verdict (http://127.0.0.1:")
    for part in (
        "/v1/models: HTTP 404 (verifier.judge.model names one without it)",
        "not one of the two verdicts but 'yes'",
        f"http://{nobody}/v1: Cannot connect",
        "verifier.hosts=[]",
    ):
        assert part in message


def test_check_complains_of_single_hosts_and_goes_on():
    with JudgeServer() as good, JudgeServer(servers.always("INCORRECT")) as bad, Bench(settings(good, bad)) as bench:
        assert bench.judge.check() == [f"judge host http://{bad.host}/v1: says that 4 is not 4"]


def test_a_model_name_in_the_config_makes_the_list_of_models_unnecessary():
    with JudgeServer(models=None) as server, Bench(settings(server, model="mine")) as bench:
        assert bench.judge.check() == []
        assert server.payloads[0]["model"] == "mine"


@pytest.mark.parametrize(
    "models", [b"{}", b"[]", b'{"data": []}', b'{"data": [{"id": 3}]}', b"junk", b'{"data": [null]}']
)
def test_a_list_of_models_without_a_name_is_said(models):
    with (
        JudgeServer(models=models) as server,
        Bench(settings(server)) as bench,
        pytest.raises(UserError, match="/v1/models: lists no model"),
    ):
        bench.judge.check()


def http_date(seconds):
    moment = datetime.datetime.fromtimestamp(1_000_000 + seconds, datetime.UTC)
    return email.utils.format_datetime(moment, usegmt=True)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None), ("3", 3.0), (" 7 ", 7.0), ("0", 0.0), ("99999999999999999999", 120.0), ("-5", None), ("", None),
        (http_date(30), 30.0), (http_date(-30), 0.0), (http_date(10**6), 120.0), ("Wed, 99 Foo", None), ("1.5", None),
        ("\u0663", None),
    ],
)  # fmt: skip
def test_retry_after_is_read_as_seconds_or_as_a_date_and_is_bounded(header, seconds):
    assert retry_after_s(header, now=1_000_000) == seconds
