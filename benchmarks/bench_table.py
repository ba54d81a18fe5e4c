"""Put the figures of a result of ``megatron-oreal bench`` into a page, between its two markers.

python benchmarks/bench_table.py benchmarks/results/bench_cpu.json docs/bench.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_oreal.bench.compare import figures_of, read_record
from megatron_oreal.bench.figures import markdown

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result")
    parser.add_argument("page", type=Path)
    arguments = parser.parse_args()
    before, begin, rest = arguments.page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{arguments.page}: no {BEGIN} and {END}")
    table = markdown(figures_of(read_record(arguments.result), arguments.result))
    arguments.page.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")


if __name__ == "__main__":
    main()
