"""The tables of the model families: every Hugging Face tensor, its shape, and which tensors are fused into one weight.

A decoder layer is a row of ``Weight``: a role that the parallel layouts place (``megatron.py``, ``engines.py``), and
the HF tensors it is made of. A weight of several tensors (``qkv_weight``, ``qkv_bias``, ``gate_up``) is held as one
parameter by Megatron and by the engines; *how* they interleave it is theirs to say.

To add a family of dense decoders: give its layer a row in ``FAMILY_LAYERS`` and its architecture a line in
``ARCHITECTURES``. A new role needs one line in the tables of ``megatron.py`` and ``engines.py`` as well. Nothing else
knows the families; ``docs/layout.md`` has the steps and names the tests that check a new row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_oreal.layout.blocks import Rows, Shape

if TYPE_CHECKING:
    from megatron_oreal.layout.model_spec import ModelSpec

Role = Literal[
    "attention_norm", "qkv_weight", "qkv_bias", "q_norm", "k_norm", "attention_out", "mlp_norm", "gate_up", "down"
]  # fmt: skip

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"
SCORE = "score.weight"
"""The reward model's scalar head [1, hidden], named as ``*ForSequenceClassification`` names it."""


@dataclass(frozen=True, slots=True)
class Weight:
    """``role``; ``parts``: HF name below ``model.layers.{i}.`` and shape of each tensor, in sizes of ``_sizes``."""

    role: Role
    parts: tuple[tuple[str, tuple[str, ...]], ...]


_ATTENTION_NORM = Weight("attention_norm", (("input_layernorm.weight", ("hidden",)),))
_QKV_WEIGHT = Weight(
    "qkv_weight",
    (
        ("self_attn.q_proj.weight", ("q", "hidden")),
        ("self_attn.k_proj.weight", ("kv", "hidden")),
        ("self_attn.v_proj.weight", ("kv", "hidden")),
    ),
)
_QKV_BIAS = Weight(
    "qkv_bias",
    (("self_attn.q_proj.bias", ("q",)), ("self_attn.k_proj.bias", ("kv",)), ("self_attn.v_proj.bias", ("kv",))),
)
_Q_NORM = Weight("q_norm", (("self_attn.q_norm.weight", ("head_dim",)),))
_K_NORM = Weight("k_norm", (("self_attn.k_norm.weight", ("head_dim",)),))
_ATTENTION_OUT = Weight("attention_out", (("self_attn.o_proj.weight", ("hidden", "q")),))
_MLP_NORM = Weight("mlp_norm", (("post_attention_layernorm.weight", ("hidden",)),))
_GATE_UP = Weight(
    "gate_up", (("mlp.gate_proj.weight", ("ffn", "hidden")), ("mlp.up_proj.weight", ("ffn", "hidden")))
)  # fmt: skip
_DOWN = Weight("down", (("mlp.down_proj.weight", ("hidden", "ffn")),))

FAMILY_LAYERS: dict[str, tuple[Weight, ...]] = {
    "llama": (_ATTENTION_NORM, _QKV_WEIGHT, _ATTENTION_OUT, _MLP_NORM, _GATE_UP, _DOWN),
    "qwen2": (_ATTENTION_NORM, _QKV_WEIGHT, _QKV_BIAS, _ATTENTION_OUT, _MLP_NORM, _GATE_UP, _DOWN),
    "qwen3": (_ATTENTION_NORM, _QKV_WEIGHT, _Q_NORM, _K_NORM, _ATTENTION_OUT, _MLP_NORM, _GATE_UP, _DOWN),
}

ARCHITECTURES: dict[str, str] = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "LlamaForCausalLM": "llama",
}
"""Architecture in ``config.json`` to family: the language models. Distilled and fine-tuned models keep theirs."""
CLASSIFIER = "ForSequenceClassification"
"""In the place of ``ForCausalLM`` in the architecture of a family's reward model."""


def has_role(family: str, role: Role) -> bool:
    """Whether the layers of a family have a weight of this role."""
    return any(weight.role == role for weight in FAMILY_LAYERS[family])


def _sizes(spec: ModelSpec) -> dict[str, int]:
    return {
        "hidden": spec.hidden_size,
        "ffn": spec.ffn_hidden_size,
        "q": spec.q_size,
        "kv": spec.kv_size,
        "head_dim": spec.head_dim,
    }


def layer_weights(spec: ModelSpec, layer: int) -> list[tuple[Role, tuple[Rows, ...]]]:
    """Return the weights of decoder layer ``layer`` of the whole model: the role, and its HF tensors, whole."""
    sizes = _sizes(spec)
    weights: list[tuple[Role, tuple[Rows, ...]]] = []
    for weight in FAMILY_LAYERS[spec.family]:
        rows = []
        for name, dims in weight.parts:
            rows.append(whole(f"model.layers.{layer}.{name}", tuple(sizes[dim] for dim in dims)))
        weights.append((weight.role, tuple(rows)))
    return weights


def whole(tensor: str, shape: Shape) -> Rows:
    """Return all rows of an HF tensor."""
    return Rows(tensor, shape, 0, shape[0])


def embedding(spec: ModelSpec) -> Rows:
    """Return the input embedding [vocab, hidden]."""
    return whole(EMBEDDING, (spec.vocab_size, spec.hidden_size))


def final_norm(spec: ModelSpec) -> Rows:
    """Return the norm after the last layer [hidden]."""
    return whole(FINAL_NORM, (spec.hidden_size,))


def head(spec: ModelSpec, reward_model: bool) -> Rows:
    """Return what multiplies the last hidden state: the scalar head, the embedding when tied, or ``lm_head``."""
    if reward_model:
        return whole(SCORE, (1, spec.hidden_size))
    return embedding(spec) if spec.tied_embeddings else whole(LM_HEAD, (spec.vocab_size, spec.hidden_size))


def hf_tensors(spec: ModelSpec, *, reward_model: bool = False) -> dict[str, Shape]:
    """Return every HF tensor and its shape, in the order of a checkpoint; a tied ``lm_head`` is not one."""
    rows = [embedding(spec)]
    for layer in range(spec.num_layers):
        rows.extend(part for _, parts in layer_weights(spec, layer) for part in parts)
    rows += [final_norm(spec), head(spec, reward_model)]
    return {row.tensor: row.shape for row in rows if row.tensor is not None}
