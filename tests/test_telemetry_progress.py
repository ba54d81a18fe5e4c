from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from megatron_oreal.telemetry import progress


@pytest.fixture
def clock(monkeypatch):
    """The seconds that the module reads from ``now``, which a test moves on."""
    clock = SimpleNamespace(now=1000.0)
    module = sys.modules["megatron_oreal.telemetry.progress"]  # the package's attribute of this name is the function
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_a_file_gets_few_plain_lines_and_one_at_the_end(clock):
    stream = io.StringIO()
    with progress("generate", total=300, unit="responses", stream=stream) as bar:
        for _ in range(100):
            clock.now += 0.25
            bar.update(3, extra="1234 tok/s\x1b[1m\r")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 5 + 1  # one in 5 s, in 25 s
    assert re.fullmatch(r"generate: 60/300 responses \(20 %\), 5\.0 s, 20\.0 s left, 1234 tok/s.*", lines[0])
    assert re.fullmatch(r"generate: 300/300 responses in 25\.0 s, 1234 tok/s.*", lines[-1])
    assert all(c == "\n" or c.isprintable() for c in stream.getvalue())


def test_a_short_phase_still_gets_its_last_line(clock):
    stream = io.StringIO()
    with progress("export", total=2, unit="tensors", stream=stream) as bar:
        bar.update()
        bar.update()
    assert re.fullmatch(r"export: 2/2 tensors in 0\.\d s\n", stream.getvalue())


def test_an_unknown_total_is_only_counted(clock):
    stream = io.StringIO()
    with progress("verify", stream=stream, interval_s=0.0) as bar:
        bar.update(7)
    assert re.fullmatch(r"verify: 7, 0\.\d s\nverify: 7 in 0\.\d s\n", stream.getvalue())


def test_a_phase_that_fails_says_how_far_it_came(clock):
    stream = io.StringIO()
    bar = progress("load", total=9, unit="shards", stream=stream)
    with contextlib.suppress(KeyError), bar:
        bar.update(4)
        raise KeyError
    assert re.fullmatch(r"load: stopped at 4/9 shards after 0\.\d s \(KeyError\)\n", stream.getvalue())


def test_updates_from_several_threads_are_all_counted():
    stream = io.StringIO()
    with progress("generate", total=4000, stream=stream) as bar:
        threads = [threading.Thread(target=lambda: [bar.update() for _ in range(1000)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert "4000/4000 in" in stream.getvalue()


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0), (None, 1)])
def test_only_rank_0_writes(monkeypatch, capsys, rank, lines):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with progress("generate", total=1, interval_s=3600) as bar:
        bar.update()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == lines


LIVE = """
import sys
from megatron_oreal.telemetry import progress

with (
    progress("generate", total=40, unit="responses", interval_s=3600) as a,
    progress("verify [3]", total=40, interval_s=3600) as b,
):
    for i in range(40):
        a.update(1, extra="99 tok/s")
        b.update(1)
        if i == 20:
            sys.stdin.readline()
    print("table line")
"""
FRAMES = re.compile(r"generate .*[1-9]\d*/40 responses.*\x1b\[1A", re.DOTALL)
"""A frame with a count in it, and that the next one goes back over both lines."""


def run_on_terminal(**env: str) -> tuple[str, str]:
    """Run LIVE with a real terminal as standard error and a pipe as standard output; return what each received."""
    master, slave = pty.openpty()
    environment = os.environ | {"COLUMNS": "120"} | env
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": slave}
    process = subprocess.Popen([sys.executable, "-c", LIVE], env=environment, **pipes)
    assert process.stdin is not None and process.stdout is not None
    os.close(slave)
    chunks = []
    if env["TERM"] == "dumb":
        process.stdin.close()
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # what Linux answers when the other end is closed
            break
        if not chunk:
            break
        chunks.append(chunk)
        if not process.stdin.closed and FRAMES.search(b"".join(chunks).decode(errors="replace")):
            process.stdin.close()  # it has been seen at work, and may end
    with process:
        output = process.stdout.read()
    os.close(master)
    assert process.returncode == 0, b"".join(chunks).decode()
    return b"".join(chunks).decode(), output.decode()


def test_a_terminal_gets_live_bars_and_standard_output_stays_what_it_is():
    screen, output = run_on_terminal(TERM="xterm-256color")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen)
    assert "\x1b[" in screen
    assert re.search(r"generate .*[1-9]\d*/40 responses \d:\d\d:\d\d", plain)
    assert "99 tok/s" in plain
    assert "verify [3]" in plain
    assert "\x1b[1A" in screen, "both bars are redrawn together, on two lines"
    assert screen.count("\x1b[?25l") == screen.count("\x1b[?25h") == 1, "one display, the cursor visible again"
    assert output == "table line\n"


def test_a_dumb_terminal_gets_plain_lines():
    screen, _ = run_on_terminal(TERM="dumb")
    assert "\x1b" not in screen
    assert "generate: 40/40 responses in" in screen


def test_force_color_does_not_put_control_characters_into_a_log():
    environment = os.environ | {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    done = subprocess.run(
        [sys.executable, "-c", LIVE], input="", capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout == "table line\n"
    assert "\x1b" not in done.stderr
    assert len(done.stderr.splitlines()) == 2
