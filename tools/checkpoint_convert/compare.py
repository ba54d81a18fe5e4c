"""Compare two checkpoints, Hugging Face or Megatron-core, tensor by tensor, whatever their layouts.

python compare.py A B

Exit status 0: the same tensors, bit for bit. 1: they differ, standard output says where. 2: a mistake.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import _shared as shared

from megatron_oreal.errors import UserError

if TYPE_CHECKING:
    from megatron_oreal.layout.hf import TensorSource


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = shared.parser(__doc__)
    parser.add_argument("a", type=Path, metavar="A")
    parser.add_argument("b", type=Path, metavar="B")
    parser.add_argument("--dtype", choices=shared.DTYPES, help="round both sides to it before they are compared")
    parser.add_argument("--hf-config", type=Path, metavar="DIR", help="config.json of a Megatron directory without one")
    parser.add_argument("--max-lines", type=int, default=20, metavar="N", help="lines of each kind (default 20)")
    return shared.run(_compare, parser.parse_args(argv))


def _compare(arguments: argparse.Namespace) -> int:
    for path in (arguments.a, arguments.b):
        shared.check_directories(path)
    from megatron_oreal.layout.compare import compare_sources
    from megatron_oreal.telemetry.progress import progress

    config = arguments.hf_config or _config_of(arguments.a, arguments.b)
    a, b = (_open(path, config) for path in (arguments.a, arguments.b))
    dtype = shared.torch_dtype(arguments.dtype) if arguments.dtype else None
    with progress("compare", total=len(a.names()), unit="tensors") as bar:
        result = compare_sources(a, b, dtype=dtype, on_tensor=lambda name: bar.update(1))
    lines = {
        "only in A": [f"{name} {list(a.shape(name))}" for name in result.missing],
        "only in B": [f"{name} {list(b.shape(name))}" for name in result.extra],
        "shape": [f"{name}: {list(one)} in A, {list(other)} in B" for name, (one, other) in result.shapes.items()],
        "dtype": [f"{name}: {_dtype(one)} in A, {_dtype(other)} in B" for name, (one, other) in result.dtypes.items()],
        "values": [
            f"{d.name}: {d.count} of {d.elements} elements differ, at most by {d.max_abs:.6g}; the first at "
            f"{list(d.first)}: {d.values[0]!r} in A, {d.values[1]!r} in B"
            for d in result.different
        ],
    }
    for kind, found in lines.items():
        for line in found[: arguments.max_lines]:
            print(f"{kind}: {line}")
        if len(found) > arguments.max_lines:
            print(f"{kind}: ... and {len(found) - arguments.max_lines} more")
    for note in result.notes:
        print(f"note: {note}")
    counts = ", ".join(f"{len(found)} {kind}" for kind, found in lines.items() if found)
    verdict = "equal" if result.equal else f"different ({counts})"
    print(f"{result.compared} tensors compared: {verdict}", flush=True)
    return 0 if result.equal else 1


def _config_of(*paths: Path) -> Path | None:
    """Return a directory with a config that either side has: both are of one model, or they differ anyway."""
    folders = [folder for path in paths for folder in (path, path / "hf")]
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def _open(path: Path, hf_config: Path | None) -> TensorSource:
    from megatron_oreal.layout.hf import INDEX_FILE, SINGLE_FILE, SafetensorsSource
    from megatron_oreal.layout.megatron_checkpoint import HF_FOLDER, is_megatron_checkpoint

    if is_megatron_checkpoint(path):
        source = shared.open_megatron(path, None if (path / HF_FOLDER / "config.json").is_file() else hf_config)
        source.check_all()
        padding = source.padded_vocab - source.spec.vocab_size
        if padding:
            print(f"note: {path}: {padding} rows of vocabulary padding are not compared")
        return source
    if any((path / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
        return SafetensorsSource(path)
    if any(is_megatron_checkpoint(path / name) for name in ("policy", "reward_model")):
        return shared.open_megatron(path)
    raise UserError(f"{path}: neither a Hugging Face nor a dist_checkpointing directory")


def _dtype(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(main())
