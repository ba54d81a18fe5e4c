"""The options of ``megatron-oreal plan``, apart from the planner: reading them needs no torch."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("config", help="YAML file")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="for example parallel.offload=[optimizer]"
    )
    parser.add_argument("--world-size", type=int, required=True, metavar="N", help="ranks in all, one a GPU")
    parser.add_argument("--ranks-per-node", type=int, default=8, metavar="N", help="GPUs of a node (default 8)")
    parser.add_argument("--gpu", default="h200", metavar="NAME", help="h100, h200 (default), a100-80g, b200, h20, l40s")
    parser.add_argument("--gpu-memory-gib", type=float, metavar="G", help="memory of a GPU, in place of the table's")
    parser.add_argument("--network-gbps", type=float, metavar="G", help="network of a GPU in Gbit/s")
    parser.add_argument("--model-shape", metavar="DIR", help="directory of a config.json that stands for model.path")
    parser.add_argument("--lengths", metavar="SPEC", help="lognormal:median=3000,sigma=0.8, fixed:512 or file:FILE")
    parser.add_argument("--assume", action="append", default=[], metavar="NAME=VALUE", help="an assumption's value")
    parser.add_argument("--results", metavar="DIR", help="measured results (default: benchmarks/results of this tree)")
    parser.add_argument("--rank", type=int, metavar="R", help="show this rank's place and memory too")
    parser.add_argument(
        "--search", action="store_true", help="rank parallel sizes that fit by predicted tokens/s a GPU"
    )
    parser.add_argument("--top", type=int, default=10, metavar="N", help="of the search, to confirm and show")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the report")
