"""Device memory of a rank's engine: weights, KV cache and workspace, and what a publication stages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from megatron_oreal.layout import ModelSpec, embedded_layout
from megatron_oreal.layout.digest import CHUNK_ELEMENTS
from megatron_oreal.layout.engines import sglang_layout
from megatron_oreal.layout.execute import DEFAULT_BUCKET_BYTES
from megatron_oreal.planner.parameters import ITEM_BYTES
from megatron_oreal.planner.types import Setting
from megatron_oreal.rollout.kv_cache import KvCache
from megatron_oreal.rollout.sglang.staging import weight_groups

_MIB = 2**20


@dataclass(frozen=True)
class EngineBytes:
    """``workspace``: activations and CUDA graphs of a server, by SGLang's own rule of thumb."""

    weights: int
    kv_cache: int
    workspace: int
    staging: int
    buckets: int
    digest: int
    sleeps: bool


def engine_bytes(setting: Setting) -> EngineBytes:
    """Of the engine that this setting's ranks have; alike on all of them."""
    config, dtype = setting.config, {"bf16": torch.bfloat16, "fp32": torch.float32}[setting.config.model.dtype]
    buckets = _bucket_bound(setting)
    digest = _digest_bytes(setting) if config.rollout.verify_weights else 0
    if config.rollout.engine == "embedded":
        weights = _embedded_weights(setting.spec, ITEM_BYTES[config.model.dtype])
        tables = 2 * config.rollout.gen_max_length * setting.spec.head_dim * dtype.itemsize
        slots = _embedded_slots(setting)
        # Sampling: logits, their sorted values and indices, probabilities; attention: scores in both precisions.
        workspace = slots * (24 * setting.spec.vocab_size + 10 * setting.spec.num_heads * config.rollout.gen_max_length)
        cache = embedded_cache_bytes(setting)
        return EngineBytes(weights + tables, cache, workspace, 0, buckets, digest, sleeps=False)
    weights, staged = _served_weights(
        setting.spec, config.rollout.engine_tp, setting.device, dtype, config.rollout.server.bucket_bytes
    )
    static, workspace = _sglang_memory(setting)
    per_token = kv_bytes_per_token(setting)
    limit = config.rollout.sglang.get("max_total_tokens")
    cache = max(static - weights, 0)
    if setting.device == "cpu":
        requests = config.rollout.max_running_requests * (config.rollout.gen_max_length + 16)
        limit = limit or max(8192, min(requests, 65536))  # the trainer's own argument there (sglang/args.py)
        cache = limit * per_token
    if limit is not None:
        cache = min(cache, limit * per_token)
    sleeps = bool(config.rollout.sglang.get("enable_memory_saver", setting.device == "cuda"))
    return EngineBytes(weights, cache, workspace, staged, buckets, digest, sleeps)


def _digest_bytes(setting: Setting) -> int:
    """Scratch of the digests: a chunk of the largest tensor in int64, of which each holds 4 bytes of weights."""
    spec, tp = setting.spec, setting.config.parallel.tensor_model_parallel_size
    largest = max(spec.vocab_size, spec.ffn_hidden_size) * spec.hidden_size // tp
    words = {"bf16": 2, "fp32": 1}[setting.config.model.dtype]
    return 8 * min(CHUNK_ELEMENTS[setting.device], largest) // words


def kv_bytes_per_token(setting: Setting) -> int:
    """Keys and values of all layers on one engine rank; with fewer KV heads than ranks each has one."""
    spec, tp = setting.spec, setting.config.rollout.engine_tp
    heads = max(spec.num_kv_heads // tp, 1)
    return 2 * spec.num_layers * heads * spec.head_dim * cache_itemsize(setting)


def cache_itemsize(setting: Setting) -> int:
    """Bytes of an element of the engines' KV cache."""
    fp8 = str(setting.config.rollout.sglang.get("kv_cache_dtype", "auto")).startswith("fp8")
    return 1 if fp8 else ITEM_BYTES[setting.config.model.dtype]


def _sglang_memory(setting: Setting) -> tuple[int, int]:
    """(weights and KV cache, workspace): ``mem_fraction_static`` of the device, by SGLang's own default if unset.

    SGLang 0.5.17 (``server_args.py``, ``_handle_gpu_memory_settings``) leaves 512 MiB, 1.5 MiB a token of a prefill
    chunk, tp/8 GiB, and of CUDA graphs 2 MiB a request and 8 MiB a prefill graph; at least 10 GiB on devices of more
    than 60 GiB. The workspace counted here is that of the decode graphs, of which requests that may not run have none,
    and a quarter of the rest, since the rule is an upper bound.
    """
    user, tp = setting.config.rollout.sglang, setting.config.rollout.engine_tp
    device = setting.device_memory_bytes
    if setting.device == "cpu" or not device:
        return 0, 0
    default_chunk, *default_graphs = next(sizes for below, *sizes in _SGLANG_SIZES if device < below * 1024 * _MIB)
    chunk = user.get("chunked_prefill_size")
    if chunk is None:
        chunk = default_chunk
    elif chunk <= 0:  # no chunks: a prefill takes as many tokens as SGLang lets wait for one
        chunk = user.get("max_prefill_tokens") or 16384
    graphs = user.get("cuda_graph_max_bs") or default_graphs[tp >= 4]
    graphs, prefills = (0, 0) if user.get("disable_cuda_graph") else (graphs, _prefill_graphs(chunk))
    reserved = (512 + 1.5 * max(chunk, 2048) + tp / 8 * 1024 + 2 * graphs + 8 * prefills) * _MIB
    reserved = max(reserved, 10 * 1024 * _MIB) if device > 60 * 1024 * _MIB else reserved
    fraction = user.get("mem_fraction_static") or max(round((device - reserved) / device, 3), 0.0)
    captured = min(graphs, setting.config.rollout.max_running_requests)
    return round(fraction * device), round(2 * captured * _MIB + 0.25 * 1.5 * chunk * _MIB)


_SGLANG_SIZES = (
    (20, 2048, 8, 8),
    (35, 2048, 24, 80),
    (60, 4096, 32, 160),
    (160, 8192, 256, 512),
    (math.inf, 16384, 512, 512),
)
"""SGLang's defaults: for a device below so many GiB the prefill chunk, and the largest decode graph below and from TP 4
on."""


def _prefill_graphs(chunk: int) -> int:
    """Sizes that SGLang captures of a prefill."""
    runs = ((4, 33, 4), (48, 257, 16), (288, 513, 32), (576, 1025, 64), (1280, 4097, 256), (4608, chunk + 1, 512))
    return sum(size <= chunk for run in runs for size in range(*run))


def embedded_cache_bytes(setting: Setting) -> int:
    """Most bytes of the embedded engine's cache: its own pools, on meta, filled as the running sequences grow.

    All ``max_running_requests`` slots start together with a token each and every one grows to its length:
    ``setting.lengths`` (the longest), else ``gen_max_length``.
    """
    config = setting.config
    lengths = sorted(setting.lengths or (config.rollout.gen_max_length,), reverse=True)
    slots = _embedded_slots(setting)
    targets = tuple(lengths[slot % len(lengths)] for slot in range(slots))
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[config.model.dtype]
    return _cache_bytes(setting.spec, targets, max(setting.prompt_tokens, 1), config.rollout.gen_max_length, dtype)


@lru_cache(maxsize=64)
def _cache_bytes(spec: ModelSpec, targets: tuple[int, ...], prompt: int, longest: int, dtype: torch.dtype) -> int:
    cache = KvCache(spec, len(targets), longest, dtype, torch.device("meta"))
    for slot in range(len(targets)):
        cache.admit(slot, min(prompt, longest))
    peak = cache.nbytes()
    for number, pool in enumerate(cache.pools[:-1]):
        growing = [s for s, target in enumerate(targets) if target > pool.capacity and cache.pool_of[s] == number]
        if growing:
            moved = pool.data[:, :, : len(growing)].nbytes  # read out of one pool before it is written into the next
            cache.promote(np.array(growing))
            peak = max(peak, cache.nbytes() + moved)
    return peak


@lru_cache(maxsize=4)
def num_parameters(spec: ModelSpec) -> int:
    """``ModelSpec.num_parameters``, which a search asks for of every setting."""
    return spec.num_parameters()


@lru_cache(maxsize=64)
def _embedded_weights(spec: ModelSpec, itemsize: int) -> int:
    return embedded_layout(spec).shards[0].num_elements() * itemsize


@lru_cache(maxsize=64)
def _served_weights(spec: ModelSpec, tp: int, device: str, dtype: torch.dtype, bucket_bytes: int) -> tuple[int, int]:
    """(weights, staging) of one engine rank: two buckets of the largest group."""
    layout = sglang_layout(spec, tp=tp, device="cuda" if device == "cuda" else "cpu")
    largest = max(shard.num_elements() for shard in layout.shards) * dtype.itemsize
    shapes = [dict(shard.params) for shard in layout.shards]
    groups = weight_groups(layout, dtype, bucket_bytes)
    held = max(sum(_elements(shape[name]) for name in group if name in shape) for shape in shapes for group in groups)
    return largest, 2 * held * dtype.itemsize


def _elements(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


def _embedded_slots(setting: Setting) -> int:
    rollout = setting.config.rollout
    return min(
        rollout.max_running_requests, -(-rollout.prompts_per_step * rollout.prompt_repeat_k // setting.world_size)
    )


def _bucket_bound(setting: Setting) -> int:
    """At most four buckets (``layout/execute.py``), or what an engine rank gets from others, sent and received.

    Large contiguous pieces pass no bucket, so that less is usual; where every rank has the whole model nothing moves.
    """
    parallel, rollout = setting.config.parallel, setting.config.rollout
    holders = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    if holders == 1:
        return 0
    engine_ranks = rollout.engine_tp if rollout.engine == "sglang" else 1
    weights = num_parameters(setting.spec) * ITEM_BYTES[setting.config.model.dtype] // engine_ranks
    return min(4 * DEFAULT_BUCKET_BYTES, 2 * weights * (holders - 1) // holders)
