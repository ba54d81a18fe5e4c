"""Stand-in for SGLang's compiled kernels on a machine without a GPU, where PyPI has no wheel of them.

Plain PyTorch for what SGLang's CPU path really calls; any other name can be imported, and raises when it is called.
"""

from collections.abc import Callable
from typing import NoReturn

from torch import Tensor


def assign_req_to_token_pool_cpu(
    req_pool_indices: Tensor, req_to_token: Tensor, start: Tensor, end: Tensor, out_cache_loc: Tensor, pool_len: int
) -> None:
    """Write each request's new KV slots, which lie one request after the other, into its row of the pool."""
    offset = 0
    for row, first, last in zip(req_pool_indices.tolist(), start.tolist(), end.tolist(), strict=True):
        slots = out_cache_loc[offset : offset + last - first]
        req_to_token[row, first:last] = slots.to(req_to_token.dtype)
        offset += last - first


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} is not in the stand-in for machines without a GPU")

    missing.__name__ = name
    return missing
