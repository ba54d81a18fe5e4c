"""The vocabulary head over the positions that the loss reads: whole, or in chunks of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor

from megatron_oreal.loss import (
    PolicyLoss,
    TokenCoefficients,
    Vocabulary,
    auto_chunk_tokens,
    linear_policy_loss,
    linear_token_logprobs,
    policy_loss,
    token_logprobs,
)

if TYPE_CHECKING:
    from megatron_oreal.actor.gpt import PackedGPTModel


@dataclass(frozen=True)
class VocabularyHead:
    """Hidden states and the projection that is still to be applied to them.

    ``hidden`` [n, h], gathered over sequence-parallel ranks, of the n positions that are read; ``output_layer``
    Megatron's ColumnParallelLinear; ``weight`` [vocab/tp, h], its own or the tied embedding's; ``chunk_tokens`` the
    most tokens whose logits may live at once.

    Up to ``chunk_tokens`` positions go through Megatron's output layer: its GEMMs, its overlapped all-reduce of the
    hidden states' gradient, its fused accumulation into ``main_grad``. More go through ``loss/chunked.py``, which does
    the same sums chunk by chunk; only the hidden states' all-reduce remains Megatron's.
    """

    hidden: Tensor
    output_layer: Any
    weight: Tensor
    chunk_tokens: int

    @classmethod
    def of(cls, model: PackedGPTModel, hidden: Tensor) -> VocabularyHead:
        """The head of a last stage."""
        tied = model.share_embeddings_and_output_weights
        weight = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
        chunk_tokens = model.loss_chunk_tokens or auto_chunk_tokens(len(weight), weight.element_size())
        return cls(hidden, model.output_layer, weight, chunk_tokens)

    def policy_loss(
        self, labels: Tensor, coefficients: TokenCoefficients, vocabulary: Vocabulary, *, monitor: bool = False
    ) -> PolicyLoss:
        """``megatron_oreal.loss.policy_loss`` of these positions."""
        if len(self.hidden) <= self.chunk_tokens:
            return policy_loss(self._logits(), labels, coefficients, **vars(vocabulary), monitor=monitor)
        hidden = self.hidden
        if self.output_layer.allreduce_dgrad:  # under sequence parallelism the gather's backward sums instead
            hidden = copy_to_tensor_model_parallel_region(hidden, group=vocabulary.tp_group)
        return linear_policy_loss(
            hidden,
            self.weight,
            labels,
            coefficients,
            vocabulary,
            chunk_tokens=self.chunk_tokens,
            # Megatron's schedules start the backward with the loss scale, which bf16 and fp32 training do not have.
            upstream=1.0 if self.output_layer.config.grad_scale_func is None else None,
            monitor=monitor,
        )

    def token_logprobs(self, labels: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
        """``megatron_oreal.loss.token_logprobs`` of these positions."""
        if len(self.hidden) <= self.chunk_tokens:
            return token_logprobs(self._logits(), labels, **vars(vocabulary))
        return linear_token_logprobs(self.hidden, self.weight, labels, vocabulary, chunk_tokens=self.chunk_tokens)

    def _logits(self) -> Tensor:
        """[n, vocab/tp], through Megatron's layer."""
        logits, _ = self.output_layer(self.hidden.unsqueeze(1), weight=self.weight)
        return logits.squeeze(1)
