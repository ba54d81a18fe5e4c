"""Megatron-core's GPTModel with the two things that OREAL needs of its last stage.

* Only the positions that the loss reads reach the vocabulary head: prompt tokens and padding are dropped before the
  GEMM, which is where most of the head's time and memory would go.
* The head is applied inside the model by a function that comes with the micro-batch (``actor/head.py``), so that no
  logits-sized tensor leaves it (Megatron would transpose it, and upcast it to fp32 in bf16 runs).

``_postprocess`` is overridden because every megatron-core from 0.16 on has it. From 0.18 on ``GPTModel.forward`` also
takes an ``output_processor``, which ``_postprocess`` calls just before the output layer: where the override stands.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_oreal.actor.head import VocabularyHead
from megatron_oreal.actor.local_modules import PackedSequences


class ScoreHead(torch.nn.Module):
    """The token reward model's head: one score a position, no bias, replicated over tensor-parallel ranks.

    Zero at the start, so that every token weight is zero until it has learned (algorithm.md, "Reward model").
    """

    def __init__(self, hidden_size: int, dtype: torch.dtype):
        super().__init__()
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.zeros(1, hidden_size, dtype=dtype, device=device))

    def forward(self, hidden: Tensor) -> Tensor:
        """[n, h] -> float32 [n]; in fp32 whatever the model's dtype, because small scores decide the token weights."""
        return F.linear(hidden.float(), self.weight.float()).squeeze(-1)


class PackedGPTModel(GPTModel):
    """GPTModel over packed sequences, with a vocabulary head (policy, reference) or a score head (reward model)."""

    def __init__(
        self, *args: Any, score_head: bool = False, local_rope: bool, loss_chunk_tokens: int = 0, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self.score_head = score_head
        self.local_rope = local_rope
        self.loss_chunk_tokens = loss_chunk_tokens
        if not self.post_process:
            return
        if score_head:
            self.output_layer = ScoreHead(self.config.hidden_size, self.config.params_dtype)
        else:
            # The hidden states are gathered here, before positions are selected; the gather's backward is then the
            # reduce-scatter, and the head must not reduce a second time.
            sequence_parallel = self.config.sequence_parallel
            head: Any = self.output_layer
            head.sequence_parallel = False
            head.disable_grad_reduce = sequence_parallel
            head.allreduce_dgrad = self.pg_collection.tp.size() > 1 and not sequence_parallel

    def _preprocess(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Torch-native attention takes one rotary angle a token, so that packed sequences need no loop."""
        outputs = super()._preprocess(*args, **kwargs)
        if not self.local_rope:
            return outputs
        position_ids = kwargs["position_ids"]
        return (outputs[0], outputs[1].index_select(0, position_ids[0]), *outputs[2:])

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.post_process:
            return hidden_states
        packed: PackedSequences = kwargs["packed_seq_params"]
        assert packed.read_index is not None
        if self.config.sequence_parallel:
            # Every tensor-parallel rank computes the same scores from the same rows (nothing to sum in the backward),
            # but only its own part of the vocabulary (partial gradients, summed by the reduce-scatter).
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=not self.score_head, group=self.pg_collection.tp
            )
        hidden = hidden_states.squeeze(1).index_select(0, packed.read_index)
        if self.score_head:
            return packed.head(self.output_layer(hidden))
        return packed.head(VocabularyHead.of(self, hidden))
