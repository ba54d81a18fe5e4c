"""Cross-checks between config keys, the model's shape and the world, before a model is built."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

from megatron_oreal.config import Config
from megatron_oreal.errors import UserError
from megatron_oreal.layout.engines import sglang_layout
from megatron_oreal.layout.megatron import pipeline_layer_split
from megatron_oreal.layout.megatron_checkpoint import is_megatron_checkpoint
from megatron_oreal.layout.model_spec import ModelSpec
from megatron_oreal.loss.chunked import LEAST_TOKENS
from megatron_oreal.rollout.sglang.args import check_model, check_server_args, server_arg_names
from megatron_oreal.verifier.judge_hosts import judge_contradictions

_PASSES = ("fprop", "dgrad", "wgrad")
_BOOTSTRAP_BACKENDS = ("nccl", "gloo", "mpi")
_USER_BUFFER_GEMMS = tuple(f"{linear}_{of}" for linear in ("qkv", "proj", "fc1", "fc2") for of in _PASSES)
"""Keys of TransformerEngine's ``ub_cfgs``, which passes over others in silence."""


def check_config(
    config: Config, spec: ModelSpec, world_size: int, ranks_per_node: int | None = None, *, planned: bool = False
) -> None:
    """Raise ``UserError`` with the first contradiction between the config, the model and the number of ranks.

    ``ranks_per_node``: default all of them. ``planned``: the run is for other machines, with GPUs: no weights are
    looked for, and SGLang need not be installed here.
    """
    for message in _contradictions(config, spec, world_size, ranks_per_node or world_size, planned):
        raise UserError(message)


def _contradictions(
    config: Config, spec: ModelSpec, world_size: int, ranks_per_node: int, planned: bool
) -> Iterator[str]:
    if not planned:
        yield from _weights(config)
    yield from _parallel(config, spec, world_size)
    yield from _performance(config, spec)
    yield from _lengths(config, spec)
    yield from _algorithm(config)
    yield from _verifier(config)
    yield from _engine(config, spec, ranks_per_node, planned)


def _weights(config: Config) -> Iterator[str]:
    path = config.model.megatron_checkpoint
    if path is not None and not is_megatron_checkpoint(path):
        yield (
            f"model.megatron_checkpoint={path!r} is not a dist_checkpointing directory: give one that "
            "tools/checkpoint_convert/hf_to_megatron.py or Megatron-core has written, or null"
        )


def _parallel(config: Config, spec: ModelSpec, world_size: int) -> Iterator[str]:
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    vpp = parallel.virtual_pipeline_model_parallel_size
    name = "parallel.tensor_model_parallel_size"
    if world_size % (tp * pp):
        yield (
            f"{name}={tp} x parallel.pipeline_model_parallel_size={pp} does not divide the world size {world_size}: "
            f"start a multiple of {tp * pp} ranks"
        )
    if spec.num_heads % tp:
        yield f"{name}={tp} does not divide the model's {spec.num_heads} attention heads{_divisors(spec.num_heads)}"
    if spec.num_kv_heads % tp and tp % spec.num_kv_heads:
        yield f"{name}={tp} is neither a divisor nor a multiple of the model's {spec.num_kv_heads} key-value heads"
    if (spec.q_size + 2 * spec.kv_size) % tp:
        yield f"{name}={tp} does not divide the {spec.q_size + 2 * spec.kv_size} rows of query, key and value: lower it"
    if spec.ffn_hidden_size % tp:
        yield f"{name}={tp} does not divide the model's intermediate_size {spec.ffn_hidden_size}"
    if parallel.sequence_parallel and tp == 1:
        yield f"parallel.sequence_parallel=true needs {name} > 1: set it to false"
    if vpp is not None and pp == 1:
        yield f"parallel.virtual_pipeline_model_parallel_size={vpp} needs parallel.pipeline_model_parallel_size > 1"
    if vpp is not None and vpp < 2:
        yield f"parallel.virtual_pipeline_model_parallel_size={vpp}: use 2 or more, or null"
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    if first is not None or last is not None:
        try:
            pipeline_layer_split(spec, pp=pp, vpp=vpp, first=first, last=last)
        except UserError as error:
            yield f"parallel.{error}"
    elif spec.num_layers % (pp * (vpp or 1)):
        yield (
            f"parallel.pipeline_model_parallel_size={pp} x virtual {vpp or 1} does not divide the model's "
            f"{spec.num_layers} layers{_divisors(spec.num_layers)}"
        )
    if 0 < parallel.loss_chunk_tokens < LEAST_TOKENS:
        yield f"parallel.loss_chunk_tokens={parallel.loss_chunk_tokens}: use {LEAST_TOKENS} or more, or 0"
    if parallel.recompute_granularity == "full" and parallel.recompute_method is None:
        yield "parallel.recompute_granularity=full needs parallel.recompute_method=uniform or block"
    if parallel.recompute_granularity != "full" and (parallel.recompute_method or parallel.recompute_num_layers):
        yield (
            "parallel.recompute_method and recompute_num_layers go with parallel.recompute_granularity=full: unset "
            "them, or set it"
        )
    if parallel.recompute_method and parallel.recompute_num_layers is None:
        yield f"parallel.recompute_method={parallel.recompute_method} needs parallel.recompute_num_layers"


def _performance(config: Config, spec: ModelSpec) -> Iterator[str]:
    """Options that need or exclude others; what a machine and its packages can serve is for ``actor/options.py``."""
    p = config.parallel
    if p.overlap_param_gather and not (p.use_distributed_optimizer and p.overlap_grad_reduce):
        yield "parallel.overlap_param_gather=true needs use_distributed_optimizer and overlap_grad_reduce: set both"
    if p.overlap_param_gather and not config.model.reward_model:
        yield (
            "parallel.overlap_param_gather=true is for the reward model (the policy is published right after its "
            "update), and model.reward_model=false: set it to false"
        )
    if p.ddp_bucket_size is not None and not p.overlap_grad_reduce:
        yield f"parallel.ddp_bucket_size={p.ddp_bucket_size} needs parallel.overlap_grad_reduce=true: set it, or null"
    if p.tp_comm_overlap and not p.sequence_parallel:
        yield "parallel.tp_comm_overlap=true needs parallel.sequence_parallel=true: set it, or false here"
    if p.tp_comm_overlap and p.virtual_pipeline_model_parallel_size is not None:
        yield (
            "parallel.tp_comm_overlap=true takes micro-batches of one fixed length and interleaved stages of another: "
            "set parallel.virtual_pipeline_model_parallel_size to null"
        )
    if not p.tp_comm_overlap and (p.tp_comm_overlap_options or p.tp_comm_overlap_cfg):
        yield "parallel.tp_comm_overlap_options and tp_comm_overlap_cfg need parallel.tp_comm_overlap=true: unset them"
    for name, value in p.tp_comm_overlap_options.items():
        if not name.startswith("tp_comm_") or name == "tp_comm_overlap":
            yield f"parallel.tp_comm_overlap_options: {name} is none of Megatron's tp_comm_* settings: remove it"
        elif name == "tp_comm_bootstrap_backend" and value not in _BOOTSTRAP_BACKENDS:
            yield f"parallel.tp_comm_overlap_options: {name}={value!r}: use one of {', '.join(_BOOTSTRAP_BACKENDS)}"
        elif name != "tp_comm_bootstrap_backend" and not isinstance(value, bool):
            yield f"parallel.tp_comm_overlap_options: {name}={value!r}: use true or false"
    for name in p.tp_comm_overlap_cfg:
        if name not in _USER_BUFFER_GEMMS:
            yield (
                f"parallel.tp_comm_overlap_cfg: {name} is no GEMM that TransformerEngine overlaps: use one of "
                + ", ".join(_USER_BUFFER_GEMMS)
            )
    if p.cuda_graph_impl != "none":
        yield (
            f"parallel.cuda_graph_impl={p.cuda_graph_impl}: megatron-core captures layers with one shape and without "
            "packed sequences, which all micro-batches here are: set it to none (the engines' graphs: rollout.sglang)"
        )
    yield from _optimizer_state(config)
    yield from _activations(config, spec)


def _optimizer_state(config: Config) -> Iterator[str]:
    p = config.parallel
    for key in ("optimizer_cpu_offload", "use_precision_aware_optimizer"):
        if getattr(p, key) and not p.use_distributed_optimizer:
            yield f"parallel.{key}=true needs parallel.use_distributed_optimizer=true: set it, or false here"
        if getattr(p, key) and config.model.dtype != "bf16":
            yield f"parallel.{key}=true is for model.dtype=bf16: set it to false"
    if p.overlap_cpu_optimizer_d2h_h2d and not p.optimizer_cpu_offload:
        yield "parallel.overlap_cpu_optimizer_d2h_h2d=true needs parallel.optimizer_cpu_offload=true: set false here"
    if p.use_precision_aware_optimizer and p.optimizer_cpu_offload:
        yield (
            "parallel.use_precision_aware_optimizer=true and optimizer_cpu_offload=true exclude each other (state on "
            "the CPU is fp32): set one to false"
        )
    for key in ("main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
        if getattr(p, key) != "fp32" and not p.use_precision_aware_optimizer:
            yield (
                f"parallel.{key}={getattr(p, key)} needs parallel.use_precision_aware_optimizer=true: set it, or fp32 "
                "here"
            )


def _activations(config: Config, spec: ModelSpec) -> Iterator[str]:
    p = config.parallel
    if p.recompute_modules is not None and p.recompute_granularity != "selective":
        yield "parallel.recompute_modules goes with parallel.recompute_granularity=selective: unset it, or set that"
    if p.cpu_offloading_num_layers:
        key = f"parallel.cpu_offloading_num_layers={p.cpu_offloading_num_layers}"
        if p.cpu_offloading_num_layers >= spec.num_layers:
            yield f"{key} must be below the model's {spec.num_layers} layers: lower it"
        if p.pipeline_model_parallel_size > 1:
            yield f"{key} needs parallel.pipeline_model_parallel_size=1: set 0, or recompute_granularity instead"
        if p.recompute_granularity is not None:
            yield f"{key} excludes parallel.recompute_granularity={p.recompute_granularity}: set 0, or null there"
    if p.optimizer_offload_fraction != 1.0 and not p.optimizer_cpu_offload:
        yield (
            f"parallel.optimizer_offload_fraction={p.optimizer_offload_fraction} needs "
            "parallel.optimizer_cpu_offload=true: set it, or remove the fraction"
        )


def _divisors(n: int) -> str:
    return " (use one of " + ", ".join(str(d) for d in range(1, n + 1) if n % d == 0) + ")"


def _lengths(config: Config, spec: ModelSpec) -> Iterator[str]:
    rollout = config.rollout
    if rollout.gen_max_length > spec.max_position_embeddings:
        yield (
            f"rollout.gen_max_length={rollout.gen_max_length} exceeds the model's max_position_embeddings "
            f"{spec.max_position_embeddings}: lower it"
        )
    if rollout.gen_max_new >= rollout.gen_max_length:
        yield (
            f"rollout.gen_max_new={rollout.gen_max_new} leaves no room for a prompt within rollout.gen_max_length="
            f"{rollout.gen_max_length}: lower it"
        )
    pad = config.parallel.tensor_model_parallel_size if config.parallel.sequence_parallel else 1
    budget = config.parallel.max_tokens_per_microbatch // pad * pad
    if budget < rollout.gen_max_length:
        multiple = f" (as a multiple of the tensor-parallel size {budget})" if pad > 1 else ""
        yield (
            f"parallel.max_tokens_per_microbatch={config.parallel.max_tokens_per_microbatch}{multiple} is smaller than "
            f"rollout.gen_max_length={rollout.gen_max_length}, which one micro-batch must be able to hold: raise it"
        )


def _verifier(config: Config) -> Iterator[str]:
    if config.verifier.stop_word not in (None, config.model.stop_word):
        yield (
            f"verifier.stop_word={config.verifier.stop_word!r} is not model.stop_word={config.model.stop_word!r}, with "
            "which responses end: set it to null"
        )
    deadline_s, limit_s = config.verifier.judge.deadline_s, config.parallel.distributed_timeout_s
    if config.verifier.hosts and deadline_s >= limit_s:
        yield (
            f"verifier.judge.deadline_s={deadline_s:g} is not below parallel.distributed_timeout_s={limit_s}, the time "
            "that other ranks wait: lower it, or raise that"
        )
    control_s = config.rollout.server.control_timeout_s
    if config.rollout.engine == "sglang" and control_s >= limit_s:
        yield (
            f"rollout.server.control_timeout_s={control_s:g} is not below parallel.distributed_timeout_s={limit_s}, "
            "the time that other ranks wait while a server takes weights: lower it, or raise that"
        )
    yield from judge_contradictions(config.verifier)


def _engine(config: Config, spec: ModelSpec, ranks_per_node: int, planned: bool) -> Iterator[str]:
    rollout = config.rollout
    if rollout.engine == "embedded":
        if rollout.engine_tp > 1:
            yield f"rollout.engine_tp={rollout.engine_tp} needs rollout.engine=sglang: the embedded engine has one rank"
        if rollout.sglang:
            yield f"rollout.sglang has keys ({', '.join(rollout.sglang)}) but rollout.engine=embedded: set it to sglang"
        if rollout.oversample_prompts:
            yield (
                f"rollout.oversample_prompts={rollout.oversample_prompts} needs rollout.engine=sglang: the embedded "
                "engine gives no response up; set it to 0"
            )
        return
    if ranks_per_node % rollout.engine_tp:
        yield (
            f"rollout.engine_tp={rollout.engine_tp} does not divide the {ranks_per_node} ranks of a node, which share "
            f"its engines{_divisors(ranks_per_node)}"
        )
    on_gpu = config.device != "cpu" and (planned or torch.cuda.is_available())
    device: Literal["cuda", "cpu"] = "cuda" if on_gpu else "cpu"
    try:
        if not planned or server_arg_names() is not None:
            check_server_args(rollout.sglang)
        check_model(spec, torch.device(device), rollout.engine_tp)
        sglang_layout(spec, tp=rollout.engine_tp, device=device)
    except UserError as error:
        yield str(error)


def check_training_paths(config: Config) -> None:
    """Raise ``UserError`` when a model that training reads is the directory that it will replace by its export."""
    export = (config.work_path / "hf").resolve()
    for key in ("path", "reference_path"):
        value = getattr(config.model, key)
        if value is not None and Path(value).resolve() == export:
            raise UserError(f"model.{key}={value!r} is where this work_dir's own export goes: use another work_dir")


def _algorithm(config: Config) -> Iterator[str]:
    algorithm, optimizer = config.algorithm, config.optimizer
    if algorithm.actor_freeze_steps >= config.total_steps:
        yield (
            f"algorithm.actor_freeze_steps={algorithm.actor_freeze_steps} freezes the policy for all "
            f"total_steps={config.total_steps}: lower it"
        )
    if not config.model.reward_model and algorithm.actor_freeze_steps:
        yield (
            f"algorithm.actor_freeze_steps={algorithm.actor_freeze_steps} with model.reward_model=false trains nothing "
            "in those steps: set it to 0"
        )
    if algorithm.kl_anchor == "old" and algorithm.kl_type == "k1":
        yield "algorithm.kl_type=k1 with algorithm.kl_anchor=old is a constant slope on every token: use k2 or k3"
    for low, high, repeats in config.data.pass_rate_buckets:
        if not low < high or repeats < 0:
            yield f"data.pass_rate_buckets: [{low}, {high}, {repeats}] must be [low, high, repeats] with low < high"
    for base, minimum in (("actor_lr", "actor_min_lr"), ("token_level_rm_lr", "token_level_rm_lr_min")):
        if getattr(optimizer, minimum) > getattr(optimizer, base):
            yield (
                f"optimizer.{minimum}={getattr(optimizer, minimum)} is above "
                f"optimizer.{base}={getattr(optimizer, base)}: lower it"
            )
