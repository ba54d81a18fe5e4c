"""What a model is, read from its Hugging Face ``config.json``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_oreal.errors import UserError, seen_from
from megatron_oreal.layout.families import ARCHITECTURES, CLASSIFIER, has_role, hf_tensors
from megatron_oreal.layout.files import is_file, read_json

FAMILIES: dict[str, str] = ARCHITECTURES | {
    name.replace("ForCausalLM", CLASSIFIER): family for name, family in ARCHITECTURES.items()
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
    if not is_file(path):
        raise UserError(
            f"model directory {str(model_dir)!r} has no config.json{seen_from(path)}: give a Hugging Face model "
            "directory"
        )
    return model_spec_from_config(read_json(path), str(path))


def model_spec_from_config(config: dict[str, Any], origin: str = "config.json") -> ModelSpec:
    """Build the spec from a parsed ``config.json``; ``origin`` names the file in error messages."""
    architecture = _architecture(config, origin)
    family = FAMILIES[architecture]
    _refuse_unsupported(config, architecture, origin)
    heads = _size(config, "num_attention_heads", origin)
    hidden = _size(config, "hidden_size", origin)
    spec = ModelSpec(
        family=family,
        num_layers=_size(config, "num_hidden_layers", origin),
        hidden_size=hidden,
        ffn_hidden_size=_size(config, "intermediate_size", origin),
        num_heads=heads,
        num_kv_heads=_size(config, "num_key_value_heads", origin, heads),
        head_dim=_size(config, "head_dim", origin, max(1, hidden // heads)),
        vocab_size=_size(config, "vocab_size", origin),
        max_position_embeddings=_size(config, "max_position_embeddings", origin),
        norm_eps=_number(config, "rms_norm_eps", origin, 1e-6),
        tied_embeddings=_flag(config, "tie_word_embeddings", origin),
        qkv_bias=has_role(family, "qkv_bias"),
        qk_norm=has_role(family, "q_norm"),
        rope=_rope_spec(config, origin),
    )
    if spec.num_heads % spec.num_kv_heads:
        raise UserError(
            f"{origin}: num_attention_heads={spec.num_heads} is not a multiple of "
            f"num_key_value_heads={spec.num_kv_heads}"
        )
    return spec


def _architecture(config: dict[str, Any], origin: str) -> str:
    """Return the first of ``architectures``, one of ``FAMILIES``."""
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    if not isinstance(first, str) or first not in FAMILIES:
        raise UserError(f"{origin}: architectures={named!r} is not supported: use one of [{', '.join(FAMILIES)}]")
    return first


def _size(config: dict[str, Any], key: str, origin: str, default: int | None = None) -> int:
    """Return an integer of at least 1; ``default`` where the key is absent or null."""
    value = config.get(key)
    if value is None and default is not None:
        return default
    if value is None:
        raise UserError(f"{origin}: key {key!r} is missing" if key not in config else f"{origin}: {key} is null")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{origin}: {key}={value!r} is not a whole number of at least 1")
    return value


def _number(config: dict[str, Any], key: str, origin: str, default: float | None = None) -> float:
    """Return a positive finite number; ``default`` where the key is absent."""
    if key not in config and default is not None:
        return default
    if key not in config:
        raise UserError(f"{origin}: key {key!r} is missing")
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{origin}: {key}={value!r} is not a positive number")
    return float(value)


def _flag(config: dict[str, Any], key: str, origin: str) -> bool:
    """Return a boolean; False where the key is absent or null, as in transformers' classes of these families."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{origin}: {key}={value!r} is neither true nor false")
    return bool(value)


def _refuse_unsupported(config: dict[str, Any], architecture: str, origin: str) -> None:
    family = FAMILIES[architecture]
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"{origin}: hidden_act={config['hidden_act']!r} is not supported: only 'silu'")
    if config.get("use_sliding_window"):
        raise UserError(f"{origin}: use_sliding_window=true is not supported: set it to false")
    if config.get("attention_bias") and not has_role(family, "qkv_bias"):
        raise UserError(f"{origin}: attention_bias=true is not supported for {family}")
    named = config.get("id2label") or {"0": "", "1": ""}  # transformers' default is two labels
    labels = len(named) if isinstance(named, dict) else repr(named)
    if architecture.endswith(CLASSIFIER) and labels != 1:
        raise UserError(f"{origin}: a {architecture} of {labels} labels is not a reward model: it needs 1")
    if config.get("mlp_bias"):
        raise UserError(f"{origin}: mlp_bias=true is not supported")
    if config.get("quantization_config"):
        raise UserError(f"{origin}: quantization_config is not supported: give an unquantized model")


def _rope_type(rope: dict[str, Any]) -> Any:
    return rope.get("rope_type") or rope.get("type") or "default"


def _rope_spec(config: dict[str, Any], origin: str) -> RopeSpec:
    """Read ``rope_parameters`` (transformers 5), or ``rope_theta`` and ``rope_scaling`` (earlier versions)."""
    rope: dict[str, Any] = {}
    for section in ("rope_scaling", "rope_parameters"):
        values = config.get(section) or {}
        if not isinstance(values, dict):
            raise UserError(f"{origin}: {section}={values!r} is not an object")
        if any(isinstance(value, dict) for value in values.values()):
            raise UserError(f"{origin}: {section} of each layer type is not supported: only one for all layers")
        if rope and values and _rope_type(rope) != _rope_type(values):
            raise UserError(
                f"{origin}: rope_scaling says {_rope_type(rope)!r} and rope_parameters {_rope_type(values)!r}: keep one"
            )
        rope |= values
    stated = [holder["rope_theta"] for holder in (rope, config) if holder.get("rope_theta") is not None]
    rope["rope_theta"] = stated[0] if stated else 10000.0
    kind = _rope_type(rope)
    theta = _number(rope, "rope_theta", origin)
    if (rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0) != 1.0:
        raise UserError(f"{origin}: partial_rotary_factor is not supported: only 1.0")
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind not in ("linear", "llama3"):
        raise UserError(f"{origin}: rope_type={kind!r} is not supported: use default, linear or llama3")
    factor = _number(rope, "factor", origin)
    if kind == "linear":
        return RopeSpec(theta=theta, kind="linear", factor=factor)
    return RopeSpec(
        theta=theta,
        kind="llama3",
        factor=factor,
        low_freq_factor=_number(rope, "low_freq_factor", origin),
        high_freq_factor=_number(rope, "high_freq_factor", origin),
        original_max_position_embeddings=_size(rope, "original_max_position_embeddings", origin),
    )
