"""Cross-checks between config keys, the model's shape and the world, before a model is built."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_oreal.config import Config
from megatron_oreal.errors import UserError
from megatron_oreal.layout.model_spec import ModelSpec


def check_config(config: Config, spec: ModelSpec, world_size: int) -> None:
    """Raise ``UserError`` with the first contradiction between the config, the model and the number of ranks."""
    for message in _contradictions(config, spec, world_size):
        raise UserError(message)


def _contradictions(config: Config, spec: ModelSpec, world_size: int) -> Iterator[str]:
    yield from _parallel(config, spec, world_size)
    yield from _lengths(config, spec)
    yield from _algorithm(config)


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
    if spec.num_layers % (pp * (vpp or 1)):
        yield (
            f"parallel.pipeline_model_parallel_size={pp} x virtual {vpp or 1} does not divide the model's "
            f"{spec.num_layers} layers{_divisors(spec.num_layers)}"
        )
    if parallel.recompute_granularity == "full" and parallel.recompute_method is None:
        yield "parallel.recompute_granularity=full needs parallel.recompute_method=uniform or block"
    if parallel.recompute_granularity != "full" and (parallel.recompute_method or parallel.recompute_num_layers):
        yield (
            "parallel.recompute_method and recompute_num_layers go with parallel.recompute_granularity=full: unset "
            "them, or set it"
        )
    if parallel.recompute_method and parallel.recompute_num_layers is None:
        yield f"parallel.recompute_method={parallel.recompute_method} needs parallel.recompute_num_layers"


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
