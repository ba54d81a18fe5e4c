"""``examples/configs``: OREAL's published settings on the worlds that the files name; shapes need no download."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import config_twins
import pytest
import yaml
from config_twins import CONFIGS, MACHINES, SHAPES, real_config, shape_dir

from megatron_oreal.cli import main
from megatron_oreal.config import Config
from megatron_oreal.config_check import check_config
from megatron_oreal.data.chat import ChatTemplate
from megatron_oreal.layout import load_model_spec

PUBLISHED = {
    # "One step"
    "rollout.prompts_per_step": 64,
    "rollout.prompt_repeat_k": 16,
    "rollout.temperature": 1.0,
    "rollout.top_p": 0.9,
    "rollout.top_k": 0,
    "rollout.gen_max_new": 14000,
    "rollout.gen_max_length": 16384,
    "algorithm.reward_shaping_type": "rloo",
    "algorithm.filter": "pair",
    "algorithm.actor_freeze_steps": 10,
    # "Token weights"
    "algorithm.rescale": "threshold",
    "algorithm.correct_threshold": 0.5,
    "algorithm.incorrect_threshold": 0.5,
    # "Losses"
    "algorithm.mode": "released",
    "algorithm.positive_loss_factor": 1.0,
    "algorithm.negative_loss_factor": 0.5,
    "algorithm.pos_mult_adv": True,
    "algorithm.kl_coef": 0.01,
    "algorithm.kl_type": "k3",
    # "Optimisation"
    "optimizer.actor_lr": 5e-7,
    "optimizer.actor_min_lr": 1e-7,
    "optimizer.token_level_rm_lr": 2e-6,
    "optimizer.token_level_rm_lr_min": 4e-7,
    "optimizer.warmup_steps": 10,
    "optimizer.wd": 0.01,
    "optimizer.max_grad_norm": 1.0,
    "total_steps": 90,
    # "Prompts"
    "data.resample_by_pass_rate": True,
    "data.pass_rate_buckets": [[0.0, 0.2, 6], [0.2, 0.6, 4], [0.6, 0.8, 2]],
}
"""The published values, by the headings of the algorithm's description; each file spells them out."""
WITHOUT_REWARD_MODEL = {"algorithm.filter": "none", "algorithm.actor_freeze_steps": 0}
UNWRITTEN = {
    "model.dtype": "bf16",
    "optimizer.betas": (0.9, 0.999),
    "optimizer.eps": 1e-8,
    "optimizer.warmup_after_freeze": False,
    "optimizer.wd_on_norms_and_biases": True,
    "algorithm.kl_anchor": "reference",
    "rollout.oversample_prompts": 0,
}
"""Published values that the files leave to the defaults."""
QWEN_7B = (28, 3584, 18944, 28, 4, 152064)
SHAPE_FACTS = {
    # layers, hidden, ffn, heads, KV heads, vocabulary; rope's base; tied; parameters
    "OREAL-7B-SFT": (QWEN_7B, 1e6, False, 7_615_616_512),
    "OREAL-32B-SFT": ((64, 5120, 27648, 40, 8, 152064), 1e6, False, 32_763_876_352),
    "DeepSeek-R1-Distill-Qwen-7B": (QWEN_7B, 1e4, False, 7_615_616_512),
    "Qwen2.5-1.5B-Instruct": ((28, 1536, 8960, 12, 2, 151936), 1e6, True, 1_543_714_304),
}


def at(tree: Any, dotted: str) -> Any:
    """The value of a dotted key in nested dicts or sections."""
    for key in dotted.split("."):
        tree = tree[key] if isinstance(tree, dict) else getattr(tree, key)
    return tree


def file_text(name: str) -> str:
    return (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")


def expected(name: str, key: str) -> Any:
    without = name == "oreal_7b_without_reward_model"
    return WITHOUT_REWARD_MODEL.get(key, PUBLISHED[key]) if without else PUBLISHED[key]


def test_every_shipped_oreal_config_is_tested() -> None:
    assert {path.stem for path in CONFIGS.glob("oreal_*.yaml")} == set(MACHINES)


@pytest.mark.parametrize("name", MACHINES)
def test_hyper_parameters_are_the_published_ones_and_written_out(name: str) -> None:
    written, config = yaml.safe_load(file_text(name)), real_config(name)
    for key in PUBLISHED:
        if key.startswith("optimizer.token_level_rm") and not config.model.reward_model:
            continue
        assert at(written, key) == expected(name, key), key
    for key, value in UNWRITTEN.items():
        assert at(config, key) == value, key


@pytest.mark.parametrize("name", MACHINES)
def test_a_config_fits_its_model_and_its_documented_world(name: str) -> None:
    machine, config, spec = MACHINES[name], real_config(name), load_model_spec(shape_dir(name))
    check_config(config, spec, machine.ranks, machine.per_node, planned=True)
    assert config.rollout.engine == "sglang" and config.rollout.gen_max_length == 16384
    gpus = re.search(r"on (\d+) GPUs|on one GPU", file_text(name).partition("work_dir")[0])
    assert gpus is not None and int(gpus[1] or 1) == machine.ranks, "the head names the number of GPUs"
    assert machine.ranks % config.rollout.engine_tp == 0
    engines = machine.ranks // config.rollout.engine_tp
    samples = config.rollout.prompts_per_step * config.rollout.prompt_repeat_k
    assert config.rollout.max_running_requests <= samples // engines, "an engine never has more than its share"
    assert config.parallel.max_tokens_per_microbatch % 16384 == 0
    for path in (config.work_dir, config.model.path, config.data.train):
        assert not Path(path).is_absolute()


@pytest.mark.parametrize("name", SHAPE_FACTS)
def test_committed_shapes_are_those_of_the_published_models(name: str) -> None:
    sizes, theta, tied, parameters = SHAPE_FACTS[name]
    spec = load_model_spec(SHAPES / name)
    found = (spec.num_layers, spec.hidden_size, spec.ffn_hidden_size, spec.num_heads, spec.num_kv_heads)
    assert (*found, spec.vocab_size) == sizes
    assert (spec.rope.theta, spec.tied_embeddings, spec.num_parameters()) == (theta, tied, parameters)
    assert spec.qkv_bias and not spec.qk_norm and spec.max_position_embeddings >= 16384
    assert sorted(path.name for path in (SHAPES / name).iterdir()) == ["config.json"]


def test_every_committed_shape_is_of_a_config() -> None:
    assert {path.name for path in SHAPES.iterdir()} == set(SHAPE_FACTS) == {shape_dir(name).name for name in MACHINES}


def prompt_of(name: str, folder: Path) -> tuple[str, str]:
    """A prompt as the config renders it with a tokenizer that has the family's special tokens; the stop token."""
    model = real_config(name).model
    chat = ChatTemplate.load(
        config_twins.write_twin_model(name, folder),
        stop_word=model.stop_word,
        chat_template=model.chat_template,
        system_prompt=model.system_prompt,
    )
    return chat.render_prompt("1+1"), chat.tokenizer.convert_ids_to_tokens(chat.stop_token_id)


def test_each_family_has_its_own_chat_format_and_stop_word(tmp_path: Path) -> None:
    prompt, stop = prompt_of("oreal_deepseek_distill_7b", tmp_path / "deepseek")
    assert prompt == "<｜begin▁of▁sentence｜><｜User｜>1+1<｜Assistant｜>"
    assert stop == "<｜end▁of▁sentence｜>"
    prompt, stop = prompt_of("oreal_1.5b_one_gpu", tmp_path / "qwen")
    assert prompt.startswith(
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}"
    )
    assert prompt.endswith("<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n") and stop == "<|im_end|>"
    oreal = real_config("oreal_7b").model
    assert oreal.chat_template is None and oreal.system_prompt is None, "both are in the tokenizer of the OREAL models"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(arguments)
    said = capsys.readouterr()
    return status, said.out, said.err


OREAL_7B = str(CONFIGS / "oreal_7b.yaml")
SHAPE_7B = f"model.path={SHAPES / 'OREAL-7B-SFT'}"


def test_print_config_shows_the_whole_tree_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "train", OREAL_7B, "--print-config", "rollout.gen_max_new=9000")
    assert status == 0
    shown = Config.model_validate(yaml.safe_load(out))
    assert shown == real_config("oreal_7b", "rollout.gen_max_new=9000")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nproc-per-node", "32"], ["models/OREAL-7B-SFT", "config.json"]),
        (["--nproc-per-node", "6", SHAPE_7B], ["tensor_model_parallel_size=4", "world size 6", "multiple of 4"]),
        (["--nproc-per-node", "4", "rollout.engine_tp=8", SHAPE_7B], ["rollout.engine_tp=8", "4 ranks of a node"]),
    ],
    ids=["missing model directory", "wrong world size", "engine larger than a node"],
)
def test_a_wrong_start_ends_with_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, "train", OREAL_7B, *arguments)
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words)
