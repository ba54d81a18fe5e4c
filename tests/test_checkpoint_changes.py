"""Resuming with a config that is not the one a checkpoint was saved with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_layout_megatron import small_spec

from megatron_oreal.checkpoint.changes import check_changes, record
from megatron_oreal.config import Config
from megatron_oreal.config_load import parse_config
from megatron_oreal.errors import UserError

SPEC = small_spec("qwen2")


def config(**changes: Any) -> Config:
    tree: dict[str, Any] = {"work_dir": "w", "model": {"path": "m", "stop_word": "s"}, "data": {"train": "d"}}
    for key, value in changes.items():
        section, _, leaf = key.partition("__")
        if leaf:
            tree[section] = tree.get(section, {}) | {leaf: value}
        else:
            tree[section] = value
    return parse_config(tree)


def saved(**changes: Any) -> dict[str, Any]:
    return json.loads(json.dumps(record(config(**changes), SPEC)))


def test_the_same_config_changes_nothing() -> None:
    assert check_changes(saved(), config(), SPEC, Path("step")) is None


def test_changed_settings_are_said_in_one_line_with_both_values() -> None:
    now = config(algorithm__kl_coef=0.0, optimizer__betas=[0.9, 0.95], parallel__tensor_model_parallel_size=2)
    assert check_changes(saved(), now, SPEC, Path("step")) == (
        "algorithm.kl_coef 0.01 -> 0.0, optimizer.betas [0.9, 0.999] -> [0.9, 0.95], "
        "parallel.tensor_model_parallel_size 1 -> 2"
    )


def test_an_argument_of_the_engine_that_is_new_or_gone_is_a_change() -> None:
    with_one = {"rollout__sglang": {"attention_backend": "triton"}}
    assert check_changes(saved(), config(**with_one), SPEC, Path("step")) == (
        "rollout.sglang {} -> {'attention_backend': 'triton'}"
    )
    assert check_changes(saved(**with_one), config(), SPEC, Path("step")) == (
        "rollout.sglang {'attention_backend': 'triton'} -> {}"
    )


def test_where_and_how_often_things_are_written_may_change_silently() -> None:
    now = config(work_dir="elsewhere", checkpoint__every=3, telemetry__tensorboard=False, device="cpu")
    assert check_changes(saved(), now, SPEC, Path("step")) is None


def test_keys_that_are_new_or_gone_since_are_no_changes() -> None:
    before = saved()
    del before["config"]["optimizer"]["eps"]
    before["config"]["optimizer"]["retired"] = 1
    assert check_changes(before, config(), SPEC, Path("step")) is None
    assert check_changes({"step": 3}, config(seed=7), SPEC, Path("step")) is None


@pytest.mark.parametrize("key", ["overlap_grad_reduce", "ddp_bucket_size"])
def test_buckets_may_change_only_where_the_optimizer_state_does_not_lie_in_them(key: str) -> None:
    now = config(**{f"parallel__{key}": 4000 if key == "ddp_bucket_size" else True})
    formats = {"policy": "fully_reshardable", "reward_model": "fully_reshardable"}
    assert f"parallel.{key}" in str(check_changes(saved() | {"optimizer_formats": formats}, now, SPEC, Path("step")))
    formats["reward_model"] = "dp_reshardable"
    with pytest.raises(UserError, match=rf"parallel\.{key}=.*state is kept by buckets: set it back"):
        check_changes(saved() | {"optimizer_formats": formats}, now, SPEC, Path("step"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__dtype": "fp32"}, r"model\.dtype=fp32: step was saved with bf16.*set it back"),
        ({"optimizer__wd_on_norms_and_biases": False}, r"optimizer\.wd_on_norms_and_biases=False: step was saved with"),
        ({"parallel__use_distributed_optimizer": False}, r"parallel\.use_distributed_optimizer=False: step was saved"),
    ],
)
def test_what_cannot_be_resumed_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_changes(saved(), config(**changes), SPEC, Path("step"))


def test_another_model_shape_is_refused_and_a_longer_context_is_not() -> None:
    for spec, key in (
        (replace(SPEC, ffn_hidden_size=48), "ffn_hidden_size=24"),
        (replace(SPEC, rope=replace(SPEC.rope, theta=1e6)), r"rope\.theta=10000\.0"),
        (replace(SPEC, tied_embeddings=True), "tied_embeddings=False"),
    ):
        with pytest.raises(UserError, match=f"step: was saved by a model with {key}, model.path has"):
            check_changes(saved(), config(), spec, Path("step"))
    longer = replace(SPEC, max_position_embeddings=128)
    assert check_changes(saved(), config(), longer, Path("step")) is None
