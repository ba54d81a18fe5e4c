"""What the tests of the converters run with Megatron-core on real ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_oreal.actor.build import transformer_config
from megatron_oreal.actor.parallel import ParallelGrid, destroy_parallel, init_parallel
from megatron_oreal.config import ParallelConfig
from megatron_oreal.layout import (
    ModelSpec,
    SafetensorsSource,
    load_from_hf,
    load_model_spec,
    megatron_layout,
)
from megatron_oreal.platform import Platform, init_distributed, shutdown_distributed

IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3]


def plain_gpt_model(spec: ModelSpec, parallel: ParallelConfig, padded_vocab: int) -> Any:
    """megatron-core's own GPTModel with its own local layer spec, as a user of it would build it, in fp32."""
    from megatron.core import parallel_state as mpu
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    model = GPTModel(
        config=transformer_config(spec, parallel, "fp32", "local"),
        transformer_layer_spec=get_gpt_layer_local_spec(qk_layernorm=spec.qk_norm, normalization="RMSNorm"),
        vocab_size=padded_vocab,
        max_sequence_length=64,
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=spec.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=int(spec.rope.theta),
        parallel_output=False,
    )
    model.rotary_pos_emb.inv_freq = torch.tensor(spec.rope.inverse_frequencies(spec.head_dim), dtype=torch.float32)
    return model


def load_into_plain_model(
    cases: list[dict[str, Any]], parallels: list[dict[str, int]], ids: list[int] = IDS
) -> list[dict[str, Any]]:
    """``dist_checkpointing.load`` of each converted checkpoint into a plain GPTModel, in each layout of these ranks.

    Returns, for each, the parameters that differ from ``load_from_hf`` and, with PP 1, the logits [len(ids), vocab].
    """
    from megatron.core import dist_checkpointing

    platform = init_distributed("cpu", 400)
    results = []
    for parallel in map(ParallelConfig.model_validate, parallels):
        grid = init_parallel(parallel, platform)
        for case in cases:
            spec = load_model_spec(case["hf"])
            with platform.megatron():
                model = plain_gpt_model(spec, parallel, case["padded_vocab"])
                for parameter in model.parameters():
                    parameter.data.fill_(float("nan"))
                state = {"model": model.sharded_state_dict()}
                state = dist_checkpointing.load(state, str(case["megatron"]), strict="raise_unexpected")
                model.load_state_dict(state["model"], strict=False)
            logits = _logits(model, ids, platform, spec) if grid.pp == 1 else None
            results.append({"different": _different(model, spec, case, grid), "logits": logits})
        destroy_parallel()
    shutdown_distributed()
    return results


def _different(model: Any, spec: ModelSpec, case: dict[str, Any], grid: ParallelGrid) -> list[str]:
    layout = megatron_layout(spec, tp=grid.tp, pp=grid.pp, vocab_divisor=case["padded_vocab"] // grid.tp)
    shard = layout.shards[grid.model_index]
    want = {name: torch.full(shape, float("nan")) for name, shape in shard.params}
    with SafetensorsSource(case["hf"]) as source:
        load_from_hf(source, shard, want)
    have = {name: parameter.data for name, parameter in model.named_parameters()}
    assert want.keys() == have.keys()
    return [name for name in want if not torch.equal(want[name], have[name])]


def _logits(model: Any, ids: list[int], platform: Platform, spec: ModelSpec) -> Tensor:
    tokens = torch.tensor(ids)[None]
    with platform.megatron(), torch.no_grad():
        mask = torch.ones(1, 1, len(ids), len(ids)).tril() < 0.5
        return model(tokens, torch.arange(len(ids))[None], mask)[0, :, : spec.vocab_size].float()


def hf_logits(path: Path, ids: list[int] = IDS) -> Tensor:
    """transformers' logits [len(ids), vocab] in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor(ids)[None]).logits[0]


def trainer_checkpoints(path: Path, work: Path) -> dict[str, Any]:
    """Train a step under TP 2, save, export, convert on the same ranks, and resume from the original and the result.

    Returns what the resumed runs and the actors that started from either kind of directory disagree about.
    """
    import actor_cases
    from convert_cases import convert

    from megatron_oreal.actor.actor import Actor
    from megatron_oreal.checkpoint import Checkpoints

    config = actor_cases.make_config(path, work, {"tensor_model_parallel_size": 2})
    platform, _, actor = actor_cases.start(config)
    sequences = actor_cases.make_sequences(6)
    actor.update(sequences, 0)
    step = Checkpoints(work, 2, platform).save(actor, 1, {"at": 1})
    actor.export(work / "export")
    again = work / "again" / "checkpoints" / step.name
    pp2 = ("--tp", 1, "--pp", 2)
    for key in ("policy", "reward_model"):
        assert convert("megatron_to_megatron", "--megatron", step / key, "--out", again / key, *pp2) == 0
    assert convert("megatron_to_hf", "--megatron", step / "policy", "--out", work / "policy") == 0
    assert convert("megatron_to_hf", "--megatron", step / "reward_model", "--out", work / "reward_model") == 0
    assert convert("hf_to_megatron", "--hf", path, "--out", work / "initial", "--tp", 2, "--pp", 2) == 0
    if platform.rank == 0:
        (again / "run.json").write_text((step / "run.json").read_text())
    platform.barrier()
    destroy_parallel()

    config = actor_cases.make_config(path, work, {"pipeline_model_parallel_size": 2})
    grid = init_parallel(config.parallel, platform)
    actor = Actor(config, actor.spec, grid, platform)
    after = []
    for folder in (work, work / "again"):
        actor.load_hf()
        Checkpoints(folder, 2, platform).load(actor, 1)
        actor.update(sequences, 1)
        after.append(_parameters(actor))
    started = actor_cases.make_config(path, work, {"pipeline_model_parallel_size": 2}, **_from(path, work / "initial"))
    fresh = Actor(started, actor.spec, grid, platform)
    fresh.load_hf()
    actor.load_hf()
    result = {
        "resumed": [name for name in after[0] if not torch.equal(after[0][name], after[1][name])],
        "moved": any(not torch.equal(after[0][name], value) for name, value in _parameters(actor).items()),
        "started": [n for n, value in _parameters(actor).items() if not torch.equal(value, _parameters(fresh)[n])],
        "compared": len(after[0]),
    }
    platform.barrier()
    shutdown_distributed()
    return result


def _from(path: Path, checkpoint: Path) -> dict[str, Any]:
    model = {"path": str(path), "stop_word": "unused", "dtype": "fp32", "megatron_checkpoint": str(checkpoint)}
    return {"model": model}


def _parameters(actor: Any) -> dict[str, Tensor]:
    models = {"policy": actor.policy, "reference": actor.reference, "reward_model": actor.reward_model}
    return {
        f"{key}: {name}": value.clone()
        for key, model in models.items()
        if model is not None
        for name, value in model.parameters().items()
    }
