"""What only the embedded engine promises: its schedule, its cache, its weight layout."""

import heapq
import json

import engine_contract as contract
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_oreal.errors import UserError
from megatron_oreal.layout.model_spec import ModelSpec, RopeSpec, load_model_spec
from megatron_oreal.rollout import embedded
from megatron_oreal.rollout.embedded import EmbeddedEngine
from megatron_oreal.rollout.embedded_model import weight_shapes
from megatron_oreal.rollout.engine import EngineError, Request
from megatron_oreal.rollout.hf_weights import load_hf_engine
from megatron_oreal.rollout.kv_cache import KvCache


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return contract.save_random_model(tmp_path_factory.mktemp("embedded"), "qwen2_tied")


def build(model_dir, slots: int, max_length: int = 512, dtype: torch.dtype = torch.float32) -> EmbeddedEngine:
    return load_hf_engine(model_dir, dtype=dtype, max_running_requests=slots, max_length=max_length)


def steps_of_continuous_batching(lengths: list[int], slots: int) -> int:
    """Steps until the last response ends when each slot takes the next request as soon as it is free."""
    free_at = [0] * slots
    for length in lengths:
        heapq.heapreplace(free_at, free_at[0] + length)
    return max(free_at)


@pytest.mark.parametrize("slots", [1, 5, 16])
def test_a_free_slot_is_refilled_in_the_next_step(model_dir, slots):
    prompts = contract.make_prompts([3, 6, 10])
    requests = [Request(prompts[i % 3], i) for i in range(40)]
    engine = build(model_dir, slots)
    got = engine.generate(requests, contract.params(stop_token_id=3, max_new_tokens=120, max_length=256))
    lengths = [len(completion.token_ids) for completion in got]
    static = sum(max(lengths[i : i + slots]) for i in range(0, len(lengths), slots))
    assert engine.num_decode_steps == steps_of_continuous_batching(lengths, slots)
    if slots > 1:
        assert engine.num_decode_steps < 0.7 * static


def test_samples_of_a_prompt_share_its_prefill_and_come_out_as_without_sharing(model_dir):
    prompts = contract.make_prompts([70, 12, 130])
    requests = [Request(prompts[i // 16], 96 + i) for i in range(48)]  # no draw near a border between two tokens
    sampling = contract.params(max_length=256)
    shared, alone = build(model_dir, slots=48), build(model_dir, slots=1)
    tokens = contract.tokens_of(shared.generate(requests, sampling))
    assert tokens == contract.tokens_of(alone.generate(requests, sampling))
    assert shared.num_prefill_tokens == 69 + 11 + 129
    assert alone.num_prefill_tokens == 16 * (69 + 11 + 129)


def test_a_refilled_slot_takes_the_prompt_from_a_running_one(model_dir):
    requests = [Request(contract.make_prompts([20])[0], i) for i in range(64)]
    engine = build(model_dir, slots=8)
    engine.generate(requests, contract.params(stop_token_id=3, max_new_tokens=100, max_length=256))
    assert engine.num_prefill_tokens < 3 * 19


def test_long_responses_cross_every_pool_and_still_equal_hugging_face(model_dir):
    prompts = contract.make_prompts([5, 60, 64, 65, 120])
    engine = build(model_dir, slots=3, max_length=400)
    got = engine.generate(
        [Request(p, i) for i, p in enumerate(prompts)], contract.params(max_new_tokens=300, max_length=400)
    )
    for prompt, completion in zip(prompts, got, strict=True):
        tokens = [*prompt.tolist(), *completion.token_ids.tolist()]
        assert len(tokens) == min(400, len(prompt) + 300)
        log_probs = contract.hf_log_probs(model_dir, tokens, 1.0)[len(prompt) - 1 : -1]
        expected = log_probs.gather(1, torch.from_numpy(completion.token_ids).long()[:, None])[:, 0]
        np.testing.assert_allclose(completion.logp, expected.numpy(), atol=2e-5, rtol=0)


def test_prompts_beyond_the_prefill_budget_are_run_in_several_forwards(model_dir, monkeypatch):
    prompts = contract.make_prompts([9, 50, 51, 52, 90, 100, 200])
    requests, sampling = [Request(p, i) for i, p in enumerate(prompts)], contract.params(max_length=256)
    expected = contract.tokens_of(build(model_dir, slots=7).generate(requests, sampling))
    monkeypatch.setattr(embedded, "_PREFILL_TOKENS", 104)
    widths = []
    engine = build(model_dir, slots=7)
    prefill = engine._model.prefill

    def spy(tokens, pool, rows):
        widths.append(tuple(tokens.shape))
        prefill(tokens, pool, rows)

    engine._model.prefill = spy
    assert contract.tokens_of(engine.generate(requests, sampling)) == expected
    assert widths == [(2, 49), (2, 51), (1, 89), (1, 99), (1, 199)]


def test_bfloat16_follows_hugging_face_in_bfloat16(model_dir):
    prompt = contract.make_prompts([24])[0]
    got = build(model_dir, slots=2, dtype=torch.bfloat16).generate([Request(prompt, 5)], contract.params())[0]
    tokens = torch.tensor([[*prompt.tolist(), *got.token_ids.tolist()]])
    exact = torch.log_softmax(contract.hf_model(model_dir)(tokens).logits[0], -1)
    rounded = torch.log_softmax(contract.hf_model(model_dir).bfloat16()(tokens).logits[0].float(), -1)
    ids = torch.from_numpy(got.token_ids).long()[:, None]
    exact, rounded = (x[23:-1].gather(1, ids)[:, 0].detach().numpy() for x in (exact, rounded))
    assert np.abs(got.logp - exact).mean() < 2 * np.abs(rounded - exact).mean()


def test_weights_that_are_not_finite_are_reported_with_their_version_and_leave_no_trace(model_dir):
    engine, requests = build(model_dir, slots=2), [Request(contract.make_prompts([5])[0], 1)]
    expected = contract.tokens_of(engine.generate(requests, contract.params()))
    weight = engine.weight_buffers()["model.layers.0.mlp.down_proj.weight"]
    saved = weight.clone()
    weight.fill_(torch.nan)
    engine.load_weights(7)
    with pytest.raises(EngineError, match=r"version 7 .* not finite"):
        engine.generate(requests, contract.params())
    weight.copy_(saved)
    engine.load_weights(8)
    assert contract.tokens_of(engine.generate(requests, contract.params())) == expected


def test_the_callback_may_raise_but_not_call_the_engine(model_dir):
    engine, requests = build(model_dir, slots=2), [Request(contract.make_prompts([5])[0], 1)]
    with pytest.raises(EngineError, match="generating"):
        engine.generate(requests, contract.params(), lambda i, completion: engine.sleep())
    with pytest.raises(KeyError):
        engine.generate(requests, contract.params(), lambda i, completion: {}[i])
    assert engine.health().detail == "idle"
    assert len(engine.generate(requests, contract.params())) == 1


def test_lengths_beyond_the_engine_or_the_model_are_refused(model_dir):
    with pytest.raises(UserError, match=r"max_length=513 .* max_position_embeddings=512"):
        build(model_dir, slots=1, max_length=513)
    engine = build(model_dir, slots=1, max_length=32)
    with pytest.raises(EngineError, match="max_length=33 exceeds the engine's 32"):
        engine.generate([Request(np.array([1], dtype=np.int32), 0)], contract.params(max_length=33))


@pytest.mark.parametrize("name", contract.MODELS)
def test_weight_buffers_have_the_parameters_of_the_model(tmp_path, name):
    spec = load_model_spec(contract.save_random_model(tmp_path, name))
    engine = EmbeddedEngine(spec, dtype=torch.float32, max_running_requests=1, max_length=8)
    buffers = engine.weight_buffers()
    assert {key: tuple(tensor.shape) for key, tensor in buffers.items()} == weight_shapes(spec)
    assert sum(tensor.numel() for tensor in buffers.values()) == spec.num_parameters()
    assert ("lm_head.weight" in buffers) == (not spec.tied_embeddings)


def test_cache_keeps_every_sequence_through_random_moves():
    spec = ModelSpec("llama", 2, 8, 8, 2, 2, 4, 10, 1024, 1e-6, True, False, False, RopeSpec(1e4))
    slots, rng = 64, np.random.default_rng(0)
    cache = KvCache(spec, slots, 300, torch.float32, torch.device("cpu"))
    assert [pool.capacity for pool in cache.pools] == [64, 128, 256, 300]
    mark: dict[int, float] = {}

    def columns(slot: int) -> torch.Tensor:
        return cache.pools[cache.pool_of[slot]].data[:, :, cache.row_of[slot], :, :40]

    for step in range(100):
        for slot in [s for s in mark if rng.random() < 0.2]:
            cache.release(slot)
            del mark[slot]
        pools = cache.pool_of.copy()
        for pool in (2, 1, 0):
            movers = np.array([s for s in mark if pools[s] == pool and rng.random() < 0.2], dtype=np.int64)
            if movers.size:
                cache.promote(movers)
        sources = list(mark)
        for slot in [s for s in range(slots) if s not in mark and rng.random() < 0.5]:
            cache.admit(slot, int(rng.integers(41, 301)))
            if sources and rng.random() < 0.5:
                source = int(rng.choice(sources))
                cache.copy_prefixes(*np.array([[source], [slot], [40]]))
                mark[slot] = mark[source]
            else:
                mark[slot] = float(step * slots + slot)
                columns(slot).fill_(mark[slot])
        order = cache.close_gaps().tolist()
        assert sorted(order) == sorted(mark)
        assert order == sorted(order, key=lambda s: (cache.pool_of[s], cache.row_of[s]))
        assert [
            int(r) for p in range(4) for r in sorted(cache.row_of[[s for s in order if cache.pool_of[s] == p]])
        ] == [row for pool in cache.pools for row in range(len(pool.slots))]
        for slot, value in mark.items():
            assert (columns(slot) == value).all()
        assert all(pool.data.shape[2] <= slots for pool in cache.pools)
    assert max(pool.data.shape[2] for pool in cache.pools) > 16, "no pool had to grow"


def test_a_sharded_checkpoint_gives_the_same_weights(model_dir, tmp_path):
    tensors = load_file(model_dir / "model.safetensors")
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    sharded, whole = build(tmp_path, slots=1).weight_buffers(), build(model_dir, slots=1).weight_buffers()
    assert all(torch.equal(sharded[name], whole[name]) for name in whole)


def test_checkpoints_with_missing_or_misshapen_tensors_are_refused_by_name(model_dir, tmp_path):
    (tmp_path / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        build(tmp_path, slots=1)
    tensors = load_file(model_dir / "model.safetensors")
    save_file(tensors | {"model.norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.norm\.weight' has shape \[3\], config\.json asks for \[32\]"):
        build(tmp_path, slots=1)
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"tensor 'model\.layers\.1\.self_attn\.k_proj\.bias' \[\d+\] is missing"):
        build(tmp_path, slots=1)
