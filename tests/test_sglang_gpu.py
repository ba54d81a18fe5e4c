"""SGLang on a GPU: memory that comes back, weights by CUDA IPC in two buckets, a server that is started again."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import engine_contract as contract
import pytest
import torch
import transformers
from sglang_server import fast_settings, needs_sglang

from megatron_oreal.layout import SafetensorsSource, load_from_hf, load_model_spec
from megatron_oreal.rollout.engine import EngineError, Request
from megatron_oreal.rollout.sglang.engine import SglangEngine
from megatron_oreal.rollout.sglang.guard import group_members
from megatron_oreal.rollout.sglang.staging import CudaSegment

pytestmark = [
    needs_sglang,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCE = 0.1
"""Nats, of a token in bf16: different kernels round differently."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a shape that Hopper's attention kernels take: heads of 64."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=None,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    path = tmp_path_factory.mktemp("model") / "qwen2"
    transformers.Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def engine(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SglangEngine]:
    settings = fast_settings(control_timeout_s=60.0, bucket_bytes=4 * 2**20)
    engine = SglangEngine(
        load_model_spec(model_dir),
        model_path=model_dir,
        folder=tmp_path_factory.mktemp("server"),
        dtype=torch.bfloat16,
        device="cuda",
        devices=[os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]],
        max_running_requests=32,
        max_length=256,
        server_args={
            "attention_backend": os.environ.get("OREAL_TEST_ATTENTION", "triton"),
            "mem_fraction_static": 0.2,
            "enable_memory_saver": True,
        },
        settings=settings,
    )
    yield engine
    engine.shutdown()


def stage(engine: SglangEngine, model_dir: Path, version: int) -> None:
    weights = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in engine.layout.shards[0].params}
    with SafetensorsSource(model_dir) as source:
        load_from_hf(source, engine.layout.shards[0], weights)
    handover = engine.stage(version)
    assert len(handover.groups) > 2
    for number, group in enumerate(handover.groups):
        buffers = handover.open(number)
        for name in group:
            assert buffers[name].is_cuda
            buffers[name].copy_(weights[name])
        handover.hand_over(number)
    engine.load_weights(version)
    engine.release_staging()


def requests() -> list[Request]:
    return [Request(prompt % 4096, i) for i, prompt in enumerate(contract.make_prompts([5, 40, 9, 61]))]


@torch.no_grad()
def check_against_transformers(engine: SglangEngine, model_dir: Path) -> None:
    reference = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).cuda().eval()
    sampling = contract.params(max_new_tokens=20, max_length=128)
    for request, drawn in zip(requests(), engine.generate(requests(), sampling), strict=True):
        ids = torch.tensor([*request.prompt_ids.tolist(), *drawn.token_ids.tolist()], device="cuda")
        logp = reference(ids[None]).logits[0].log_softmax(-1)[len(request.prompt_ids) - 1 : -1]
        own = logp.gather(1, torch.tensor(drawn.token_ids, device="cuda").long()[:, None])[:, 0].cpu()
        assert (own - torch.tensor(drawn.logp)).abs().max() < TOLERANCE


def test_weights_arrive_by_cuda_ipc_in_two_buckets(engine: SglangEngine, model_dir: Path):
    stage(engine, model_dir, 0)
    check_against_transformers(engine, model_dir)


def test_sleep_gives_the_devices_memory_back_and_wake_takes_it(engine: SglangEngine, model_dir: Path):
    before = torch.cuda.mem_get_info()[0]
    engine.sleep()
    asleep = torch.cuda.mem_get_info()[0]
    assert asleep - before > 0.1 * torch.cuda.mem_get_info()[1], "mem_fraction_static=0.2 of the device"
    engine.wake(["weights"])
    stage(engine, model_dir, 1)
    engine.wake()
    assert torch.cuda.mem_get_info()[0] < asleep - 0.5 * (asleep - before)
    check_against_transformers(engine, model_dir)


def test_shared_memory_that_no_worker_counts_back_is_freed_all_the_same():
    before = torch.cuda.memory_allocated()
    segment = CudaSegment.create(2**26, torch.device("cuda", torch.cuda.current_device()))
    segment.describe()  # from here on it counts as a worker's; that of a killed server never lets go
    assert torch.cuda.memory_allocated() >= before + 2**26
    segment.close()
    assert torch.cuda.memory_allocated() == before


def test_a_killed_server_returns_with_the_kept_weights_in_the_same_step(engine: SglangEngine, model_dir: Path):
    restarts = engine.num_restarts
    for pid in group_members(engine._server.pid)[1:]:
        os.kill(pid, signal.SIGKILL)
    check_against_transformers(engine, model_dir)
    assert engine.num_restarts == restarts + 1
    with pytest.raises(EngineError, match="not newer"):
        engine.load_weights(1)
