"""Load the exported model with transformers alone, solve the held-out problems, and compare with what the run logged.

    python check_export.py WORK_DIR HELD_OUT.jsonl CONFIG.yaml

Imports nothing of megatron_oreal. The answer of a response is the last number in it, and a response that has not ended
by itself is wrong. Greedy accuracy must be the logged one to 3 problems in 100 (the trainer reads answers by more
rules); sampled accuracy must lie within the sampling error of it. Exit status 1 when one is not reproduced.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

NUMBER = re.compile(r"(?<![\w)])-?\d+")
GREEDY_TOLERANCE = 0.03


def solved(model: Any, tokenizer: Any, problems: list[dict], config: dict, num_samples: int) -> list[bool]:
    """Whether each response (``num_samples`` a problem at the run's temperature; 0: one greedy) ends in the answer."""
    system = {"role": "system", "content": config["model"]["system_prompt"]}
    prompts = [
        tokenizer.apply_chat_template(
            [system, {"role": "user", "content": problem["question"]}], tokenize=False, add_generation_prompt=True
        )
        for problem in problems
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    stop_id = tokenizer.convert_tokens_to_ids(config["model"]["stop_word"])
    sampling = (
        {"do_sample": True, "temperature": config["rollout"]["temperature"], "top_k": 0, "top_p": 1.0}
        if num_samples
        else {"do_sample": False}
    )
    with torch.inference_mode():
        out = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=config["rollout"]["gen_max_new"],
            num_return_sequences=max(1, num_samples),
            eos_token_id=stop_id,
            pad_token_id=stop_id,
            **sampling,
        )
    verdicts = []
    for index, ids in enumerate(out[:, batch["input_ids"].shape[1] :].tolist()):
        response = ids[: ids.index(stop_id)] if stop_id in ids else None
        numbers = NUMBER.findall(tokenizer.decode(response)) if response else []
        verdicts.append(bool(numbers) and numbers[-1] == problems[index // max(1, num_samples)]["gold_answer"])
    return verdicts


def main() -> int:
    """Compare; return the exit status."""
    work_dir, held_out, config_path = map(Path, sys.argv[1:4])
    config = yaml.safe_load(config_path.read_text())
    num_samples = config["evaluation"]["num_samples"]
    records = [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]
    evaluated = [record for record in records if "eval/pass_at_1" in record]
    first, last = evaluated[0], evaluated[-1]
    problems = [json.loads(line) for line in held_out.read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(work_dir / "hf", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(work_dir / "hf")
    tokenizer.pad_token = config["model"]["stop_word"]
    torch.manual_seed(0)
    greedy = solved(model, tokenizer, problems, config, 0)
    sampled = solved(model, tokenizer, problems, config, num_samples)

    greedy_share, sampled_share = sum(greedy) / len(greedy), sum(sampled) / len(sampled)
    # Both sampled numbers are estimates: allow four standard errors of a binomial with this many draws.
    tolerance = 4 * math.sqrt(max(sampled_share * (1 - sampled_share), 0.01) / len(sampled))
    print(f"{'held-out pass@1':<32}{'sampled':>9}{'greedy':>9}")
    for name, sampled_value, greedy_value in (
        ("before OREAL", first["eval/pass_at_1"], first["eval/greedy"]),
        ("after OREAL", last["eval/pass_at_1"], last["eval/greedy"]),
        ("the export, transformers alone", sampled_share, greedy_share),
    ):
        print(f"{name:<32}{sampled_value:>9.3f}{greedy_value:>9.3f}")
    print(f"export: {work_dir / 'hf'}\ncurves: {work_dir / 'report.png'}")
    reproduced = (
        abs(greedy_share - last["eval/greedy"]) <= GREEDY_TOLERANCE
        and abs(sampled_share - last["eval/pass_at_1"]) <= tolerance
    )
    if not reproduced:
        print("error: transformers does not reproduce the logged accuracy", file=sys.stderr)
    return 0 if reproduced else 1


if __name__ == "__main__":
    sys.exit(main())
