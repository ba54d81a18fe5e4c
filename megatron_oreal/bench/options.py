"""The command line of ``megatron-oreal bench``. Imports no torch."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from megatron_oreal.errors import UserError, nearest

PARTS = ("rollout", "update", "loss", "reshard", "switch", "step")
DEFAULT_PROMPT_TOKENS = 512
DEFAULT_TOLERANCE = 0.1


@dataclass(frozen=True)
class BenchOptions:
    """What is measured, and how often. ``prompt_tokens`` None: ``DEFAULT_PROMPT_TOKENS``, less where that has no room.

    ``solve_rate``: probability that a response counts as correct, drawn by seed: random weights solve nothing.
    """

    parts: tuple[str, ...] = PARTS
    lengths: str | None = None
    prompt_tokens: int | None = None
    solve_rate: float = 0.5
    warmup: int = 1
    repeats: int = 3
    output: str | None = None
    note: str | None = None

    def arguments(self) -> list[str]:
        """The command line that reads back to these options, for the ranks that a launcher starts."""
        found = ["--parts", ",".join(self.parts), "--solve-rate", repr(self.solve_rate)]
        found += ["--warmup", str(self.warmup), "--repeats", str(self.repeats)]
        for option, value in (
            ("--lengths", self.lengths),
            ("--prompt-tokens", self.prompt_tokens),
            ("--output", self.output),
            ("--note", self.note),
        ):
            found += [] if value is None else [f"{option}={value}"]
        return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``bench`` to a parser that has the config and the ranks."""
    what = parser.add_argument_group("what is measured")
    what.add_argument("--parts", default=",".join(PARTS), help="some of %(default)s")
    what.add_argument(
        "--lengths",
        metavar="DISTRIBUTION",
        help="of responses: lognormal:median=3000,sigma=0.8, fixed:512, file:TRAJECTORIES.jsonl "
        "[log-normal, sigma 0.8, median 3/14 of the most new tokens]",
    )
    what.add_argument("--prompt-tokens", type=int, metavar="N", help=f"of every prompt [{DEFAULT_PROMPT_TOKENS}]")
    what.add_argument(
        "--solve-rate", type=float, default=0.5, metavar="P", help="share of responses that count as correct [0.5]"
    )
    what.add_argument("--warmup", type=int, default=1, metavar="N", help="repeats that do not count [1]")
    what.add_argument("--repeats", type=int, default=3, metavar="N", help="repeats that count [3]")
    what.add_argument("--output", metavar="FILE.json", help="write the result there")
    what.add_argument("--note", metavar="TEXT", help="stands in the JSON")
    compare = parser.add_argument_group("two results (without a config)")
    compare.add_argument("--compare", nargs=2, metavar=("A.json", "B.json"), help="exit status 1 when B is worse")
    compare.add_argument(
        "--tolerance", type=float, default=None, metavar="T", help=f"by more than this share [{DEFAULT_TOLERANCE}]"
    )


def read_options(arguments: argparse.Namespace) -> BenchOptions:
    """Check what was given. Raises ``UserError``."""
    parts = tuple(part for part in arguments.parts.split(",") if part)
    for part in parts:
        if part not in PARTS:
            raise UserError(f"--parts {part!r} is not one of them{nearest(part, PARTS)}")
    if not parts or len(set(parts)) < len(parts):
        raise UserError(f"--parts={arguments.parts!r}: name each of {', '.join(PARTS)} at most once, and at least one")
    for option, value, least in (("--warmup", arguments.warmup, 0), ("--repeats", arguments.repeats, 1)):
        if value < least:
            raise UserError(f"{option}={value}: must be {least} or more")
    if arguments.prompt_tokens is not None and arguments.prompt_tokens < 1:
        raise UserError(f"--prompt-tokens={arguments.prompt_tokens}: must be 1 or more")
    if not 0.0 < arguments.solve_rate < 1.0:
        raise UserError(
            f"--solve-rate={arguments.solve_rate:g}: must lie between 0 and 1: at either end nothing is kept"
        )
    if arguments.tolerance is not None:
        raise UserError("--tolerance goes with --compare A.json B.json")
    writes = os.environ.get("RANK", "0") == "0" and arguments.node_rank == 0
    if arguments.output is not None and writes:
        _check_writable(Path(arguments.output))
    return BenchOptions(
        parts=tuple(part for part in PARTS if part in parts),
        lengths=arguments.lengths,
        prompt_tokens=arguments.prompt_tokens,
        solve_rate=arguments.solve_rate,
        warmup=arguments.warmup,
        repeats=arguments.repeats,
        output=arguments.output,
        note=arguments.note,
    )


def _check_writable(path: Path) -> None:
    """Before minutes of measurement, not after them."""
    if path.is_dir():
        raise UserError(f"--output={path}: is a directory: give a file")
    folder = path.parent
    if not folder.is_dir():
        raise UserError(f"--output={path}: there is no directory {folder}: make it first")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UserError(f"--output={path}: may not be written: choose another file")
