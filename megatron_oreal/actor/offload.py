"""Parts of the actor in host memory while they are not in use.

What moves is the storage behind the tensors: the bytes go to pinned host memory and the device storage is resized to
nothing, later the other way round. Tensors, views and parameters stay the same objects at the same offsets, so
Megatron's flat parameter buffers, the views that its optimizer keeps of them, and tied weights all survive it, and
every bit comes back. On a CPU the same happens between two places of one memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_oreal.actor.build import MegatronModel
from megatron_oreal.actor.optimizer import ModelOptimizer
from megatron_oreal.telemetry import PhaseTimers

_SLAB_BYTES = 1 << 30
"""Of one pinned allocation. torch rounds each up to a power of two: one a tensor would take up to twice the memory."""


@dataclass
class Part:
    """Tensors that are needed at the same time. ``scratch``: those whose contents nobody reads again."""

    tensors: list[Tensor]
    scratch: list[Tensor] = field(default_factory=list)


class Offloader:
    """Moves parts out and in again, by name; those not in ``names`` always stay. All calls are idempotent.

    ``parts`` share no storage. Device memory that is freed is given back to the driver, for other processes on the
    device. ``scratch`` comes back as zeros.
    """

    def __init__(self, parts: dict[str, Part], names: Iterable[str]):
        self._names = set(names)
        self._parts = {name: _Storages(part) for name, part in parts.items() if name in self._names}

    def put_out(self, parts: dict[str, Part]) -> None:
        """Move further parts, now on the device, out at once; those that are known, or not to move, are left alone."""
        new = {name: part for name, part in parts.items() if name in self._names - self._parts.keys()}
        self._parts |= {name: _Storages(part) for name, part in new.items()}
        if new:
            self.offload(*new)

    def load(self, *names: str, timers: PhaseTimers | None = None) -> None:
        """Bring parts back; no name: all. A phase ``load`` where there is something to do."""
        away = [part for part in self._chosen(names) if part.is_out]
        if not away:
            return
        with (timers or PhaseTimers())("load"):
            for part in away:
                part.load()

    def offload(self, *names: str, timers: PhaseTimers | None = None) -> None:
        """Move parts out; no name: all. A phase ``offload`` where there is something to do."""
        here = [part for part in self._chosen(names) if not part.is_out]
        if not here:
            return
        with (timers or PhaseTimers())("offload"):
            for part in here:
                part.offload()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    @contextlib.contextmanager
    def resident(self, name: str, timers: PhaseTimers | None = None) -> Iterator[None]:
        """A part on the device for one phase of the step."""
        self.load(name, timers=timers)
        yield
        self.offload(name, timers=timers)

    @property
    def away(self) -> set[str]:
        """Names of the parts that are out."""
        return {name for name, part in self._parts.items() if part.is_out}

    def _chosen(self, names: Sequence[str]) -> list[_Storages]:
        return [part for name, part in self._parts.items() if not names or name in names]


class _Storages:
    """The storages of one part, each once, and the host memory that they leave for, one after another; it is kept."""

    def __init__(self, part: Part):
        self._device = _unique(part.tensors)
        self._scratch = _unique(part.scratch)
        self._sizes = [storage.nbytes() for storage in self._device]
        self._scratch_sizes = [storage.nbytes() for storage in self._scratch]
        self._host: list[Tensor] = []
        self.is_out = False

    def offload(self) -> None:
        if not self._host:
            self._host = _slabs(sum(self._sizes), pinned=any(s.device.type == "cuda" for s in self._device))
        for device, host in self._pieces():
            host.copy_(device, non_blocking=True)
        _wait(self._device)
        for storage in self._device + self._scratch:
            storage.resize_(0)
        self.is_out = True

    def load(self) -> None:
        for storage, size in zip(self._device, self._sizes, strict=True):
            storage.resize_(size)
        for device, host in self._pieces():
            device.copy_(host, non_blocking=True)
        for storage, size in zip(self._scratch, self._scratch_sizes, strict=True):
            storage.resize_(size)
            _as_bytes(storage).zero_()
        _wait(self._device)
        self.is_out = False

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Bytes on the device and their place in host memory; a piece ends with its storage or its slab."""
        place = 0
        for storage, size in zip(self._device, self._sizes, strict=True):
            device, end = _as_bytes(storage), place + size
            while place < end:
                slab, offset = divmod(place, _SLAB_BYTES)
                count = min(end - place, _SLAB_BYTES - offset)
                done = size - (end - place)
                yield device[done : done + count], self._host[slab][offset : offset + count]
                place += count


def model_part(model: MegatronModel) -> Part:
    """All parameters of a model, Megatron's flat buffers included."""
    flat = [buffer.param_data for buffer in _ddp_buffers(model) if buffer.param_data is not None]
    return Part([*model.parameters().values(), *flat])


def optimizer_part(model: MegatronModel, optimizer: ModelOptimizer) -> Part:
    """An optimizer's moments and fp32 weights, and, as scratch, its model's gradient buffers.

    Gradients are zeroed before the first micro-batch of every step, so their contents need not be kept.
    """
    mine = {storage.data_ptr() for storage in _unique(model_part(model).tensors)}
    tensors: list[Tensor] = []
    for inner in optimizer.inner_optimizers():
        tensors += [param.data for group in inner.param_groups for param in group["params"]]
        for state in inner.state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor) and value.numel() > 1]
    own = [tensor for tensor in tensors if tensor.untyped_storage().data_ptr() not in mine]  # fp32: the model's own
    return Part(own, [buffer.grad_data for buffer in _ddp_buffers(model)])


def merged(*parts: Part) -> Part:
    """Several parts as one."""
    return Part([t for part in parts for t in part.tensors], [t for part in parts for t in part.scratch])


def _ddp_buffers(model: MegatronModel) -> list[Any]:
    """Megatron's ``_ParamAndGradBuffer``s of a trainable model."""
    wrapped = [chunk for chunk in model.chunks if isinstance(chunk, DistributedDataParallel)]
    return [buffer for chunk in wrapped for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]]


def _unique(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            found[storage.data_ptr()] = storage
    return list(found.values())


def _slabs(size: int, *, pinned: bool) -> list[Tensor]:
    """``size`` bytes of host memory."""
    sizes = [min(_SLAB_BYTES, size - begin) for begin in range(0, size, _SLAB_BYTES)]
    return [torch.empty(count, dtype=torch.uint8, pin_memory=pinned) for count in sizes]


def _as_bytes(storage: torch.UntypedStorage) -> Tensor:
    """A tensor over all of a storage."""
    view = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return view.set_(storage, 0, (storage.nbytes(),), (1,))  # type: ignore[call-overload, no-any-return]


def _wait(storages: Sequence[torch.UntypedStorage]) -> None:
    if any(storage.device.type == "cuda" for storage in storages):
        torch.cuda.synchronize()
