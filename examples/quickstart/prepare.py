"""Make what the quickstart needs: a small untrained Qwen2 model, its tokenizer, and three-digit additions.

    python prepare.py OUT_DIR [--seed 0]

writes OUT_DIR/model (Hugging Face directory), train.jsonl (prompts), solutions.jsonl (supervised phase) and
held_out.jsonl. No problem is in two of the files, and no held-out
one is in another with its numbers swapped. A worked solution adds digit by digit from the right, with carries:

    347+586  ->  7+6+0=13,4+8+1=13,3+5+1=09 \\boxed{933}
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

SPECIAL = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
BOXED = "\\boxed{"
WORDS = [*"0123456789+=, }", BOXED]
SPACE = "\u0120"  # how byte-level BPE writes a space
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NUM_TRAIN, NUM_SOLUTIONS, NUM_HELD_OUT = 20_000, 6_000, 200


def worked_solution(a: int, b: int) -> str:
    """Add two three-digit numbers in writing: one step a digit, each with the carry before it."""
    steps, carry = [], 0
    for place in (1, 10, 100):
        x, y = a // place % 10, b // place % 10
        total = x + y + carry
        steps.append(f"{x}+{y}+{carry}={total:02d}")
        carry = total // 10
    return ",".join(steps) + f" \\boxed{{{a + b}}}"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, and one for ``\\boxed{``.

    Byte-level BPE without merges behind Qwen2's splitting rule: what ``AutoTokenizer`` expects of a Qwen2 model.
    """
    characters = [SPACE if word == " " else word for word in WORDS]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *characters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(BOXED, special=False, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token="<|end|>", chat_template=TEMPLATE
    )


def make_model(seed: int) -> Qwen2ForCausalLM:
    """0.3 million parameters, random."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        initializer_range=0.06,
        eos_token_id=SPECIAL.index("<|end|>"),
        pad_token_id=SPECIAL.index("<|pad|>"),
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config).float()


def main() -> None:
    """Write everything."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    make_model(arguments.seed).save_pretrained(out / "model")
    make_tokenizer().save_pretrained(out / "model")

    draw = random.Random(arguments.seed)
    pairs = draw.sample(range(900 * 900), NUM_TRAIN + NUM_SOLUTIONS + NUM_HELD_OUT)
    problems = [(100 + pair // 900, 100 + pair % 900) for pair in pairs]
    parts = {
        "held_out": problems[:NUM_HELD_OUT],
        "solutions": problems[NUM_HELD_OUT : NUM_HELD_OUT + NUM_SOLUTIONS],
        "train": problems[NUM_HELD_OUT + NUM_SOLUTIONS :],
    }
    held_out = set(parts["held_out"])
    for name, members in parts.items():  # train last: the quickstart takes its presence for "all is there"
        partial = out / f".{name}.jsonl"
        with partial.open("w") as file:
            for a, b in members:
                if name != "held_out" and (b, a) in held_out:
                    continue
                record = {"question": f"{a}+{b}", "gold_answer": str(a + b)}
                if name == "solutions":
                    record["solution"] = worked_solution(a, b)
                print(json.dumps(record), file=file)
        partial.rename(out / f"{name}.jsonl")
    print(f"prepared {out}: {NUM_TRAIN} prompts, {NUM_SOLUTIONS} worked solutions, {NUM_HELD_OUT} held-out problems")


if __name__ == "__main__":
    main()
