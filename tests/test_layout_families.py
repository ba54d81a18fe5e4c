"""The family tables against transformers' own models, and what is read from config.json."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from test_layout_megatron import FAMILIES, place, small_spec, unique_values

from megatron_oreal.errors import UserError
from megatron_oreal.layout import (
    Layout,
    embedded_layout,
    hf_layout,
    hf_tensors,
    load_model_spec,
    megatron_layout,
    sglang_layout,
)
from megatron_oreal.layout.families import ARCHITECTURES, FAMILY_LAYERS
from megatron_oreal.layout.model_spec import ModelSpec, model_spec_from_config

PREFIX = {family: name.removesuffix("ForCausalLM") for name, family in ARCHITECTURES.items()}


def transformers_config(spec: ModelSpec, kind: str = "ForCausalLM") -> transformers.PretrainedConfig:
    config = getattr(transformers, f"{PREFIX[spec.family]}Config")(
        num_hidden_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.ffn_hidden_size,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        vocab_size=spec.vocab_size,
        max_position_embeddings=spec.max_position_embeddings,
        rms_norm_eps=spec.norm_eps,
        tie_word_embeddings=spec.tied_embeddings,
        architectures=[f"{PREFIX[spec.family]}{kind}"],
        num_labels=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config.rope_parameters = {"rope_type": "default", "rope_theta": spec.rope.theta}
    return config


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_those_of_transformers(family: str, tied: bool) -> None:
    spec = small_spec(family, tied=tied)
    for kind in ("ForCausalLM", "ForSequenceClassification"):
        with torch.device("meta"):
            model = getattr(transformers, f"{PREFIX[family]}{kind}")(transformers_config(spec, kind))
        shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
        assert hf_tensors(spec, reward_model=kind != "ForCausalLM") == shapes
    assert spec.num_parameters() == sum(torch.Size(shape).numel() for shape in hf_tensors(spec).values())


def test_every_family_has_an_architecture_and_the_tests_go_over_all_of_them() -> None:
    assert sorted(FAMILIES) == sorted(FAMILY_LAYERS) == sorted(ARCHITECTURES.values())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_covers_every_hf_tensor_and_fills_every_parameter_once(family: str, tied: bool) -> None:
    """A family's table is complete for every layout: nothing is left out, put down twice, or filled twice."""
    spec = small_spec(family, tied=tied, heads=8, kv_heads=2)
    table = spec.vocab_size * spec.hidden_size
    for reward_model in (False, True):
        # a layout, and how many of its elements are held once more; None under TP, where norms and KV heads may be
        layouts: list[tuple[Layout, int | None]] = [(hf_layout(spec, reward_model=reward_model), 0)]
        for tp, (pp, vpp), impl in itertools.product((1, 2, 4), ((1, None), (2, 2)), ("local", "transformer_engine")):
            layout = megatron_layout(spec, tp=tp, pp=pp, vpp=vpp, transformer_impl=impl, reward_model=reward_model)
            second_embedding = table if tied and pp > 1 and not reward_model else 0
            layouts.append((layout, second_embedding if tp == 1 else None))
        if not reward_model:
            layouts += [(embedded_layout(spec), 0), (sglang_layout(spec, tp=1), 0)]
            layouts += [(sglang_layout(spec, tp=tp), None) for tp in (2, 4)]
        hf = unique_values(spec, reward_model)
        everything = np.concatenate([value.ravel() for value in hf.values()])
        for layout, repeated in layouts:
            shards = place(layout, hf)  # fails where an element of a parameter is filled twice, or never
            held = np.concatenate([value.ravel() for arrays in shards for value in arrays.values()])
            held = held[held != 0]
            np.testing.assert_array_equal(np.unique(held), np.sort(everything), err_msg=layout.label)
            assert repeated is None or len(held) == len(everything) + repeated, layout.label


@pytest.mark.parametrize("family", FAMILIES)
def test_spec_is_read_back_from_a_config_that_transformers_wrote(family: str, tmp_path: Path) -> None:
    spec = small_spec(family, tied=True)
    for kind in ("ForCausalLM", "ForSequenceClassification"):
        transformers_config(spec, kind).save_pretrained(tmp_path)
        assert load_model_spec(tmp_path) == spec


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
PUBLISHED = {
    # architecture, layers, hidden, ffn, heads, kv heads, vocabulary, tied, extra keys as published, parameters
    "Qwen2.5-7B-Instruct": ("Qwen2", 28, 3584, 18944, 28, 4, 152064, False, {"sliding_window": 131072,
        "use_sliding_window": False, "max_window_layers": 28, "use_mrope": False}, 7_615_616_512),
    "Qwen2.5-32B": ("Qwen2", 64, 5120, 27648, 40, 8, 152064, False, {"use_sliding_window": False}, 32_763_876_352),
    "Qwen2.5-0.5B": ("Qwen2", 24, 896, 4864, 14, 2, 151936, True, {}, 494_032_768),
    "DeepSeek-R1-Distill-Qwen-1.5B": ("Qwen2", 28, 1536, 8960, 12, 2, 151936, False,
        {"rope_theta": 10000, "use_mrope": False}, 1_777_088_000),
    "DeepSeek-R1-Distill-Qwen-7B": ("Qwen2", 28, 3584, 18944, 28, 4, 152064, False, {"rope_theta": 10000},
        7_615_616_512),
    "Qwen3-8B": ("Qwen3", 36, 4096, 12288, 32, 8, 151936, False, {"attention_bias": False, "head_dim": 128,
        "rope_theta": 1000000}, 8_190_735_360),
    "Qwen3-0.6B": ("Qwen3", 28, 1024, 3072, 16, 8, 151936, True, {"attention_bias": False, "head_dim": 128},
        596_049_920),
    "Llama-3.1-8B": ("Llama", 32, 4096, 14336, 32, 8, 128256, False, {"attention_bias": False, "mlp_bias": False,
        "pretraining_tp": 1, "rope_theta": 500000.0, "rope_scaling": LLAMA3}, 8_030_261_248),
    "DeepSeek-R1-Distill-Llama-8B": ("Llama", 32, 4096, 14336, 32, 8, 128256, False, {"rope_scaling": LLAMA3,
        "rope_theta": 500000.0}, 8_030_261_248),
    "SmolLM2-135M": ("Llama", 30, 576, 1536, 9, 3, 49152, True, {"is_llama_config": True, "rope_interleaved": False,
        "rope_scaling": None, "rope_theta": 100000}, 134_515_008),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_number_of_parameters(name: str) -> None:
    prefix, layers, hidden, ffn, heads, kv_heads, vocab, tied, extra, parameters = PUBLISHED[name]
    config = {
        "architectures": [f"{prefix}ForCausalLM"],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 32768,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
    }
    spec = model_spec_from_config(config | extra)
    assert spec.num_parameters() == parameters
    for tp in (1, kv_heads):
        shards = megatron_layout(spec, tp=tp, pp=1).shards
        norms = sum(np.prod(shape) for param, shape in shards[0].params if "norm" in param)
        assert sum(shard.num_elements() for shard in shards) == parameters + (tp - 1) * norms


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"num_key_value_heads": 3}, "is not a multiple of num_key_value_heads=3"),
        ({"hidden_size": "wide"}, "hidden_size='wide' is not a whole number of at least 1"),
        ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads=0 is not a whole number"),
        ({"hidden_size": None}, "hidden_size is null"),
        ({"hidden_size": -64}, "hidden_size=-64 is not a whole number"),
        ({"vocab_size": 0}, "vocab_size=0 is not a whole number"),
        ({"num_hidden_layers": -1}, "num_hidden_layers=-1 is not a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True is not a whole number"),
        ({"head_dim": 16.7}, "head_dim=16.7 is not a whole number"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 is not a whole number"),
        ({"rms_norm_eps": None}, "rms_norm_eps=None is not a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan is not a positive number"),
        ({"architectures": 5}, "architectures=5 is not supported"),
        ({"architectures": []}, "architectures=[] is not supported"),
        ({"architectures": [["a"]]}, "architectures=[['a']] is not supported"),
        ({"architectures": "Qwen2ForCausalLM"}, "architectures='Qwen2ForCausalLM' is not supported"),
        ({"architectures": ["Qwen2ForSequenceClassification"], "id2label": 5}, "of 5 labels is not a reward model"),
        ({"rope_parameters": "x"}, "rope_parameters='x' is not an object"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta=0 is not a positive number"),
        ({"rope_parameters": {"rope_type": ["a"]}}, "rope_type=['a'] is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type='yarn'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling says 'yarn' and rope_parameters 'default'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters of each layer type"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false' is neither true nor false"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "key 'factor' is missing"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"architectures": ["LlamaForCausalLM"], "attention_bias": True}, "attention_bias=true"),
        (
            {"architectures": ["Qwen2ForSequenceClassification"], "id2label": {"0": "bad", "1": "good"}},
            "2 labels is not a reward model",
        ),
    ],
)
def test_configs_that_cannot_be_described_are_one_line_errors(change: dict, message: str) -> None:
    config = transformers_config(small_spec()).to_dict() | change
    with pytest.raises(UserError) as caught:
        model_spec_from_config(config, "somewhere/config.json")
    assert message in str(caught.value)
    assert str(caught.value).startswith("somewhere/config.json: ")
    assert "\n" not in str(caught.value)


def test_config_file_that_is_not_an_object_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_model_spec(tmp_path)
    for text, message in (("{", "not valid JSON"), (json.dumps([1]), "not a JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            load_model_spec(tmp_path)
