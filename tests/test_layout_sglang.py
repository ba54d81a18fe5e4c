"""The SGLang layout against SGLang's own models where it is installed, and against its splits written out again."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_layout_megatron import FAMILIES, Arrays, assert_same, follow_plan, place, small_spec, unique_values

from megatron_oreal.errors import UserError
from megatron_oreal.layout import (
    ModelSpec,
    embedded_layout,
    hf_layout,
    megatron_layout,
    sglang_layout,
    sglang_padded_vocab_size,
)


def sglang_oracle(spec: ModelSpec, hf: Arrays, tp: int, padded_vocab: int) -> list[Arrays]:
    """Every rank's parameters as SGLang's weight loaders cut them from whole tensors, one narrow at a time."""

    def vocab(table: np.ndarray, rank: int) -> np.ndarray:
        height = padded_vocab // tp
        held = np.zeros((height, table.shape[1]), table.dtype)
        rows = table[rank * height : (rank + 1) * height]
        held[: len(rows)] = rows
        return held

    def qkv(layer: str, kind: str, rank: int) -> np.ndarray:
        query, key, value = (hf[f"{layer}self_attn.{part}_proj.{kind}"] for part in "qkv")
        replicas = max(1, tp // spec.num_kv_heads)
        height = max(1, spec.num_kv_heads // tp) * spec.head_dim
        start = rank // replicas * height
        query_height = spec.num_heads // tp * spec.head_dim
        parts = query[rank * query_height :][:query_height], key[start:][:height], value[start:][:height]
        return np.concatenate(parts)

    ranks = []
    for rank in range(tp):
        held = {"model.embed_tokens.weight": vocab(hf["model.embed_tokens.weight"], rank)}
        held["model.norm.weight"] = hf["model.norm.weight"]
        if not spec.tied_embeddings:
            held["lm_head.weight"] = vocab(hf["lm_head.weight"], rank)
        for number in range(spec.num_layers):
            layer = f"model.layers.{number}."
            for norm in ("input_layernorm", "post_attention_layernorm"):
                held[f"{layer}{norm}.weight"] = hf[f"{layer}{norm}.weight"]
            held[f"{layer}self_attn.qkv_proj.weight"] = qkv(layer, "weight", rank)
            if spec.qkv_bias:
                held[f"{layer}self_attn.qkv_proj.bias"] = qkv(layer, "bias", rank)
            if spec.qk_norm:
                for which in "qk":
                    held[f"{layer}self_attn.{which}_norm.weight"] = hf[f"{layer}self_attn.{which}_norm.weight"]
            rows = spec.ffn_hidden_size // tp
            halves = [hf[f"{layer}mlp.{half}_proj.weight"][rank * rows :][:rows] for half in ("gate", "up")]
            held[f"{layer}mlp.gate_up_proj.weight"] = np.concatenate(halves)
            for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
                held[layer + name] = np.split(hf[layer + name], tp, axis=1)[rank]
        ranks.append(held)
    return ranks


def spec_of(family: str, tied: bool, heads: int, kv_heads: int, vocab: int) -> ModelSpec:
    spec = small_spec(family, tied=tied, heads=heads, kv_heads=kv_heads, layers=2, vocab=vocab)
    return replace(spec, hidden_size=18 if heads == 9 else 16, ffn_hidden_size=144)


CASES = [
    (family, tied, heads, kv_heads, vocab, tp)
    for family in FAMILIES
    for tied in (False, True)
    for heads, kv_heads, vocab, tps in ((8, 2, 101, (1, 2, 4, 8)), (16, 4, 320, (8,)), (9, 3, 130, (1,)))
    for tp in tps
]
CPU_CASES = [(family, True, 9, 3, vocab, tp) for family in FAMILIES for vocab in (101, 193) for tp in (3, 9)]


def check(spec: ModelSpec, tp: int, device: str) -> None:
    hf = unique_values(spec)
    layout = sglang_layout(spec, tp=tp, device=device)
    want = sglang_oracle(spec, hf, tp, sglang_padded_vocab_size(spec.vocab_size, tp=tp, device=device))
    assert_same(place(layout, hf), want)
    megatron_tp = min(tp, spec.num_kv_heads) if spec.num_heads == 9 else tp
    for source in (
        hf_layout(spec),
        megatron_layout(spec, tp=megatron_tp, pp=2, vocab_divisor=7),
        megatron_layout(spec, tp=1, pp=1),
    ):
        assert_same(follow_plan(source, layout, place(source, hf)), want)
        assert_same(follow_plan(layout, source, want), place(source, hf))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_sglang_shard_is_what_its_loaders_would_cut(family: str) -> None:
    for case in CASES:
        if case[0] == family:
            check(spec_of(*case[:5]), case[5], "cuda")
    for case in CPU_CASES:
        if case[0] == family:
            check(spec_of(*case[:5]), case[5], "cpu")


def test_embedded_engine_is_sglang_at_tp_1_without_padding() -> None:
    for tied in (False, True):
        padded, exact = spec_of("qwen2", tied, 8, 2, 101), spec_of("qwen2", tied, 8, 2, 128)
        assert embedded_layout(exact).shards == sglang_layout(exact, tp=1).shards
        ours, theirs = embedded_layout(padded).shards[0], sglang_layout(padded, tp=1).shards[0]
        assert (ours.padding, ours.blocks) == ((), theirs.blocks)
        tables = ["model.embed_tokens.weight"] if tied else ["model.embed_tokens.weight", "lm_head.weight"]
        assert sorted(theirs.padding) == sorted((name, ((101, 128), (0, 16))) for name in tables)


@pytest.mark.parametrize(
    ("vocab", "tp", "device", "rows"),
    [
        (152064, 4, "cuda", 152064),
        (151936, 8, "cuda", 151936),
        (49153, 2, "cuda", 49216),
        (128256, 16, "cuda", 128256),
        (101, 3, "cpu", 192),
        (193, 3, "cpu", 384),
        (180, 3, "cpu", 192),
    ],
)
def test_padded_vocabulary_is_a_multiple_of_64_and_of_more_only_on_a_cpu(
    vocab: int, tp: int, device: str, rows: int
) -> None:
    assert sglang_padded_vocab_size(vocab, tp=tp, device=device) == rows


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ffn", "vocab", "tp", "message"),
    [
        (6, 2, 144, 192, 4, "tp_size=4 does not divide num_attention_heads=6"),
        (12, 3, 144, 192, 2, "tp_size=2 is neither a divisor nor a multiple of num_key_value_heads=3"),
        (16, 16, 24, 192, 16, "tp_size=16 does not divide intermediate_size=24"),
        (9, 3, 144, 101, 3, "tp_size=3 does not divide its 128 vocabulary rows"),
        (8, 2, 144, 101, 0, "tp_size=0 is not a positive number"),
    ],
)
def test_sizes_that_sglang_refuses_are_user_errors(
    heads: int, kv_heads: int, ffn: int, vocab: int, tp: int, message: str
) -> None:
    spec = replace(spec_of("qwen2", False, heads, kv_heads, vocab), ffn_hidden_size=ffn)
    with pytest.raises(UserError, match=message) as caught:
        sglang_layout(spec, tp=tp)
    assert "\n" not in str(caught.value)


NO_SGLANG = "SGLang is not installed: bash tests/setup_sglang.sh"


@pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason=NO_SGLANG)
@pytest.mark.parametrize("device", ["cuda", pytest.param("cpu", marks=pytest.mark.slow)])
def test_parameters_loaded_by_sglangs_own_models_are_the_layouts(device: str) -> None:
    """Builds SGLang's models rank by rank and loads HF weights into them through their ``load_weights``.

    They are built for SGLang's CPU engine; for ``cuda`` the flag by which its layers tell the two apart is turned
    off in them. No kernel runs.
    """
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "SGLANG_USE_CPU_ENGINE": "1"}
    done = subprocess.run(
        [sys.executable, __file__, device], env=env, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["device"] == device
    cases = CASES + CPU_CASES if device == "cpu" else CASES
    assert report["ranks"] == sum(case[5] for case in cases)
    assert report["refused"] == (len(CPU_CASES) if device == "cuda" else 0)


def _compare_with_sglang(device: str) -> dict:
    import tempfile

    import torch
    from sglang.srt import runtime_context
    from sglang.srt.distributed import parallel_state
    from sglang.srt.layers import linear, parameter, vocab_parallel_embedding
    from sglang.srt.server_args import ServerArgs
    from test_layout_families import transformers_config

    for module in (linear, parameter, vocab_parallel_embedding):
        assert module._is_cpu is True
        module._is_cpu = device == "cpu"
    with tempfile.TemporaryDirectory() as folder:
        transformers_config(spec_of(*CASES[0][:5])).save_pretrained(folder)
        args = ServerArgs(model_path=folder, device="cpu", skip_tokenizer_init=True)
        runtime_context.publish(args, role="test")
        parallel_state.init_distributed_environment(
            world_size=1, rank=0, distributed_init_method=f"file://{folder}/rendezvous", backend="gloo"
        )
        parallel_state.initialize_model_parallel(backend="gloo")
    torch.set_default_dtype(torch.float32)
    ranks = refused = 0
    for family, tied, heads, kv_heads, vocab, tp in CASES + CPU_CASES:
        spec = spec_of(family, tied, heads, kv_heads, vocab)
        hf = unique_values(spec)
        try:
            want = place(sglang_layout(spec, tp=tp, device=device), hf)
        except UserError:
            _check_refused(spec, tp)
            refused += 1
            continue
        for rank in range(tp):
            model = _build(spec, tp, rank)
            model.load_weights((name, torch.tensor(value, dtype=torch.float32)) for name, value in hf.items())
            real = {name: param.detach().numpy().astype(np.int64) for name, param in model.named_parameters()}
            assert_same([real], [want[rank]])
            ranks += 1
    return {"device": device, "ranks": ranks, "refused": refused}


def _build(spec: ModelSpec, tp: int, rank: int):
    from sglang.srt.models.registry import ModelRegistry
    from sglang.srt.runtime_context import get_parallel
    from test_layout_families import transformers_config

    config = transformers_config(spec)
    model_class, _ = ModelRegistry.resolve_model_cls(config.architectures)
    sizes = {"tp_size": tp, "tp_rank": rank, "attn_tp_size": tp, "attn_tp_rank": rank}
    with get_parallel().override(**sizes, attn_dp_size=1, attn_dp_rank=0):
        return model_class(config)


def _check_refused(spec: ModelSpec, tp: int) -> None:
    try:
        _build(spec, tp, 0)
    except AssertionError:
        return
    raise SystemExit(f"the layout refuses tp={tp} of {spec}, SGLang does not")


if __name__ == "__main__":
    print(json.dumps(_compare_with_sglang(sys.argv[1])))
