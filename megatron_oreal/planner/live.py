"""Bytes of tensors that are alive, storage by storage and by what they are for; not the allocator's word, not RSS."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorages(TorchDispatchMode):
    """Counts every storage that an operation makes while it is entered, real or meta, and when it is freed.

    A storage belongs to the item of ``making`` that was open when it was made, or to the one that ``assign`` gave it.
    ``live``: bytes alive now, by item. ``peak``: the same at the moment since ``restart`` when their sum was highest.
    Storages that were there before are not counted. ``UntypedStorage.resize_`` is followed, as offloading uses it.
    """

    def __init__(self, item: str = "activations") -> None:
        super().__init__()
        self.live: dict[str, int] = {}
        self.peak: dict[str, int] = {}
        self.total = 0
        self._highest = 0
        self._item = item
        self._known: dict[int, _Storage] = {}
        self._resize: Any = None

    def __enter__(self) -> LiveStorages:
        self._resize = torch.UntypedStorage.resize_
        watched = self

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = watched._resize(storage, size)
            watched._resized(storage)
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf, counted=False)
        out = self.run(func, args, kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf, counted=True)
        return out

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Execute one operation."""
        return func(*args, **kwargs)

    @contextlib.contextmanager
    def making(self, item: str) -> Iterator[None]:
        """Storages made inside belong to ``item``."""
        before, self._item = self._item, item
        try:
            yield
        finally:
            self._item = before

    @contextlib.contextmanager
    def ignoring(self) -> Iterator[None]:
        """Storages made inside are not counted: host memory, on a machine where both are one."""
        with self.making(""):
            yield

    def assign(self, tensor: torch.Tensor, item: str) -> None:
        """Say what a storage is for; a no-op for one that is not counted."""
        known = self._known.get(tensor.untyped_storage()._cdata)
        if known is not None and known.item:
            self._add(known.item, -known.size)
            known.item = item
            self._add(item, known.size)

    def restart(self) -> None:
        """Begin a new search for the peak, from what is alive now."""
        self.peak, self._highest = dict(self.live), self.total

    def _see(self, tensor: torch.Tensor, *, counted: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        item = self._item if counted else ""
        known = self._known[key] = _Storage(item, storage.nbytes() if item else 0)
        weakref.finalize(storage, self._forget, key).atexit = False
        self._add(item, known.size)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        known = self._known.get(storage._cdata)
        if known is not None and known.item:
            size = storage.nbytes()
            self._add(known.item, size - known.size)
            known.size = size

    def _forget(self, key: int) -> None:
        known = self._known.pop(key, None)
        if known is not None:
            self._add(known.item, -known.size)

    def _add(self, item: str, size: int) -> None:
        if not size:
            return
        self.live[item] = self.live.get(item, 0) + size
        self.total += size
        if self.total > self._highest:
            self._highest, self.peak = self.total, dict(self.live)


class _Storage:
    __slots__ = ("item", "size")

    def __init__(self, item: str, size: int):
        self.item, self.size = item, size
