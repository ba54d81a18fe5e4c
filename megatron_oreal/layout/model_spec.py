"""What a model is, read from its Hugging Face ``config.json``."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_oreal.errors import UserError
from megatron_oreal.layout.families import ARCHITECTURES, has_role, hf_tensors

_CLASSIFIER = "ForSequenceClassification"
FAMILIES: dict[str, str] = ARCHITECTURES | {
    name.replace("ForCausalLM", _CLASSIFIER): family for name, family in ARCHITECTURES.items()
}
"""Architecture to family. A sequence classifier with one label is a reward model: the same backbone, a scalar head."""


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding: ``kind`` is Hugging Face's ``rope_type``. Only scalings that leave cos and sin unscaled."""

    theta: float
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def inverse_frequencies(self, head_dim: int) -> list[float]:
        """Angular frequency (radians a position) of each of the ``head_dim // 2`` rotated pairs, in float64."""
        freqs = [self.theta ** (-2.0 * i / head_dim) for i in range(head_dim // 2)]
        if self.kind == "linear":
            return [f / self.factor for f in freqs]
        if self.kind == "llama3":
            return [self._llama3(f) for f in freqs]
        return freqs

    def _llama3(self, freq: float) -> float:
        """Llama 3.1: long wavelengths are stretched by ``factor``, short ones kept, the band between blended."""
        wavelength = 2 * math.pi / freq
        turns = self.original_max_position_embeddings / wavelength
        if turns > self.high_freq_factor:
            return freq
        if turns < self.low_freq_factor:
            return freq / self.factor
        blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return (1 - blend) * freq / self.factor + blend * freq


@dataclass(frozen=True)
class ModelSpec:
    """The shape of a dense decoder-only model (RMSNorm, RoPE, SwiGLU, GQA). Sizes are in elements."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    rope: RopeSpec

    @property
    def q_size(self) -> int:
        """Rows of the query projection."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.num_kv_heads * self.head_dim

    def num_parameters(self) -> int:
        """Parameters of the whole language model, a tied embedding counted once."""
        return sum(math.prod(shape) for shape in hf_tensors(self).values())


def load_model_spec(model_dir: str | Path) -> ModelSpec:
    """Read ``config.json`` of a Hugging Face model directory.

    Raises ``UserError`` when the file is missing or malformed, the architecture is not one of ``FAMILIES``, or the
    config asks for something that the table of its family does not describe.
    """
    path = Path(model_dir) / "config.json"
    if not path.is_file():
        raise UserError(f"model directory {str(model_dir)!r} has no config.json: give a Hugging Face model directory")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a JSON object")
    return model_spec_from_config(config, str(path))


def model_spec_from_config(config: dict[str, Any], origin: str = "config.json") -> ModelSpec:
    """Build the spec from a parsed ``config.json``; ``origin`` names the file in error messages."""
    architectures = config.get("architectures") or [None]
    family = FAMILIES.get(architectures[0])
    if family is None:
        raise UserError(f"{origin}: architectures={architectures} is not supported: use one of {', '.join(FAMILIES)}")
    _refuse_unsupported(config, family, origin)
    try:
        heads = int(config["num_attention_heads"])
        hidden = int(config["hidden_size"])
        spec = ModelSpec(
            family=family,
            num_layers=int(config["num_hidden_layers"]),
            hidden_size=hidden,
            ffn_hidden_size=int(config["intermediate_size"]),
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            vocab_size=int(config["vocab_size"]),
            max_position_embeddings=int(config["max_position_embeddings"]),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=has_role(family, "qkv_bias"),
            qk_norm=has_role(family, "q_norm"),
            rope=_rope_spec(config, origin),
        )
    except KeyError as error:
        raise UserError(f"{origin}: key {error} is missing") from None
    except UserError:
        raise
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{origin}: a size or a rope parameter is not a positive number ({error})") from None
    if spec.num_heads % spec.num_kv_heads:
        raise UserError(
            f"{origin}: num_attention_heads={spec.num_heads} is not a multiple of "
            f"num_key_value_heads={spec.num_kv_heads}"
        )
    return spec


def _refuse_unsupported(config: dict[str, Any], family: str, origin: str) -> None:
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"{origin}: hidden_act={config['hidden_act']!r} is not supported: only 'silu'")
    if config.get("use_sliding_window"):
        raise UserError(f"{origin}: use_sliding_window=true is not supported: set it to false")
    if config.get("attention_bias") and not has_role(family, "qkv_bias"):
        raise UserError(f"{origin}: attention_bias=true is not supported for {family}")
    labels = len(config.get("id2label") or (0, 1))  # transformers' default is two labels
    if config["architectures"][0].endswith(_CLASSIFIER) and labels != 1:
        raise UserError(
            f"{origin}: a {config['architectures'][0]} of {labels} labels is not a reward model: it needs 1"
        )
    if config.get("mlp_bias"):
        raise UserError(f"{origin}: mlp_bias=true is not supported")
    if config.get("quantization_config"):
        raise UserError(f"{origin}: quantization_config is not supported: give an unquantized model")


def _rope_spec(config: dict[str, Any], origin: str) -> RopeSpec:
    """Read ``rope_parameters`` (transformers 5), or ``rope_theta`` and ``rope_scaling`` (earlier versions)."""
    rope = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    kind = rope.get("rope_type") or rope.get("type") or "default"
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    if float(rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0) != 1.0:
        raise UserError(f"{origin}: partial_rotary_factor is not supported: only 1.0")
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind not in ("linear", "llama3"):
        raise UserError(f"{origin}: rope_type={kind!r} is not supported: use default, linear or llama3")
    if kind == "linear":
        return RopeSpec(theta=theta, kind="linear", factor=float(rope["factor"]))
    return RopeSpec(
        theta=theta,
        kind="llama3",
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
    )
