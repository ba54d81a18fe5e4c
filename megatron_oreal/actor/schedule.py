"""Run micro-batches through a model on Megatron-core's pipeline schedules (no pipeline, 1F1B, interleaved)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_oreal.actor.build import MegatronModel, unwrap
from megatron_oreal.actor.local_modules import PackedSequences, padded_batches
from megatron_oreal.actor.specs import Implementation
from megatron_oreal.data.packing import PackedBatch
from megatron_oreal.loss.settings import Mode
from megatron_oreal.platform import Platform

# head(i, output): what the last stage makes of micro-batch i's vocabulary head (policy: a VocabularyHead of n
# positions) or scores (reward model: [n]). Returns a 0-d loss (ignored when only the forward runs) and what the caller
# wants back.
HeadFn = Callable[[int, Any], tuple[Tensor, Any]]


@dataclass
class DeviceBatch:
    """A packed micro-batch on the device.

    ``tokens`` and ``position_ids`` int64 [1, t]; ``labels`` int64 [n], the response tokens; ``logit_index`` and
    ``score_index`` int64 [n], where the policy's logits and the reward model's scores are read for them.
    """

    tokens: Tensor
    position_ids: Tensor
    labels: Tensor
    logit_index: Tensor
    score_index: Tensor
    packed: PackedSequences
    response_lengths: list[int]


def to_device(batch: PackedBatch, implementation: Implementation, platform: Platform, *, mode: Mode) -> DeviceBatch:
    """Move a packed batch to the device; ``mode`` decides where scores are read (algorithm.md, "Positions")."""
    device = platform.device
    on_device = batch.cu_seqlens.to(device)
    packed = PackedSequences(
        qkv_format="thd" if implementation == "transformer_engine" else "packed",
        cu_seqlens_q=on_device,
        cu_seqlens_kv=on_device,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
    )
    if implementation == "local":
        batches, unpad = padded_batches(batch.cu_seqlens.numpy())
        packed.batches = [(torch.from_numpy(rows).to(device), count, length) for rows, count, length in batches]
        packed.unpad = torch.from_numpy(unpad).to(device)
    return DeviceBatch(
        tokens=batch.tokens.unsqueeze(0).to(device),
        position_ids=batch.position_ids.unsqueeze(0).to(device),
        labels=batch.labels.to(device),
        logit_index=batch.logit_index.to(device),
        score_index=batch.score_index(mode).to(device),
        packed=packed,
        response_lengths=list(batch.response_lengths),
    )


def run_microbatches(
    model: MegatronModel, batches: Sequence[DeviceBatch], head: HeadFn, platform: Platform, *, backward: bool
) -> list[Any]:
    """Forward every micro-batch (and backward it), and return what ``head`` gave back, on the last stage (else empty).

    The gradients stand summed in ``main_grad`` and reduced over data-parallel ranks when this returns.
    """
    stash: dict[int, Any] = {}

    def forward_step(iterator: Iterator[int], chunk: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        index = next(iterator)
        batch = batches[index]

        def consume(output: Any) -> Tensor:
            loss, stash[index] = head(index, output)
            return loss

        batch.packed.head = consume
        batch.packed.read_index = batch.score_index if unwrap(chunk).score_head else batch.logit_index
        output = chunk(
            input_ids=batch.tokens,
            position_ids=batch.position_ids,
            attention_mask=None,
            packed_seq_params=batch.packed,
        )
        # The count is 0: our losses are normalised already, and Megatron divides by it only when asked to.
        return output, lambda loss: (loss, torch.zeros([], dtype=torch.int, device=platform.device), None)

    model.train() if backward else model.eval()
    iterators = [iter(range(len(batches))) for _ in model.chunks]
    longest = max(batch.tokens.size(1) for batch in batches)
    with platform.megatron(), torch.set_grad_enabled(backward):
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=model.chunks if len(model.chunks) > 1 else model.chunks[0],
            num_microbatches=len(batches),
            seq_length=longest,
            micro_batch_size=1,
            forward_only=not backward,
        )
    return [stash[index] for index in range(len(batches))] if stash else []
