"""Whole checkpoints from one kind to another, by any number of processes, each holding one tensor at a time.

Every conversion is a ``TensorSource`` (Hugging Face coordinates) and the writer of a format that reads from it. The
processes share the files of the result; ``torch.distributed`` is used only to agree, and not at all by a single one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_oreal.errors import UserError
from megatron_oreal.layout.blocks import Rect, Shape, full_rect
from megatron_oreal.layout.directory import NewDirectory, check_companions, together, write_companions
from megatron_oreal.layout.families import EMBEDDING, LM_HEAD, SCORE, hf_tensors
from megatron_oreal.layout.files import writing
from megatron_oreal.layout.hf import TensorSource, file_names, partition_files, refuse_other_model, to_dtype
from megatron_oreal.layout.megatron_checkpoint import HF_FOLDER
from megatron_oreal.layout.megatron_writer import Section, ShardFile, Written, total_bytes, write_files, write_metadata
from megatron_oreal.layout.model_spec import ModelSpec

_SAFETENSORS_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

OnBytes = Callable[[int], None]
"""Called with the bytes of each tensor that is on its way to the disk."""


@dataclass(frozen=True)
class Team:
    """The processes that convert together: file ``i`` of a checkpoint is written by process ``i % size``."""

    rank: int = 0
    size: int = 1

    def mine(self, files: Sequence[Any]) -> list[Any]:
        """Return this process's share of a list of files."""
        return list(files[self.rank :: self.size])


def check_weights(
    source: TensorSource, spec: ModelSpec, *, reward_model: bool, origin: str | Path, new_head: bool = False
) -> list[str]:
    """Check every tensor's presence, shape and dtype; returns notes on what will not be taken over.

    ``new_head``: a reward model is made of a policy, so its scalar head may be missing, and then starts at zero.

    Raises ``UserError`` for the first that is missing or does not fit, and for tensors that show that ``config.json``
    describes another model: layers beyond its last, biases or norms that its family lacks, a head that is not tied.
    """
    expected = hf_tensors(spec, reward_model=reward_model)
    notes = []
    for name, shape in expected.items():
        if name == SCORE and new_head and name not in source:
            notes.append(f"{origin}: no {SCORE!r}: the scalar head starts at zero")
        else:
            source.check(name, shape)
    left_out = [name for name in source.names() if name not in expected]
    for name in left_out:
        refuse_other_model(name, spec, origin)
    if LM_HEAD in left_out and not reward_model:
        _check_tied_head(source, spec, origin)
        left_out.remove(LM_HEAD)
    if left_out:
        some = ", ".join(map(repr, left_out[:3])) + (", ..." if len(left_out) > 3 else "")
        notes.append(f"{origin}: {len(left_out)} tensors are not of this model and are left out: {some}")
    return notes


def _check_tied_head(source: TensorSource, spec: ModelSpec, origin: str | Path) -> None:
    """A tied checkpoint may store its head a second time, but not another one."""
    step = max(1, 16 * 2**20 // spec.hidden_size)
    source.check(LM_HEAD, (spec.vocab_size, spec.hidden_size))
    for start in range(0, spec.vocab_size, step):
        rect: Rect = ((start, min(start + step, spec.vocab_size)), (0, spec.hidden_size))
        if not torch.equal(source.read(LM_HEAD, rect), source.read(EMBEDDING, rect)):
            raise UserError(
                f"{origin}: tensor {LM_HEAD!r} differs from {EMBEDDING!r}, but config.json says "
                "tie_word_embeddings=true: set it to false, or remove the tensor"
            )


def only_dtype(
    source: TensorSource, names: Sequence[str], origin: str | Path, mend: str = "choose one with --dtype"
) -> torch.dtype:
    """Return the dtype of all these tensors; ``UserError`` with ``mend`` when there are several."""
    found = {name: source.dtype(name) for name in names if name in source}
    dtypes = sorted({str(dtype) for dtype in found.values()})
    if len(dtypes) != 1:
        raise UserError(f"{origin}: the tensors have several dtypes ({', '.join(dtypes)}): {mend}")
    return next(iter(found.values()))


def _begin(out: NewDirectory, model_dir: Path, reward_model: bool, size: int) -> None:
    check_companions(model_dir, reward_model=reward_model)
    out.begin(size)


# Megatron


def save_megatron(
    out_dir: str | Path,
    files: Sequence[ShardFile],
    sections: Sequence[Section],
    *,
    model_dir: Path,
    reward_model: bool,
    common: Mapping[str, Any],
    team: Team = Team(),
    on_bytes: OnBytes = lambda nbytes: None,
) -> None:
    """Write a ``dist_checkpointing`` directory; every process of the team calls it with the same arguments.

    ``files``: of ``megatron_writer.plan_files``; ``sections[0]`` are the weights. Config and tokenizer come from
    ``model_dir``. The directory appears under its name when it is complete; on a ``UserError`` nothing is left.
    """
    out = NewDirectory(out_dir)
    first = team.rank == 0
    try:
        together(None, lambda: _begin(out, model_dir, reward_model, total_bytes(files, sections)) if first else None)
        written: Written = []

        together(None, lambda: written.extend(write_files(out.partial, team.mine(files), sections, on_bytes)))
        everything = [item for part in _gather(written, team) for item in part]

        def finish() -> None:
            write_metadata(out.partial, files, sections, everything, common)
            folder = out.partial / HF_FOLDER
            with writing(folder):
                folder.mkdir()
            write_companions(folder, {}, model_dir, dtype=sections[0].dtype, reward_model=reward_model)
            out.commit()

        together(None, finish if first else lambda: None)
    finally:
        out.abandon()


def _gather(item: Any, team: Team) -> list[Any]:
    if team.size == 1:
        return [item]
    everyone: list[Any] = [None] * team.size
    dist.all_gather_object(everyone, item)
    return everyone


# Hugging Face


def plan_hf_files(
    spec: ModelSpec, dtype: torch.dtype, max_shard_bytes: int, reward_model: bool
) -> dict[str, dict[str, Shape]]:
    """Name of each safetensors file and the tensors in it, in order."""
    files = partition_files(hf_tensors(spec, reward_model=reward_model), dtype.itemsize, max_shard_bytes)
    return dict(zip(file_names(len(files)), files, strict=True))


def save_hf(
    out_dir: str | Path,
    files: Mapping[str, Mapping[str, Shape]],
    source: TensorSource,
    dtype: torch.dtype,
    *,
    model_dir: Path,
    reward_model: bool,
    team: Team = Team(),
    on_bytes: OnBytes = lambda nbytes: None,
) -> None:
    """Write a Hugging Face directory; every process of the team calls it with the same arguments.

    ``files``: of ``plan_hf_files``. Config, tokenizer, generation config and chat template come from ``model_dir``. A
    file is streamed, so a process holds one tensor, whatever the size of the file. See ``save_megatron`` on failures.
    """
    out = NewDirectory(out_dir)
    first = team.rank == 0
    size = sum(math.prod(shape) for shapes in files.values() for shape in shapes.values()) * dtype.itemsize
    try:
        together(None, lambda: _begin(out, model_dir, reward_model, size) if first else None)

        def write() -> None:
            for name in team.mine(list(files)):
                stream_safetensors(out.partial / name, files[name], source, dtype, on_bytes)

        together(None, write)

        def finish() -> None:
            write_companions(out.partial, files, model_dir, dtype=dtype, reward_model=reward_model)
            out.commit()

        together(None, finish if first else lambda: None)
    finally:
        out.abandon()


def stream_safetensors(
    path: Path, tensors: Mapping[str, Shape], source: TensorSource, dtype: torch.dtype, on_bytes: OnBytes
) -> None:
    """Write one safetensors file tensor by tensor: 8 bytes of header length, the JSON header, the values in order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the values are aligned
    with writing(path), path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors.items():
            value = to_dtype(source.read(name, full_rect(shape)), dtype, name).contiguous()
            file.write(value.view(torch.uint8).numpy().data)
            on_bytes(value.nbytes)
