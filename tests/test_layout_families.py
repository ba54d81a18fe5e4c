"""The family tables against transformers' own models, and what is read from config.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from test_layout_megatron import FAMILIES, small_spec

from megatron_oreal.errors import UserError
from megatron_oreal.layout import hf_tensors, load_model_spec
from megatron_oreal.layout.model_spec import ModelSpec, model_spec_from_config

PREFIX = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}


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


@pytest.mark.parametrize("family", FAMILIES)
def test_spec_is_read_back_from_a_config_that_transformers_wrote(family: str, tmp_path: Path) -> None:
    spec = small_spec(family, tied=True)
    for kind in ("ForCausalLM", "ForSequenceClassification"):
        transformers_config(spec, kind).save_pretrained(tmp_path)
        assert load_model_spec(tmp_path) == spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"num_key_value_heads": 3}, "is not a multiple of num_key_value_heads=3"),
        ({"hidden_size": "wide"}, "not a positive number"),
        ({"num_attention_heads": 0, "head_dim": None}, "not a positive number"),
        ({"hidden_size": None}, "not a positive number"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type='yarn'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "key 'factor' is missing"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
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
