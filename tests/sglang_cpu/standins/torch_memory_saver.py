"""Stand-in for torch_memory_saver without a GPU; the real one preloads a library that is linked to libcuda.

Storages made inside ``region(tag)`` are really dropped by ``pause(tag)`` and made again by ``resume(tag)`` with bytes
that read as NaN, so that a weight nobody has written since shows.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class _Record(TorchDispatchMode):
    """Note the storage of every tensor that is made."""

    def __init__(self, found: list[StorageWeakRef]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self.found.append(StorageWeakRef(tensor.untyped_storage()))
        return out


class _Saver:
    enabled = True

    def __init__(self):
        self.made: dict[tuple[str, bool], list[StorageWeakRef]] = {}
        self.paused: dict[tuple[str, bool], list] = {}

    @contextlib.contextmanager
    def region(self, tag: str = "default", enable_cpu_backup: bool = False) -> Iterator[None]:
        with _Record(self.made.setdefault((tag, enable_cpu_backup), [])):
            yield

    @contextlib.contextmanager
    def cuda_graph(self, *args, **kwargs) -> Iterator[None]:
        yield

    disable = cuda_graph

    def pause(self, tag: str | None = None) -> None:
        for (name, backup), refs in self.made.items():
            if tag not in (None, name) or (name, backup) in self.paused:
                continue
            dropped = {}
            for ref in refs:
                storage = torch.UntypedStorage._new_with_weak_ptr(ref.cdata)
                if storage is not None and storage.resizable():
                    dropped.setdefault(storage._cdata, (storage, storage.nbytes(), storage.clone() if backup else None))
            for storage, _, _ in dropped.values():
                storage.resize_(0)
            self.paused[name, backup] = list(dropped.values())

    def resume(self, tag: str | None = None) -> None:
        for key in [key for key in self.paused if tag in (None, key[0])]:
            for storage, nbytes, saved in self.paused.pop(key):
                storage.resize_(nbytes)
                if saved is not None:
                    storage.copy_(saved)
                else:
                    storage.fill_(255)  # 0xffff... is a NaN in every float type


torch_memory_saver = _Saver()


@contextlib.contextmanager
def configure_subprocess() -> Iterator[None]:
    yield
