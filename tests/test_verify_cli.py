"""``megatron-oreal verify`` as users call it: verdicts on standard output, a mistake in one line."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import judge_server as servers
import pytest
from judge_server import JudgeServer

from megatron_oreal import cli

DOCS = Path(__file__).parent.parent / "docs" / "verifier.md"
END = "<|im_end|>"
FAST = [
    "judge.cache=null",
    "judge.timeout_s=120",
    "judge.deadline_s=240",
    "judge.retry_delay_s=0.01",
    "judge.max_retries=1",
]


def run(*arguments, folder=None, stdin=""):
    """The command line in a process of its own."""
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK")}
    env["PYTHONPATH"] = str(Path(__file__).parent.parent)
    return subprocess.run(
        [sys.executable, "-m", "megatron_oreal", "verify", *map(str, arguments)],
        env=env, cwd=folder, input=stdin, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def verdict(*arguments, **options):
    done = run(*arguments, **options)
    assert (done.returncode, done.stderr) == (0, ""), done
    (line,) = done.stdout.splitlines()
    return json.loads(line)


def refused(capsys, *arguments):
    """The one line with which the command refuses, without ``error: ``; in this process, to be quick."""
    assert cli.main(["verify", *map(str, arguments)]) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert said.out == "" and line.startswith("error: ")
    return line.removeprefix("error: ")


def in_process(capsys, *arguments):
    """Standard output of a command that succeeds."""
    assert cli.main(["verify", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_answer_is_one_json_object():
    found = verdict("--gold", "\\frac{1}{2}", "--response", f"3 </think> So it is \\boxed{{0.5}}{END}\n")
    milliseconds = found.pop("milliseconds")
    assert found == {"verdict": "correct", "reason": "equal", "extracted_answer": "0.5", "decided_by": "rules"}
    assert 0 < milliseconds < 5000


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--gold", "5", "--response", f"\\boxed{{6}}{END}"], ("wrong", "not equal")),
        (["--gold", "5", "--response", "\\boxed{5}"], ("wrong", "truncated")),
        (["--gold", "5", "--response", f"\\boxed{{5}}{END} and"], ("wrong", "truncated")),
        (["--gold", "5", "--response", ""], ("wrong", "truncated")),
        (["--gold", "5", "--response", END], ("wrong", "no answer")),
        (["--gold", "5", "--response", "\\boxed{5}", "--stop-word", ""], ("correct", "equal")),
        (["--gold", "5", "--response", "\\boxed{5}</s>", "--stop-word", "</s>"], ("correct", "equal")),
        (["--gold", "5", "--response", "\\boxed{5}</s>", "--set", "stop_word=</s>"], ("correct", "equal")),
        (["--gold", "", "--response", f"\\boxed{{5}}{END}"], ("unknown", "gold answer is empty")),
        (["--gold=-5", "--response", f"\\boxed{{-5}}{END}"], ("correct", "equal")),
        (["--gold", "4", "--response", f"4 MARK 5{END}"], ("wrong", "no answer")),
        (["--gold", "5", "--response", f"4 MARK 5{END}", "--thinking-finish-words", "MARK"], ("correct", "equal")),
    ],
)
def test_the_exit_status_is_0_whatever_the_verdict(capsys, arguments, expected):
    found = json.loads(in_process(capsys, *arguments))
    assert (found["verdict"], found["reason"]) == expected


def test_a_response_comes_from_a_file_or_from_standard_input(tmp_path):
    (tmp_path / "response.txt").write_text(f"\\boxed{{7}}{END}\n\n")
    assert verdict("--gold", "7", "--response-file", tmp_path / "response.txt")["verdict"] == "correct"
    assert verdict("--gold", "7", "--response-file", "-", stdin=f"\\boxed{{7}}{END}\n")["verdict"] == "correct"


def test_a_judge_decides_what_the_rules_do_not(capsys):
    with JudgeServer() as server:
        said = in_process(
            capsys, "--gold", "twelve", "--question", "How many?", "--response", f"\\boxed{{surely twelve}}{END}",
            "--hosts", server.host, "--set", *FAST,
        )  # fmt: skip
    found = json.loads(said)
    assert (found["verdict"], found["decided_by"]) == ("correct", "judge")
    assert servers.block_of(server.payloads[-1], "QUESTION") == "How many?"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give --gold with --response or --response-file for one answer, or --file with --out for many"),
        (["--gold", "5"], "--gold goes with --response"),
        (["--response", "5"], "--gold goes with --response"),
        (["--file", "x"], "--file and --out go together"),
        (["--file", "x", "--out", "y", "--gold", "5"], "give --gold with"),
        (["--file", "absent.jsonl", "--out", "y"], "--file 'absent.jsonl': no such file"),
        (["--gold", "5", "--response-file", "absent.txt"], "'absent.txt' cannot be read: No such file"),
        (["--gold", "5", "--response", "5", "--num-processes", "0"], "verifier.num_processes=0: input should be"),
        (["--gold", "5", "--response", "5", "--set", "judge.votes=2"], "verifier.judge.votes=2 can end in a tie"),
        (["--gold", "5", "--response", "5", "--set", "judge.vote=1"], "unknown key 'verifier.judge.vote' (did"),
        (["--gold", "5", "--response", "5", "--hosts", "x.x.x.x:xxxx"], "hosts: 'x.x.x.x:xxxx' is no address"),
        (["--gold", "5", "--response", "5", "--hosts", "ftp://h"], "verifier.hosts: 'ftp://h' has the scheme 'ftp'"),
        (["--gold", "5", "--response", "5", "--hosts", "a:1", "http://a:1/"], "http://a:1/v1 is there twice"),
        (["--gold", "5", "--response", "5", "--checker", "nothing"], "'nothing' is not of the form module:function"),
        (["--gold", "5", "--response", "5", "--checker", "absent_x:f"], "cannot be loaded by the workers: ModuleNotF"),
        (["--gold", "5", "--response", "5", "--cache", "c"], "--cache 'c' keeps the judge's verdicts, and there"),
        (["--gold", "5", "--response", "5", "--set", "deadline_s=1e30"], "deadline_s='1e30': input should be less"),
        (["--gold", "5", "--response", "5", "--set", "deadline_s=.inf"], "verifier.deadline_s=inf: input should be"),
        (["--gold", "5", "--response", "5", "--set", "judge.timeout_s=1e30"], "timeout_s='1e30': input should be less"),
        (["--gold", "5", "--response", "5", "--set", "memory_limit_mb=60"], "memory_limit_mb=60: input should be gr"),
        (["--gold", "5", "--response", "5", "--set", f"memory_limit_mb={10**20}"], "input should be less than"),
        (["--gold", "5", "--response", "5", "--hosts", "127.0.0.1:1", "--set", *FAST], "none of the 1 judge hosts"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(capsys, arguments, said):
    assert said in refused(capsys, *arguments)


def test_a_file_that_is_not_text_is_said(capsys, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"5\xff")
    assert "is not UTF-8 text (byte 1)" in refused(capsys, "--gold", "5", "--response-file", path)
    assert refused(capsys, "--file", path, "--out", tmp_path / "y") == f"{path}:1: not UTF-8 text (byte 1 of the line)"
    path.write_bytes(b'{"gold_answer": "1", "response": "1"}\r\n\r\n{"gold_answer": "\xe9"}\n')
    assert refused(capsys, "--file", path, "--out", tmp_path / "y") == f"{path}:3: not UTF-8 text (byte 17 of the line)"


def test_a_file_gives_one_row_for_each_row_in_order_and_totals(capfd, tmp_path):
    rows = []
    for n in range(9000):
        rows.append(
            {"question": "?", "gold_answer": str(n - n % 3), "response": f"\\boxed{{{n}}}{END if n % 5 else ''}"}
        )
        if n % 2:
            rows[-1]["id"] = f"row {n}"
    out = tmp_path / "out.jsonl"
    source = write_rows(tmp_path / "in.jsonl", rows)
    assert cli.main(["verify", "--file", str(source), "--out", str(out), "--num-processes", "1"]) == 0
    said = capfd.readouterr()
    found = rows_of(out)
    assert [row.get("id") for row in found] == [row.get("id") for row in rows]
    assert [row["verdict"] for row in found] == ["correct" if n % 5 and n % 3 == 0 else "wrong" for n in range(9000)]
    totals = json.loads(said.out)
    assert {key: totals[key] for key in ("rows", "correct", "wrong", "unknown")} == {
        "rows": 9000, "correct": 2400, "wrong": 6600, "unknown": 0,
    }  # fmt: skip
    assert "verify: 9000/9000 rows in" in said.err
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_a_slow_row_holds_back_the_rows_behind_it_and_loses_none(capsys, tmp_path):
    rows = [{"gold_answer": "twelve", "response": f"\\boxed{{surely twelve {n}}}{END}"} for n in range(30)]

    async def first_is_slow(payload, request):
        seconds = 1.0 if servers.block_of(payload, "ANSWER").endswith(" 0") else 0.0
        return await servers.slow(seconds)(payload, request)

    out = tmp_path / "out.jsonl"
    with JudgeServer(first_is_slow) as server:
        said = in_process(
            capsys, "--file", write_rows(tmp_path / "in.jsonl", rows), "--out", out, "--hosts", server.host,
            "--num-processes", "1", "--cache", tmp_path / "cache.txt", "--set", "judge.timeout_s=240",
        )  # fmt: skip
    assert [row["extracted_answer"] for row in rows_of(out)] == [f"surely twelve {n}" for n in range(30)]
    totals = json.loads(said)
    assert (totals["correct"], totals["judge"]["requests"]) == (30, 30)
    assert (tmp_path / "cache.txt").stat().st_size > 30 * 64


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ("[1]", "must be an object with question, gold_answer and response"),
        ('{"response": "5"}', "has no 'gold_answer' (keys: response)"),
        ('{"gold_answer": "5", "answer": "5"}', "has no 'response' (keys: gold_answer, answer)"),
        ('{"gold_answer": 5, "response": "5"}', "gold_answer=5 must be a string: put it in quotes"),
        ('{"gold_answer": "5", "response": null}', "response=null must be a string"),
        ('{"gold_answer": "5", "response": "5", "question": ["?"]}', 'question=["?"] must be a string'),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_malformed_row_is_named_by_its_line_before_anything_is_judged(capsys, tmp_path, line, said):
    good = json.dumps({"question": "?", "gold_answer": "5", "response": "5"})
    source = tmp_path / "in.jsonl"
    source.write_text(f"{good}\n\n{good}\n{line}\n")
    out = tmp_path / "out.jsonl"
    out.write_text("of an earlier run\n")
    message = refused(capsys, "--file", source, "--out", out)
    assert message.startswith(f"{source}:4: ") and said in message
    assert out.read_text() == "of an earlier run\n"


def test_the_output_is_never_half_written(capsys, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", [{"gold_answer": "5", "response": f"\\boxed{{5}}{END}"}] * 10)
    assert "is the file that is read" in refused(capsys, "--file", source, "--out", source)
    assert "cannot be written: No such file" in refused(capsys, "--file", source, "--out", tmp_path / "no" / "o")
    with JudgeServer(servers.hang) as server:
        hanging = write_rows(tmp_path / "hang.jsonl", [{"gold_answer": "5", "response": f"\\boxed{{6}}{END}"}] * 10)
        server.respond = servers.in_turn(servers.always("CORRECT"), servers.hang)
        command = ["env", "--default-signal=INT", sys.executable, "-m", "megatron_oreal", "verify", "--file", hanging]
        command += ["--out", tmp_path / "out.jsonl"]  # a background job of a shell ignores SIGINT, and so its children
        process = subprocess.Popen(
            [*map(str, command), "--hosts", server.host, "--set", "judge.cache=null"], stderr=subprocess.PIPE, text=True
        )
        end = time.monotonic() + 300
        while len(server.payloads) < 2 and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hang.jsonl", "in.jsonl"]


def test_what_a_killed_process_left_is_cleared_by_the_next_and_two_at_once_are_noticed(capsys, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", [{"gold_answer": "5", "response": f"\\boxed{{6}}{END}"}])
    out = tmp_path / "out.jsonl"
    with JudgeServer(servers.in_turn(servers.always("CORRECT"), servers.hang)) as server:
        command = [sys.executable, "-m", "megatron_oreal", "verify", "--file", source, "--out", out]
        process = subprocess.Popen(
            [*map(str, command), "--hosts", server.host, "--set", "judge.cache=null"], stderr=subprocess.DEVNULL
        )
        try:
            end = time.monotonic() + 300
            while len(server.payloads) < 2 and time.monotonic() < end:
                time.sleep(0.02)
            assert "is being written by another process" in refused(capsys, "--file", source, "--out", out)
        finally:
            process.kill()
            process.wait()
    assert len(list(tmp_path.iterdir())) == 2
    in_process(capsys, "--file", source, "--out", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    assert len(rows_of(out)) == 1


def test_a_byte_order_mark_is_no_part_of_the_first_row(capsys, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + json.dumps({"gold_answer": "5", "response": f"\\boxed{{5}}{END}"}).encode())
    in_process(capsys, "--file", source, "--out", tmp_path / "out.jsonl")
    assert [row["verdict"] for row in rows_of(tmp_path / "out.jsonl")] == ["correct"]


def test_the_output_must_be_a_regular_file(capsys, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", [{"gold_answer": "5", "response": "5"}])
    for target in ("/dev/null", tmp_path):
        assert "is not a regular file" in refused(capsys, "--file", source, "--out", target)
    (tmp_path / "link").symlink_to(tmp_path / "real.jsonl")
    in_process(capsys, "--file", source, "--out", tmp_path / "link", "--num-processes", "1")
    assert (tmp_path / "link").is_symlink()
    assert len(rows_of(tmp_path / "real.jsonl")) == 1


def test_half_a_character_comes_out_as_it_came_in(capsys, tmp_path):
    row = {"id": "\ud83d", "question": "\ud800?", "gold_answer": "x\udfff", "response": f"\\boxed{{y\ud800 é}}{END}"}
    with JudgeServer() as server:
        source = write_rows(tmp_path / "in.jsonl", [row])
        in_process(capsys, "--file", source, "--out", tmp_path / "o", "--hosts", server.host, "--set", *FAST)
    (found,) = rows_of(tmp_path / "o")
    assert (found["id"], found["extracted_answer"], found["verdict"]) == ("\ud83d", "y\ud800 é", "wrong")
    assert servers.block_of(server.payloads[-1], "ANSWER") == "y é"


def test_an_empty_file_has_an_empty_result(capsys, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("\n")
    assert json.loads(in_process(capsys, "--file", source, "--out", tmp_path / "out.jsonl"))["rows"] == 0
    assert (tmp_path / "out.jsonl").read_text() == ""


def test_the_documented_checker_and_its_command_work(tmp_path):
    section = DOCS.read_text().partition("## A verifier for another domain")[2]
    (source,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (command,) = re.findall(r"```bash\nmegatron-oreal verify (.*?)```", section, re.DOTALL)
    (tmp_path / "my_checks.py").write_text(source)
    found = verdict(*shlex.split(command), folder=tmp_path)
    assert (found["verdict"], found["extracted_answer"]) == ("correct", "select  1")
    *options, response = shlex.split(command)
    assert options[-1] == "--response"
    for text, expected in (("select 2", "wrong"), ("drop it", "unknown"), ("select 1", "wrong")):
        end = "" if text == "select 1" else END
        assert verdict(*options, text + end, folder=tmp_path)["verdict"] == expected
    assert response.endswith(END)


def test_the_documented_example_prints_what_is_documented():
    section = DOCS.read_text().partition("## `megatron-oreal verify`")[2]
    command = re.search(r"```bash\nmegatron-oreal verify (.*?)```", section, re.DOTALL)[1]
    documented = json.loads(re.search(r"```json\n(.*?)```", section, re.DOTALL)[1])
    found = verdict(*shlex.split(command))
    assert found | {"milliseconds": 0} == documented | {"milliseconds": 0}


def test_every_documented_key_is_a_key_with_that_default():
    import yaml

    from megatron_oreal.config import VerifierConfig

    documented = yaml.safe_load(re.search(r"```yaml\n(.*?)```", DOCS.read_text(), re.DOTALL)[1])["verifier"]
    assert documented.pop("hosts")
    defaults = VerifierConfig().model_dump(mode="json")
    assert defaults.pop("hosts") == []
    assert documented == defaults


def test_the_command_imports_neither_torch_nor_aiohttp_nor_numpy():
    script = (
        "import sys; from megatron_oreal.cli import main\n"
        "main(['verify', '--gold', '5', '--response', '5', '--stop-word', ''])\n"
        "print(sorted({'torch', 'numpy', 'aiohttp', 'sympy', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
