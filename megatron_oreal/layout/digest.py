"""Digests: is what stands in the engines what stands in the trainer, without moving a tensor to find out.

The digest of a rectangle of an HF tensor is ``sum(w[i, j] * R[i] * C[j])`` modulo 2^64 over its words: an element of
the wire's dtype is a word, read as a signed integer, but of 16-bit elements the two of columns ``2 j`` and ``2 j + 1``
are one. ``i`` is the row in the HF tensor (a vector is one row), ``R`` and ``C`` are odd 64-bit numbers from
SplitMix64. Sums of disjoint rectangles add up, so a tensor's digest does not depend on how it is cut, even inside a
word.

One changed word always changes the digest. Of two contents that differ by ``d[i, j]``, whose lowest bit set anywhere is
bit ``t``, at most ``(64 - t) * 2^-(62 - t)`` of all choices of the odd numbers take the same digest: in a row with such
a word, at most ``2^-k`` of the choices of its ``C`` leave a sum over the row with more than ``k`` further zero bits,
and the same holds for that row's ``R`` and the sum over rows. That is 2e-8 at worst (32-bit words that differ in signs
alone), 7e-13 where the lowest bits of elements in odd columns differ, 1e-17 where those of even columns do.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oreal.layout.blocks import Layout, Rect, ShardLayout, to_slices

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}
"""Elements hashed at a time, as int64: 2 MiB on a CPU (its cache), 128 MiB on a GPU."""
_HEADER = 2  # version, elements of the padding that are not zero


class DigestError(RuntimeError):
    """The destination does not hold what the source holds, or the source's replicas differ."""


@dataclass(frozen=True, slots=True)
class DigestReport:
    """A version that was found equal everywhere.

    ``tensors``: the digest of each HF tensor as an unsigned 64-bit number; ``digest``: one for all of them, equal for
    equal weights in any layout (of one wire dtype). ``drifted``: tensors of which tensor-parallel copies (norms, tied
    embeddings) differ within the trainer; each destination then holds one of them. ``seconds``: wall-clock time of the
    whole check on this rank; ``bytes_read``: what it hashed.
    """

    version: int
    digest: str
    tensors: Mapping[str, int]
    drifted: tuple[str, ...]
    seconds: float
    bytes_read: int


@dataclass(frozen=True, slots=True)
class _Cell:
    """A rectangle that every shard of both layouts holds whole or not at all; ``rect`` in HF coordinates."""

    tensor: str
    rect: Rect

    def __str__(self) -> str:
        return f"{self.tensor!r} [{', '.join(f'{start}:{stop}' for start, stop in self.rect)}]"


@dataclass(frozen=True, slots=True)
class _Held:
    """What one shard hashes: for each cell its number, its parameter and its rectangle there."""

    numbers: np.ndarray
    places: tuple[tuple[str, Rect], ...]


class Digester:
    """Compares source and destination shards of a reshard, again and again; made once, alike on every rank.

    ``source_ranks`` and ``dest_ranks`` as for ``make_plan``. Values are hashed in ``wire_dtype``, what they are when
    they travel: parameters of another dtype are cast to it, which for a destination must be exact (NaNs then lose what
    a cast does not keep). ``host_group``: a gloo group over all these ranks, by default the default group. Threads may
    share one; on a GPU, threads that use one stream.
    """

    def __init__(
        self,
        source: Layout,
        source_ranks: Mapping[int, Sequence[int]],
        dest: Layout,
        dest_ranks: Mapping[int, Sequence[int]],
        *,
        wire_dtype: torch.dtype,
        host_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.wire_dtype, self.host_group = wire_dtype, host_group
        self._labels = source.label, dest.label
        self._source_ranks = {index: tuple(source_ranks[index]) for index in sorted(source_ranks)}
        self._dest_ranks = {index: tuple(dest_ranks[index]) for index in sorted(dest_ranks)}
        shards = [source.shards[index] for index in self._source_ranks]
        shards += [dest.shards[index] for index in self._dest_ranks]
        cells = _Cells(shards)
        self._cells = cells.all
        self._held = (
            {index: cells.held(source.shards[index]) for index in self._source_ranks},
            {index: cells.held(dest.shards[index]) for index in self._dest_ranks},
        )
        self._padding = {index: dest.shards[index].padding for index in self._dest_ranks}
        self._hasher = _Hasher(wire_dtype, cells.longest)
        self._alone = threading.Lock()  # the hasher's scratch memory serves one thread at a time
        self._source_of = {rank: index for index, ranks in self._source_ranks.items() for rank in ranks}
        self._dest_of = {rank: index for index, ranks in self._dest_ranks.items() for rank in ranks}

    def release(self) -> None:
        """Drop the scratch memory (at most a chunk in int64 on each device used). Idempotent."""
        with self._alone:
            self._hasher.scratch.clear()

    def hash_source(self, rank: int, tensors: Mapping[str, Tensor], *, partial: bool = False) -> Tensor:
        """Digests of the cells of this rank's source shard, int64 [n] on its device; the host does not wait for it.

        ``partial``: ``tensors`` are some of the shard's parameters; cells of the others are 0, so that the digests of
        disjoint parts add up to those of the whole.
        """
        return self._hash(self._held[0].get(self._source_of.get(rank, -1)), tensors, partial)

    def hash_dest(self, rank: int, tensors: Mapping[str, Tensor], *, partial: bool = False) -> Tensor:
        """The same of its destination shard, after the number of elements of its padding that are not zero."""
        index = self._dest_of.get(rank, -1)
        hashes = self._hash(self._held[1].get(index), tensors, partial)
        wrong = hashes.new_zeros(())
        for name, rect in self._padding.get(index, ()):
            if not partial or name in tensors:
                wrong += self._hasher.bits(tensors[name][to_slices(rect)]).count_nonzero()
        return torch.cat([wrong[None], hashes])

    def verify(self, rank: int, version: int, source: Tensor, dest: Tensor) -> DigestReport:
        """Compare what every rank has hashed: one gather of int64 to the first rank, one answer to all.

        Raises ``DigestError`` on every rank, naming tensor, ranks and version. ``seconds`` and ``bytes_read`` are zero.
        """
        vector = torch.cat([torch.tensor([version]), dest[:1].cpu(), source.cpu(), dest[1:].cpu()])
        vectors = self._gather(rank, vector)
        answer: list[object] = [None if vectors is None else self.compare(vectors)]
        if dist.is_initialized():
            dist.broadcast_object_list(answer, src=self._group_ranks()[0], group=self.host_group)
        (result,) = answer
        if isinstance(result, str):
            raise DigestError(result)
        assert isinstance(result, DigestReport)
        return result

    def check(
        self, rank: int, version: int, src_tensors: Mapping[str, Tensor], dst_tensors: Mapping[str, Tensor]
    ) -> DigestReport:
        """Hash both shards of this rank and ``verify``. A collective: every rank calls it with the same ``version``."""
        began = time.perf_counter()
        source, dest = self.hash_source(rank, src_tensors), self.hash_dest(rank, dst_tensors)
        report = self.verify(rank, version, source, dest)
        read = 0
        for held, index, tensors in self._sides(rank, src_tensors, dst_tensors):
            read += sum(tensors[name].nbytes for name in {name for name, _ in held[index].places})
        return replace(report, seconds=time.perf_counter() - began, bytes_read=read)

    def compare(self, vectors: Mapping[int, np.ndarray]) -> DigestReport | str:
        """``vectors[rank]``: int64 [version, wrong padding, source cells, destination cells] of every rank.

        Returns the report, or a line about what differs.
        """
        versions = {rank: int(vector[0]) for rank, vector in sorted(vectors.items())}
        version = next(iter(versions.values()))
        other = next((rank for rank, each in versions.items() if each != version), None)
        if other is not None:
            first = next(iter(versions))
            return f"rank {other} publishes version {versions[other]}, rank {first} version {version}"
        book = _Book(self._cells)
        offsets = dict.fromkeys(vectors, _HEADER)
        for index, ranks in self._source_ranks.items():
            numbers = self._held[0][index].numbers
            rows = {rank: vectors[rank][_HEADER : _HEADER + len(numbers)] for rank in ranks}
            offsets |= {rank: _HEADER + len(numbers) for rank in ranks}
            book.add_source(ranks, numbers, rows)
        for index, ranks in self._dest_ranks.items():
            numbers = self._held[1][index].numbers
            for rank in ranks:
                book.check_dest(rank, numbers, vectors[rank][offsets[rank] : offsets[rank] + len(numbers)])
                if vectors[rank][1]:
                    book.unpadded.append((rank, int(vectors[rank][1])))
        return book.complaint(version, *self._labels) or book.report(version)

    def _sides(self, rank: int, *tensors: Mapping[str, Tensor]) -> Iterator[tuple[dict[int, _Held], int, Any]]:
        """What this rank takes part in: the shards of the side, its index there, its tensors."""
        for held, index_of, mine in zip(self._held, (self._source_of, self._dest_of), tensors, strict=True):
            if rank in index_of:
                yield held, index_of[rank], mine

    def _gather(self, rank: int, vector: Tensor) -> dict[int, np.ndarray] | None:
        """Every rank's vector on the first rank of the group, ``None`` on the others."""
        if not dist.is_initialized():
            return {rank: vector.numpy()}
        ranks = self._group_ranks()
        padded = vector.new_zeros(max(self._length(each) for each in ranks))
        padded[: len(vector)] = vector
        rows = [torch.empty_like(padded) for _ in ranks] if rank == ranks[0] else None
        dist.gather(padded, rows, dst=ranks[0], group=self.host_group)
        return {each: row.numpy() for each, row in zip(ranks, rows, strict=True)} if rows is not None else None

    def _group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.host_group or dist.group.WORLD)

    def _length(self, rank: int) -> int:
        return _HEADER + sum(len(held[index].numbers) for held, index, _ in self._sides(rank, {}, {}))

    @torch.no_grad()
    def _hash(self, held: _Held | None, tensors: Mapping[str, Tensor], partial: bool) -> Tensor:
        if held is None or not held.places:
            return torch.zeros(0, dtype=torch.int64)
        hashes, rows = [], []
        with self._alone:
            for row, (number, (param, rect)) in enumerate(zip(held.numbers.tolist(), held.places, strict=True)):
                if not partial or param in tensors:
                    hashes.append(self._hasher.digest(tensors[param][to_slices(rect)], self._cells[number].rect))
                    rows.append(row)
        if not hashes:
            return torch.zeros(len(held.places), dtype=torch.int64)
        found = torch.stack(hashes)
        return found if not partial else found.new_zeros(len(held.places)).index_copy_(0, _on(found, rows), found)


class _Cells:
    """Every tensor cut along all edges of all blocks of all shards."""

    def __init__(self, shards: Sequence[ShardLayout]) -> None:
        cuts: dict[str, list[set[int]]] = {}
        for shard in shards:
            for block in shard.blocks:
                edges = cuts.setdefault(block.tensor, [set() for _ in block.source])
                for known, span in zip(edges, block.source, strict=True):
                    known.update(span)
        self._cuts = {tensor: [sorted(each) for each in edges] for tensor, edges in cuts.items()}
        self._numbers: dict[_Cell, int] = {}
        self.all: list[_Cell] = []
        self.longest = max((edges[-1] for dims in self._cuts.values() for edges in dims), default=1)

    def held(self, shard: ShardLayout) -> _Held:
        """The cells in a shard and where they stand in its parameters."""
        numbers, places = [], []
        for block in shard.blocks:
            for rect in self._inside(block.tensor, block.source):
                numbers.append(self._number(_Cell(block.tensor, rect)))
                places.append((block.param, block.dest_of(rect)))
        return _Held(np.array(numbers, dtype=np.int64), tuple(places))

    def _inside(self, tensor: str, rect: Rect) -> Iterator[Rect]:
        spans = []
        for (start, stop), edges in zip(rect, self._cuts[tensor], strict=True):
            low, high = bisect.bisect_left(edges, start), bisect.bisect_left(edges, stop)
            spans.append(list(itertools.pairwise(edges[low : high + 1])))
        yield from itertools.product(*spans)

    def _number(self, cell: _Cell) -> int:
        if cell not in self._numbers:
            self._numbers[cell] = len(self.all)
            self.all.append(cell)
        return self._numbers[cell]


class _Hasher:
    """Digests of rectangles on any device, a chunk at a time."""

    def __init__(self, wire_dtype: torch.dtype, longest: int) -> None:
        self._dtype, self._bits = wire_dtype, _BITS[wire_dtype.itemsize]
        self._host = _odd_numbers(0, longest), _odd_numbers(1, longest)
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.scratch: dict[torch.device, Tensor] = {}

    def bits(self, values: Tensor) -> Tensor:
        """Elements as they are on the wire, as signed integers of its size."""
        return values.detach().to(self._dtype).view(self._bits)

    def digest(self, values: Tensor, rect: Rect) -> Tensor:
        """Return the digest of ``values``, which are ``rect`` of their HF tensor: int64, 0-d."""
        if values.dim() == 1:
            values, rect = values[None], ((0, 1), *rect)
        device = values.device
        if device not in self._tables:
            self._tables[device] = self._host[0].to(device), self._host[1].to(device)
        (top, bottom), (left, right) = rect
        rows, columns = self._tables[device][0][top:bottom], self._tables[device][1]
        height = max(1, CHUNK_ELEMENTS.get(device.type, 2**24) // (right - left))
        total = rows.new_zeros(())
        for start in range(0, bottom - top, height):
            words, factors = self._words(self.bits(values[start : start + height]), left, columns)
            if device.type == "cpu":
                sums = torch.mv(words, factors)
            else:  # there is no matrix product of integers on CUDA
                sums = words.mul_(factors).sum(1)
            total += (sums * rows[start : start + height]).sum()
        return total

    def _words(self, bits: Tensor, left: int, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Words from column ``left`` of the HF tensor on, int64 [rows, n], and what each is multiplied with, [n]."""
        width = bits.shape[1]
        if bits.dtype != torch.int16:
            return self._wide(bits), columns[left : left + width]
        strides = (left, width, bits.storage_offset(), *bits.stride()[:-1])
        if bits.stride(-1) == 1 and not any(number % 2 for number in strides):
            return self._wide(bits.view(torch.int32)), columns[left // 2 : (left + width) // 2]
        place = torch.arange(left, left + width, device=bits.device)
        odd = place % 2
        # alone, the element of an even column is the low half of a word: without a sign
        return self._wide(bits).bitwise_and_(0xFFFF - odd * 0x10000), columns[place // 2] << 16 * odd

    def _wide(self, part: Tensor) -> Tensor:
        """Copy to int64, in memory that is used again."""
        held = self.scratch.get(part.device)
        if held is None or held.numel() < part.numel():
            held = self.scratch[part.device] = torch.empty(part.numel(), dtype=torch.int64, device=part.device)
        return held[: part.numel()].view(part.shape).copy_(part)


def _on(like: Tensor, numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, device=like.device)


def _odd_numbers(stream: int, count: int) -> Tensor:
    """The first ``count`` outputs of SplitMix64 (Steele, Lea and Flood 2014) from a seed for each stream, made odd."""
    with np.errstate(over="ignore"):
        state = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(stream + 1 << 62)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return torch.from_numpy((state | np.uint64(1)).view(np.int64))


@dataclass
class _Book:
    """What the source says about every cell, and who says something else."""

    cells: Sequence[_Cell]
    unpadded: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        count = len(self.cells)
        self._reference = np.zeros(count, dtype=np.int64)
        self._holder = np.full(count, -1, dtype=np.int64)
        self._copies: dict[int, set[int]] = {}  # cell -> other values of it that the source holds
        self._replicas: list[tuple[int, int, int]] = []  # (cell, rank, rank of the replica that differs)
        self._wrong: list[tuple[int, int]] = []  # (cell, destination rank)

    def add_source(self, ranks: Sequence[int], numbers: np.ndarray, rows: Mapping[int, np.ndarray]) -> None:
        first = rows[ranks[0]]
        for rank in ranks[1:]:
            self._replicas += [(int(cell), ranks[0], rank) for cell in numbers[rows[rank] != first]]
        known = self._holder[numbers] >= 0
        self._reference[numbers[~known]] = first[~known]
        self._holder[numbers[~known]] = ranks[0]
        differs = self._reference[numbers] != first
        for cell, value in zip(numbers[differs].tolist(), first[differs].tolist(), strict=True):
            self._copies.setdefault(cell, set()).add(value)

    def check_dest(self, rank: int, numbers: np.ndarray, values: np.ndarray) -> None:
        differs = self._reference[numbers] != values
        for cell, value in zip(numbers[differs].tolist(), values[differs].tolist(), strict=True):
            if value not in self._copies.get(cell, ()):
                self._wrong.append((cell, rank))

    def complaint(self, version: int, source: str, dest: str) -> str | None:
        """One line: the first difference, and how many more."""
        if self._replicas:
            cell, rank, other = self._replicas[0]
            return (
                f"weights of version {version} differ between data-parallel replicas ({source}): {self.cells[cell]} on "
                f"rank {rank} is not that on rank {other}; {self._summary([(c, o) for c, _, o in self._replicas])}"
            )
        if self._wrong:
            cell, rank = self._wrong[0]
            return (
                f"weights of version {version} did not arrive ({source} -> {dest}): {self.cells[cell]} on rank {rank} "
                f"is not what rank {self._holder[cell]} holds; {self._summary(self._wrong)}"
            )
        if self.unpadded:
            rank, count = self.unpadded[0]
            ranks = ", ".join(str(rank) for rank, _ in self.unpadded)
            return f"weights of version {version} ({dest}): {count} elements of padding are not zero on rank {ranks}"
        return None

    def report(self, version: int) -> DigestReport:
        tensors: dict[str, int] = {}
        for cell, value in zip(self.cells, self._reference.tolist(), strict=True):
            tensors[cell.tensor] = (tensors.get(cell.tensor, 0) + value) % 2**64
        whole = hashlib.sha256(repr(sorted(tensors.items())).encode()).hexdigest()[:16]
        drifted = tuple(dict.fromkeys(self.cells[cell].tensor for cell in self._copies))
        return DigestReport(version, whole, tensors, drifted, 0.0, 0)

    def _summary(self, found: Sequence[tuple[int, int]]) -> str:
        tensors = {self.cells[cell].tensor for cell, _ in found}
        ranks = sorted({rank for _, rank in found})
        return f"in all {len(tensors)} tensor{'s' if len(tensors) > 1 else ''}, ranks {', '.join(map(str, ranks))}"
