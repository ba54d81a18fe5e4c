"""What becomes of a step, and of the machine, when a real SGLang server fails."""

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite("engine_contract")

import engine_contract as contract  # noqa: E402
from sglang_server import fast_settings, holders, left_over, make_engine, needs_sglang, stage_hf_weights  # noqa: E402

from megatron_oreal.rollout.engine import Completion, EngineError, Request  # noqa: E402
from megatron_oreal.rollout.hf_weights import load_hf_engine, write_hf_weights  # noqa: E402
from megatron_oreal.rollout.sglang.dispatcher import Endpoint  # noqa: E402
from megatron_oreal.rollout.sglang.guard import group_members  # noqa: E402

pytestmark = needs_sglang
SAMPLING = contract.params(max_new_tokens=400, max_length=330)


def requests(count: int = 48) -> list[Request]:
    """Of many lengths, so that they end one after the other.

    No draw of theirs is within 1.5e-5 of a border between two tokens. Which requests are in a batch together depends on
    the time, and the rounding on the batch: it moves borders by about 1e-6.
    """
    prompts = contract.make_prompts([250 + i % 40 for i in range(count)])
    later = {2: 1, 13: 1, 15: 1, 19: 2, 27: 1, 28: 1, 36: 1, 38: 1, 47: 1}
    return [Request(prompt, 100 + i + 1000 * later.get(i, 0)) for i, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return contract.save_random_model(tmp_path_factory.mktemp("model"), "qwen2_tied")


@pytest.fixture(scope="module")
def expected(model_dir) -> list[list[int]]:
    """The embedded engine's responses, which SGLang's are to equal."""
    engine = load_hf_engine(model_dir, dtype=torch.float32, max_running_requests=64, max_length=400)
    return contract.tokens_of(engine.generate(requests(), SAMPLING))


@pytest.fixture(scope="module")
def engine(model_dir, tmp_path_factory):
    before, segments, folder = left_over([]), shared_memory(), tmp_path_factory.mktemp("server")
    engine = make_engine(
        model_dir,
        folder,
        settings=fast_settings(window=24, max_restarts=9, control_timeout_s=40.0),
        server_args={"enable_memory_saver": True},
    )
    write_hf_weights(engine, model_dir, version=0)
    yield engine
    port, group = engine._server.port, engine._server.pid
    engine.shutdown()
    assert not any(str(folder) in text for text in holders(port))  # somebody else may listen there by now
    assert group_members(group) == []
    assert left_over(before) == []
    assert shared_memory() <= segments, "shared memory is still open"


def shared_memory() -> Counter[str]:
    """Segments of ours that this process has open, by their names; what only cycles hold is none."""
    gc.collect()
    links = []
    for entry in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{entry}"))
        except OSError:
            continue
    return Counter(link for link in links if "memfd:megatron_oreal" in link)


def generate_with(engine, fault, after: int = 4) -> tuple[list[Completion], Counter]:
    """Generate, and call ``fault`` when ``after`` responses are there."""
    seen: Counter[int] = Counter()

    def take(index: int, completion: Completion) -> None:
        seen[index] += 1
        if seen.total() == after:
            fault()

    return engine.generate(requests(), SAMPLING, take), seen


def check(completions: list[Completion], seen: Counter, expected: list[list[int]]) -> None:
    assert seen == Counter(range(len(expected))), "every sample exactly once"
    assert contract.tokens_of(completions) == expected
    assert {completion.finish_reason for completion in completions} == {"length"}


def test_a_server_killed_during_generation_is_started_again_and_nothing_is_lost_or_doubled(engine, expected):
    victims = group_members(engine._server.pid)
    restarts = engine.num_restarts
    completions, seen = generate_with(engine, lambda: kill_server(engine, victims))
    check(completions, seen, expected)
    assert engine.num_restarts == restarts + 1
    assert not set(victims) & set(group_members(engine._server.pid))


def kill_server(engine, group: list[int]) -> None:
    """The server and its workers, of which one may end with another; not the guard."""
    guard = engine._server.pid
    for pid in group:
        if pid != guard:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_hung_server_is_found_out_and_replaced(engine, expected, monkeypatch):
    soon = replace(engine.dispatcher.settings, health_timeout_s=6.0)
    monkeypatch.setattr(engine.dispatcher, "settings", soon)
    monkeypatch.setattr(engine._keeper, "settings", replace(engine._keeper.settings, dispatch=soon))
    victims = group_members(engine._server.pid)
    restarts = engine.num_restarts
    completions, seen = generate_with(engine, lambda: [os.kill(pid, signal.SIGSTOP) for pid in victims])
    check(completions, seen, expected)
    assert engine.num_restarts == restarts + 1
    assert not [pid for pid in victims if Path(f"/proc/{pid}").exists()]


def test_a_server_killed_during_a_sync_is_started_again_and_takes_the_version(engine, model_dir, expected):
    before = group_members(engine._server.pid)
    workers = [pid for pid in before if b"scheduler" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 1
    os.kill(workers[0], signal.SIGSTOP)  # the sync stands still ...
    killer = threading.Timer(1.0, os.kill, (workers[0], signal.SIGKILL))  # ... until it is killed in the middle
    killer.start()
    stage_hf_weights(engine, model_dir, engine.health().version + 1)
    killer.join()
    assert not set(before) & set(group_members(engine._server.pid))
    completions, seen = generate_with(engine, lambda: None)
    check(completions, seen, expected)


def test_a_server_that_refuses_connections_is_left_out(engine, expected):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening
        dead = Endpoint(f"http://127.0.0.1:{closed.getsockname()[1]}", engine.endpoint.weight_version)
        seen: Counter[int] = Counter()
        completions = engine.dispatcher.generate(
            [dead, engine.endpoint],
            requests(),
            SAMPLING,
            vocab_size=contract.VOCABULARY,
            window=24,
            on_complete=lambda index, completion: seen.update([index]),
        )
    check(completions, seen, expected)


def test_responses_of_other_weights_do_not_count_and_the_step_ends_with_an_error(engine):
    stale = Endpoint(engine.endpoint.url, "another:7")
    seen: list[int] = []
    settings = engine.dispatcher.settings
    engine.dispatcher.settings = replace(settings, recover_timeout_s=3.0)
    try:
        with pytest.raises(EngineError, match=r"no engine has answered for .*=3; .* instead of 'another:7'"):
            engine.dispatcher.generate(
                [stale],
                requests(),
                SAMPLING,
                vocab_size=contract.VOCABULARY,
                window=24,
                on_complete=lambda index, completion: seen.append(index),
            )
    finally:
        engine.dispatcher.settings = settings
    assert seen == []


def test_the_steps_deadline_ends_it_and_leaves_the_server_idle(engine, expected):
    settings = engine.dispatcher.settings
    engine.dispatcher.settings = replace(settings, step_deadline_s=0.3)
    try:
        with pytest.raises(EngineError, match=r"step_deadline_s=0\.3 has passed with \d+ of 48"):
            engine.generate(requests(), SAMPLING)
    finally:
        engine.dispatcher.settings = settings
    completions, seen = generate_with(engine, lambda: None)
    check(completions, seen, expected)


def test_enough_gives_up_the_rest_as_aborted_and_each_is_reported_once(engine, expected):
    seen: Counter[int] = Counter()
    got = engine.generate(
        requests(), SAMPLING, lambda index, completion: seen.update([index]), enough=lambda: seen.total() >= 5
    )
    assert seen == Counter(range(48))
    reasons = Counter(completion.finish_reason for completion in got)
    assert reasons["abort"] > 0
    assert reasons["length"] >= 5
    for completion, tokens in zip(got, expected, strict=True):
        assert completion.token_ids.tolist() == (tokens if completion.finish_reason == "length" else [])


def test_a_callback_that_raises_ends_the_step_and_the_engine_goes_on(engine, expected):
    with pytest.raises(KeyError):
        engine.generate(requests(), SAMPLING, lambda index, completion: {}[index])
    with pytest.raises(EngineError, match="generating"):
        engine.generate(requests(), SAMPLING, lambda index, completion: engine.sleep())
    completions, seen = generate_with(engine, lambda: None)
    check(completions, seen, expected)


def test_a_sync_that_misses_a_parameter_is_refused_and_generation_too_until_the_next(engine, model_dir, expected):
    version = engine.health().version
    engine.weight_buffers()
    offsets = engine._stagings[0].offsets
    entry = offsets.pop("model.norm.weight")
    with pytest.raises(EngineError, match=r"parameters \['model.norm.weight'\] get no weights"):
        engine.load_weights(version + 1)
    offsets["model.norm.weight"] = entry
    with pytest.raises(EngineError, match="did not arrive"):
        engine.generate(requests(), SAMPLING)
    assert engine.health().version == version
    write_hf_weights(engine, model_dir, version=version + 1)
    check(*generate_with(engine, lambda: None), expected)


def test_staging_that_changes_after_it_was_hashed_is_found_out_by_the_digests(engine, model_dir, monkeypatch):
    hash_source = engine._digester.hash_source

    def hash_then_change(rank, tensors):
        hashes = hash_source(rank, tensors)
        weight = tensors["model.layers.1.self_attn.o_proj.weight"]
        weight.view(torch.int32)[3, 5] ^= 1  # the lowest bit of one element
        return hashes

    version = engine.health().version
    with monkeypatch.context() as patch:
        patch.setattr(engine._digester, "hash_source", hash_then_change)
        with pytest.raises(EngineError, match=r"did not arrive .*'model.layers.1.self_attn.o_proj.weight'"):
            engine.load_weights(version + 1)
    write_hf_weights(engine, model_dir, version=version + 1)


def test_the_first_sync_overwrites_the_engine_with_noise(engine, model_dir, monkeypatch):
    orders = []
    order = engine._sync._order

    async def spy(sent, what):
        orders.extend(sent)
        return await order(sent, what)

    monkeypatch.setattr(engine._sync, "_order", spy)
    engine._sync.restarted()  # as a new server
    for _ in range(2):
        write_hf_weights(engine, model_dir, version=engine.health().version + 1)
    assert [sent["noise_seed"] is not None for sent in orders] == [True, False]


def test_a_version_comes_group_by_group_and_another_one_of_it_changes_nothing(engine, model_dir, expected):
    for _ in range(2):
        stage_hf_weights(engine, model_dir, engine.health().version + 1)
        assert engine._buckets.nbytes == 0, "staging is given back"
        assert not engine._digester._hasher.scratch
        check(*generate_with(engine, lambda: None), expected)


@pytest.mark.slow
def test_a_server_killed_before_it_wakes_has_the_kept_weights_when_it_is_awake(engine, model_dir, expected):
    """Between the sync and the waking of the caches nobody watches the server."""
    engine.sleep()
    engine.wake(["weights"])
    stage_hf_weights(engine, model_dir, engine.health().version + 1)
    kill_server(engine, group_members(engine._server.pid))
    wait_for(lambda: engine._server.pid is None, 60)
    engine.wake()
    check(*generate_with(engine, lambda: None), expected)


def test_released_weights_are_gone_until_a_version_is_loaded(engine, model_dir, expected):
    engine.sleep()
    with pytest.raises(EngineError, match="asleep"):
        engine.generate(requests(), SAMPLING)
    engine.wake(["weights"])
    with pytest.raises(EngineError, match="asleep"):
        engine.generate(requests(), SAMPLING)
    write_hf_weights(engine, model_dir, version=engine.health().version + 1)
    engine.wake()
    check(*generate_with(engine, lambda: None), expected)
    engine.sleep()
    engine.wake()
    with pytest.raises(EngineError, match="released in sleep"):
        engine.generate(requests(), SAMPLING)
    write_hf_weights(engine, model_dir, version=engine.health().version + 1)
    engine.sleep(["kv_cache"])
    engine.wake()
    check(*generate_with(engine, lambda: None), expected)


def test_a_slow_start_ends_at_its_deadline_with_the_end_of_the_log(model_dir, tmp_path):
    before = left_over([])
    settings = replace(fast_settings(), start_timeout_s=2.0)
    engine = make_engine(model_dir, tmp_path, settings=settings)
    engine.start()
    group = engine._server.pid
    with pytest.raises(EngineError, match=r"not ready within 2 s; the end of .*sglang\.log"):
        engine.wait_ready()
    assert group_members(group) == []
    engine.shutdown()
    assert left_over(before) == []


@pytest.mark.slow
def test_a_server_that_cannot_start_shows_its_own_words(model_dir, tmp_path):
    before = left_over([])
    engine = make_engine(model_dir, tmp_path, server_args={"attention_backend": "no_such_backend"})
    with pytest.raises(EngineError, match=r"(?s)ended with .* while starting; .*no_such_backend"):
        engine.wait_ready()
    engine.shutdown()
    assert left_over(before) == []


TRAINER = """
import sys, time
sys.path[:0] = [{tests!r}, {root!r}]
from pathlib import Path
from sglang_server import make_engine
engine = make_engine(Path({model!r}), Path({folder!r}))
engine.start()
print(engine._server.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.slow  # test_sglang_train.py kills a whole trainer in CI
@pytest.mark.parametrize("stopped", [False, True])
def test_nothing_outlives_a_trainer_that_is_killed(model_dir, tmp_path, stopped):
    before = left_over([])
    tests = Path(__file__).parent
    script = TRAINER.format(
        tests=str(tests), root=str(tests.parent), model=str(model_dir), folder=str(tmp_path / "server")
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        group = int(trainer.stdout.readline())
        wait_for(lambda: len(group_members(group)) >= 3, 120)  # guard, server, at least one worker
        if stopped:
            for pid in group_members(group):
                os.kill(pid, signal.SIGSTOP)
        trainer.kill()
    wait_for(lambda: not group_members(group), 60)
    wait_for(lambda: left_over(before) == [], 60)


def wait_for(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not within the deadline"
        time.sleep(0.05)
