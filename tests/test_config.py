"""The config tree: what loads, what is refused, and that each refusal names the key, the value and the mend."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_oreal.config import AlgorithmConfig, Config
from megatron_oreal.config_check import check_config, check_training_paths
from megatron_oreal.config_load import dump_config, load_config, parse_config
from megatron_oreal.errors import UserError
from megatron_oreal.layout.model_spec import ModelSpec, RopeSpec
from megatron_oreal.loss import LossSettings

REPOSITORY = Path(__file__).parent.parent
REQUIRED = ["work_dir=w", "model.path=m", "model.stop_word=<|end|>", "data.train=d.jsonl"]
SPEC = ModelSpec(
    family="qwen2",
    num_layers=6,
    hidden_size=96,
    ffn_hidden_size=264,
    num_heads=12,
    num_kv_heads=4,
    head_dim=8,
    vocab_size=100,
    max_position_embeddings=32768,
    norm_eps=1e-6,
    tied_embeddings=False,
    qkv_bias=True,
    qk_norm=False,
    rope=RopeSpec(theta=10000.0),
)


def config_of(tmp_path: Path, *overrides: str) -> Config:
    path = tmp_path / "empty.yaml"
    path.write_text("{}\n")
    return load_config(path, [*REQUIRED, *overrides])


def refusal(tmp_path: Path, *overrides: str, world_size: int = 1, spec: ModelSpec = SPEC) -> str:
    with pytest.raises(UserError) as caught:
        check_config(config_of(tmp_path, *overrides), spec, world_size)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Cross-checks with the model and the world


def test_defaults_fit_a_model_and_one_rank(tmp_path: Path) -> None:
    check_config(config_of(tmp_path), SPEC, 1)


TP = "parallel.tensor_model_parallel_size"
PP = "parallel.pipeline_model_parallel_size"
VPP = "parallel.virtual_pipeline_model_parallel_size"

CONTRADICTIONS = {
    "world": (6, [f"{TP}=2", f"{PP}=2"], [f"{TP}=2", f"{PP}=2", "world size 6", "multiple of 4"]),
    "heads": (8, [f"{TP}=8"], [f"{TP}=8", "12 attention heads", "(use one of 1, 2, 3, 4, 6, 12)"]),
    "kv-heads": (6, [f"{TP}=6"], [f"{TP}=6", "neither a divisor nor a multiple", "4 key-value heads"]),
    "sequence-parallel": (1, ["parallel.sequence_parallel=true"], [f"{TP} > 1", "set it to false"]),
    "vpp-without-pp": (1, [f"{VPP}=2"], [f"{VPP}=2", f"{PP} > 1"]),
    "vpp-of-one": (2, [f"{PP}=2", f"{VPP}=1"], [f"{VPP}=1", "2 or more, or null"]),
    "layers": (4, [f"{PP}=4"], [f"{PP}=4", "6 layers", "(use one of 1, 2, 3, 6)"]),
    "layers-vpp": (2, [f"{PP}=2", f"{VPP}=2"], [f"{PP}=2 x virtual 2", "6 layers"]),
    "uneven-stages": (
        2,
        [f"{PP}=2", "parallel.num_layers_in_first_pipeline_stage=2", "parallel.num_layers_in_last_pipeline_stage=2"],
        ["parallel.num_layers_in_first_pipeline_stage=2, num_layers_in_last_pipeline_stage=2 leaves 2", "=6"],
    ),
    "uneven-stages-without-pp": (
        1,
        ["parallel.num_layers_in_last_pipeline_stage=6"],
        ["parallel.num_layers_in_last_pipeline_stage=6", "pipeline_model_parallel_size above 1"],
    ),
    "recompute-method": (
        1,
        ["parallel.recompute_granularity=full"],
        ["parallel.recompute_granularity=full", "recompute_method=uniform or block"],
    ),
    "recompute-layers": (
        1,
        ["parallel.recompute_granularity=full", "parallel.recompute_method=block"],
        ["parallel.recompute_method=block", "parallel.recompute_num_layers"],
    ),
    "context": (
        1,
        ["rollout.gen_max_length=40000"],
        ["rollout.gen_max_length=40000", "max_position_embeddings 32768", "lower it"],
    ),
    "no-room-for-a-prompt": (
        1,
        ["rollout.gen_max_new=16384"],
        ["rollout.gen_max_new=16384", "rollout.gen_max_length=16384", "lower it"],
    ),
    "micro-batch": (
        1,
        ["parallel.max_tokens_per_microbatch=1000"],
        ["parallel.max_tokens_per_microbatch=1000", "rollout.gen_max_length=16384", "raise it"],
    ),
    "freeze": (1, ["total_steps=10"], ["algorithm.actor_freeze_steps=10", "total_steps=10", "lower it"]),
    "freeze-without-reward-model": (
        1,
        ["model.reward_model=false"],
        ["algorithm.actor_freeze_steps=10", "model.reward_model=false", "set it to 0"],
    ),
    "kl-anchor": (
        1,
        ["algorithm.kl_anchor=old", "algorithm.kl_type=k1"],
        ["algorithm.kl_type=k1", "algorithm.kl_anchor=old", "use k2 or k3"],
    ),
    "bucket-bounds": (
        1,
        ["data.pass_rate_buckets=[[0.5, 0.5, 1]]"],
        ["data.pass_rate_buckets: [0.5, 0.5, 1]", "low < high"],
    ),
    "bucket-repeats": (1, ["data.pass_rate_buckets=[[0, 1, -1]]"], ["data.pass_rate_buckets: [0.0, 1.0, -1]"]),
    "policy-rates": (1, ["optimizer.actor_min_lr=1"], ["optimizer.actor_min_lr=1.0", "optimizer.actor_lr=5e-07"]),
    "reward-model-rates": (
        1,
        ["optimizer.token_level_rm_lr=1e-7"],
        ["optimizer.token_level_rm_lr_min=4e-07", "optimizer.token_level_rm_lr=1e-07", "lower it"],
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_contradiction_names_the_keys_their_values_and_the_mend(tmp_path: Path, case: str) -> None:
    world_size, overrides, parts = CONTRADICTIONS[case]
    message = refusal(tmp_path, *overrides, world_size=world_size)
    assert [part for part in parts if part not in message] == [], message


def test_an_indivisible_intermediate_size_is_refused(tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, ffn_hidden_size=265)
    message = refusal(tmp_path, f"{TP}=2", world_size=2, spec=spec)
    assert f"{TP}=2" in message and "intermediate_size 265" in message


def test_rows_of_query_key_and_value_must_divide(tmp_path: Path) -> None:
    message = refusal(tmp_path, f"{TP}=12", world_size=12)
    assert f"{TP}=12" in message and "rows of query, key and value" in message


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_kv_heads_may_be_split_or_repeated(tmp_path: Path, tp: int) -> None:
    check_config(config_of(tmp_path, f"{TP}={tp}"), SPEC, 2 * tp)


def test_virtual_stages_that_divide_the_layers_are_accepted(tmp_path: Path) -> None:
    check_config(config_of(tmp_path, f"{PP}=3", f"{VPP}=2"), SPEC, 3)


# Unknown keys, missing keys, bad values


@pytest.mark.parametrize(
    ("tree", "parts"),
    [
        ({"total_step": 3}, ["unknown key 'total_step'", "(did you mean 'total_steps'?)"]),
        ({"rolout": {"top_p": 0.9}}, ["unknown key 'rolout'", "(did you mean 'rollout'?)"]),
        ({"rollout": {"topp": 0.9}}, ["unknown key 'rollout.topp'", "(did you mean 'top_p'?)"]),
        ({"sft": {"xyzzy": 1}}, ["unknown key 'sft.xyzzy'", "(valid: batch_size, data, eval_every, lr"]),
        ({"judge": {"host": []}, "zzz": 1}, ["(and 1 more)"]),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_valid_one(tree: dict[str, Any], parts: list[str]) -> None:
    model = {"path": "m", "stop_word": "<|end|>"}
    with pytest.raises(UserError) as caught:
        parse_config({"work_dir": "w", "model": model, "data": {"train": "d"}} | tree, "my.yaml")
    message = str(caught.value)
    assert message.startswith("my.yaml: ")
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("rolout.top_p=0.9", ["unknown key 'rolout'", "did you mean 'rollout'"]),
        ("rollout.topp=0.9", ["unknown key 'rollout.topp'", "did you mean 'top_p'"]),
        ("totl_steps=3", ["unknown key 'totl_steps'", "did you mean 'total_steps'"]),
        ("seed.start=3", ["seed", "not a section"]),
        ("rollout.top_p.x=3", ["rollout.top_p", "not a section"]),
    ],
)
def test_an_override_of_an_unknown_key_is_named_with_the_nearest_valid_one(
    tmp_path: Path, override: str, parts: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        config_of(tmp_path, override)
    assert [part for part in parts if part not in str(caught.value)] == [], caught.value


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("rollout.top_p=1.5", ["rollout.top_p=1.5", "less than or equal to 1"]),
        ("rollout.prompt_repeat_k=1", ["rollout.prompt_repeat_k=1", "greater than or equal to 2"]),
        ("rollout.temperature=0", ["rollout.temperature=0", "greater than 0"]),
        ("rollout.engine=vllm", ["rollout.engine='vllm'", "'embedded'"]),
        ("total_steps=ten", ["total_steps='ten'", "valid integer"]),
        ("total_steps=2.5", ["total_steps=2.5", "integer"]),
        ("rollout.top_k=", ["rollout.top_k=None", "integer"]),
        ("model.reward_model=maybe", ["model.reward_model='maybe'", "boolean"]),
        ("algorithm.correct_threshold=1", ["algorithm.correct_threshold=1", "less than 1"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas=[0.9]", "too few values"]),
        ("optimizer.actor_lr=.nan", ["optimizer.actor_lr=nan", "finite"]),
        ("optimizer.actor_lr=.inf", ["optimizer.actor_lr=inf", "finite"]),
        ("rollout=3", ["rollout=3", "dictionary"]),
        ("model.stop_word=12", ["model.stop_word=12", "valid string", "put it in quotes"]),
    ],
)
def test_a_bad_value_is_named_with_its_key_and_its_range(tmp_path: Path, override: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        config_of(tmp_path, override)
    assert [part for part in parts if part not in str(caught.value)] == [], caught.value


@pytest.mark.parametrize("key", ["work_dir", "model.path", "model.stop_word", "data.train"])
def test_a_missing_key_is_named_with_the_override_that_gives_it(tmp_path: Path, key: str) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("{}")
    with pytest.raises(UserError) as caught:
        load_config(path, [override for override in REQUIRED if not override.startswith(key)])
    assert f"{key} is missing" in str(caught.value) and f"{key}=VALUE" in str(caught.value)


def test_values_are_checked_on_assignment_too(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    with pytest.raises(ValueError, match="less than or equal to 1"):
        config.rollout.top_p = 2.0


# Overrides


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimizer.actor_lr=5e-7", 5e-7),
        ("optimizer.actor_lr=1E-3", 1e-3),
        ("optimizer.actor_lr=.5", 0.5),
        ("optimizer.actor_lr=1", 1.0),
        ("optimizer.betas=[0.9, 0.95]", (0.9, 0.95)),
        ("optimizer.betas=[9e-1, 95e-2]", (0.9, 0.95)),
        ("data.pass_rate_buckets=[[0, 0.5, 2], [0.5, 1, 1]]", [(0.0, 0.5, 2), (0.5, 1.0, 1)]),
        ("data.max_prompt_tokens=null", None),
        ("data.max_prompt_tokens=", None),
        ("evaluation.data=null", None),
        ("model.stop_word='null'", "null"),
        ('model.system_prompt="a: b, c=d"', "a: b, c=d"),
        ("model.system_prompt='1e5'", "1e5"),
        ("verifier.thinking_finish_words=['</think>', '# Answer']", ["</think>", "# Answer"]),
        ("checkpoint.resume=false", False),
        ("work_dir=a=b", "a=b"),
        ("work_dir=runs/5e-7", "runs/5e-7"),
    ],
)
def test_an_override_reads_as_yaml_and_scientific_numbers(tmp_path: Path, override: str, value: object) -> None:
    node: Any = config_of(tmp_path, override)
    for part in override.partition("=")[0].split("."):
        node = getattr(node, part)
    assert node == value
    assert type(node) is type(value)


def test_scientific_numbers_in_a_file_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("optimizer:\n  actor_lr: 1e-3\n  betas: [9e-1, 0.99]\n")
    optimizer = load_config(path, REQUIRED).optimizer
    assert (optimizer.actor_lr, optimizer.betas) == (1e-3, (0.9, 0.99))


def test_later_overrides_win_and_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("seed: 1\nrollout:\n  top_p: 0.5\n  top_k: 7\n")
    config = load_config(path, [*REQUIRED, "rollout.top_p=0.6", "rollout.top_p=0.7", "seed=2"])
    assert (config.seed, config.rollout.top_p, config.rollout.top_k) == (2, 0.7, 7)


def test_an_override_enters_an_empty_section(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("rollout:\nsft:\n")
    config = load_config(path, [*REQUIRED, "rollout.top_k=7"])
    assert config.rollout.top_k == 7
    assert config.sft == type(config.sft)()


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("rollout.top_p", ["'rollout.top_p'", "not of the form key=value"]),
        ("=3", ["'=3'", "not of the form key=value"]),
        ("optimizer.betas=[0.9", ["optimizer.betas=[0.9", "not valid YAML", "quote"]),
        # PyYAML raises ValueError, KeyError and AttributeError for these.
        ("work_dir=2024-13-45", ["work_dir=2024-13-45", "not valid YAML", "quote"]),
        ("seed=0b_", ["seed=0b_", "not valid YAML"]),
        ("data.resample_by_pass_rate=!!bool x", ["!!bool x", "not valid YAML"]),
        ("work_dir=!!timestamp x", ["!!timestamp x", "not valid YAML"]),
        ("verifier.hosts=localhost:1", ["verifier.hosts='localhost:1'", "write [localhost:1]"]),
    ],
)
def test_a_malformed_override_is_named(tmp_path: Path, override: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        config_of(tmp_path, override)
    assert [part for part in parts if part not in str(caught.value)] == [], caught.value


# Files


@pytest.mark.parametrize(
    ("text", "line"), [("a: 1\nb: [1, 2\nc: 3\n", 3), ("a: 1\n\tb: 2\n", 2), ("a: 1\nb: c: d\n", 2)]
)
def test_malformed_yaml_names_the_file_and_the_line(tmp_path: Path, text: str, line: int) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="not valid YAML") as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "kind"), [("", "NoneType"), ("- 1\n", "list"), ("hello\n", "str")])
def test_a_file_without_keys_is_refused(tmp_path: Path, text: str, kind: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"keys and values at the top level, not {kind}"):
        load_config(path)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UserError, match=r"config\.yaml: not UTF-8 text"):
        load_config(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml' does not exist"):
        load_config(tmp_path / "nowhere.yaml")


def test_a_directory_is_not_called_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a directory: give a YAML file"):
        load_config(tmp_path)


def test_a_date_that_is_none_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("work_dir: 2024-13-45\n")
    with pytest.raises(UserError, match=r"config\.yaml: not valid YAML \(month must be in 1\.\.12"):
        load_config(path)


def test_a_key_that_stands_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("rollout:\n  top_k: 7\nsft:\nrollout:\n  top_p: 0.9\n")
    with pytest.raises(UserError) as caught:
        load_config(path, REQUIRED)
    assert str(caught.value).startswith(f"{path}:4: ")
    assert "the key 'rollout' stands in line 1 already" in str(caught.value)


def test_merged_keys_are_no_repetition(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    judge = "{retry_delay_s: 1, timeout_s: 9}"
    path.write_text(f"verifier:\n  judge: &a {{<<: {judge}, <<: {judge}, timeout_s: 8}}\nrollout:\n  server: {{}}\n")
    assert load_config(path, REQUIRED).verifier.judge.timeout_s == 8


def test_a_dumped_config_reads_back_equal(tmp_path: Path) -> None:
    config = config_of(
        tmp_path,
        "optimizer.actor_lr=5e-7",
        "optimizer.eps=1e-8",
        "model.system_prompt='Größe: ≤ 3\n- \"a\"'",
        "model.stop_word='null'",
        "data.pass_rate_buckets=[[0, 0.25, 3]]",
        "verifier.thinking_finish_words=['</think>', 'yes', '1e3']",
    )
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config
    assert list(yaml.safe_load(path.read_text())) == list(Config.model_fields)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "examples").rglob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_load(path: Path) -> None:
    config = load_config(path)
    assert config.algorithm.actor_freeze_steps < config.total_steps


# One meaning in both places


def test_the_losses_defaults_are_those_of_the_config() -> None:
    algorithm = AlgorithmConfig()
    assert LossSettings.from_config(algorithm) == LossSettings()


@pytest.mark.parametrize("key", ["positive_loss_factor", "kl_coef", "correct_threshold", "incorrect_topk_ratio"])
@pytest.mark.parametrize("value", [-0.1, 0.0, 0.999, 1.0, 1.5])
def test_the_losses_ranges_are_those_of_the_config(key: str, value: float) -> None:
    def accepts(make: Any) -> bool:
        try:
            make(**{key: value})
        except ValueError:
            return False
        return True

    assert accepts(AlgorithmConfig) == accepts(LossSettings)


def with_model_path(config: Config, model_path: str) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update={"path": model_path})})


def test_training_refuses_to_start_from_the_export_it_would_replace(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    own = with_model_path(config, f"{config.work_dir}/hf")
    with pytest.raises(UserError, match="use another work_dir"):
        check_training_paths(own)
    check_training_paths(with_model_path(config, f"{config.work_dir}-other/hf"))
