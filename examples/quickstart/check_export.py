"""Load the exported model with transformers alone, solve the held-out problems, and compare with what the run logged.

    python check_export.py WORK_DIR HELD_OUT.jsonl

Imports nothing of megatron_oreal. Greedy accuracy must be the logged one to a hundredth; sampled accuracy must lie
within the sampling error of it. Prints pass@1 before and after training; exit status 1 when a number is not reproduced.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NUM_SAMPLES = 4


def solved(model: torch.nn.Module, tokenizer: object, problems: list[dict], num_samples: int) -> list[bool]:
    """Whether each response (``num_samples`` a problem, sampled at temperature 1; 0: one greedy) boxes the answer."""
    tokenizer.padding_side = "left"
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": p["question"]}], tokenize=False, add_generation_prompt=True
        )
        for p in problems
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    sampling = (
        {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if num_samples else {"do_sample": False}
    )
    with torch.inference_mode():
        out = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=56,
            num_return_sequences=max(1, num_samples),
            **sampling,
        )
    verdicts = []
    for index, ids in enumerate(out[:, batch["input_ids"].shape[1] :]):
        gold = problems[index // max(1, num_samples)]["gold_answer"]
        text = tokenizer.decode(ids, skip_special_tokens=False)
        answer, stop, _ = text.partition("<|end|>")
        boxed = re.findall(r"\\boxed\{([^{}]*)\}", answer)
        verdicts.append(bool(stop) and bool(boxed) and boxed[-1].strip() == gold)
    return verdicts


def main() -> int:
    """Compare; return the exit status."""
    work_dir, held_out = Path(sys.argv[1]), Path(sys.argv[2])
    records = [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]
    evaluated = [record for record in records if "eval/pass_at_1" in record]
    first, last = evaluated[0], evaluated[-1]
    problems = [json.loads(line) for line in held_out.read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(work_dir / "hf", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(work_dir / "hf")
    torch.manual_seed(0)
    greedy = solved(model, tokenizer, problems, 0)
    sampled = solved(model, tokenizer, problems, NUM_SAMPLES)

    greedy_share, sampled_share = sum(greedy) / len(greedy), sum(sampled) / len(sampled)
    # Both sampled numbers are estimates: allow four standard errors of a binomial with this many draws.
    tolerance = 4 * math.sqrt(max(sampled_share * (1 - sampled_share), 0.01) / len(sampled))
    print(f"{'held-out pass@1':<32}{'sampled':>9}{'greedy':>9}")
    rows = [
        ("before OREAL", first["eval/pass_at_1"], first["eval/greedy"]),
        ("after OREAL", last["eval/pass_at_1"], last["eval/greedy"]),
        ("the export, transformers alone", sampled_share, greedy_share),
    ]
    for name, sampled_value, greedy_value in rows:
        print(f"{name:<32}{sampled_value:>9.3f}{greedy_value:>9.3f}")
    print(f"export: {work_dir / 'hf'}\ncurves: {work_dir / 'report.png'}")
    reproduced = (
        abs(greedy_share - last["eval/greedy"]) <= 0.01 and abs(sampled_share - last["eval/pass_at_1"]) <= tolerance
    )
    if not reproduced:
        print("error: transformers does not reproduce the logged accuracy", file=sys.stderr)
    return 0 if reproduced else 1


if __name__ == "__main__":
    sys.exit(main())
