r"""Precision and recall of the rules and of math-verify on the labelled set, by kind of answer.

    python benchmarks/verifier_quality.py --output benchmarks/results/verifier_quality.json --table docs/FILE.md
    python benchmarks/verifier_quality.py --errors dev

``--table`` writes the table between the two ``verifier-quality`` markers of a file.

The set, ``tests/data/verifier_labelled.jsonl``, was written for this project. A line has ``kind``, ``gold``,
``response`` (a text, or a list of texts and ``[text, count]`` repetitions) and ``verdict``, given by hand: by
mathematics and by the conventions that rules.py states. A hash of the line puts it into one half, ``dev`` or
``held_out``.

A second set, ``tests/data/verifier_adversarial.jsonl``, was written by a hostile reviewer against the finished rules;
it has ``group`` for ``kind`` and is reported by itself.

math-verify has its defaults: ``verify(parse("$gold$"), parse(response))``; it sees the whole response, or ("after the
thinking word") what our extraction takes for the conclusion. A verdict other than correct counts as not correct.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_oreal.config import VerifierConfig
from megatron_oreal.verifier.answer import conclusion
from megatron_oreal.verifier.rules import judge_response
from megatron_oreal.verifier.verdict import Verdict

ROOT = Path(__file__).parents[1]
LABELLED = ROOT / "tests/data/verifier_labelled.jsonl"
ADVERSARIAL = ROOT / "tests/data/verifier_adversarial.jsonl"
FINISH_WORDS = VerifierConfig().thinking_finish_words
STOP_WORDS = ("<|im_end|>",)
PACKAGES = ("math-verify", "latex2sympy2_extended", "sympy", "mpmath")
HALVES = ("dev", "held_out")
_RATES = ("precision", "recall")
BEGIN, END = "<!-- verifier-quality:begin -->", "<!-- verifier-quality:end -->"

Item = dict[str, str]


def load(path: Path = LABELLED) -> list[Item]:
    """Read the set; every item gets the ``half`` that its hash puts it into."""
    items = []
    for line in path.read_text().splitlines():
        item = json.loads(line)
        digest = hashlib.sha256(line.encode()).digest()
        items.append(item | {"response": expand(item["response"]), "half": HALVES[digest[0] % 2]})
    return items


def expand(response: str | list[Any]) -> str:
    """Join the parts of a response; ``[text, count]`` is a repetition."""
    parts = [response] if isinstance(response, str) else response
    return "".join(part if isinstance(part, str) else part[0] * part[1] for part in parts)


def ours(item: Item) -> str:
    return judge_response(item["response"], True, item["gold"], FINISH_WORDS, STOP_WORDS).verdict.value


def math_verify_on(read: Callable[[str], str]) -> Callable[[Item], str]:
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)

    def judge(item: Item) -> str:
        verdict = verify(parse(f"${item['gold']}$"), parse(read(item["response"])))
        return (Verdict.CORRECT if verdict else Verdict.WRONG).value

    return judge


def systems() -> dict[str, Callable[[Item], str]]:
    """Return what is measured, by name."""
    return {
        "ours": ours,
        "math_verify": math_verify_on(lambda text: text),
        "math_verify_after_thinking": math_verify_on(lambda text: conclusion(text, FINISH_WORDS, STOP_WORDS)),
    }


def score(items: list[Item], verdicts: list[str]) -> dict[str, Any]:
    """Count the four outcomes; precision and recall are None where nothing was called correct or nothing is."""
    count = Counter((item["verdict"], verdict) for item, verdict in zip(items, verdicts, strict=True))
    true_positives, false_positives = count["correct", "correct"], count["wrong", "correct"]
    positives = sum(item["verdict"] == "correct" for item in items)
    called = true_positives + false_positives
    return {
        "items": len(items),
        "correct": positives,
        "true_positives": true_positives,
        "false_positives": false_positives,
        "false_negatives": positives - true_positives,
        "unknown": sum(verdict == "unknown" for verdict in verdicts),
        "precision": round(true_positives / called, 4) if called else None,
        "recall": round(true_positives / positives, 4) if positives else None,
    }


def measure(items: list[Item], judge: Callable[[Item], str]) -> dict[str, Any]:
    """Score one system over everything, by half and by kind."""
    verdicts = [judge(item) for item in items]

    def part(key: str, value: str) -> dict[str, Any]:
        chosen = [index for index, item in enumerate(items) if item[key] == value]
        return score([items[index] for index in chosen], [verdicts[index] for index in chosen])

    kinds = dict.fromkeys(item["kind"] for item in items)
    return {
        "all": score(items, verdicts),
        "by_half": {half: part("half", half) for half in HALVES},
        "by_kind": {kind: part("kind", kind) for kind in kinds},
        "with_judge": with_judge(items, verdicts),
    }


def measure_adversarial(items: list[Item], judge: Callable[[Item], str]) -> dict[str, Any]:
    """Score one system over the adversarial set and by its groups."""
    verdicts = [judge(item) for item in items]
    groups = dict.fromkeys(item["group"] for item in items)
    chosen = {group: [index for index, item in enumerate(items) if item["group"] == group] for group in groups}
    by_group = {
        group: score([items[index] for index in part], [verdicts[index] for index in part])
        for group, part in chosen.items()
    }
    return {"all": score(items, verdicts), "by_group": by_group}


def with_judge(items: list[Item], verdicts: list[str]) -> dict[str, int]:
    """What a judge that never errs would leave: it sees all that the rules do not call correct, and nothing else."""
    pairs = Counter((item["verdict"], verdict == "correct") for item, verdict in zip(items, verdicts, strict=True))
    return {
        "asked": pairs["correct", False] + pairs["wrong", False],
        "false_positives_left": pairs["wrong", True],
        "false_negatives_it_can_mend": pairs["correct", False],
    }


def table(result: dict[str, Any]) -> str:
    """Return the table of docs/verifier: a row a kind, the halves and the whole at its end."""
    mine, theirs = result["systems"]["ours"], result["systems"]["math_verify"]

    def row(name: str, ours: dict[str, Any], other: dict[str, Any]) -> str:
        cells = [f"{100 * one[key]:.1f}" if one[key] is not None else "–" for one in (ours, other) for key in _RATES]
        return f"| {name} | {ours['items']} | {ours['correct']} | {' | '.join(cells)} |"

    lines = [
        "| kind | items | correct | precision, ours | recall, ours | precision, math-verify | recall, math-verify |",
        "|---|---|---|---|---|---|---|",
        *(row(kind, scores, theirs["by_kind"][kind]) for kind, scores in mine["by_kind"].items()),
        *(row(f"*half {half}*", mine["by_half"][half], theirs["by_half"][half]) for half in HALVES),
        row("**all**", mine["all"], theirs["all"]),
        row("*adversarial set*", *(result["adversarial"]["systems"][name]["all"] for name in ("ours", "math_verify"))),
    ]
    return "\n".join(lines)


def write_table(path: Path, result: dict[str, Any]) -> None:
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{path}: no {BEGIN} and {END}")
    path.write_text(f"{before}{BEGIN}\n{table(result)}\n{END}{after}")


def print_errors(items: list[Item], half: str) -> None:
    for item in items:
        judgement = judge_response(item["response"], True, item["gold"], FINISH_WORDS, STOP_WORDS)
        if item["half"] == half and (judgement.verdict is Verdict.CORRECT) != (item["verdict"] == "correct"):
            print(f"{item['kind']}: gold {item['gold']!r} is {item['verdict']}: {judgement}")


def commit() -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path, help="a Markdown file with the two markers")
    parser.add_argument("--errors", choices=HALVES, help="print what the rules get wrong in one half, and stop")
    arguments = parser.parse_args()
    items = load()
    if arguments.errors:
        return print_errors(items, arguments.errors)
    result = {
        "what": "verdicts on tests/data/verifier_labelled.jsonl: precision and recall of 'correct'",
        "set_sha256": hashlib.sha256(LABELLED.read_bytes()).hexdigest(),
        "commit": commit(),
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "systems": {name: measure(items, judge) for name, judge in systems().items()},
        "adversarial": {
            "set_sha256": hashlib.sha256(ADVERSARIAL.read_bytes()).hexdigest(),
            "systems": {name: measure_adversarial(load(ADVERSARIAL), judge) for name, judge in systems().items()},
        },
    }
    text = json.dumps(result, indent=1) + "\n"
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text)
    if arguments.table:
        write_table(arguments.table, result)
    for name, scores in result["systems"].items():
        print(name, scores["all"], scores["by_half"]["held_out"], scores["with_judge"])
    return None


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
