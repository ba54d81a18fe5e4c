"""Megatron-core's ``dist_checkpointing`` directories (backend ``torch_dist``), read by Hugging Face coordinates.

On disk a model is the same whatever TP, PP and VPP wrote it: every parameter is one global tensor, under Megatron's
name of it, in the geometry of one rank (``linear_qkv`` interleaved by query group, ``linear_fc1`` all gate rows and
then all up rows), stored in chunks of the ranks that wrote it. The layers of equal shape are stacked: layer ``i`` of
``decoder.layers.mlp.linear_fc2.weight`` [layers, hidden, ffn] is its row ``i`` (``non_homogeneous_layers``, the
alternative, has ``decoder.layers.{i}.`` keys; both are read). So the layout of a checkpoint is ``megatron_layout`` at
TP 1 and PP 1, and a ``MegatronSource`` is read as if it were a Hugging Face checkpoint.

The optimizer's state, where Megatron saves it in global coordinates, has the same keys behind a prefix
(``optimizer.state.exp_avg.``): a ``section`` of the checkpoint, with the geometry of the weights.

``torch.distributed.checkpoint`` defines the files: ``.metadata`` (pickled ``Metadata``) says where in which
``*.distcp`` file the bytes of each chunk begin; they are what ``torch.save`` wrote. Nothing here imports Megatron.
"""

from __future__ import annotations

import re
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megatron_oreal.errors import UserError
from megatron_oreal.layout.blocks import (
    Block,
    Rect,
    Shape,
    ShardLayout,
    full_rect,
    intersect,
    rect_size,
    shift,
    to_slices,
)
from megatron_oreal.layout.distcp import METADATA_FILE, UNREADABLE, load_plain, one_line, read_metadata, read_object
from megatron_oreal.layout.families import hf_tensors
from megatron_oreal.layout.files import check_readable, is_file, reading
from megatron_oreal.layout.megatron import megatron_layout
from megatron_oreal.layout.model_spec import ModelSpec, load_model_spec

CONFIG_FILE = "metadata.json"
COMMON_FILE = "common.pt"
HF_FOLDER = "hf"
"""Folder inside a checkpoint with the Hugging Face config and tokenizer files."""

_EMBEDDING_KEY = "embedding.word_embeddings.weight"
_OUTPUT_KEY = "output_layer.weight"
VOCABULARY_KEYS = (_EMBEDDING_KEY, _OUTPUT_KEY)
"""Keys of the tables that have rows of padding below those of the vocabulary."""
_LAYER_KEY = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_PREFIXES = ("", "module.", "model.")
_OPTIMIZER_PREFIX = "optimizer.state."
_BESIDE_MODEL = ("optimizer.", "chained_")
"""What stands beside a model whose keys have no prefix: its optimizer, or (``ChainedOptimizer``) several."""
_EXTRA_STATE = "._extra_state"
_LOCAL_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""TransformerEngine's fused names are the names in checkpoints; a spec without Megatron's key map writes these."""
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_CACHE_BYTES = 64 * 2**20


def is_megatron_checkpoint(path: str | Path) -> bool:
    """Whether a directory is one that ``dist_checkpointing`` wrote, perhaps a damaged one.

    ``metadata.json`` may be anybody's: Megatron-core's names the backend.
    """
    if is_file(Path(path) / METADATA_FILE):
        return True
    config = Path(path) / CONFIG_FILE
    if not is_file(config):
        return False
    with reading(config):
        return b"sharded_backend" in config.read_bytes()


def global_layout(spec: ModelSpec, padded_vocab: int, reward_model: bool) -> ShardLayout:
    """Return the model as checkpoints describe it: on one rank, with ``padded_vocab`` rows in the vocabulary tables."""
    return megatron_layout(
        spec,
        tp=1,
        pp=1,
        vocab_divisor=padded_vocab,
        transformer_impl="transformer_engine",
        reward_model=reward_model,
    ).shards[0]


def stacked_key(param: str) -> tuple[str, int | None]:
    """Key of a whole model's parameter in a checkpoint with stacked layers, and its row there (None: not stacked)."""
    match = _LAYER_KEY.fullmatch(param)
    return (param, None) if match is None else (f"decoder.layers.{match[2]}", int(match[1]))


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A rectangle of a stored tensor and where its bytes are."""

    rect: Rect
    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a parameter stands: ``row`` of the stored tensor ``key``, or all of it when None."""

    key: str
    row: int | None
    dtype: torch.dtype
    chunks: tuple[_Chunk, ...]


class MegatronSource:
    """Reads rectangles of Hugging Face tensors out of a ``dist_checkpointing`` directory; a context manager.

    ``spec`` is by default read from the folder ``hf`` inside. ``section`` is "" for the weights, or the name of an
    optimizer state (``optimizer_states``), which is read by the names of the weights; ``prefix`` stands before its
    keys. A reward model is known by its scalar head. Chunks are read whole; the last ones are kept, up to the size of a
    ``linear_qkv`` (which is read for query, key and value) or 64 MiB.

    Raises ``UserError`` naming the file or the tensor for a directory that is incomplete, damaged or of another model,
    which is one too that holds a tensor of the model that no parameter of ``spec`` comes from.
    """

    def __init__(self, directory: str | Path, spec: ModelSpec | None = None, *, section: str = "") -> None:
        self.directory = Path(directory)
        self.spec = spec if spec is not None else load_stored_spec(self.directory)
        self.section = section
        self.bytes_read = 0
        self._metadata = read_metadata(self.directory)
        self._stored: dict[str, TensorStorageMetadata] = {
            key: value
            for key, value in self._metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }
        self.prefix = _OPTIMIZER_PREFIX + section + "." if section else self._model_prefix()
        self._check_files()
        output = self._stored.get(self.prefix + _OUTPUT_KEY)
        self.reward_model = output is not None and tuple(output.size) == (1, self.spec.hidden_size)
        self.padded_vocab = self._padded_vocab()
        self._check_tying(output)
        self._shapes = hf_tensors(self.spec, reward_model=self.reward_model)
        layout = global_layout(self.spec, self.padded_vocab, self.reward_model)
        self._params = layout.shapes
        self._blocks: dict[str, list[Block]] = defaultdict(list)
        for block in layout.blocks:
            self._blocks[block.tensor].append(block)
        self._used = {key for param in self._params if (key := self._stored_key(param)) is not None}
        self._refuse_other_model()
        self._places: dict[str, _Place] = {}
        self._cache: OrderedDict[_Chunk, Tensor] = OrderedDict()
        qkv = (self.spec.q_size + 2 * self.spec.kv_size) * self.spec.hidden_size
        self._cache_elements = max(qkv, _CACHE_BYTES // 4)

    def __enter__(self) -> MegatronSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def close(self) -> None:
        """Drop what was kept in memory. Idempotent."""
        self._cache.clear()

    def names(self) -> list[str]:
        """Return the Hugging Face name of every tensor of the model."""
        return list(self._shapes)

    def shape(self, name: str) -> Shape:
        """Return the shape of a Hugging Face tensor."""
        if name not in self._shapes:
            raise UserError(f"{self.directory}: holds no {name!r}")
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor; ``UserError`` unless it is a plain float type."""
        self.shape(name)
        return self._place(self._blocks[name][0].param).dtype

    def check(self, name: str, shape: Shape) -> None:
        """Raise ``UserError`` unless the tensor is there in this shape and in a dtype that can be read."""
        found = self.shape(name)
        if found != shape:
            raise UserError(f"{self.directory}: {name!r} has shape {list(found)}, the model has {list(shape)}")
        for block in self._blocks[name]:
            self._place(block.param)

    def check_all(self) -> None:
        """``check`` every tensor: with the files' sizes, all that can be seen without reading the weights."""
        for name, shape in self._shapes.items():
            self.check(name, shape)

    def read(self, name: str, rect: Rect) -> Tensor:
        """Read the rectangle of a Hugging Face tensor, on the CPU, in the stored dtype."""
        self.shape(name)
        out = torch.empty([stop - start for start, stop in rect], dtype=self.dtype(name))
        origin = [-start for start, _ in rect]
        for block in self._blocks[name]:
            if (common := intersect(rect, block.source)) is not None:
                self._read_param(block.param, block.dest_of(common), out[to_slices(shift(common, origin))])
        return out

    def read_stored(self, param: str, rect: Rect) -> Tensor:
        """Read the rectangle of a parameter of the whole model by Megatron's name, padding included."""
        out = torch.empty([stop - start for start, stop in rect], dtype=self._place(param).dtype)
        self._read_param(param, rect, out)
        return out

    def cost(self, wanted: Iterable[tuple[str, Rect]]) -> int:
        """Bytes that reading these rectangles takes from the files when nothing is read twice."""
        chunks = set()
        for name, rect in wanted:
            for block in self._blocks[name]:
                if (common := intersect(rect, block.source)) is None:
                    continue
                place, inside = self._place(block.param), block.dest_of(common)
                if place.row is not None:
                    inside = ((place.row, place.row + 1), *inside)
                chunks |= {chunk for chunk in place.chunks if intersect(inside, chunk.rect) is not None}
        return sum(chunk.length for chunk in chunks)

    @property
    def optimizer_states(self) -> list[str]:
        """Names of the optimizer states that have the geometry of the weights: ``exp_avg``, ``exp_avg_sq``, ..."""
        tail = "." + _EMBEDDING_KEY
        return [
            key.removeprefix(_OPTIMIZER_PREFIX).removesuffix(tail)
            for key in self._stored
            if key.startswith(_OPTIMIZER_PREFIX) and key.endswith(tail)
        ]

    def state(self, name: str) -> MegatronSource:
        """Open one of ``optimizer_states``, every tensor of it checked."""
        state = MegatronSource(self.directory, self.spec, section=name)
        state.check_all()
        return state

    def other_keys(self) -> list[str]:
        """Keys that are neither weights, optimizer states with their geometry, nor Megatron's empty extra states."""
        states = tuple(f"{_OPTIMIZER_PREFIX}{name}." for name in self.optimizer_states)
        return [
            key
            for key in self._metadata.state_dict_metadata
            if key not in self._used
            and not key.startswith((*states, "common_state/"))
            and not (key.startswith(self.prefix) and _EXTRA_STATE in key)
        ]

    def common_state(self) -> dict[str, Any]:
        """What the checkpoint holds besides tensors: ``common.pt``, or ``common_state`` of megatron-core 0.19."""
        path = self.directory / COMMON_FILE
        key = "common_state/shard_0_1"
        if is_file(path):
            found = [load_plain(path)]
        elif key in self._metadata.state_dict_metadata:
            info = self._metadata.storage_data[MetadataIndex(key)]
            path = self.directory / info.relative_path
            found = load_plain(path, info.offset, info.length)
        else:
            raise UserError(f"{path}: missing: the checkpoint is incomplete (--weights-only does without it)")
        if not (isinstance(found, list) and found and isinstance(found[0], dict)):
            raise UserError(f"{path}: damaged: it does not hold the state beside the tensors")
        return found[0]

    def _model_prefix(self) -> str:
        for prefix in _PREFIXES:
            if prefix + _EMBEDDING_KEY in self._stored:
                return prefix
        raise UserError(
            f"{self.directory}: tensor {_EMBEDDING_KEY!r} is missing: not a whole GPTModel of megatron-core"
        )

    def _padded_vocab(self) -> int:
        key = self.prefix + _EMBEDDING_KEY
        if key not in self._stored:
            raise UserError(f"{self.directory}: tensor {key!r} is missing")
        rows, *_ = self._stored[key].size
        if rows < self.spec.vocab_size:
            raise UserError(
                f"{self.directory}: tensor {key!r} has {rows} rows, config.json asks for "
                f"vocab_size={self.spec.vocab_size}"
            )
        return int(rows)

    def _stored_key(self, param: str) -> str | None:
        """Key that a parameter is read from; None when it is not there."""
        keys = (self.prefix + key for key, _ in _candidates(param))
        return next((key for key in keys if key in self._stored), None)

    def _refuse_other_model(self) -> None:
        """A tensor that nothing reads would be lost without a word: the config is not of this checkpoint."""
        for key in self._stored:
            beside = not self.section and key.startswith(_BESIDE_MODEL) and not self.prefix
            if key in self._used or not key.startswith(self.prefix) or beside or _EXTRA_STATE in key:
                continue
            layer = _LAYER_KEY.fullmatch(key.removeprefix(self.prefix))
            if layer is not None and int(layer[1]) >= self.spec.num_layers:
                reason = f"but config.json says num_hidden_layers={self.spec.num_layers}"
            else:
                reason = f"but config.json describes a {self.spec.family} model, which has none"
            raise UserError(f"{self.directory}: tensor {key!r} is stored, {reason}: they are not of one model")

    def _check_tying(self, output: TensorStorageMetadata | None) -> None:
        key = self.prefix + _OUTPUT_KEY
        if output is not None and self.spec.tied_embeddings and not self.reward_model:
            raise UserError(
                f"{self.directory}: tensor {key!r} is stored, but config.json says tie_word_embeddings=true: "
                "they are not of one model"
            )
        if output is None and not self.spec.tied_embeddings:
            raise UserError(
                f"{self.directory}: tensor {key!r} is missing, and config.json says tie_word_embeddings=false"
            )

    def _check_files(self) -> None:
        """See that every data file is there and as long as ``.metadata`` says, before anything is read or written."""
        ends: dict[str, int] = defaultdict(int)
        for info in self._metadata.storage_data.values():
            ends[info.relative_path] = max(ends[info.relative_path], info.offset + info.length)
        for file, end in ends.items():
            path = self.directory / file
            if not is_file(path):
                raise UserError(f"{path}: missing, though {METADATA_FILE} names it: the checkpoint is incomplete")
            if path.stat().st_size < end:
                raise UserError(f"{path}: truncated: has {path.stat().st_size} bytes of the {end} that it should have")
            check_readable(path)

    def _place(self, param: str) -> _Place:
        if param not in self._places:
            self._places[param] = self._find(param)
        return self._places[param]

    def _find(self, param: str) -> _Place:
        shape = self._params[param]
        for key, row in _candidates(param):
            stored = self._stored.get(self.prefix + key)
            if stored is None:
                continue
            want = shape if row is None else (self.spec.num_layers, *shape)
            if tuple(stored.size) != want:
                raise UserError(
                    f"{self.directory}: tensor {self.prefix + key!r} has shape {list(stored.size)}, config.json asks "
                    f"for {list(want)}"
                )
            if stored.properties.dtype not in _FLOATS:
                raise UserError(
                    f"{self.directory}: tensor {self.prefix + key!r} has dtype {stored.properties.dtype}: only "
                    "float32, float16 and bfloat16 can be read"
                )
            bounds = full_rect(shape) if row is None else ((row, row + 1), *full_rect(shape))
            chunks = tuple(self._chunks(self.prefix + key, stored, bounds))
            return _Place(self.prefix + key, row, stored.properties.dtype, chunks)
        raise UserError(
            f"{self.directory}: tensor {self.prefix + stacked_key(param)[0]!r} is missing: not the model of config.json"
        )

    def _chunks(self, key: str, stored: TensorStorageMetadata, bounds: Rect) -> Iterator[_Chunk]:
        """Yield the chunks that share elements with ``bounds``; they must cover it, each element once."""
        covered = 0
        for chunk in stored.chunks:
            rect = tuple((int(o), int(o) + int(s)) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
            common = intersect(rect, bounds)
            if common is None:
                continue
            info = self._metadata.storage_data.get(MetadataIndex(key, chunk.offsets))
            if info is None or getattr(info, "transform_descriptors", None):
                reason = "is not in any file" if info is None else "is stored transformed"
                raise UserError(f"{self.directory}/{METADATA_FILE}: a chunk of {key!r} {reason}")
            covered += rect_size(common)
            yield _Chunk(rect, str(info.relative_path), int(info.offset), int(info.length))
        if covered != rect_size(bounds):
            raise UserError(
                f"{self.directory}/{METADATA_FILE}: the chunks of {key!r} hold {covered} of the {rect_size(bounds)} "
                "elements of a parameter: the checkpoint is damaged"
            )

    def _read_param(self, param: str, rect: Rect, into: Tensor) -> None:
        """Fill ``into`` with a rectangle of a parameter."""
        place = self._place(param)
        if place.row is not None:
            rect, into = ((place.row, place.row + 1), *rect), into.unsqueeze(0)
        origin = [-start for start, _ in rect]
        for chunk in place.chunks:
            if (common := intersect(rect, chunk.rect)) is not None:
                inside = shift(common, (-start for start, _ in chunk.rect))
                into[to_slices(shift(common, origin))].copy_(self._load(place, chunk)[to_slices(inside)])

    def _load(self, place: _Place, chunk: _Chunk) -> Tensor:
        if chunk in self._cache:
            self._cache.move_to_end(chunk)
            return self._cache[chunk]
        path = self.directory / chunk.file
        try:
            value = read_object(path, chunk.offset, chunk.length)
        except UserError:
            raise
        except UNREADABLE as error:
            raise UserError(f"{path}: tensor {place.key!r}: damaged or not readable ({one_line(error)})") from None
        sizes = tuple(stop - start for start, stop in chunk.rect)
        if not isinstance(value, Tensor) or tuple(value.shape) != sizes or value.dtype != place.dtype:
            raise UserError(f"{path}: tensor {place.key!r}: the bytes are not the {list(sizes)} that .metadata says")
        self.bytes_read += chunk.length
        self._cache[chunk] = value
        while len(self._cache) > 1 and sum(kept.numel() for kept in self._cache.values()) > self._cache_elements:
            self._cache.popitem(last=False)
        return value


def _candidates(param: str) -> Iterator[tuple[str, int | None]]:
    """Keys under which a parameter may be stored, and its row there."""
    key, row = stacked_key(param)
    names = [(key, row), (param, None)] if row is not None else [(param, None)]
    yield from names
    for ours, local in _LOCAL_NAMES.items():
        for name, place in names:
            if name.endswith(ours):
                yield name.removesuffix(ours) + local, place


def load_stored_spec(directory: Path) -> ModelSpec:
    """Read the model's shape from the folder ``hf`` of a checkpoint."""
    if not is_file(directory / HF_FOLDER / "config.json"):
        raise UserError(
            f"{directory}: has no {HF_FOLDER}/config.json: name a directory with the model's config.json (--hf-config)"
        )
    return load_model_spec(directory / HF_FOLDER)
