"""Verdicts on disk: shared by processes that write at once, and whole after any of them was killed."""

import os
import subprocess
import sys
import time

import pytest
from judge_server import JudgeServer, status
from test_verifier_judge import RIGHT, WRONG, Bench, settings

from megatron_oreal.errors import UserError
from megatron_oreal.verifier.judge_cache import JudgeCache, cache_key
from megatron_oreal.verifier.judge_prompt import Case
from megatron_oreal.verifier.verdict import Verdict

WRITER = """
import sys
from pathlib import Path
from megatron_oreal.verifier.judge_cache import JudgeCache
from megatron_oreal.verifier.verdict import Verdict
cache, first = JudgeCache(Path(sys.argv[1])), int(sys.argv[2])
print("ready", flush=True)
for n in range(first, first + int(sys.argv[3])):
    cache.put(f"{n:064x}", Verdict.CORRECT if n % 2 else Verdict.WRONG)
print("done", flush=True)
"""


def writer(path, first, count):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(first), str(count)], stdout=subprocess.PIPE, text=True
    )


def key(number):
    return f"{number:064x}"


def parity(number):
    return Verdict.CORRECT if number % 2 else Verdict.WRONG


def test_processes_that_write_at_once_lose_nothing_and_mix_nothing(tmp_path):
    path, count = tmp_path / "made" / "cache.txt", 3000
    writers = [writer(path, first * count, count) for first in range(4)]
    assert [process.wait(300) for process in writers] == [0] * 4
    cache = JudgeCache(path)
    assert len(cache) == 4 * count
    assert all(cache.get(key(n)) is parity(n) for n in range(4 * count))


def test_a_reader_finds_what_another_process_has_written_since(tmp_path):
    cache = JudgeCache(tmp_path / "cache.txt")
    assert cache.get(key(7)) is None
    assert writer(tmp_path / "cache.txt", 0, 10).wait(300) == 0
    assert cache.get(key(7)) is Verdict.CORRECT


def test_a_writer_that_is_killed_in_the_middle_costs_no_entry_but_its_last(tmp_path):
    path = tmp_path / "cache.txt"
    process = writer(path, 0, 10**6)  # ends, should nobody be there to kill it
    assert process.stdout.readline() == "ready\n"
    while path.stat().st_size < 200_000:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    size = path.stat().st_size - 30  # what a crash of the machine may leave of the last line
    os.truncate(path, size)
    assert writer(path, 10**12, 100).wait(300) == 0
    cache = JudgeCache(path)
    # The kill may have cut a line too, at a page's end. A line counts without its last break, for the next one's first.
    whole = (size + 1) // len(f"\n{key(0)} W 00000000\n")
    assert len(cache) == whole + 100
    assert all(cache.get(key(n)) is parity(n) for n in range(whole))
    assert all(cache.get(key(10**12 + n)) is parity(n) for n in range(100))


@pytest.mark.parametrize(
    "rubbish", [b"\x00" * 5000, b"\n\n\n", b"junk", b"a" * 64 + b" C 00000000\n", os.urandom(3000)]
)
def test_rubbish_in_the_file_costs_only_itself(tmp_path, rubbish):
    path = tmp_path / "cache.txt"
    first = JudgeCache(path)
    first.put(key(1), Verdict.CORRECT)
    with path.open("ab") as file:
        file.write(rubbish)
    first.put(key(2), Verdict.WRONG)
    for cache in (first, JudgeCache(path)):
        assert (cache.get(key(1)), cache.get(key(2)), len(cache)) == (Verdict.CORRECT, Verdict.WRONG, 2)


def test_of_two_verdicts_the_first_in_the_file_holds_for_everyone(tmp_path):
    one, other = JudgeCache(tmp_path / "cache.txt"), JudgeCache(tmp_path / "cache.txt")
    one.put(key(1), Verdict.CORRECT)
    other.put(key(1), Verdict.WRONG)
    assert [cache.get(key(1)) for cache in (one, other, JudgeCache(tmp_path / "cache.txt"))] == [Verdict.CORRECT] * 3


def test_a_key_has_everything_that_can_change_a_verdict_and_no_white_space():
    case = Case("q  1", "g", "a\n b")
    assert cache_key(case, "m", 1) == cache_key(Case("q 1", " g ", "a b"), "m", 1)
    others = [
        cache_key(Case("q 2", "g", "a b"), "m", 1),
        cache_key(Case("q 1", "h", "a b"), "m", 1),
        cache_key(Case("q 1", "g", "ab"), "m", 1),
        cache_key(Case("q 1 g", "", "a b"), "m", 1),
        cache_key(case, "n", 1),
        cache_key(case, "m", 3),
    ]
    assert len({cache_key(case, "m", 1), *others}) == 7


def test_a_verdict_is_asked_for_once_in_two_runs_and_unknown_is_not_kept(tmp_path):
    path = tmp_path / "cache.txt"
    with JudgeServer() as server:
        config = settings(server)
        with Bench(config, cache=path) as bench:
            first = bench.ask(RIGHT, WRONG)
        with Bench(config, cache=path) as bench:
            bench.judge.check()
            server.payloads.clear()
            second = bench.ask(WRONG, RIGHT)
            assert bench.judge.stats().cache_hits == 2
        assert server.payloads == []
    assert [j.verdict for j in first] == [j.verdict for j in reversed(second)] == [Verdict.CORRECT, Verdict.WRONG]
    assert second[0].reason == "judge: wrong (cached)"
    with JudgeServer(status(500)) as server, Bench(settings(server, max_retries=0), cache=path) as bench:
        assert bench.ask("\\boxed{new twelve}")[0].verdict is Verdict.UNKNOWN
    assert len(JudgeCache(path)) == 2


def test_a_cache_that_cannot_be_written_is_refused_with_its_path(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"verifier\.judge\.cache: '.*/file/cache\.txt' cannot be written \(File exists"
    ):
        JudgeCache(tmp_path / "file" / "cache.txt")
