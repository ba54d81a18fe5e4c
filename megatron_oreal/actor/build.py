"""Build a Megatron-core model from a ``ModelSpec``: its config, its chunks, its wrappers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_oreal.actor.gpt import PackedGPTModel
from megatron_oreal.actor.options import allocate_user_buffers, ddp_options, fuses_weight_gradient, transformer_options
from megatron_oreal.actor.parallel import ParallelGrid
from megatron_oreal.actor.specs import Implementation, layer_spec
from megatron_oreal.config import ParallelConfig
from megatron_oreal.errors import UserError
from megatron_oreal.layout.megatron import padded_vocab_size
from megatron_oreal.layout.model_spec import ModelSpec
from megatron_oreal.platform import Platform

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class MegatronModel:
    """One model on this rank: its chunks (several under VPP) as Megatron's schedules take them."""

    chunks: list[torch.nn.Module]
    config: TransformerConfig
    spec: ModelSpec
    trainable: bool

    def parameters(self) -> dict[str, Tensor]:
        """Live parameters by the names of ``layout.megatron_layout`` (``"{chunk}:{name}"`` under VPP)."""
        named: dict[str, Tensor] = {}
        for index, chunk in enumerate(self.chunks):
            prefix = f"{index}:" if len(self.chunks) > 1 else ""
            named |= {prefix + name: param.data for name, param in unwrap(chunk).named_parameters()}
        return named

    def gather_parameters(self) -> None:
        """Complete weights whose gather ``parallel.overlap_param_gather`` has put off until the next forward pass.

        For whoever reads them without one. A collective of the data-parallel ranks, inside ``platform.megatron()``;
        nothing to do, and no collective, without the option.
        """
        for chunk in self.chunks:
            if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def eval(self) -> None:
        """Switch all chunks to evaluation."""
        for chunk in self.chunks:
            chunk.eval()

    def train(self) -> None:
        """Switch all chunks to training."""
        for chunk in self.chunks:
            chunk.train()


def unwrap(chunk: torch.nn.Module) -> PackedGPTModel:
    """The GPTModel inside DDP and the bf16 wrapper."""
    while not isinstance(chunk, PackedGPTModel):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk


def _leave_uninitialised(weight: Tensor) -> Tensor:
    return weight


def transformer_config(
    spec: ModelSpec, parallel: ParallelConfig, dtype: str, implementation: Implementation
) -> TransformerConfig:
    """Megatron's config for a dense RMSNorm / RoPE / SwiGLU / GQA model of this shape under these parallel sizes."""
    engine = implementation == "transformer_engine"
    interleaved = parallel.virtual_pipeline_model_parallel_size
    return _accepted(
        TransformerConfig,
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        ffn_hidden_size=spec.ffn_hidden_size,
        num_attention_heads=spec.num_heads,
        num_query_groups=spec.num_kv_heads,
        kv_channels=spec.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=spec.norm_eps,
        add_bias_linear=False,
        add_qkv_bias=spec.qkv_bias,
        qk_layernorm=spec.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=interleaved,
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
        sequence_parallel=parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1,
        params_dtype=DTYPES[dtype],
        pipeline_dtype=DTYPES[dtype],
        bf16=dtype == "bf16",
        # Interleaved stages exchange in both directions at once: with two stages only the unbatched, overlapped form
        # pairs sends with receives rightly, and Megatron's exchange of shapes does not; so their micro-batches have
        # one length.
        variable_seq_lengths=interleaved is None,
        batch_p2p_comm=interleaved is None,
        overlap_p2p_comm=interleaved is not None,
        moe_token_dispatcher_type="alltoall",  # unused, but Megatron refuses the default with variable lengths
        # Weights are loaded. Initialisation still runs, because Megatron marks tensor-parallel parameters there, and
        # counts unmarked ones once instead of on every rank in the gradient norm.
        init_method=_leave_uninitialised,
        output_layer_init_method=_leave_uninitialised,
        # The loss is normalised by global counts before the backward: nothing may be averaged after it.
        calculate_per_token_loss=True,
        bias_activation_fusion=engine,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=engine,
        persist_layer_norm=False,
        gradient_accumulation_fusion=fuses_weight_gradient(parallel, implementation),
        recompute_granularity=parallel.recompute_granularity,
        recompute_method=parallel.recompute_method,
        recompute_num_layers=parallel.recompute_num_layers,
        **transformer_options(parallel),
    )


def _accepted(config_class: Callable[..., TransformerConfig], **settings: Any) -> TransformerConfig:
    """Megatron's config; what it refuses is the user's mistake, since everything else here is fixed."""
    try:
        return config_class(**settings)
    except (AssertionError, ValueError) as error:
        raise UserError(f"parallel: megatron-core refuses these settings: {' '.join(str(error).split())}") from None


def _finalize(model: list[torch.nn.Module], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    """Megatron's gradient reductions without its division by tokens: ``algorithm.md`` has three counts, not one."""
    finalize_model_grads(model, None, **kwargs)


def build_model(
    spec: ModelSpec,
    parallel: ParallelConfig,
    grid: ParallelGrid,
    platform: Platform,
    *,
    dtype: str,
    implementation: Implementation,
    trainable: bool,
    score_head: bool = False,
    max_sequence_length: int,
) -> MegatronModel:
    """Build this rank's chunks, uninitialised: load weights before use. ``score_head``: the token reward model."""
    with platform.megatron():
        config = transformer_config(spec, parallel, dtype, implementation)
        if platform.is_cuda:
            allocate_user_buffers(parallel, spec.hidden_size)
        chunks = [
            _build_chunk(spec, config, parallel, grid, implementation, score_head, max_sequence_length, stage)
            for stage in range(grid.vpp or 1)
        ]
        if dtype == "bf16":
            chunks = [Float16Module(config, chunk) for chunk in chunks]
        if trainable:
            chunks = _wrap_ddp(chunks, config, parallel, published=not score_head)
        # A frozen model keeps requires_grad: it only ever runs under no_grad, and Megatron and torch choose other
        # kernels for frozen weights, whose rounding would show as a KL between two equal models.
    return MegatronModel(chunks=chunks, config=config, spec=spec, trainable=trainable)


def _build_chunk(
    spec: ModelSpec,
    config: TransformerConfig,
    parallel: ParallelConfig,
    grid: ParallelGrid,
    implementation: Implementation,
    score_head: bool,
    max_sequence_length: int,
    stage: int,
) -> torch.nn.Module:
    vp_stage = stage if grid.vpp else None
    first = mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
    last = mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=grid.pp_rank)
    model = PackedGPTModel(
        config=config,
        transformer_layer_spec=layer_spec(config, implementation, qk_norm=spec.qk_norm, num_layers=num_layers),
        vocab_size=padded_vocab_size(spec.vocab_size, tp=grid.tp, vocab_divisor=parallel.make_vocab_size_divisible_by),
        max_sequence_length=max_sequence_length,
        pre_process=first,
        post_process=last,
        share_embeddings_and_output_weights=spec.tied_embeddings and not score_head,
        position_embedding_type="rope",
        rotary_base=int(spec.rope.theta),
        vp_stage=vp_stage,
        score_head=score_head,
        local_rope=implementation == "local",
        loss_chunk_tokens=parallel.loss_chunk_tokens,
    )
    frequencies = torch.tensor(spec.rope.inverse_frequencies(spec.head_dim), dtype=torch.float32)
    model.rotary_pos_emb.inv_freq = frequencies.to(torch.cuda.current_device())
    return model.to(torch.cuda.current_device())


def _wrap_ddp(
    chunks: list[torch.nn.Module], config: TransformerConfig, parallel: ParallelConfig, *, published: bool
) -> list[torch.nn.Module]:
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        **ddp_options(parallel, published=published),
    )
    wrapped: list[torch.nn.Module] = [
        DistributedDataParallel(
            config=config,
            ddp_config=ddp_config,
            module=chunk,
            # Megatron buckets the first chunk only: the others' gradients come together anyway.
            disable_bucketing=index > 0,
        )
        for index, chunk in enumerate(chunks)
    ]
    config.finalize_model_grads_func = _finalize
    if parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync[0] if len(no_sync) == 1 else no_sync
    return wrapped
