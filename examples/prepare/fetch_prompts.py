"""Write a prompt set as JSON lines, every record checked: a Hugging Face data set, or any file that data.train takes.

python fetch_prompts.py internlm/OREAL-RL-Prompts data/OREAL-RL-Prompts.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from megatron_oreal.data.prompts import load_prompts
from megatron_oreal.errors import UserError


def main() -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    try:
        prompts = load_prompts(arguments.source)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        partial = arguments.out.with_name(f".{arguments.out.name}.incomplete")
        with partial.open("w", encoding="utf-8") as file:
            for prompt in prompts:
                file.write(json.dumps(asdict(prompt), ensure_ascii=False) + "\n")
        partial.replace(arguments.out)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.out}: {len(prompts)} prompts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
