"""What the four tools share: arguments, processes, how a mistake is said, and how a plan is shown.

torch is imported only after the arguments were found to make sense.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, cast

from megatron_oreal.errors import UserError

if TYPE_CHECKING:
    import torch

    from megatron_oreal.layout.convert import Team
    from megatron_oreal.layout.hf import TensorSource
    from megatron_oreal.layout.megatron_checkpoint import MegatronSource
    from megatron_oreal.layout.megatron_writer import MegatronTarget, ShardFile
    from megatron_oreal.layout.model_spec import ModelSpec
    from megatron_oreal.telemetry.progress import Bar

DTYPES = ("bf16", "fp16", "fp32")
_UNITS = {"": 1} | {
    f"{prefix}{binary}": (1024 if binary else 1000) ** power
    for power, prefix in enumerate("KMGT", start=1)
    for binary in ("", "I")
}
_MODELS = ("policy", "reward_model")


class _Parser(argparse.ArgumentParser):
    """Says a mistake in one line, as the rest of a tool does."""

    def error(self, message: str) -> NoReturn:
        if _is_first():
            print(f"error: {message} (--help lists the arguments)", file=sys.stderr, flush=True)
        raise SystemExit(2)


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser whose help keeps the description's line breaks."""
    return _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def directory(text: str) -> Path:
    """The ``type`` of an argument; an empty one is a shell variable that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("the name of a directory is empty")
    return Path(text)


def add_output(arguments: argparse.ArgumentParser, *, dtype: bool = True) -> None:
    """Add what every converter takes."""
    arguments.add_argument("--out", type=directory, required=True, metavar="DIR", help="new directory")
    if dtype:
        arguments.add_argument("--dtype", choices=DTYPES, help="of the result; default: as stored")
    arguments.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")


def add_megatron_input(arguments: argparse.ArgumentParser) -> None:
    """Add what is read of a ``dist_checkpointing`` directory."""
    arguments.add_argument(
        "--megatron", type=directory, required=True, metavar="DIR", help="dist_checkpointing directory"
    )
    arguments.add_argument(
        "--hf-config", type=directory, metavar="DIR", help="config.json and tokenizer; default: the folder hf inside"
    )


def add_layout(arguments: argparse.ArgumentParser) -> None:
    """Add Megatron's parallel sizes."""
    arguments.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-model-parallel size (default 1)")
    arguments.add_argument("--pp", type=int, default=1, metavar="N", help="pipeline-model-parallel size (default 1)")
    arguments.add_argument("--vpp", type=int, metavar="N", help="virtual pipeline chunks a stage")
    arguments.add_argument("--num-layers-in-first-pipeline-stage", type=int, metavar="N")
    arguments.add_argument("--num-layers-in-last-pipeline-stage", type=int, metavar="N")
    arguments.add_argument(
        "--make-vocab-size-divisible-by",
        type=int,
        default=1,
        metavar="N",
        help="pad the vocabulary to a multiple of N x TP (default 1; Megatron-LM's own default is 128)",
    )


def check_layout(arguments: argparse.Namespace) -> None:
    """Raise ``UserError`` for a size that no model could have."""
    for name in ("tp", "pp", "vpp", "make_vocab_size_divisible_by", "num_layers_in_first_pipeline_stage",
                 "num_layers_in_last_pipeline_stage"):  # fmt: skip
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}={value}: must be 1 or more")


def check_directories(source: Path, out: Path | None = None) -> None:
    """Find the commonest mistakes before torch is imported."""
    with _looking(source):
        if not source.is_dir():
            raise UserError(f"{source}: " + ("not a directory" if source.exists() else "does not exist"))
        next(source.iterdir(), None)
    if out is None:
        return
    with _looking(out):
        taken = os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir()))
    if taken:
        raise UserError(f"{out}: already exists: choose another directory, or remove it first")
    if out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"--out {out} is inside {source}, which is read: choose another directory")


@contextmanager
def _looking(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read ({error.strerror}): check its permissions") from None


def parse_size(text: str) -> int:
    """``5GB``, ``500MB``, ``2GiB``, bytes; the ``type`` of an argument."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?i?)B?\s*", text, re.IGNORECASE)
    unit = match[2].upper() if match else None
    size = int(float(match[1]) * _UNITS[unit]) if match and unit in _UNITS else 0
    if size < 1:
        shown = text if len(text) <= 40 else text[:40] + "..."
        raise argparse.ArgumentTypeError(f"{shown!r} is not a size such as 5GB, 500MB or 2GiB")
    return size


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype of one of ``DTYPES``."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def run(work: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Run a tool; returns its exit status: 2 after one line on standard error for a mistake, 3 for a defect."""
    try:
        return work(arguments)
    except UserError as error:
        if _is_first():
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception:  # a defect: not 1, which says that two checkpoints differ
        traceback.print_exc()
        return 3


@contextmanager
def team() -> Iterator[Team]:
    """Join the processes that torchrun started; alone, a team of one without a process group."""
    import torch.distributed as dist

    from megatron_oreal.layout.convert import Team

    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or dist.is_initialized():
        yield Team(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Team()
        return
    dist.init_process_group("gloo")
    try:
        yield Team(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()


def open_megatron(directory: Path, hf_config: Path | None = None) -> MegatronSource:
    """Open a ``dist_checkpointing`` directory; the config comes from ``hf_config``, or from inside."""
    from megatron_oreal.layout.megatron_checkpoint import MegatronSource, is_megatron_checkpoint
    from megatron_oreal.layout.model_spec import load_model_spec

    if not is_megatron_checkpoint(directory):
        inside = checkpoints_inside(directory)
        hint = f"give one of {', '.join(map(str, inside))}" if inside else "it has no .metadata"
        raise UserError(f"{directory}: not a dist_checkpointing directory: {hint}")
    return MegatronSource(directory, load_model_spec(hf_config) if hf_config else None)


def checkpoints_inside(directory: Path) -> list[Path]:
    """Return the checkpoints of a trainer's step, or the newest first of a root of Megatron-LM."""
    from megatron_oreal.layout.files import reading
    from megatron_oreal.layout.megatron_checkpoint import is_megatron_checkpoint

    with reading(directory):
        iterations = sorted((path for path in directory.glob("iter_*") if path.is_dir()), reverse=True)
    candidates = [directory / name for name in _MODELS] + iterations + [directory / "release"]
    return [path for path in candidates if is_megatron_checkpoint(path)][:3]


def megatron_target(arguments: argparse.Namespace, spec: ModelSpec, reward_model: bool) -> MegatronTarget:
    """Return the layout that the arguments ask for; ``UserError`` when the model cannot be cut so."""
    from megatron_oreal.layout.megatron import pipeline_layer_split
    from megatron_oreal.layout.megatron_writer import MegatronTarget

    first, last = arguments.num_layers_in_first_pipeline_stage, arguments.num_layers_in_last_pipeline_stage
    split = None
    if first is not None or last is not None:
        split = pipeline_layer_split(spec, pp=arguments.pp, vpp=arguments.vpp, first=first, last=last)
    divisor = arguments.make_vocab_size_divisible_by
    return MegatronTarget(arguments.tp, arguments.pp, arguments.vpp, divisor, split, reward_model)


def prepare(work: Callable[[], Any]) -> Any:
    """Run ``work`` on every process and fail together; returns its result."""
    from megatron_oreal.layout.directory import together

    results: list[Any] = []
    together(None, lambda: results.append(work()))
    return results[0]


class _Lines(io.TextIOBase):
    """Standard error for the lines of a progress bar; its last one is not wanted beside that of a mistake."""

    muted = False

    def write(self, text: str) -> int:
        return len(text) if self.muted else sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


@contextmanager
def shown_progress(label: str, count: int) -> Iterator[Bar]:
    """Show progress on the first process, and nothing of it after a mistake, whose line stands alone."""
    from megatron_oreal.telemetry.progress import progress

    lines = None if sys.stderr.isatty() else _Lines()
    with progress(label, total=count, unit="tensors", stream=cast("TextIO | None", lines)) as shown:
        try:
            yield shown
        except UserError:
            if lines is not None:
                lines.muted = True
            raise


@contextmanager
def bar(label: str, count: int) -> Iterator[Callable[[int], None]]:
    """Show progress; yields what takes the bytes of each tensor that is written."""
    from megatron_oreal.layout.statistics import format_bytes

    done, began = 0, time.monotonic()
    with shown_progress(label, count) as shown:

        def on_bytes(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            seconds = max(time.monotonic() - began, 1e-3)
            shown.update(1, extra=f"{format_bytes(done)}, {done / seconds / 1e6:.0f} MB/s")

        yield on_bytes


def say(*lines: str) -> None:
    """Print on the first process."""
    if _is_first():
        print(*lines, sep="\n", flush=True)


def describe_model(spec: ModelSpec, reward_model: bool) -> str:
    """One line."""
    from math import prod

    from megatron_oreal.layout.families import hf_tensors

    count = sum(prod(shape) for shape in hf_tensors(spec, reward_model=reward_model).values())
    kind = " reward model" if reward_model else " tied" if spec.tied_embeddings else ""
    return f"{spec.family}{kind}, {spec.num_layers} layers, {count / 1e6:,.1f} million parameters"


def megatron_rows(
    files: Sequence[ShardFile], target: MegatronTarget, itemsize: int, *sources: TensorSource
) -> list[tuple[str, str, int, int]]:
    """(file, its rank, bytes to write, bytes to read) of each file, for ``print_plan``; a source for each section."""
    rows = []
    for file in files:
        blocks = [block for chunk in file.chunks for block in chunk.blocks]
        place = f"tp {file.shard % target.tp} pp {file.shard // target.tp}"
        read = 0
        for source in sources:
            read += source.cost((block.tensor, block.source) for block in blocks if block.tensor in source)
        rows.append((file.name, place, file.elements * itemsize, read))
    return rows


def print_plan(rows: Sequence[tuple[str, str, int, int]], size: int, largest: int) -> None:
    """Print what is written by whom, from how many bytes; ``largest``: bytes of the largest tensor held."""
    from megatron_oreal.layout.statistics import format_bytes

    width = max(len(name) for name, *_ in rows)
    for number, (name, place, written, read) in enumerate(rows):
        say(f"  {name:<{width}}  {place:<12}  {format_bytes(written):>8}  by process {number % size}"
            f"  from {format_bytes(read)}")  # fmt: skip
    for rank in range(size):
        mine = rows[rank::size]
        say(
            f"process {rank}: reads {format_bytes(sum(row[3] for row in mine))}, writes "
            f"{format_bytes(sum(row[2] for row in mine))} in {len(mine)} files"
        )
    total = sum(row[2] for row in rows)
    say(f"total {format_bytes(total)}; the largest tensor held at a time is {format_bytes(largest)}")
