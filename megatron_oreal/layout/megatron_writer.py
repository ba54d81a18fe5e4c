"""Write Megatron-core ``dist_checkpointing`` directories from any source of Hugging Face tensors, chunk by chunk.

What a rank of the target layout would write is computed from the layout alone, so any number of processes (one is
enough) can write the files of any number of ranks. A chunk is read, written and dropped: nothing else is held.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_oreal.layout.blocks import Block, Rect, Shape, full_rect, intersect, rect_size, shift, to_slices
from megatron_oreal.layout.distcp import METADATA_FILE
from megatron_oreal.layout.files import writing
from megatron_oreal.layout.hf import TensorSource, to_dtype
from megatron_oreal.layout.megatron import megatron_layout, padded_vocab_size
from megatron_oreal.layout.megatron_checkpoint import (
    COMMON_FILE,
    CONFIG_FILE,
    VOCABULARY_KEYS,
    MegatronSource,
    global_layout,
    stacked_key,
)
from megatron_oreal.layout.model_spec import ModelSpec

_GATED = "mlp.linear_fc1.weight"
"""Holds gate and up: on a rank side by side, in a checkpoint all gate rows before all up rows (two chunks)."""
_EXTRA_STATES = (
    "self_attention.linear_qkv", "self_attention.core_attention", "self_attention.linear_proj", "mlp.linear_fc1",
    "mlp.linear_fc2",
)  # fmt: skip
_NORM_EXTRA_STATES = ("self_attention.q_layernorm", "self_attention.k_layernorm")
_EMPTY_STATE = [None]
"""``torch.save`` of this is an empty ``_extra_state``: every TransformerEngine module asks for one when it loads."""


@dataclass(frozen=True)
class MegatronTarget:
    """The parallel layout that a checkpoint is cut for; Megatron-core loads it into any other as well."""

    tp: int
    pp: int
    vpp: int | None = None
    vocab_divisor: int = 1
    layer_split: tuple[tuple[int, ...], ...] | None = None
    reward_model: bool = False

    def __str__(self) -> str:
        parts = [f"tp={self.tp}", f"pp={self.pp}"]
        parts += [f"vpp={self.vpp}"] if self.vpp else []
        parts += [f"layers {'+'.join(str(sum(stage)) for stage in self.layer_split)}"] if self.layer_split else []
        return " ".join(parts)


@dataclass(frozen=True, slots=True)
class Chunk:
    """``rect`` of the stored tensor ``key`` (global shape ``size``) and the blocks of HF tensors that fill it.

    The blocks' destinations are inside the chunk, without the axis of stacked layers.
    """

    key: str
    size: Shape
    rect: Rect
    blocks: tuple[Block, ...]

    @property
    def elements(self) -> int:
        """Elements, padding included."""
        return rect_size(self.rect)


@dataclass(frozen=True)
class ShardFile:
    """One ``*.distcp`` file: its name, the rank of the target layout (``pp_rank * tp + tp_rank``), what it holds."""

    name: str
    shard: int
    chunks: tuple[Chunk, ...]
    extra_states: tuple[str, ...]

    @property
    def elements(self) -> int:
        """Elements of one section."""
        return sum(chunk.elements for chunk in self.chunks)


@dataclass(frozen=True)
class Section:
    """A set of tensors in the geometry of the weights: the weights themselves, or an optimizer state.

    ``prefix`` stands before the keys; values are read from ``source`` and stored as ``dtype``. Vocabulary padding is
    zero; with ``keep_padding`` it is the source's, a ``MegatronSource`` whose tables have as many rows: training moves
    these rows too.
    """

    prefix: str
    source: TensorSource
    dtype: torch.dtype
    keep_padding: bool = False


def plan_files(spec: ModelSpec, target: MegatronTarget, files_per_shard: int = 1) -> list[ShardFile]:
    """Which files the ranks of ``target`` write, in rank order; every element of the model stands in one of them.

    A rank's chunks are dealt to ``files_per_shard`` files of about one size. Raises ``UserError`` for sizes that
    Megatron-core refuses.
    """
    padded = padded_vocab_size(spec.vocab_size, tp=target.tp, vocab_divisor=target.vocab_divisor)
    whole = global_layout(spec, padded, target.reward_model).shapes
    layout = megatron_layout(
        spec,
        tp=target.tp,
        pp=target.pp,
        vpp=target.vpp,
        vocab_divisor=target.vocab_divisor,
        transformer_impl="transformer_engine",
        reward_model=target.reward_model,
        layer_split=target.layer_split,
    )
    written: set[tuple[str, Rect]] = set()
    files = []
    for number, shard in enumerate(layout.shards):
        blocks: dict[str, list[Block]] = {name: [] for name, _ in shard.params}
        for block in shard.blocks:
            blocks[block.param].append(block)
        chunks = []
        for name, shape in shard.params:
            for chunk in _chunks(spec, _whole_name(name, blocks[name]), shape, blocks[name], whole, number % target.tp):
                if (chunk.key, chunk.rect) not in written:  # replicated over tensor-parallel ranks
                    written.add((chunk.key, chunk.rect))
                    chunks.append(chunk)
        extra = tuple(_extra_states(spec, chunks)) if number % target.tp == 0 else ()
        for part, dealt in enumerate(_deal(chunks, files_per_shard)):
            files.append(ShardFile(f"__{number}_{part}.distcp", number, tuple(dealt), extra if part == 0 else ()))
    return files


def _whole_name(name: str, blocks: Sequence[Block]) -> str:
    """Name of a rank's parameter in the whole model: layers count from the first of the model, not of the chunk."""
    name = name.partition(":")[2] or name
    if not name.startswith("decoder.layers."):
        return name
    layer = blocks[0].tensor.split(".")[2]  # model.layers.{layer}.
    return f"decoder.layers.{layer}." + name.split(".", 3)[3]


def _chunks(
    spec: ModelSpec, name: str, shape: Shape, blocks: Sequence[Block], whole: Mapping[str, Shape], tp_rank: int
) -> Iterator[Chunk]:
    """Cut a rank's parameter into the chunks that Megatron stores of it; none for the tied copy of the embedding."""
    if name not in whole:
        assert name == "output_layer.weight" and spec.tied_embeddings
        return
    key, row = stacked_key(name)
    size = whole[name]
    parts = 2 if name.endswith(_GATED) else 1
    rows = shape[0] // parts
    for part in range(parts):
        local = ((part * rows, (part + 1) * rows), *full_rect(shape[1:]))
        offset = [0 if full == own else tp_rank * own for full, own in zip(size, shape, strict=True)]
        offset[0] = offset[0] // parts + part * size[0] // parts
        rect: Rect = tuple((o, o + stop - start) for o, (start, stop) in zip(offset, local, strict=True))
        inside = tuple(_inside(block, local) for block in blocks if intersect(block.dest, local) is not None)
        if row is None:
            yield Chunk(key, size, rect, inside)
        else:
            yield Chunk(key, (spec.num_layers, *size), ((row, row + 1), *rect), inside)


def _inside(block: Block, local: Rect) -> Block:
    """Return a block with its destination counted from the corner of ``local``, which it lies in."""
    return Block(block.tensor, block.source, block.param, shift(block.dest, (-start for start, _ in local)))


def _extra_states(spec: ModelSpec, chunks: Sequence[Chunk]) -> Iterator[str]:
    """Keys of the empty extra states of the layers, and of the final norm, that a rank holds."""
    modules = [*_EXTRA_STATES, *(_NORM_EXTRA_STATES if spec.qk_norm else ())]
    rows = sorted({chunk.rect[0][0] for chunk in chunks if chunk.key.startswith("decoder.layers.")})
    for row in rows:
        yield from (f"decoder.layers.{module}._extra_state/shard_{row}_{spec.num_layers}" for module in modules)
    if any(chunk.key.startswith("decoder.final_layernorm.") for chunk in chunks):
        yield "decoder.final_layernorm._extra_state/shard_0_1"


def _deal(chunks: Sequence[Chunk], count: int) -> list[list[Chunk]]:
    """Deal chunks, in order, to ``count`` files that are filled up to an even share each."""
    share = max(1, -(-sum(chunk.elements for chunk in chunks) // count))
    dealt: list[list[Chunk]] = [[] for _ in range(count)]
    before = 0
    for chunk in chunks:
        dealt[min(count - 1, before // share)].append(chunk)
        before += chunk.elements
    return [part for part in dealt if part]


Written = list[tuple[MetadataIndex, Any]]
"""What was written: the index of each tensor chunk and object, and torch's record of where its bytes are."""


def write_files(
    folder: Path,
    files: Sequence[ShardFile],
    sections: Sequence[Section],
    on_written: Callable[[int], None] = lambda nbytes: None,
) -> Written:
    """Write all sections of these files; ``on_written`` gets the bytes of each chunk. ``UserError`` on a full disk.

    One chunk is held in memory at a time. A parameter's chunks are written to all files before the next one's, so that
    a source whose chunks are larger is read once. Padding, and what a source does not have (the score of a reward model
    that starts from a policy), is zero.
    """
    written: Written = []
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(_open(folder / file.name)) for file in files]
        for section in sections:
            for number, chunk in _by_parameter(files):
                value = _value(chunk, section)
                index = MetadataIndex(section.prefix + chunk.key, [start for start, _ in chunk.rect])
                written.append((index, streams[number].save(value)))
                on_written(value.nbytes)
        for file, stream in zip(files, streams, strict=True):
            written += [(MetadataIndex(key), stream.save(_EMPTY_STATE)) for key in file.extra_states]
    return written


def _by_parameter(files: Sequence[ShardFile]) -> list[tuple[int, Chunk]]:
    """Return (which file, chunk) of all files, the chunks of one parameter after each other."""
    order: dict[tuple[str, int], list[tuple[int, Chunk]]] = {}
    for number, file in enumerate(files):
        for chunk in file.chunks:
            row = chunk.rect[0][0] if chunk.key.startswith("decoder.layers.") else 0
            order.setdefault((chunk.key, row), []).append((number, chunk))
    return [entry for entries in order.values() for entry in entries]


@contextlib.contextmanager
def _open(path: Path) -> Iterator[_Stream]:
    with writing(path), path.open("wb") as file:
        yield _Stream(file, path)


def _value(chunk: Chunk, section: Section) -> Tensor:
    if section.keep_padding and chunk.key in VOCABULARY_KEYS:
        assert isinstance(section.source, MegatronSource)
        return to_dtype(section.source.read_stored(chunk.key, chunk.rect), section.dtype, chunk.key)
    shape = [stop - start for start, stop in chunk.rect]
    value = torch.zeros(shape, dtype=section.dtype)
    dims = len(chunk.blocks[0].dest) if chunk.blocks else len(shape)
    inner = value[0] if len(shape) > dims else value
    for block in chunk.blocks:
        if block.tensor in section.source:
            read = section.source.read(block.tensor, block.source)
            inner[to_slices(block.dest)].copy_(to_dtype(read, section.dtype, block.tensor))
    return value


class _Stream(io.RawIOBase):
    """What ``torch.save`` writes into. Keeps the ``OSError`` that its C++ code would turn into one without a reason."""

    def __init__(self, file: Any, path: Path) -> None:
        self._file, self._path = file, path
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return int(self._file.write(data))
        except OSError as error:
            self._error = error
            raise

    def save(self, value: Any) -> Any:
        """Append an object; returns torch's record of where it stands. ``UserError`` when that cannot be written."""
        begin = self._file.tell()
        with writing(self._path):
            try:
                torch.save(value, cast("IO[bytes]", self))
                self._file.flush()
            except Exception:
                if self._error is not None:
                    raise self._error from None
                raise
        return _StorageInfo(self._path.name, begin, self._file.tell() - begin)


def write_metadata(
    folder: Path,
    files: Sequence[ShardFile],
    sections: Sequence[Section],
    written: Written,
    common: Mapping[str, Any],
) -> None:
    """Write what makes the files a checkpoint: ``.metadata``, ``common.pt`` and ``metadata.json``."""
    state: dict[str, Any] = {}
    for section in sections:
        for file in files:
            for chunk in file.chunks:
                key = section.prefix + chunk.key
                if key not in state:
                    properties = TensorProperties(dtype=section.dtype)
                    state[key] = TensorStorageMetadata(properties, torch.Size(chunk.size), [])
                offsets = torch.Size([start for start, _ in chunk.rect])
                sizes = torch.Size([stop - start for start, stop in chunk.rect])
                state[key].chunks.append(ChunkStorageMetadata(offsets, sizes))
    state |= {key: BytesStorageMetadata() for file in files for key in file.extra_states}
    metadata = Metadata(state, planner_data=None, storage_data=dict(written))
    with writing(folder / METADATA_FILE):
        (folder / METADATA_FILE).write_bytes(pickle.dumps(metadata, protocol=4))
    with _open(folder / COMMON_FILE) as stream:
        stream.save(dict(common))
    backend = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    with writing(folder / CONFIG_FILE):
        (folder / CONFIG_FILE).write_text(json.dumps(backend))


def total_bytes(files: Sequence[ShardFile], sections: Sequence[Section]) -> int:
    """Bytes of all tensors in all sections."""
    return sum(file.elements for file in files) * sum(section.dtype.itemsize for section in sections)


def padded_rows(spec: ModelSpec, target: MegatronTarget) -> int:
    """Rows that the vocabulary tables get beyond the vocabulary."""
    return padded_vocab_size(spec.vocab_size, tp=target.tp, vocab_divisor=target.vocab_divisor) - spec.vocab_size
