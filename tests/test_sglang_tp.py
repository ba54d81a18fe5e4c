"""One server of two tensor-parallel workers, fed by two trainer ranks, each of which stages its own shard only."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import engine_contract as contract
import pytest
import torch
import torch.distributed as dist
from dist import run_ranks
from sglang_server import make_engine, needs_sglang

from megatron_oreal.rollout.engine import EngineError, Request
from megatron_oreal.rollout.hf_weights import load_hf_engine, write_hf_weights
from megatron_oreal.rollout.sglang.group import RankGroup

pytestmark = [needs_sglang, pytest.mark.slow]


def requests() -> list[Request]:
    return [Request(prompt, i) for i, prompt in enumerate(contract.make_prompts([5, 30, 9, 61]))]


def share_a_server(model_dirs: Sequence[str], folder: str) -> dict[str, Any]:
    """On each of two ranks: load one checkpoint after the other and generate with each."""
    dist.init_process_group("gloo")
    group = RankGroup(dist.new_group([0, 1]))
    engine = make_engine(Path(model_dirs[0]), Path(folder), tp=2, group=group)
    shapes = {name: tuple(tensor.shape) for name, tensor in engine.weight_buffers().items()}
    tokens, digests, refused = [], [], ""
    for version, model_dir in enumerate(model_dirs):
        write_hf_weights(engine, model_dir, version=version)
        assert engine.health().version == version
        if engine.is_owner:
            tokens.append(contract.tokens_of(engine.generate(requests(), contract.params(temperature=0.0))))
        dist.barrier()
    # One rank's staging changes after it was hashed: nobody may take the version.
    hash_source = engine._digester.hash_source

    def hash_then_change(rank: int, tensors: Any) -> torch.Tensor:
        hashes = hash_source(rank, tensors)
        if rank == 1:
            tensors["model.layers.1.mlp.down_proj.weight"][0, 0] += 1
        return hashes

    engine._digester.hash_source = hash_then_change  # type: ignore[method-assign]
    try:
        engine.load_weights(len(model_dirs))
    except EngineError as error:
        refused = str(error)
    digests.append(engine.health().version)
    engine.shutdown()
    dist.destroy_process_group()
    return {"tokens": tokens, "shapes": shapes, "refused": refused, "version": digests[-1]}


def test_two_ranks_stage_a_shard_each_and_two_successive_syncs_give_each_models_tokens(tmp_path):
    model_dirs = [contract.save_random_model(tmp_path, "qwen2_tied", seed=seed) for seed in (0, 1)]
    expected = []
    for model_dir in model_dirs:
        alone = load_hf_engine(model_dir, dtype=torch.float32, max_running_requests=8, max_length=400)
        expected.append(contract.tokens_of(alone.generate(requests(), contract.params(temperature=0.0))))
    assert expected[0] != expected[1]
    with tempfile.TemporaryDirectory() as folder:
        arguments = {"model_dirs": [str(path) for path in model_dirs], "folder": folder}
        first, second = run_ranks("test_sglang_tp:share_a_server", 2, arguments, timeout_s=500)
    assert first["tokens"] == expected
    assert first["shapes"] == second["shapes"]
    assert first["shapes"]["model.layers.0.self_attn.qkv_proj.weight"] == (16 + 8 + 8, 32)
    for rank in (first, second):
        assert "model.layers.1.mlp.down_proj.weight" in rank["refused"]
        assert "did not arrive" in rank["refused"]
        assert rank["version"] == 1
