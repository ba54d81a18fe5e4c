"""Directories that appear under their name only when they are complete, and what a Hugging Face one consists of.

Nothing here knows ranks, except ``together``, which also works in a process of its own.
"""

from __future__ import annotations

import errno
import fcntl
import fnmatch
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from megatron_oreal.errors import UserError
from megatron_oreal.layout.blocks import Shape
from megatron_oreal.layout.families import CLASSIFIER
from megatron_oreal.layout.files import WRITE_MENDS, check_readable, read_json, reading, writing
from megatron_oreal.layout.hf import INDEX_FILE

COPIED_FILES = (
    "generation_config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "additional_chat_templates/*.jinja", "*.model",
)  # fmt: skip
"""Files of the original model directory that belong to the written model as they are."""


class NewDirectory:
    """A directory that is written as ``.<name>.incomplete`` beside ``path`` and renamed when all of it is on disk.

    ``begin``, write into ``partial``, ``commit``; or ``abandon``, which removes what was written. As a context manager
    it commits when the body ends and abandons when it raises. What an interrupted process left is removed by the next
    ``begin``, unless that process still runs (an advisory lock on ``partial`` tells). All raise ``UserError``
    with one line that names the path.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(os.path.abspath(path))
        self._lock: int | None = None

    @property
    def partial(self) -> Path:
        """Where to write until ``commit``."""
        return self.path.with_name(f".{self.path.name}.incomplete")

    def begin(self, required_bytes: int = 0) -> None:
        """Create ``partial``, empty; refuses a ``path`` that is there and not an empty directory.

        Refuses too when the file system has less than ``required_bytes`` free: better now than after an hour's writing.
        """
        with writing(self.path):
            taken = os.path.lexists(self.path) and not _is_empty_directory(self.path)
        if taken:
            raise UserError(f"{self.path}: already exists: choose another directory, or remove it first")
        if os.path.ismount(self.path):  # the rename at the end would fail
            raise UserError(f"{self.path}: is a mount point, which cannot be replaced: name a directory inside it")
        with writing(self.partial):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.partial.exists():
                self._acquire()
                shutil.rmtree(self.partial)
                self._release()
            self.partial.mkdir()
            self._acquire()
            free = shutil.disk_usage(self.partial).free
        if free < required_bytes:
            self.abandon()
            raise UserError(
                f"{self.path}: needs {required_bytes / 1e9:.3g} GB and the file system has {free / 1e9:.3g} GB free: "
                f"{WRITE_MENDS[errno.ENOSPC]}"
            )

    def commit(self) -> None:
        """Wait until everything is on disk and give it its name."""
        with writing(self.path):
            for path in sorted(self.partial.rglob("*")):
                sync(path)
            sync(self.partial)
            self.partial.rename(self.path)
            sync(self.path.parent)
        self._release()

    def abandon(self) -> None:
        """Remove what was written, as far as that is possible. Idempotent; nothing happens after ``commit``."""
        if self._lock is not None:
            shutil.rmtree(self.partial, ignore_errors=True)
            self._release()

    def __enter__(self) -> NewDirectory:
        self.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            self.abandon()

    def _acquire(self) -> None:
        self._lock = os.open(self.partial, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._taken() from None
        except OSError:
            pass  # a file system without locks
        # Another process may have removed what was opened here, and made it anew, before the lock was held.
        if not self.partial.exists() or not os.path.samestat(os.fstat(self._lock), self.partial.stat()):
            raise self._taken()

    def _taken(self) -> UserError:
        self._release()
        return UserError(f"{self.path}: another process is writing it: wait for it, or choose another name")

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _is_empty_directory(path: Path) -> bool:
    if path.is_symlink() or not path.is_dir():
        return False
    return not any(path.iterdir())


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file as transformers does, with the permissions of any new file; or raise ``UserError``."""
    with writing(path):
        path.touch()
        mode = path.stat().st_mode
        save_file(dict(tensors), path, metadata={"format": "pt"})
        path.chmod(mode)  # safetensors renames a temporary file that only its owner may read


def write_companions(
    folder: Path,
    files: Mapping[str, Mapping[str, Shape]],
    model_dir: Path,
    *,
    dtype: torch.dtype,
    reward_model: bool = False,
) -> None:
    """Write what makes ``folder`` a model besides its weights: index, config, tokenizer, generation config, template.

    ``files``: file name to the tensors in it and their shapes; one file needs no index. Tokenizer and the like come
    from ``model_dir`` as they are, ``config.json`` with the dtype and a reward model's architecture set.
    """
    if len(files) > 1:
        elements = sum(math.prod(shape) for shapes in files.values() for shape in shapes.values())
        index = {
            "metadata": {"total_parameters": elements, "total_size": elements * dtype.itemsize},
            "weight_map": {tensor: file for file, shapes in files.items() for tensor in shapes},
        }
        _write_json(folder / INDEX_FILE, index, sort_keys=True)
    config = adapt_config(read_json(model_dir / "config.json"), dtype, reward_model)
    _write_json(folder / "config.json", config)
    for path in _copied_files(model_dir):
        copy = folder / path.relative_to(model_dir)
        check_readable(path)
        with writing(copy):
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def check_companions(model_dir: Path, *, reward_model: bool = False) -> None:
    """See that what ``write_companions`` takes from ``model_dir`` can be read, before the weights are written.

    Raises ``UserError`` too for a link to nowhere (a file of Hugging Face's cache that is gone), and for the config of
    a classifier beside weights that are not a reward model's: whoever loads the two gets a random head.
    """
    path = model_dir / "config.json"
    named = read_json(path).get("architectures")
    if not reward_model and str(named[0] if isinstance(named, list) and named else named).endswith(CLASSIFIER):
        raise UserError(f"{path}: architectures={named!r} is a reward model's, the weights are a language model's")
    with reading(model_dir):
        gone = [path for path in _companions(model_dir) if path.is_symlink() and not path.exists()]
    for path in [*gone, *_copied_files(model_dir)]:
        check_readable(path)


def _copied_files(model_dir: Path) -> list[Path]:
    with reading(model_dir):
        return [path for path in _companions(model_dir) if path.is_file()]


def _companions(model_dir: Path) -> list[Path]:
    return sorted({path for pattern in COPIED_FILES for path in _matching(model_dir, pattern)})


def _matching(folder: Path, pattern: str) -> list[Path]:
    """Paths that fit ``pattern``, of one part or two; unlike ``Path.glob`` it raises when it may not look."""
    first, _, rest = pattern.partition("/")
    paths = [path for path in folder.iterdir() if fnmatch.fnmatchcase(path.name, first)]
    return [inner for path in paths if path.is_dir() for inner in _matching(path, rest)] if rest else paths


def _write_json(path: Path, value: Any, *, sort_keys: bool = False) -> None:
    with writing(path):
        path.write_text(json.dumps(value, indent=2, sort_keys=sort_keys) + "\n")


def adapt_config(config: dict[str, Any], dtype: torch.dtype, reward_model: bool) -> dict[str, Any]:
    """Set the architecture, and the dtype under the config's own keys (``torch_dtype`` before transformers 5)."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    config |= dict.fromkeys(keys, str(dtype).removeprefix("torch."))
    if reward_model:
        causal = config["architectures"][0].replace("ForCausalLM", CLASSIFIER)
        config |= {"architectures": [causal], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return config


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def together(group: dist.ProcessGroup | None, step: Callable[[], object]) -> None:
    """Run ``step`` on every rank and go on together or fail together: a lone failure would leave the others waiting.

    The rank that failed raises its own error; the others a ``UserError`` with the same line, or a ``RuntimeError`` that
    names the rank. Without a process group it just runs.
    """
    failure: Exception | None = None
    try:
        step()
    except Exception as error:
        failure = error
    if dist.is_initialized():
        report = None if failure is None else (isinstance(failure, UserError), f"{failure}")
        reports: list[tuple[bool, str] | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(reports, report, group=group)
        if failure is None:
            for number, other in enumerate(reports):
                if other is not None:
                    raise UserError(other[1]) if other[0] else RuntimeError(f"rank {number} failed: {other[1]}")
    if failure is not None:
        raise failure
