"""How many bytes of tensors are alive at most while a piece of code runs: counted storage by storage, not as RSS."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Sees every storage that an operation makes, forward and backward, and when it is freed.

    ``peak``: the most bytes alive at once among those made inside; ``largest``: of one storage; ``count``: operations.
    Storages that were there before (arguments) do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self.largest, self.count = 0, 0, 0, 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            self._see(tensor, new=False)
        out = func(*args, **(kwargs or {}))
        self.count += 1
        for tensor in tree_leaves(out):
            self._see(tensor, new=True)
        return out

    def _see(self, tensor: Any, *, new: bool) -> None:
        if not isinstance(tensor, torch.Tensor):
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known[key] = weakref.finalize(storage, self._forget, key, size if new else 0)
        if new:
            self.live += size
            self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self.live -= size
