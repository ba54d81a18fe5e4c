"""The files of ``torch.distributed.checkpoint``: ``.metadata``, and objects inside ``*.distcp`` files."""

from __future__ import annotations

import argparse
import io
import operator
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_oreal.errors import UserError
from megatron_oreal.layout.files import is_file, reading

METADATA_FILE = ".metadata"
UNREADABLE = (
    RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, struct.error, pickle.UnpicklingError,
    zipfile.BadZipFile,
)  # fmt: skip
"""What reading junk as a pickle raises."""


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
    if not is_file(path):
        raise UserError(
            f"{directory}: has no {METADATA_FILE}: not a complete dist_checkpointing directory (torch_dist)"
        )
    with reading(path):
        data = path.read_bytes()
    try:
        metadata = _MetadataUnpickler(io.BytesIO(data)).load()
        whole = isinstance(metadata, Metadata) and bool(metadata.storage_data) and _is_whole(metadata)
    except Exception as error:
        raise UserError(f"{path}: damaged ({one_line(error)})") from None
    if not whole:
        raise UserError(f"{path}: damaged: it does not describe a checkpoint")
    return metadata


def _is_whole(metadata: Metadata) -> bool:
    """Whether all that is read of the metadata is there and of its type: a changed bit may leave a field out.

    Raises ``AttributeError``, ``TypeError`` or ``ValueError`` for some that are not.
    """
    numbers: list[Any] = []
    for entry in metadata.state_dict_metadata.values():
        if isinstance(entry, TensorStorageMetadata):
            if not isinstance(entry.properties.dtype, torch.dtype):
                return False
            numbers += [*entry.size]
            for chunk in entry.chunks:
                for offset, size in zip(chunk.offsets, chunk.sizes, strict=True):
                    numbers += [offset, size]
    for index, info in metadata.storage_data.items():
        if not (isinstance(index.fqn, str) and isinstance(info.relative_path, str)):
            return False
        numbers += [info.offset, info.length]
    return all(operator.index(number) >= 0 for number in numbers)


def read_object(path: Path, offset: int, length: int) -> Any:
    """Read what ``torch.save`` wrote at a place in a file, on the CPU; raises one of ``UNREADABLE`` when it is damaged.

    Its checksums are verified, which ``torch.load`` does not do (0: saved without them).
    """
    with reading(path), path.open("rb") as file:
        file.seek(offset)
        data = file.read(length)
    if data.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for record in archive.infolist():
                with archive.open(record) as stream:
                    while record.CRC and stream.read(2**20):
                        pass
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def load_plain(path: Path, offset: int = 0, length: int = -1) -> Any:
    """Read what stands beside the tensors; ``argparse.Namespace``, Megatron-LM's ``args``, may be in it.

    ``UserError`` that names the file when it is damaged, and when it holds classes that would have to be imported.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return read_object(path, offset, length)
    except UserError:
        raise
    except UNREADABLE as error:
        if foreign := re.search(r"GLOBAL (\w[\w.]*)", str(error)):
            raise UserError(
                f"{path}: holds {foreign[1]} objects, and code of other packages is not run from a file: give "
                "--weights-only to leave out what stands beside the weights"
            ) from None
        reason = "not what torch.save writes" if isinstance(error, pickle.UnpicklingError) else one_line(error)
        raise UserError(f"{path}: damaged or not readable ({reason})") from None


def one_line(error: BaseException) -> str:
    """Return an error's message without line breaks, its class when it has none."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # torch's are in colours
    return " ".join(text.split())[:200] or type(error).__name__
