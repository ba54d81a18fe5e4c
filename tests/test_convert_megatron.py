"""Converted checkpoints in the real Megatron-core, on real ranks, and the trainer's own in the converters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import actor_cases
import convert_workers
import pytest
import torch
from convert_cases import convert, shell
from dist import run_ranks
from safetensors.torch import load_file

from megatron_oreal.layout.distcp import read_metadata

TP2 = {"tensor_model_parallel_size": 2}
TP4 = {"tensor_model_parallel_size": 4}
PP2 = {"pipeline_model_parallel_size": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: actor_cases.make_model(name, folder) for name in actor_cases.MODELS}


@pytest.fixture(scope="module")
def converted(models: dict[str, Path]) -> list[dict[str, Any]]:
    """Every family, tied and untied, cut for PP 2 VPP 2, with a vocabulary padded to 104 rows."""
    cases = []
    for path in models.values():
        out = path.with_name(f"{path.name}-megatron")
        layout = ("--tp", 1, "--pp", 2, "--vpp", 2, "--make-vocab-size-divisible-by", 104)
        assert convert("hf_to_megatron", "--hf", path, "--out", out, *layout) == 0
        cases.append({"hf": str(path), "megatron": str(out), "padded_vocab": 104})
    return cases


def test_megatron_core_loads_a_converted_checkpoint_into_its_own_gpt_model(converted: list[dict[str, Any]]) -> None:
    """No key is missing, every parameter equals what is read from the safetensors, and the logits are HF's."""
    arguments = {"cases": converted, "parallels": [TP2 | PP2, TP4]}
    for results in run_ranks("convert_workers:load_into_plain_model", 4, arguments):
        assert [result["different"] for result in results] == [[]] * 2 * len(converted)
        for case, result in zip(converted, results[len(converted) :], strict=True):
            difference = (result["logits"] - convert_workers.hf_logits(case["hf"])).abs().max()
            assert 0 < difference < 1e-5, case["hf"]


@pytest.fixture(scope="module")
def trained(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    work = tmp_path_factory.mktemp("trained")
    return work, run_ranks("convert_workers:trainer_checkpoints", 2, {"path": models["qwen2"], "work": work})


def test_a_trainers_checkpoint_converts_to_what_it_exports(trained: tuple[Path, Any], models: dict[str, Path]) -> None:
    work, _ = trained
    export, policy = (load_file(work / name / "model.safetensors") for name in ("export", "policy"))
    assert export.keys() == policy.keys()
    assert [name for name in export if not torch.equal(export[name], policy[name])] == []
    initial = load_file(models["qwen2"] / "model.safetensors")
    assert not torch.equal(initial["model.norm.weight"], policy["model.norm.weight"]), "nothing was trained"
    reward_model = load_file(work / "reward_model" / "model.safetensors")
    assert reward_model["score.weight"].shape == (1, 64)
    assert reward_model["score.weight"].any()
    assert "lm_head.weight" not in reward_model


def test_a_run_resumes_from_a_checkpoint_cut_anew_as_from_the_original(trained: tuple[Path, Any]) -> None:
    """TP 2 cut for PP 2, with the optimizer's state: the next update of policy and reward model has the same bits."""
    for result in trained[1]:
        assert result["compared"] > 40
        assert result["moved"]
        assert result["resumed"] == []


def test_a_run_starts_from_a_megatron_directory_as_from_the_safetensors(trained: tuple[Path, Any]) -> None:
    assert [result["started"] for result in trained[1]] == [[], []]


def test_the_converter_writes_the_keys_and_chunks_that_megatron_writes(
    trained: tuple[Path, Any], models: dict[str, Path], tmp_path: Path
) -> None:
    """The weights of the trainer's own TP 2 checkpoint: the same tensors, shapes, chunks, and nothing less."""
    work, _ = trained
    assert convert("hf_to_megatron", "--hf", models["qwen2"], "--out", tmp_path / "m", "--tp", 2) == 0
    ours, theirs = (
        {
            key: None if not hasattr(value, "size") else (value.size, {(c.offsets, c.sizes) for c in value.chunks})
            for key, value in read_metadata(folder).state_dict_metadata.items()
            if not key.startswith(("optimizer.", "common_state/"))
        }
        for folder in (tmp_path / "m", work / "checkpoints" / "step_000001" / "policy")
    )
    assert {key: ours.get(key) for key in theirs} == theirs
    assert all("core_attention._extra_state" in key or "final_layernorm._extra" in key for key in ours.keys() - theirs)


def test_a_trainers_checkpoint_carries_config_and_tokenizer_files_and_its_own_config(trained: tuple[Path, Any]) -> None:
    step = trained[0] / "checkpoints" / "step_000001"
    for key, architecture in (("policy", "Qwen2ForCausalLM"), ("reward_model", "Qwen2ForSequenceClassification")):
        assert json.loads((step / key / "hf" / "config.json").read_text())["architectures"] == [architecture]
    run = json.loads((step / "run.json").read_text())
    assert run["config"]["parallel"]["tensor_model_parallel_size"] == 2
    assert run["model_shape"]["hidden_size"] == 64


def test_processes_under_torchrun_share_the_files_and_write_the_same_checkpoint(
    models: dict[str, Path], tmp_path: Path
) -> None:
    path = models["qwen3-tied"]
    done = shell("hf_to_megatron", "--hf", path, "--out", tmp_path / "m", "--tp", 1, ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 1
    names = sorted(p.name for p in (tmp_path / "m").glob("*.distcp"))
    assert names == ["__0_0.distcp", "__0_1.distcp"]
    sizes = [(tmp_path / "m" / name).stat().st_size for name in names]
    assert max(sizes) < 1.2 * min(sizes)
    assert convert("compare", path, tmp_path / "m") == 0
