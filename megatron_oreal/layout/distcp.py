"""The files of ``torch.distributed.checkpoint``: ``.metadata``, and objects inside ``*.distcp`` files."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_oreal.errors import UserError

METADATA_FILE = ".metadata"
UNREADABLE = (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile)


class _Ignored:
    """Stands for whatever a ``.metadata`` file holds besides what describes its tensors."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __call__(self, *args: Any, **kwargs: Any) -> _Ignored:
        return self

    def __setstate__(self, state: Any) -> None: ...


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of ``torch.distributed.checkpoint`` alone: other classes, Megatron's among them, are ignored.

    A pickle from elsewhere can then run nothing.
    """

    def find_class(self, module: str, name: str) -> Any:
        known = module.startswith("torch.distributed.checkpoint.") and "." not in name
        plain = (module, name) in {("torch", "Size"), ("torch.serialization", "_get_layout")}
        if known or plain or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            found = super().find_class(module, name)
            own = getattr(found, "__module__", "").startswith("torch.distributed.checkpoint.")
            if plain or isinstance(found, torch.dtype) or (isinstance(found, type) and own):
                return found
        return _Ignored


def read_metadata(directory: Path) -> Metadata:
    """Read ``.metadata``; ``UserError`` when it is missing or damaged, or the checkpoint is of another backend."""
    path = directory / METADATA_FILE
    if not path.is_file():
        raise UserError(
            f"{directory}: has no {METADATA_FILE}: not a complete dist_checkpointing directory (torch_dist)"
        )
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except Exception as error:
        raise UserError(f"{path}: damaged ({one_line(error)})") from None
    if not isinstance(metadata, Metadata) or not metadata.storage_data:
        raise UserError(f"{path}: damaged: it does not describe a checkpoint")
    return metadata


def read_object(path: Path, offset: int, length: int) -> Any:
    """Read what ``torch.save`` wrote at a place in a file, on the CPU; raises one of ``UNREADABLE`` when it is damaged.

    Its checksums are verified, which ``torch.load`` does not do (0: saved without them).
    """
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(length)
    if data.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for record in archive.infolist():
                with archive.open(record) as stream:
                    while record.CRC and stream.read(2**20):
                        pass
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def one_line(error: BaseException) -> str:
    """Return an error's message without line breaks, its class when it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__
