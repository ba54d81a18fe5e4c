"""What every engine refuses before it starts to generate."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_oreal.errors import UserError
from megatron_oreal.rollout.engine import EngineError, Request, SamplingParams
from megatron_oreal.rollout.sampling import check_sampling


def checked_prompts(
    requests: Sequence[Request], sampling: SamplingParams, *, max_length: int, vocab_size: int
) -> list[np.ndarray]:
    """Return the prompts as int64 [P] each.

    Raises ``EngineError`` for sampling parameters out of range, for more than the engine's ``max_length``, and for
    prompts that are empty or outside the vocabulary; ``UserError`` for a prompt that leaves no room for a response.
    """
    check_sampling(sampling)
    if sampling.max_length > max_length:
        raise EngineError(f"sampling.max_length={sampling.max_length} exceeds the engine's {max_length}")
    return [_checked_prompt(i, request, sampling.max_length, vocab_size) for i, request in enumerate(requests)]


def _checked_prompt(index: int, request: Request, max_length: int, vocab_size: int) -> np.ndarray:
    """Return the prompt as int64 [P]."""
    prompt = np.asarray(request.prompt_ids, dtype=np.int64)
    if prompt.ndim != 1 or prompt.size == 0:
        raise EngineError(f"request {index}: prompt_ids has shape {prompt.shape}, not [P] with P >= 1")
    if prompt.size >= max_length:
        raise UserError(
            f"request {index}: a prompt of {prompt.size} tokens leaves no room for a response in "
            f"max_length={max_length} (config: rollout.gen_max_length): raise it or drop the prompt"
        )
    if prompt.min() < 0 or prompt.max() >= vocab_size:
        raise EngineError(
            f"request {index}: token ids {prompt.min()}..{prompt.max()} are outside the vocabulary of {vocab_size}"
        )
    return prompt
