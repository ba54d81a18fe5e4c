"""Parameters, gradients and optimizer state of a rank in closed form: Megatron's shapes, buffers and shards."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_oreal.layout.megatron import padded_vocab_size, pipeline_layer_split
from megatron_oreal.planner.types import Setting

ITEM_BYTES = {"bf16": 2, "fp32": 4}
_STATE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}


@dataclass(frozen=True)
class Shapes:
    """Sizes of one rank's shards, in elements; ``e``: bytes of a parameter or an activation."""

    h: int
    q: int
    k: int
    f: int
    heads: int
    head_dim: int
    vocab: int
    e: int
    tp: int
    qk_norm: bool
    qkv_bias: bool

    @classmethod
    def of(cls, setting: Setting) -> Shapes:
        """Of every rank of a setting alike."""
        spec, parallel = setting.spec, setting.config.parallel
        tp = parallel.tensor_model_parallel_size
        return cls(
            h=spec.hidden_size,
            q=spec.q_size // tp,
            k=spec.kv_size // tp,
            f=spec.ffn_hidden_size // tp,
            heads=spec.num_heads // tp,
            head_dim=spec.head_dim,
            vocab=padded_vocab_size(spec.vocab_size, tp=tp, vocab_divisor=parallel.make_vocab_size_divisible_by) // tp,
            e=ITEM_BYTES[setting.config.model.dtype],
            tp=tp,
            qk_norm=spec.qk_norm,
            qkv_bias=spec.qkv_bias,
        )

    def layer(self, implementation: str) -> list[int]:
        """Elements of a layer's parameters, in the order of ``named_parameters``."""
        qkv = [self.q + 2 * self.k] if self.qkv_bias else []
        qk_norm = [self.head_dim, self.head_dim] if self.qk_norm else []
        wide = (self.q + 2 * self.k) * self.h
        if implementation == "transformer_engine":
            return [self.q * self.h, self.h, wide, *qkv, *qk_norm, self.h, 2 * self.f * self.h, self.f * self.h]
        norm = [self.h]
        return [*norm, self.q * self.h, wide, *qkv, *qk_norm, *norm, 2 * self.f * self.h, self.f * self.h]


def layer_counts(setting: Setting) -> tuple[tuple[int, ...], ...]:
    """Layers of every chunk of every stage."""
    parallel = setting.config.parallel
    return pipeline_layer_split(
        setting.spec,
        pp=parallel.pipeline_model_parallel_size,
        vpp=parallel.virtual_pipeline_model_parallel_size,
        first=parallel.num_layers_in_first_pipeline_stage,
        last=parallel.num_layers_in_last_pipeline_stage,
    )


def chunk_parameters(setting: Setting, pp_rank: int, *, score_head: bool = False) -> list[list[int]]:
    """Elements of every parameter of every chunk of a stage, in the order of ``named_parameters``."""
    shapes, spec, split = Shapes.of(setting), setting.spec, layer_counts(setting)
    pp, chunks = len(split), []
    for chunk, layers in enumerate(split[pp_rank]):
        sizes = [shapes.vocab * shapes.h] if pp_rank == 0 and chunk == 0 else []
        sizes += shapes.layer(setting.implementation) * layers
        if pp_rank == pp - 1 and chunk == len(split[pp_rank]) - 1:
            sizes.append(shapes.h)
            if score_head:
                sizes.append(shapes.h)
            elif pp > 1 or not spec.tied_embeddings:
                sizes.append(shapes.vocab * shapes.h)
        chunks.append(sizes)
    return chunks


@dataclass(frozen=True)
class ModelBytes:
    """Device bytes of one model on a rank; ``host``: of Adam on the CPU (``parallel.optimizer_cpu_offload``)."""

    parameters: int
    gradients: int = 0
    optimizer: int = 0
    host: int = 0


def frozen_bytes(setting: Setting, pp_rank: int) -> ModelBytes:
    """The reference: parameters and nothing else."""
    count = sum(map(sum, chunk_parameters(setting, pp_rank)))
    return ModelBytes(count * ITEM_BYTES[setting.config.model.dtype])


def trained_bytes(setting: Setting, pp_rank: int, dp_rank: int = 0, *, score_head: bool = False) -> ModelBytes:
    """A trained model: Megatron's flat buffers, fp32 gradients, and this data-parallel rank's part of Adam's state."""
    parallel, itemsize = setting.config.parallel, ITEM_BYTES[setting.config.model.dtype]
    chunks = chunk_parameters(setting, pp_rank, score_head=score_head)
    state, host = state_bytes(setting), host_state_bytes(setting)
    if not parallel.use_distributed_optimizer:
        count = sum(map(sum, chunks))
        return ModelBytes(count * itemsize, count * 4, int(count * state), int(count * host))
    padded = owned = 0
    for index, sizes in enumerate(chunks):
        for start, stop, params in _buckets(setting, sizes, index):
            padded += stop - start
            length = (stop - start) // setting.dp
            first = start + length * dp_rank
            owned += sum(max(min(end, first + length) - max(begin, first), 0) for begin, end in params)
    return ModelBytes(padded * itemsize, padded * 4, int(owned * state), int(owned * host))


def state_bytes(setting: Setting) -> float:
    """Device bytes of Adam's state for a parameter: main weights (in bf16 runs) and two moments.

    The precision-aware optimizer keeps 2 bytes of a main weight: all of an fp16 one, and of an fp32 one the half that
    the bf16 weight has not (Megatron's ``store_param_remainders``, with TransformerEngine from 2.1 on).
    """
    parallel = setting.config.parallel
    if parallel.use_precision_aware_optimizer:
        moments = _STATE_BYTES[parallel.exp_avg_dtype] + _STATE_BYTES[parallel.exp_avg_sq_dtype]
        main = 2
    else:
        moments, main = 8, 4
    total = moments + (main if setting.config.model.dtype == "bf16" else 0)
    return total * (1.0 - parallel.optimizer_offload_fraction) if parallel.optimizer_cpu_offload else float(total)


def host_state_bytes(setting: Setting) -> float:
    """Host bytes for a parameter of Megatron's ``HybridDeviceOptimizer``: fp32 weight, gradient and two moments."""
    parallel = setting.config.parallel
    return 16.0 * parallel.optimizer_offload_fraction if parallel.optimizer_cpu_offload else 0.0


def _buckets(setting: Setting, sizes: list[int], chunk: int) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """(start, stop, parameter ranges) of each bucket: the rule of megatron-core's ``_ParamAndGradBuffer``.

    Parameters in reverse order, each from a multiple of 64; a bucket ends at a multiple of lcm(dp, 128).
    """
    parallel, dp = setting.config.parallel, setting.dp
    size = None
    if (parallel.overlap_grad_reduce or parallel.overlap_param_gather) and chunk == 0:
        size = parallel.ddp_bucket_size or max(40_000_000, 1_000_000 * dp)
    divisor = math.lcm(dp, 128)
    start = end = 0
    params: list[tuple[int, int]] = []
    for count in reversed(sizes):
        begin = -(-end // 64) * 64
        end = begin + count
        params.append((begin, end))
        if size is not None and end - start >= size:
            stop = -(-end // divisor) * divisor
            yield start, stop, params
            start = end = stop
            params = []
    if params:
        yield start, -(-end // divisor) * divisor, params
