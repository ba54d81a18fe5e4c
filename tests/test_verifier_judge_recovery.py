"""Outages, load limits and bad replies under the default pauses and concurrency: the judge is used when it can be."""

import asyncio
import random
import time

import judge_server as servers
import pytest
from judge_server import JudgeServer
from test_verifier_judge import RULES, Bench

from megatron_oreal.config import VerifierConfig
from megatron_oreal.verifier import judge_hosts
from megatron_oreal.verifier.judge_client import JudgeClient, JudgeError
from megatron_oreal.verifier.judge_hosts import FAILURES_TO_OPEN, Host, HostPool
from megatron_oreal.verifier.judge_prompt import Case
from megatron_oreal.verifier.judge_stats import StatsBox
from megatron_oreal.verifier.verdict import Verdict


def defaults(*hosts, **judge):
    """The default ``verifier`` section with a deadline for a test; 16 requests in flight."""
    names = [host.host if isinstance(host, JudgeServer) else host for host in hosts]
    return VerifierConfig.model_validate({"hosts": names, "judge": {"deadline_s": 240, "timeout_s": 120} | judge})


def submit(bench, count):
    for key in range(count):
        bench.judge.submit(key, "?", "twelve", f"\\boxed{{{key} twelve}}", RULES)


def test_a_server_killed_under_load_and_back_after_two_seconds_costs_no_verdict():
    with JudgeServer(servers.slow(0.03)) as server, Bench(defaults(server)) as bench:
        submit(bench, 400)
        found = bench.collect(40)
        server.stop()
        time.sleep(2)
        server.start()
        began = time.monotonic()
        found |= bench.collect(360)
        seconds = time.monotonic() - began
    assert {j.verdict for j in found.values()} == {Verdict.CORRECT}
    assert seconds < 60


@pytest.mark.parametrize("headers", [None, {"Retry-After": "1"}], ids=["without a time", "with a time"])
def test_a_server_that_refuses_more_than_eight_at_once_gets_about_eight_at_once(headers):
    at_once = refused = 0

    async def capped(payload, request):
        nonlocal at_once, refused
        if at_once >= 8:
            refused += 1
            return await servers.status(429, headers)(payload, request)
        at_once += 1
        try:
            return await servers.slow(0.05)(payload, request)
        finally:
            at_once -= 1

    with JudgeServer(capped) as server, Bench(defaults(server, max_retries=0)) as bench:
        began = time.monotonic()
        count = 120 if headers else 300
        submit(bench, count)
        found = bench.collect(count)
        seconds = time.monotonic() - began
    assert {j.verdict for j in found.values()} == {Verdict.CORRECT}
    assert refused < 100
    assert seconds < 60


def test_one_bad_reply_in_five_costs_no_verdict_and_seldom_a_pause():
    bads = [servers.status(500), servers.reset, servers.body(b"<html>")]
    rng = random.Random(0)

    async def moody(payload, request):
        return await (rng.choice(bads) if rng.random() < 0.2 else servers.slow(0.02))(payload, request)

    with JudgeServer(moody) as server, Bench(defaults(server)) as bench:
        began = time.monotonic()
        submit(bench, 500)
        found = bench.collect(500)
        seconds = time.monotonic() - began
    assert sum(j.verdict is Verdict.CORRECT for j in found.values()) >= 496  # five bad replies to one item: 1 in 3,000
    assert seconds < 60


# A host


def host(limit=16):
    return Host("http://a/v1", limit, 0.5)


def taken(one, count):
    return [one.take().number for _ in range(count)]


@pytest.fixture
def still(monkeypatch):
    """Time that stands still."""
    now = time.monotonic()
    monkeypatch.setattr(judge_hosts.time, "monotonic", lambda: now)


def closed_for(one):
    return one.closed_until - time.monotonic()


def test_a_burst_of_failures_is_one_opening_with_a_pause_of_two_seconds_at_most(still):
    one = host()
    numbers = taken(one, 16)
    for number in numbers:
        one.failed(number, "reset")
        one.give_back(number)
    assert one.openings == 1
    assert 0.4 < closed_for(one) <= 2
    assert not one.can_take(time.monotonic())
    assert (one.in_flight, one.is_healthy) == (0, False)


def test_the_first_pause_is_short_whatever_the_delay_of_a_retry_is(still):
    one = Host("http://a/v1", 4, 60.0)
    for number in taken(one, 4):
        one.failed(number, "reset")
    assert 0 < closed_for(one) <= 2


def test_a_host_is_probed_by_one_request_while_older_ones_still_hang_and_every_failed_probe_lengthens_the_pause(still):
    one = host()
    numbers = taken(one, 16)
    for number in numbers[:FAILURES_TO_OPEN]:
        one.failed(number, "reset")
        one.give_back(number)
    pauses = []
    for _ in range(5):
        one.closed_until = 0.0
        assert one.can_take(time.monotonic())
        (probe,) = taken(one, 1)
        assert not one.can_take(time.monotonic())
        one.failed(probe, "reset")
        one.give_back(probe)
        pauses.append(closed_for(one))
    assert pauses[-1] > 10 > 4 > pauses[0]
    one.closed_until = 0.0
    (probe,) = taken(one, 1)
    one.succeeded(probe)
    one.give_back(probe)
    assert one.is_healthy
    assert one.openings == 0
    for number in numbers[FAILURES_TO_OPEN:]:  # they were sent before the opening
        one.failed(number, "reset")
        one.give_back(number)
    assert one.is_healthy and one.can_take(time.monotonic())
    assert one.in_flight == 0


def test_failures_count_in_the_order_of_sending_and_not_of_arrival():
    """Resets and 500 come at once and verdicts take their time: what is heard first is mostly bad."""
    one = host()
    numbers = taken(one, 16)
    for number in numbers[::2]:
        one.failed(number, "500")
        one.give_back(number)
    assert one.is_healthy
    for number in numbers[3::2]:
        one.succeeded(number)
        one.give_back(number)
    assert one.is_healthy
    one.failed(numbers[1], "500")  # 1, 2 and 3 of those sent
    assert one.is_healthy
    more = taken(one, 4)
    for number in (more[3], more[0], more[2]):
        one.failed(number, "500")
        assert one.is_healthy
    one.failed(more[1], "500")
    assert not one.is_healthy


def test_a_burst_of_429_lowers_the_limit_once_and_successes_raise_it_again(still):
    one = host()
    for number in taken(one, 16):
        one.limited(number, "HTTP 429", None)
        one.give_back(number)
    assert one.allowed == pytest.approx(0.7 * 16)
    assert (one.limits, one.is_healthy) == (1, True)
    assert closed_for(one) < 0
    for _ in range(200):
        (number,) = taken(one, 1)
        one.succeeded(number)
        one.give_back(number)
    assert (one.allowed, one.limits) == (16, 0)


def test_429_without_a_success_between_pauses_longer_every_time(still):
    one = host()
    pauses = []
    for _ in range(7):
        one.closed_until = 0.0
        (number,) = taken(one, 1)
        one.limited(number, "HTTP 429", None)
        one.give_back(number)
        pauses.append(closed_for(one))
    assert pauses[0] < 0 < pauses[1] < 1 < pauses[4] < pauses[6] <= 30
    assert one.allowed == 1


def test_the_longest_time_asked_for_holds(still):
    one = host()
    first, second = taken(one, 2)
    one.limited(first, "HTTP 429", 5)
    one.limited(second, "HTTP 429", 9)
    assert 8 < closed_for(one) < 9.2


def test_what_is_wrong_with_a_request_is_not_held_against_its_host():
    """400, 413 and 422 speak of the request; 500 speaks of the host."""

    async def outcome(code):
        with JudgeServer(servers.status(code)) as server:
            client = JudgeClient(defaults(server, max_retries=0), StatsBox())
            try:
                for _ in range(FAILURES_TO_OPEN):
                    with pytest.raises(JudgeError, match=f"HTTP {code}"):
                        await client.ask(Case("?", "1", "2"), time.monotonic() + 240)
                return client.pool.hosts[0].is_healthy
            finally:
                await client.close()

    assert {code: asyncio.run(outcome(code)) for code in (400, 413, 422, 500)} == {
        400: True, 413: True, 422: True, 500: False,
    }  # fmt: skip


def test_who_waits_is_served_in_random_order_and_who_has_waited_long_comes_first(monkeypatch):
    async def order(late):
        pool = HostPool(["http://a/v1"], 1, 0.5)
        first = await pool.acquire(time.monotonic() + 60)
        served = []

        async def wait(name, deadline):
            slot = await pool.acquire(deadline)
            served.append(name)
            pool.release(slot)

        tasks = [asyncio.create_task(wait(name, time.monotonic() + 60)) for name in range(30)]
        await asyncio.sleep(0)
        if late:
            now = time.monotonic()
            monkeypatch.setattr(judge_hosts.time, "monotonic", lambda: now + 40)
        pool.release(first)
        await asyncio.gather(*tasks)
        monkeypatch.undo()
        return served

    assert sorted(asyncio.run(order(False))) == list(range(30)) != asyncio.run(order(False))
    assert asyncio.run(order(True)) == list(range(30))


def test_two_processes_that_start_together_find_each_others_verdicts(tmp_path):
    """The second looks into the cache again when its turn has come, not only when it queues."""
    with (
        JudgeServer(servers.slow(0.02)) as server,
        Bench(defaults(server), cache=tmp_path / "cache.txt") as one,
        Bench(defaults(server), cache=tmp_path / "cache.txt") as other,
    ):
        for bench in (one, other):
            submit(bench, 300)
        found = [*one.collect(300).values(), *other.collect(300).values()]
        stats = one.judge.stats() + other.judge.stats()
        requests = len(server.payloads)
    assert {j.verdict for j in found} == {Verdict.CORRECT}
    assert stats.requests + stats.cache_hits == 600
    assert 300 <= requests == stats.requests < 420
    assert sum(j.reason.endswith("(cached)") for j in found) == stats.cache_hits
