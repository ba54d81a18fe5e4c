"""Write a Hugging Face checkpoint from the ranks of a layout, file by file, and show it only when it is complete."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oreal.layout.blocks import Layout, Shape
from megatron_oreal.layout.directory import (
    NewDirectory,
    check_companions,
    sync,
    together,
    write_companions,
    write_safetensors,
)
from megatron_oreal.layout.execute import DEFAULT_BUCKET_BYTES, common_dtype, execute_plan
from megatron_oreal.layout.families import hf_tensors
from megatron_oreal.layout.hf import file_names, partition_files, whole_tensors
from megatron_oreal.layout.model_spec import ModelSpec
from megatron_oreal.layout.plan import make_plan


def export_hf(
    out_dir: str | Path,
    spec: ModelSpec,
    layout: Layout,
    source_ranks: Mapping[int, Sequence[int]],
    tensors: Mapping[str, Tensor],
    *,
    rank: int,
    model_dir: str | Path,
    group: dist.ProcessGroup | None = None,
    dtype: torch.dtype | None = None,
    reward_model: bool = False,
    max_shard_bytes: int = 4 * 10**9,
    writers: Sequence[int] | None = None,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
) -> None:
    """Write the model that ``layout`` describes as safetensors files; every rank of ``source_ranks`` calls it.

    ``tensors``: this rank's shard. ``dtype`` of the files: by default that of the parameters. Tokenizer, generation
    config, chat template and ``config.json`` (dtype and a reward model's architecture adapted) come from ``model_dir``.
    ``writers``: global ranks that write, one file each at a time, default all; they must see the same file system.
    A writer holds one file (``max_shard_bytes``, or one larger tensor) in host memory beside its shard.

    The files are written to ``.<name>.incomplete`` beside ``out_dir`` and renamed when all are on disk
    (``directory.NewDirectory``): an interrupted export leaves nothing under ``out_dir``, and the next one starts over.
    Raises ``UserError`` on every rank, naming the file, when ``out_dir`` exists and is not empty, ``model_dir`` has no
    config, the disk is full or may not be written; then nothing is left of the export.
    """
    out = NewDirectory(out_dir)
    everyone = sorted({r for ranks in source_ranks.values() for r in ranks})
    writers = everyone if writers is None else list(writers)
    dtype = dtype or common_dtype(tensors.values(), "give the dtype of the export")
    files = partition_files(hf_tensors(spec, reward_model=reward_model), dtype.itemsize, max_shard_bytes)
    shapes_of = dict(zip(file_names(len(files)), files, strict=True))
    first = rank == writers[0]

    try:
        together(group, lambda: _begin(out, Path(model_dir), files, dtype, reward_model) if first else None)
        for wave in _waves(len(files), writers):
            target = Layout("safetensors", tuple(whole_tensors(files[number]) for number in wave))
            plan = make_plan(layout, source_ranks, target, dict(enumerate(wave.values())), cached=False)
            mine = next((number for number, writer in wave.items() if writer == rank), None)
            shapes = {} if mine is None else files[mine]
            held = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
            execute_plan(plan, tensors, held, rank, group, wire_dtype=dtype, bucket_bytes=bucket_bytes)
            path = None if mine is None else out.partial / list(shapes_of)[mine]
            together(group, functools.partial(_write, path, held))
            del held
        options = {"dtype": dtype, "reward_model": reward_model}
        finish = functools.partial(_finish, out, shapes_of, Path(model_dir), **options)
        together(group, finish if first else lambda: None)
    finally:
        out.abandon()  # without effect after the commit, and on ranks that did not begin


def _begin(
    out: NewDirectory, model_dir: Path, files: list[dict[str, Shape]], dtype: torch.dtype, reward_model: bool
) -> None:
    check_companions(model_dir, reward_model=reward_model)
    elements = sum(math.prod(shape) for shapes in files for shape in shapes.values())
    out.begin(required_bytes=elements * dtype.itemsize)


def _write(path: Path | None, held: dict[str, Tensor]) -> None:
    if path is not None:
        write_safetensors(path, held)
        sync(path)


def _finish(out: NewDirectory, files: dict[str, dict[str, Shape]], model_dir: Path, **options: Any) -> None:
    write_companions(out.partial, files, model_dir, **options)
    out.commit()


def _waves(count: int, writers: Sequence[int]) -> Iterator[dict[int, int]]:
    """File number to writer, as many files at a time as there are writers, spread over them."""
    for start in range(0, count, len(writers)):
        numbers = range(start, min(start + len(writers), count))
        yield {number: writers[slot * len(writers) // len(numbers)] for slot, number in enumerate(numbers)}
