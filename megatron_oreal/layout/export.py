"""Write a Hugging Face checkpoint from the ranks of a layout, file by file, and show it only when it is complete."""

from __future__ import annotations

import fnmatch
import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from megatron_oreal.errors import UserError
from megatron_oreal.layout.blocks import Layout, Shape
from megatron_oreal.layout.execute import DEFAULT_BUCKET_BYTES, execute_plan
from megatron_oreal.layout.families import hf_tensors
from megatron_oreal.layout.hf import INDEX_FILE, file_names, partition_files, whole_tensors
from megatron_oreal.layout.model_spec import ModelSpec
from megatron_oreal.layout.plan import make_plan

COPIED_FILES = (
    "generation_config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "*.model",
)  # fmt: skip
"""Files of the original model directory that belong to the exported model as they are."""


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

    The files are written to ``.<name>.incomplete`` beside ``out_dir`` and renamed when all are on disk: an interrupted
    export leaves nothing under ``out_dir``, and the next one starts over. Raises ``UserError`` on every rank when
    ``out_dir`` exists or ``model_dir`` has no config; an error on one rank is raised on all.
    """
    out = Path(out_dir)
    partial = out.with_name(f".{out.name}.incomplete")
    everyone = sorted({r for ranks in source_ranks.values() for r in ranks})
    writers = everyone if writers is None else list(writers)
    dtype = dtype or _only_dtype(tensors)
    files = partition_files(hf_tensors(spec, reward_model=reward_model), dtype.itemsize, max_shard_bytes)
    names = file_names(len(files))
    first = rank == writers[0]

    _together(group, lambda: _begin(out, partial, Path(model_dir)) if first else None)
    for wave in _waves(len(files), writers):
        target = Layout("safetensors", tuple(whole_tensors(files[number]) for number in wave))
        plan = make_plan(layout, source_ranks, target, dict(enumerate(wave.values())), cached=False)
        mine = next((number for number, writer in wave.items() if writer == rank), None)
        shapes = {} if mine is None else files[mine]
        held = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
        execute_plan(plan, tensors, held, rank, group, wire_dtype=dtype, bucket_bytes=bucket_bytes)
        path = None if mine is None else partial / names[mine]
        _together(group, functools.partial(_write, path, held))
        del held
    shapes_of = dict(zip(names, files, strict=True))
    _together(group, lambda: _finish(out, partial, shapes_of, Path(model_dir), dtype, reward_model) if first else None)


def _waves(count: int, writers: Sequence[int]) -> Iterator[dict[int, int]]:
    """File number to writer, as many files at a time as there are writers, spread over them."""
    for start in range(0, count, len(writers)):
        numbers = range(start, min(start + len(writers), count))
        yield {number: writers[slot * len(writers) // len(numbers)] for slot, number in enumerate(numbers)}


def _begin(out: Path, partial: Path, model_dir: Path) -> None:
    if out.exists():
        raise UserError(f"{out}: already exists: export to another directory, or remove it first")
    if not (model_dir / "config.json").is_file():
        raise UserError(f"{model_dir}: has no config.json to export with the weights")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)


def _write(path: Path | None, held: dict[str, Tensor]) -> None:
    if path is None:
        return
    save_file(held, path, metadata={"format": "pt"})
    _sync(path)


def _finish(
    out: Path,
    partial: Path,
    files: dict[str, dict[str, Shape]],
    model_dir: Path,
    dtype: torch.dtype,
    reward_model: bool,
) -> None:
    if len(files) > 1:
        elements = sum(math.prod(shape) for shapes in files.values() for shape in shapes.values())
        weight_map = {tensor: file for file, shapes in files.items() for tensor in shapes}
        index = {"metadata": {"total_size": elements * dtype.itemsize}, "weight_map": weight_map}
        (partial / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    config = _adapt_config(json.loads((model_dir / "config.json").read_text()), dtype, reward_model)
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for path in sorted(model_dir.iterdir()):
        if path.is_file() and any(fnmatch.fnmatchcase(path.name, pattern) for pattern in COPIED_FILES):
            shutil.copyfile(path, partial / path.name)
    for path in partial.iterdir():
        _sync(path)
    _sync(partial)
    partial.rename(out)
    _sync(out.parent)


def _adapt_config(config: dict[str, Any], dtype: torch.dtype, reward_model: bool) -> dict[str, Any]:
    """Set the architecture, and the dtype under the config's own key (``torch_dtype`` before transformers 5)."""
    key = "dtype" if "dtype" in config else "torch_dtype"
    config[key] = str(dtype).removeprefix("torch.")
    if reward_model:
        causal = config["architectures"][0].replace("ForCausalLM", "ForSequenceClassification")
        config |= {"architectures": [causal], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return config


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _together(group: dist.ProcessGroup | None, step: Callable[[], object]) -> None:
    """Run ``step`` on every rank and go on together or fail together: a lone failure would leave the others waiting."""
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
                    raise (
                        UserError(other[1]) if other[0] else RuntimeError(f"export failed on rank {number}: {other[1]}")
                    )
    if failure is not None:
        raise failure


def _only_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) != 1:
        raise ValueError(f"parameters have the dtypes {sorted(map(str, dtypes))}: give the dtype of the export")
    return dtypes.pop()
