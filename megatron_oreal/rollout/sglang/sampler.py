"""Drawing tokens inside SGLang's workers as the embedded engine draws them; ``rollout/sampling.py`` defines how.

SGLang's own samplers honour a request's seed only in its deterministic mode, which has no attention backend for a CPU,
and report nothing about the mass that top-p keeps. This one takes every token's random number from the request's seed
and the token's position, whatever else is in the batch, and reports the kept mass. Imported in the server only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.layers.sampler import Sampler, register_sampler_backend
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from torch import Tensor

from megatron_oreal.rollout.sglang.draws import draw, uniforms_of


def register() -> None:
    """Make this the sampler of the backend "pytorch", and let every batch carry its requests' seeds."""
    register_sampler_backend("pytorch", CounterSampler)
    SamplingBatchInfo.adjusted_from_schedule_batch = _add_seeds


def _add_seeds(info: SamplingBatchInfo, batch: Any, vocab_size: int) -> None:
    """Fill ``sampling_seed`` (int64 [n]), which SGLang itself does in its deterministic mode only.

    The method is SGLang's placeholder for such additions; filtering and merging of batches carry the field along.
    """
    if info.sampling_seed is None:
        seeds = [request.sampling_params.sampling_seed or 0 for request in batch.reqs]
        info.sampling_seed = torch.tensor(seeds, dtype=torch.int64).to(batch.device, non_blocking=True)


class CounterSampler(Sampler):
    """Samples [n] tokens from the logits [n, vocabulary] of one batch."""

    def forward(
        self,
        logits_output: Any,
        sampling_info: SamplingBatchInfo,
        return_logprob: bool,
        top_logprobs_nums: list[int],
        token_ids_logprobs: list[list[int]],
        positions: Tensor,
    ) -> Tensor:
        """Return int32 [n]; log-probabilities over the full vocabulary at each request's temperature go to the output.

        Greedy requests arrive as temperature 1 with top-k 1. Where a request asks for it (``return_sampling_mask``),
        the kept mass goes to ``next_token_sampling_logprobs``, without the lists of tokens that SGLang would send.
        """
        logits = self._preprocess_logits(logits_output.next_token_logits, sampling_info).float()
        logp = torch.log_softmax(logits.div_(sampling_info.temperatures), dim=-1)
        filtered = sampling_info.need_top_p_sampling or sampling_info.need_top_k_sampling
        tokens, kept = draw(
            logp,
            uniforms_of(sampling_info.sampling_seed, positions),
            sampling_info.top_ks if filtered else None,
            sampling_info.top_ps if filtered else None,
        )
        masks = sampling_info.return_sampling_masks or []
        if any(masks):
            logits_output.next_token_sampling_mask_idx = [[] for _ in masks]
            logits_output.next_token_sampling_logprobs = _Later(kept)
        if return_logprob:
            self.output_logprob_processor.compute_logprobs(
                logp, top_logprobs_nums, token_ids_logprobs, tokens
            ).write_output_to(logits_output)
        tokens = tokens.to(torch.int32)
        self._sync_token_ids_across_tp(tokens, sampling_info)
        return tokens


class _Later(Sequence[float]):
    """Numbers of a tensor [n], fetched when the first is read: by then the device has long made them."""

    def __init__(self, values: Tensor):
        self._values = values
        self._numbers: list[float] | None = None

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: Any) -> Any:
        if self._numbers is None:
            self._numbers = [round(value, 6) for value in self._values.tolist()]
        return self._numbers[index]
