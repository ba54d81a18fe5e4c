"""The options of ``megatron-oreal check``; light, because every command's parser has them at hand."""

from __future__ import annotations

import argparse
from pathlib import Path

FABRIC_DEADLINE_S = 180.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``megatron-oreal check`` beside the config and the ranks."""
    parser.add_argument("--fabric", action="store_true", help="start the ranks and measure all-reduce bandwidth")
    parser.add_argument(
        "--min-bandwidth", type=float, metavar="GB/S", help="bus bandwidth of the all-reduce below which it fails"
    )
    parser.add_argument(
        "--fabric-timeout", type=float, default=FABRIC_DEADLINE_S, metavar="S", help="deadline of it (default 180)"
    )
    parser.add_argument("--json", action="store_true", help="as JSON, a list with one object a node")
    parser.add_argument("--fabric-folder", type=Path, help=argparse.SUPPRESS)  # of the ranks that --fabric starts
