"""Write prompts and held-out problems made by ``reasoning-gym``: additions and subtractions of two one-digit numbers.

    python prompts.py OUT_DIR [--seed 0]

There are 200 such problems; 72 of them, drawn at random, are held out and the others are trained on.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import reasoning_gym

NUM_PROBLEMS, NUM_HELD_OUT = 200, 72
NUM_DRAWS = 6000  # enough for every problem to occur


def distinct_problems(seed: int) -> list[tuple[str, str]]:
    """All (question, answer) of the generator, in the order of their first occurrence."""
    drawn = reasoning_gym.create_dataset(
        "chain_sum", seed=seed, size=NUM_DRAWS, min_terms=2, max_terms=2, min_digits=1, max_digits=1
    )
    return list(dict.fromkeys((item["question"], item["answer"]) for item in drawn))


def main() -> None:
    """Write OUT_DIR/train.jsonl and OUT_DIR/held_out.jsonl."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    problems = distinct_problems(arguments.seed)
    if len(problems) != NUM_PROBLEMS:
        raise SystemExit(f"expected {NUM_PROBLEMS} distinct problems, found {len(problems)}")
    random.Random(arguments.seed).shuffle(problems)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, members in (("held_out", problems[:NUM_HELD_OUT]), ("train", problems[NUM_HELD_OUT:])):
        with (arguments.out / f"{name}.jsonl").open("w") as file:
            for question, answer in members:
                print(json.dumps({"question": question, "gold_answer": answer}), file=file)
    print(f"prepared {arguments.out}: {NUM_PROBLEMS - NUM_HELD_OUT} prompts, {NUM_HELD_OUT} held-out problems")


if __name__ == "__main__":
    main()
