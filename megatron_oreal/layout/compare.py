"""Two checkpoints of any kind, compared tensor by tensor in Hugging Face coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_oreal.layout.blocks import Rect, Shape, full_rect
from megatron_oreal.layout.families import EMBEDDING, LM_HEAD
from megatron_oreal.layout.hf import TensorSource
from megatron_oreal.layout.megatron_checkpoint import MegatronSource

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_SLAB_ELEMENTS = 4 * 2**20


@dataclass(frozen=True)
class Difference:
    """How a tensor differs: ``count`` of its elements, the first of them at ``first`` with its two values.

    ``max_abs``: the largest difference of two numbers; NaN when the elements that differ are not all numbers.
    """

    name: str
    elements: int
    count: int
    max_abs: float
    first: tuple[int, ...]
    values: tuple[float, float]


@dataclass
class Comparison:
    """``missing``: only in A; ``extra``: only in B; ``shapes`` and ``dtypes``: what the tensors have in A and in B."""

    compared: int = 0
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    dtypes: dict[str, tuple[torch.dtype, torch.dtype]] = field(default_factory=dict)
    different: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether both hold the same tensors, bit for bit."""
        return not (self.missing or self.extra or self.shapes or self.dtypes or self.different)

    def join(self, other: Comparison, prefix: str = "") -> None:
        """Add what another comparison found; ``prefix`` stands before its tensors' names."""
        self.compared += other.compared
        self.missing += [prefix + name for name in other.missing]
        self.extra += [prefix + name for name in other.extra]
        self.shapes |= {prefix + name: shapes for name, shapes in other.shapes.items()}
        self.dtypes |= {prefix + name: dtypes for name, dtypes in other.dtypes.items()}
        self.different += [replace(found, name=prefix + found.name) for found in other.different]
        self.notes += other.notes


def compare_sources(
    a: TensorSource,
    b: TensorSource,
    *,
    dtype: torch.dtype | None = None,
    on_tensor: Callable[[str], None] = lambda name: None,
) -> Comparison:
    """Compare all tensors of two sources, bit for bit where the dtypes agree, by value where they do not.

    ``dtype``: round both sides to it first, and let dtypes differ. A head that one side stores and the other ties to
    the embedding is compared with that embedding. Holds a slab of 4 Mi elements of either side at a time.
    """
    result = Comparison()
    in_b = {name for name in b.names() if not _is_tied_copy(name, b, a)}
    for name in a.names():
        on_tensor(name)
        if _is_tied_copy(name, a, b):
            result.notes.append(f"{LM_HEAD!r} is stored beside an equal {EMBEDDING!r}, the other side ties them")
        elif name not in b:
            result.missing.append(name)
        elif a.shape(name) != b.shape(name):
            result.shapes[name] = a.shape(name), b.shape(name)
        else:
            _compare(name, a, b, dtype, result)
    result.extra = [name for name in b.names() if name in in_b and name not in a]
    return result


def compare_states(
    a: MegatronSource, b: MegatronSource, on_tensor: Callable[[str], None] = lambda name: None
) -> Comparison:
    """Compare what two Megatron directories hold besides the weights: optimizer states, and the keys of all else.

    A state's tensors are named ``{state}: {tensor}``. What is kept by rank is compared by its keys alone.
    """
    result = Comparison()
    for state in dict.fromkeys([*a.optimizer_states, *b.optimizer_states]):
        sides = (a, b)
        holders = [side for side in sides if state in side.optimizer_states]
        if len(holders) == 1:
            (result.missing if holders[0] is a else result.extra).append(f"optimizer state {state}")
            continue
        found = compare_sources(*(side.state(state) for side in sides), on_tensor=on_tensor)
        result.join(found, f"{state}: ")
    here, there = a.other_keys(), b.other_keys()
    result.missing += [key for key in here if key not in set(there)]
    result.extra += [key for key in there if key not in set(here)]
    if both := sorted(set(here) & set(there)):
        result.notes.append(f"{len(both)} keys that are kept by rank, {both[0]!r} first, are compared by name alone")
    return result


def _is_tied_copy(name: str, own: TensorSource, other: TensorSource) -> bool:
    if name != LM_HEAD or name in other or EMBEDDING not in own or own.shape(name) != own.shape(EMBEDDING):
        return False
    if not {own.dtype(name), own.dtype(EMBEDDING)} <= set(_FLOATS):  # float8 is not compared with other types
        return False
    return all(torch.equal(own.read(name, rect), own.read(EMBEDDING, rect)) for rect in _slabs(own.shape(name)))


def _compare(name: str, a: TensorSource, b: TensorSource, dtype: torch.dtype | None, result: Comparison) -> None:
    result.compared += 1
    if dtype is None and a.dtype(name) != b.dtype(name):
        result.dtypes[name] = a.dtype(name), b.dtype(name)
    found: Difference | None = None
    for rect in _slabs(a.shape(name)):
        one, other = a.read(name, rect), b.read(name, rect)
        if dtype is not None:
            one, other = one.to(dtype), other.to(dtype)
        start = rect[0][0] if rect else 0
        found = _joined(found, _difference(name, one, other, start, a.shape(name)))
    if found is not None:
        result.different.append(found)


def _difference(name: str, one: Tensor, other: Tensor, first_row: int, shape: Shape) -> Difference | None:
    """Compare two slabs; bits tell zeros of different sign apart and find a NaN equal to itself."""
    if one.dtype == other.dtype:
        bits = _BITS[one.dtype.itemsize]
        unequal = one.contiguous().view(bits) != other.contiguous().view(bits)
        one, other = _numbers(one), _numbers(other)
    else:
        wide = torch.promote_types(_numbers(one).dtype, _numbers(other).dtype)
        one, other = one.to(wide), other.to(wide)
        unequal = (one != other) & ~(one.isnan() & other.isnan())
    count = int(unequal.sum())
    if not count:
        return None
    position = tuple(int(i) for i in unequal.nonzero()[0])
    values = float(one[position]), float(other[position])
    apart = (one[unequal].double() - other[unequal].double()).abs().max()
    first = (position[0] + first_row, *position[1:]) if shape else ()
    return Difference(name, math.prod(shape), count, float(apart), first, values)


def _numbers(values: Tensor) -> Tensor:
    """Return values that torch can index and subtract: float8, integers and booleans as float64."""
    return values if values.dtype in _FLOATS else values.double()


def _joined(before: Difference | None, now: Difference | None) -> Difference | None:
    if before is None or now is None:
        return before or now
    largest = float(torch.tensor([before.max_abs, now.max_abs], dtype=torch.float64).max())  # a NaN wins
    return Difference(before.name, before.elements, before.count + now.count, largest, before.first, before.values)


def _slabs(shape: Shape) -> list[Rect]:
    """Cut a tensor by its rows; one of no dimensions is one element, one without elements is in no slab."""
    if not shape or not math.prod(shape):
        return [] if shape else [()]
    step = max(1, _SLAB_ELEMENTS // math.prod(shape[1:]))
    return [((start, min(start + step, shape[0])), *full_rect(shape[1:])) for start in range(0, shape[0], step)]
