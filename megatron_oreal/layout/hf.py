"""Hugging Face checkpoints: their layout, and reading rectangles of their tensors from safetensors files."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_oreal.errors import UserError
from megatron_oreal.layout.blocks import Layout, Rect, Shape, ShardBuilder, ShardLayout, rect_size, to_slices
from megatron_oreal.layout.families import FAMILY_LAYERS, LM_HEAD, hf_tensors, whole
from megatron_oreal.layout.files import check_readable, is_file, reading
from megatron_oreal.layout.model_spec import ModelSpec

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_OTHER_DTYPES = {
    "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip
_LAYER_TENSOR = re.compile(r"model\.layers\.(\d+)\.(.+)")
_MAPPED_BYTES = 32 * 2**20
"""A mapped file's pages count as this process's memory: after so many bytes the files are mapped anew."""


class TensorSource(Protocol):
    """Anything that rectangles of Hugging Face tensors can be read from, whatever its own layout is."""

    def __contains__(self, name: str) -> bool: ...

    def names(self) -> list[str]:
        """Return the Hugging Face name of every tensor."""
        ...

    def shape(self, name: str) -> Shape:
        """Return the shape of a tensor."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor; ``UserError`` unless it is a plain float type."""
        ...

    def read(self, name: str, rect: Rect) -> Tensor:
        """Read the rectangle of a tensor, on the CPU, in the stored dtype."""
        ...

    def check(self, name: str, shape: Shape) -> None:
        """Raise ``UserError`` unless the tensor is there in this shape and in a dtype that can be read."""
        ...

    def cost(self, wanted: Iterable[tuple[str, Rect]]) -> int:
        """Bytes that reading these rectangles takes from the files when nothing is read twice."""
        ...


def whole_tensors(tensors: dict[str, Shape]) -> ShardLayout:
    """Describe a rank that holds these HF tensors whole, each as a parameter of the same name."""
    builder = ShardBuilder()
    for name, shape in tensors.items():
        builder.add(name, [whole(name, shape)])
    return builder.build()


def hf_layout(spec: ModelSpec, *, reward_model: bool = False) -> Layout:
    """Describe the checkpoint as one rank that holds every HF tensor under its own name."""
    return Layout("Hugging Face", (whole_tensors(hf_tensors(spec, reward_model=reward_model)),))


class SafetensorsSource:
    """Reads rectangles of the tensors of a model directory: ``model.safetensors``, or shards with their index.

    Only the bytes of a rectangle are read (the files are memory-mapped); ``bytes_read`` counts them. A context manager;
    ``close`` drops the files. Raises ``UserError`` that names the file for a directory without safetensors files, a
    missing or damaged shard, an index that lies, and a dtype other than float32, float16 and bfloat16
    (``any_dtype``: other than those and float8, float64, integers and booleans).
    """

    def __init__(self, model_dir: str | Path, *, any_dtype: bool = False) -> None:
        self.model_dir = Path(model_dir)
        self._dtypes = _DTYPES | _OTHER_DTYPES if any_dtype else _DTYPES
        self.bytes_read = 0
        self._map_until = _MAPPED_BYTES
        self._stack = contextlib.ExitStack()
        self._open: dict[str, Any] = {}
        self._files = self._weight_map()

    def __enter__(self) -> SafetensorsSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def close(self) -> None:
        """Drop the open files; a later read opens them again. Idempotent."""
        self._open.clear()
        self._stack.close()

    def names(self) -> list[str]:
        """Return the name of every tensor in the directory."""
        return list(self._files)

    def shape(self, name: str) -> Shape:
        """Return the shape of a tensor, read from the header."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor; ``UserError`` unless it is a plain float type."""
        stored = self._slice(name).get_dtype()
        if stored not in self._dtypes:
            raise UserError(f"{self._path(name)}: tensor {name!r} has dtype {stored}: use BF16, F16 or F32")
        return self._dtypes[stored]

    def read(self, name: str, rect: Rect) -> Tensor:
        """Read the rectangle of a tensor, on the CPU, in the dtype of the file."""
        dtype = self.dtype(name)
        try:
            value: Tensor = self._slice(name)[to_slices(rect)]
        except SafetensorError as error:
            raise UserError(f"{self._path(name)}: cannot read tensor {name!r} ({error})") from None
        self.bytes_read += rect_size(rect) * dtype.itemsize
        if self.bytes_read >= self._map_until:
            self._map_until = self.bytes_read + _MAPPED_BYTES
            self.close()
        return value

    def check(self, name: str, shape: Shape) -> None:
        """Raise ``UserError`` unless the tensor is there in this shape and in a dtype that can be read."""
        if name not in self._files:
            hint = ", which does not say tie_word_embeddings=true" if name == LM_HEAD else ""
            raise UserError(
                f"{self.model_dir}: tensor {name!r} {list(shape)} is missing: the weights do not fit its config.json"
                f"{hint}"
            )
        found = self.shape(name)
        if found != shape:
            raise UserError(
                f"{self._path(name)}: tensor {name!r} has shape {list(found)}, config.json asks for {list(shape)}"
            )
        self.dtype(name)

    def cost(self, wanted: Iterable[tuple[str, Rect]]) -> int:
        """Bytes of these rectangles in the files."""
        return sum(rect_size(rect) * self.dtype(name).itemsize for name, rect in wanted)

    def _path(self, name: str) -> Path:
        return self.model_dir / self._files[name]

    def _slice(self, name: str) -> Any:
        if name not in self._files:
            raise UserError(f"{self.model_dir}: tensor {name!r} is missing")
        try:
            return self._file(self._files[name]).get_slice(name)
        except SafetensorError:
            raise UserError(
                f"{self._path(name)}: tensor {name!r} is missing from the file that {INDEX_FILE} names"
            ) from None

    def _file(self, file: str) -> Any:
        if file not in self._open:
            path = self.model_dir / file
            if is_file(path):
                check_readable(path)  # safetensors would not say that it may not
            try:
                self._open[file] = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            except FileNotFoundError:
                raise UserError(f"{path}: missing, though {INDEX_FILE} names it: download the model again") from None
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: damaged or not a safetensors file ({error}): download it again") from None
        return self._open[file]

    def _weight_map(self) -> dict[str, str]:
        index, single = self.model_dir / INDEX_FILE, self.model_dir / SINGLE_FILE
        if is_file(index):
            weight_map = _read_index(index)
            if is_file(single) and (others := sorted(set(weight_map.values()) - {SINGLE_FILE})):
                raise UserError(
                    f"{self.model_dir}: holds {SINGLE_FILE}, which transformers reads, and {INDEX_FILE} of other "
                    f"files ({others[0]}, ...): remove what is not of this model"
                )
            return weight_map
        if is_file(single):
            return dict.fromkeys(self._file(SINGLE_FILE).keys(), SINGLE_FILE)
        raise UserError(
            f"{self.model_dir}: neither {SINGLE_FILE} nor {INDEX_FILE} is there: give a safetensors checkpoint"
        )


def _read_index(path: Path) -> dict[str, str]:
    """Return the file of each tensor."""
    with reading(path):
        data = path.read_bytes()
    try:
        weight_map = {str(name): str(file) for name, file in json.loads(data)["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: not a safetensors index with a 'weight_map'") from None
    for name, file in weight_map.items():
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise UserError(f"{path}: says that {name!r} is in {file!r}, outside the directory: not this model's index")
    return weight_map


def refuse_other_model(name: str, spec: ModelSpec, origin: str | Path) -> None:
    """Raise ``UserError`` for a tensor beyond the model that shows that ``config.json`` is not of these weights.

    Those are layers beyond the last, and weights, biases and norms that the family lacks. What no family has passes.
    """
    match = _LAYER_TENSOR.fullmatch(name)
    if match is None:
        return
    if int(match[1]) >= spec.num_layers:
        raise UserError(
            f"{origin}: tensor {name!r} is there, but config.json says num_hidden_layers={spec.num_layers}: they are "
            "not of one model"
        )
    known = {part for weights in FAMILY_LAYERS.values() for weight in weights for part, _ in weight.parts}
    if match[2] in known or match[2].endswith("proj.bias"):
        raise UserError(
            f"{origin}: tensor {name!r} is there, but config.json describes a {spec.family} model, which has none"
        )


def to_dtype(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return values in another dtype; ``UserError`` naming the tensor when a finite one would become infinite."""
    result = values.to(dtype)
    if torch.finfo(dtype).max >= torch.finfo(values.dtype).max or not result.numel():
        return result
    if all(math.isfinite(extreme) for extreme in result.aminmax()):  # without a copy, which isinf() would make
        return result
    beyond = result.isinf() & ~values.isinf()
    if bool(beyond.any()):
        worst = float(values[beyond].abs().max())
        raise UserError(
            f"tensor {name!r}: {worst:.4g} is beyond the range of {str(dtype).removeprefix('torch.')} (at most "
            f"{torch.finfo(dtype).max:.4g}): choose bf16 or fp32"
        )
    return result


def partition_files(tensors: dict[str, Shape], itemsize: int, max_shard_bytes: int) -> list[dict[str, Shape]]:
    """Cut tensors, in order, into files of at most ``max_shard_bytes``; a larger tensor gets a file of its own."""
    files: list[dict[str, Shape]] = []
    room = 0
    for name, shape in tensors.items():
        size = math.prod(shape) * itemsize
        if not files or size > room:
            files.append({})
            room = max_shard_bytes
        files[-1][name] = shape
        room -= size
    return files


def file_names(count: int) -> list[str]:
    """Return the names of the files of a checkpoint, as transformers names them."""
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
