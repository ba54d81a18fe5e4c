"""``megatron-oreal verify``: one answer, or a file of them, through the verifier of training. Imports no torch."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from megatron_oreal.config import VerifierConfig
from megatron_oreal.config_load import parse_verifier
from megatron_oreal.errors import UserError
from megatron_oreal.verifier import Judgement, Verdict, Verifier
from megatron_oreal.verifier.judge_hosts import judge_contradictions

STOP_WORD = "<|im_end|>"
WINDOW = 4096
"""Rows read ahead of the last row written: what a slow row lets the others run ahead."""
_ROW_KEYS = ("gold_answer", "response")
_JUDGE_COUNTS = ("requests", "retries", "cache_hits", "shared", "withheld")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``verify`` to a parser."""
    one = parser.add_argument_group("one answer: prints one JSON object")
    one.add_argument("--gold", metavar="TEXT", help="the reference answer")
    response = one.add_mutually_exclusive_group()
    response.add_argument("--response", metavar="TEXT", help="the response, its stop word included")
    response.add_argument("--response-file", metavar="FILE", help="the response as UTF-8 text; - reads standard input")
    one.add_argument("--question", metavar="TEXT", default="", help="what the judge is told was asked")
    many = parser.add_argument_group("a file of answers: writes one row for each row, in the same order")
    many.add_argument("--file", metavar="IN.jsonl", help="rows with question, gold_answer, response")
    many.add_argument("--out", metavar="OUT.jsonl", help="appears when all rows are done")
    parser.add_argument(
        "--stop-word", metavar="WORD", help=f"a response that does not end with it is wrong; '' for none [{STOP_WORD}]"
    )
    parser.add_argument("--thinking-finish-words", nargs="+", metavar="WORD", help="the answer stands behind the last")
    parser.add_argument("--hosts", nargs="+", metavar="HOST", help="the judge's servers: host:port or URL")
    parser.add_argument("--checker", metavar="MODULE:FUNCTION", help="checks in the rules' place")
    parser.add_argument("--num-processes", type=int, metavar="N", help="worker processes")
    parser.add_argument("--cache", metavar="FILE", help="keep the judge's verdicts there")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="key=value",
        help="verifier keys, e.g. judge.timeout_s=9",
    )


def verify(arguments: argparse.Namespace) -> int:
    """Run the command; 0 whatever the verdicts are. Raises ``UserError``."""
    many = arguments.file is not None or arguments.out is not None
    one = arguments.gold is not None or arguments.response is not None or arguments.response_file is not None
    if one == many:
        raise UserError("give --gold with --response or --response-file for one answer, or --file with --out for many")
    config = _config(arguments, many)
    if many:
        if arguments.file is None or arguments.out is None:
            raise UserError("--file and --out go together")
        return _verify_file(arguments, config, Path(arguments.file), Path(arguments.out))
    if arguments.gold is None or (arguments.response is None and arguments.response_file is None):
        raise UserError("--gold goes with --response or --response-file")
    response = arguments.response if arguments.response is not None else _read(arguments.response_file)
    text, stopped = split_stop_word(response, arguments.stop_word)
    with _open(config, arguments.stop_word) as verifier:
        verifier.submit(0, text, arguments.gold, stopped=stopped, question=arguments.question)
        ((_, judgement),) = verifier.results()
    print(json.dumps(_row(judgement)))
    return 0


def split_stop_word(response: str, stop_word: str) -> tuple[str, bool]:
    """Return the response without the stop word and whether it ended with it (white space behind it aside).

    An empty stop word ends every response.
    """
    if not stop_word:
        return response, True
    text = response.rstrip()
    return text.removesuffix(stop_word), text.endswith(stop_word)


def _config(arguments: argparse.Namespace, many: bool) -> VerifierConfig:
    options = {
        "hosts": arguments.hosts,
        "thinking_finish_words": arguments.thinking_finish_words,
        "checker": arguments.checker,
        "num_processes": (os.cpu_count() or 1) if many else 1,
    }
    if arguments.num_processes is not None:
        options["num_processes"] = arguments.num_processes
    tree: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    config = parse_verifier({**tree, "judge": {"cache": arguments.cache}}, arguments.set)
    if arguments.cache is not None and not config.hosts:
        raise UserError(f"--cache {arguments.cache!r} keeps the judge's verdicts, and there is no judge: give --hosts")
    for message in judge_contradictions(config):
        raise UserError(message)
    if arguments.stop_word is None:
        arguments.stop_word = STOP_WORD if config.stop_word is None else config.stop_word
    return config


@contextlib.contextmanager
def _open(config: VerifierConfig, stop_word: str) -> Iterator[Verifier]:
    # The checker may lie where the command is run, as with python -m; the workers take the path over.
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), os.getcwd())))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = path
    try:
        with Verifier(config, stop_words=[stop_word] if stop_word else []) as verifier:
            for complaint in verifier.check():
                print(f"warning: {complaint}", file=sys.stderr)
            yield verifier
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _read(name: str) -> str:
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return data.decode("utf-8")
    except OSError as error:
        raise UserError(f"--response-file {name!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--response-file {name!r} is not UTF-8 text (byte {error.start})") from None


def _row(judgement: Judgement) -> dict[str, Any]:
    return {
        "verdict": judgement.verdict.value,
        "reason": judgement.reason,
        "extracted_answer": judgement.answer,
        "decided_by": judgement.decided_by,
        "milliseconds": round(1000 * judgement.seconds, 3),
    }


def _verify_file(arguments: argparse.Namespace, config: VerifierConfig, source: Path, target: Path) -> int:
    total = sum(1 for _ in _rows(source))  # every row is read before the first is judged: a mistake shows at once
    target = target.resolve()  # a link keeps pointing where it does
    if target.exists() and not target.is_file():
        raise UserError(f"--out {str(target)!r} is not a regular file, which could appear when all rows are done")
    if target.exists() and target.samefile(source):
        raise UserError(f"--out {str(target)!r} is the file that is read: give another name")
    began = time.perf_counter()
    with _partial(target) as output, _open(config, arguments.stop_word) as verifier:
        totals, reasons = _stream(verifier, source, output, total, arguments.stop_word)
        stats = verifier.stats()
    seconds = time.perf_counter() - began
    summary: dict[str, Any] = {"rows": total, **{verdict.value: totals[verdict] for verdict in Verdict}}
    if reasons:
        summary["unknown_reasons"] = dict(reasons.most_common())
    if stats is not None:
        summary["judge"] = {name: getattr(stats, name) for name in _JUDGE_COUNTS}
    print(json.dumps(summary | {"seconds": round(seconds, 3), "rows_per_second": round(total / seconds, 1)}))
    return 0


@contextlib.contextmanager
def _partial(target: Path) -> Iterator[TextIO]:
    """Yield a file beside ``target`` that takes its place at the end, and is gone after a failure.

    One name, with a lock: what a killed process left is written over, and two processes with one output are noticed.
    """
    path = target.with_name(f".{target.name}.partial")
    try:
        output = path.open("a", encoding="utf-8", errors="backslashreplace")  # a lone surrogate's JSON escape
    except OSError as error:
        raise UserError(f"--out {str(target)!r} cannot be written: {error.strerror}") from None
    with output:
        try:
            fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {str(target)!r} is being written by another process: give another name") from None
        except OSError as error:
            raise UserError(f"--out {str(target)!r} cannot be locked: {error.strerror}") from None
        if not path.exists() or not os.path.samestat(os.fstat(output.fileno()), path.stat()):  # it has just ended
            raise UserError(f"--out {str(target)!r} was just written by another process: give another name")
        try:
            output.truncate(0)
            yield output
            output.flush()
            path.replace(target)
        finally:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


def _stream(
    verifier: Verifier, source: Path, output: TextIO, total: int, stop_word: str
) -> tuple[Counter[Verdict], Counter[str]]:
    """Keep the verifier busy with at most ``WINDOW`` unwritten rows; returns counts by verdict and by cause."""
    # Imported here: the bar's library is not needed for a single answer.
    from megatron_oreal.telemetry.progress import progress

    totals: Counter[Verdict] = Counter()
    reasons: Counter[str] = Counter()
    ready: dict[int, Judgement] = {}
    names: dict[int, Any] = {}
    written = submitted = 0
    rows = _rows(source)
    with progress("verify", total=total, unit="rows", enabled=True) as bar:
        while written < total:
            while submitted < total and submitted - written < WINDOW:
                _, row = next(rows)
                text, stopped = split_stop_word(row["response"], stop_word)
                if "id" in row:
                    names[submitted] = row["id"]
                verifier.submit(submitted, text, row["gold_answer"], stopped=stopped, question=row.get("question", ""))
                submitted += 1
            ready |= _next_results(verifier)
            while written in ready:
                judgement = ready.pop(written)
                row_id = {"id": names.pop(written)} if written in names else {}
                output.write(json.dumps(row_id | _row(judgement), ensure_ascii=False) + "\n")
                totals[judgement.verdict] += 1
                if judgement.verdict is Verdict.UNKNOWN:
                    reasons[judgement.cause] += 1
                written += 1
                bar.update(1)
    return totals, reasons


def _next_results(verifier: Verifier) -> dict[int, Judgement]:
    """At least one result, and what else is ready."""
    first = next(verifier.results())
    return {int(str(key)): judgement for key, judgement in (first, *verifier.drain())}


def _rows(source: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, row) of a JSON-lines file; blank lines are skipped. ``UserError`` with file:line."""
    if not source.is_file():
        raise UserError(f"--file {str(source)!r}: no such file (a pipe cannot be read twice)")
    number = 0
    try:
        with source.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                # Some editors begin a file with a byte order mark.
                if text := line.decode("utf-8-sig" if number == 1 else "utf-8").strip():
                    yield number, _parse_row(text, f"{source}:{number}")
    except UnicodeDecodeError as error:
        raise UserError(f"{source}:{number}: not UTF-8 text (byte {error.start} of the line)") from None
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror})") from None


def _parse_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: must be an object with question, gold_answer and response")
    for key in _ROW_KEYS:
        if key not in row:
            raise UserError(f"{where}: has no {key!r} (keys: {', '.join(map(str, row)) or 'none'})")
    for key in (*_ROW_KEYS, "question"):
        if not isinstance(row.get(key, ""), str):
            raise UserError(f"{where}: {key}={json.dumps(row[key])[:80]} must be a string: put it in quotes")
    return row
