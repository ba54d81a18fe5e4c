"""Megatron-core on CPU ranks over gloo.

Megatron-core assumes CUDA in a handful of places: tensors made with ``device="cuda"``, ``torch.cuda.current_device()``
and ``synchronize()``, assertions on the CUDA name that ``Tensor.type()`` returns, its CUDA random-number tracker, and
the optimizers of TransformerEngine or apex, which it takes wherever they are installed, for they have no CPU code.
``megatron_on_cpu`` answers exactly those while it is entered, and puts everything back when it is left. It refuses to
start where CUDA is available.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CUDA_TYPE_NAMES = {
    "torch.FloatTensor": "torch.cuda.FloatTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
    "torch.HalfTensor": "torch.cuda.HalfTensor",
}
_entered: list[None] = []  # one entry a level of nesting


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _CudaMeansCpu(TorchFunctionMode):
    """Map a request for a CUDA device to the CPU, and a CPU tensor's type name to the CUDA one."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = "cpu"
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            name = func(*args)
            return _CUDA_TYPE_NAMES.get(name, name)
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], torch.device("cpu"), *args[2:])
        return func(*args, **kwargs)


class _NoRandomStates:
    """Stands in for Megatron's CUDA random-number tracker: models are loaded, not initialised, and use no dropout."""

    def is_initialized(self) -> bool:
        return True

    def reset(self) -> None:
        """Nothing is tracked."""

    def get_states(self) -> dict[str, torch.Tensor]:
        return {}

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        """Nothing is tracked."""

    def add(self, name: str, seed: int) -> None:
        """Nothing is tracked."""

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        yield


class _NoStream:
    """Stands in for a CUDA stream: on a CPU everything has happened when a call returns."""

    def wait_stream(self, stream: object) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: object) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def record_event(self) -> _NoStream:
        """Itself: an event that has happened."""
        return self

    def wait(self, stream: object) -> None:
        """Nothing to wait for."""


def _replacements() -> list[tuple[Any, str, Any]]:
    from megatron.core.tensor_parallel import random as megatron_random

    cpu = torch.device("cpu")
    tracker = _NoRandomStates()
    stream = _NoStream()
    nothing = torch.empty(0, dtype=torch.uint8)
    return [
        (torch.cuda, "current_device", lambda: cpu),
        (torch.cuda, "synchronize", lambda *_: None),
        (torch.cuda, "empty_cache", lambda: None),
        (torch.cuda, "current_stream", lambda *_: stream),
        (torch.cuda, "default_stream", lambda *_: stream),
        (torch.cuda, "stream", lambda *_: contextlib.nullcontext()),
        (torch.cuda, "get_rng_state", lambda *_: nothing),
        (torch.cuda, "set_rng_state", lambda *_: None),
        (megatron_random, "_CUDA_RNG_STATE_TRACKER", tracker),
        (megatron_random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", True),
        (megatron_random, "_get_cuda_rng_state", lambda *_, **__: nothing),
        (megatron_random, "_set_cuda_rng_state", lambda *_, **__: None),
    ]


def _torch_optimizers() -> list[tuple[Any, str, Any]]:
    """What Megatron itself falls back to without TransformerEngine and apex."""
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.optimizer import optimizer as megatron_optimizer

    replaced: list[tuple[Any, str, Any]] = [
        (optimizer, "Adam", torch.optim.AdamW),
        (optimizer, "USING_PYTORCH_OPTIMIZER", True),
        (distrib_optimizer, "Adam", torch.optim.Adam),
        (distrib_optimizer, "HAVE_APEX_OR_TE", False),
        (clip_grads, "l2_norm_impl", utils.local_multi_tensor_l2_norm),
        (clip_grads, "multi_tensor_scale_tensor_impl", None),
    ]
    for module in (clip_grads, megatron_optimizer):
        replaced.append((module, "multi_tensor_applier", utils.local_multi_tensor_applier))
        replaced.append((module, "multi_tensor_scale_impl", utils.local_multi_tensor_scale))
    return [(module, name, value) for module, name, value in replaced if hasattr(module, name)]  # as versions have them


@contextlib.contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Enter the adaptation; nested use is free. Raises ``RuntimeError`` where CUDA is available."""
    if torch.cuda.is_available():
        raise RuntimeError("megatron_on_cpu is for machines without CUDA")
    if _entered:
        _entered.append(None)
        try:
            yield
        finally:
            _entered.pop()
        return
    replaced = [*_replacements(), *_torch_optimizers()]
    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    _entered.append(None)
    try:
        with _CudaMeansCpu():
            yield
    finally:
        _entered.pop()
        for owner, name, value in saved:
            setattr(owner, name, value)
