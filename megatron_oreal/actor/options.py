"""``parallel.*`` performance options as Megatron-core takes them, for every version that is supported.

Options are handed over only where they differ from Megatron's defaults, so that a version without one is refused by the
key that asks for it, and with it alone. ``docs/performance.md`` says what each one is worth.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
from importlib.metadata import version
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import is_te_min_version

from megatron_oreal.actor.specs import Implementation
from megatron_oreal.config import ParallelConfig
from megatron_oreal.errors import UserError

_STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.uint8}
# What TransformerEngine reads, and what Megatron sets it to for each backend; it refuses an environment that differs.
_ATTENTION_VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
_ATTENTION_VALUES = {"auto": "111", "flash": "100", "fused": "010", "unfused": "001"}
WEIGHT_GRADIENT_MODULE = "fused_weight_gradient_mlp_cuda"
"""apex's extension, which Megatron's own linear layers (the vocabulary head is one) need to add into ``main_grad``."""


def check_options(parallel: ParallelConfig, implementation: Implementation, is_cuda: bool) -> None:
    """Raise ``UserError`` for the first option that this machine, its packages or its megatron-core cannot serve.

    Call before a model is built. What keys contradict each other is for ``config_check.py``.
    """
    if implementation != "transformer_engine":
        for key, off in TRANSFORMER_ENGINE_KEYS.items():
            value = getattr(parallel, key)
            if value != off and not (key == "gradient_accumulation_fusion" and value is False):
                raise UserError(
                    f"parallel.{key}={_shown(value)} needs TransformerEngine's layers, and this run has torch-native "
                    f"ones: set it to {_shown(off)}, or see parallel.transformer_impl and megatron-oreal env"
                )
    if parallel.optimizer_cpu_offload and not is_cuda:
        raise UserError("parallel.optimizer_cpu_offload=true: this run has no CUDA device to free: set it to false")
    for key in ("use_precision_aware_optimizer", "optimizer_cpu_offload"):
        if getattr(parallel, key) and not _installed(_TE):
            raise UserError(f"parallel.{key}=true needs TransformerEngine, which is not installed: set it to false")
    if parallel.attention_backend == "flash" and not (_installed("flash_attn") or _installed("flash_attn_interface")):
        raise UserError("parallel.attention_backend=flash: flash-attn is not installed: install it, or set auto")
    if parallel.gradient_accumulation_fusion is True and not _installed(WEIGHT_GRADIENT_MODULE):
        raise UserError(
            f"parallel.gradient_accumulation_fusion=true needs apex's {WEIGHT_GRADIENT_MODULE}: install apex with "
            "--cuda_ext, or set auto"
        )
    _check_attention_environment(parallel.attention_backend)
    _check_fields(TransformerConfig, transformer_options(parallel))
    _check_fields(DistributedDataParallelConfig, ddp_options(parallel, published=False))
    _check_fields(MegatronOptimizerConfig, optimizer_options(parallel))


_TE = "transformer_engine"
TRANSFORMER_ENGINE_KEYS: dict[str, Any] = {
    "tp_comm_overlap": False,
    "attention_backend": "auto",
    "gradient_accumulation_fusion": "auto",
    "cpu_offloading_num_layers": 0,
}
"""Keys that TransformerEngine's layers serve, and the value that asks nothing of them."""


def transformer_options(parallel: ParallelConfig) -> dict[str, Any]:
    """Keyword arguments for ``TransformerConfig``."""
    options: dict[str, Any] = {}
    if parallel.recompute_modules is not None:
        options["recompute_modules"] = list(parallel.recompute_modules)
    if parallel.cpu_offloading_num_layers:
        options |= {"cpu_offloading": True, "cpu_offloading_num_layers": parallel.cpu_offloading_num_layers}
    if parallel.tp_comm_overlap:
        options |= {"tp_comm_overlap": True} | parallel.tp_comm_overlap_options
    if parallel.attention_backend != "auto":
        options["attention_backend"] = AttnBackend[parallel.attention_backend]
    return options


_user_buffers: set[tuple[int, int]] = set()  # shapes that this process has allocated them for


def allocate_user_buffers(parallel: ParallelConfig, hidden_size: int) -> None:
    """Have TransformerEngine allocate what ``parallel.tp_comm_overlap`` communicates through; once a process.

    All models of a run share them: they have one hidden size and, with the option, one length of micro-batches. Call
    where Megatron's groups are, before the first layer is built.
    """
    tp = parallel.tensor_model_parallel_size
    shape = (parallel.max_tokens_per_microbatch // tp * tp, hidden_size)
    if not parallel.tp_comm_overlap or shape in _user_buffers:
        return
    base = importlib.import_module("transformer_engine.pytorch.module.base")
    if is_te_min_version("2.7.0"):
        precision: dict[str, Any] = {"quantization_modes": [base.UserBufferQuantizationMode.NONE]}
    else:
        precision = {"use_fp8": False}
    backend = parallel.tp_comm_overlap_options.get("tp_comm_bootstrap_backend", "nccl")
    base.initialize_ub(
        shape=list(shape), tp_size=tp, ub_cfgs=parallel.tp_comm_overlap_cfg, bootstrap_backend=backend, **precision
    )
    _user_buffers.add(shape)


def fuses_weight_gradient(parallel: ParallelConfig, implementation: Implementation) -> bool:
    """Resolve ``parallel.gradient_accumulation_fusion``."""
    if parallel.gradient_accumulation_fusion == "auto":
        return implementation == "transformer_engine" and _installed(WEIGHT_GRADIENT_MODULE)
    return bool(parallel.gradient_accumulation_fusion)


def ddp_options(parallel: ParallelConfig, *, published: bool) -> dict[str, Any]:
    """Keyword arguments for ``DistributedDataParallelConfig``.

    ``published``: the model's weights are read right after its update, so that their gather has nothing to hide behind.
    """
    options: dict[str, Any] = {"overlap_grad_reduce": parallel.overlap_grad_reduce}
    if parallel.overlap_param_gather and not published:
        options["overlap_param_gather"] = True
    if parallel.ddp_bucket_size is not None:
        options["bucket_size"] = parallel.ddp_bucket_size
    return options


def optimizer_options(parallel: ParallelConfig) -> dict[str, Any]:
    """Keyword arguments for Megatron's ``OptimizerConfig``."""
    options: dict[str, Any] = {}
    if parallel.use_precision_aware_optimizer:
        options["use_precision_aware_optimizer"] = True
        for key in ("main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
            if getattr(parallel, key) != "fp32":
                options[key] = _STATE_DTYPES[getattr(parallel, key)]
    if parallel.optimizer_cpu_offload:
        # The hybrid optimizer is reached by the precision-aware path, with its state in fp32 all the same.
        options |= {
            "use_precision_aware_optimizer": True,
            "optimizer_cpu_offload": True,
            "optimizer_offload_fraction": parallel.optimizer_offload_fraction,
            "overlap_cpu_optimizer_d2h_h2d": parallel.overlap_cpu_optimizer_d2h_h2d,
        }
    return options


def _check_fields(config_class: Any, options: dict[str, Any]) -> None:
    fields = {field.name for field in dataclasses.fields(config_class)}
    for name in options:
        if name not in fields:
            key = name if name in ParallelConfig.model_fields else f"tp_comm_overlap_options: {name}"
            raise UserError(f"parallel.{key}: megatron-core {version('megatron-core')} has no such option: remove it")


def _check_attention_environment(backend: str) -> None:
    for name, value in zip(_ATTENTION_VARIABLES, _ATTENTION_VALUES[backend], strict=True):
        if os.environ.get(name, value) != value:
            raise UserError(
                f"environment variable {name}={os.environ[name]} contradicts parallel.attention_backend={backend}, "
                f"which means {value}: unset it"
            )


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
