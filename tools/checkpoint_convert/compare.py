"""Compare two checkpoints, Hugging Face or Megatron-core, tensor by tensor, whatever their layouts.

python compare.py A B

Two Megatron directories are compared with their optimizer states, unless --weights-only is given.

Exit status 0: the same tensors, bit for bit. 1: they differ, standard output says where. 2: a mistake.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import _shared as shared

from megatron_oreal.errors import UserError

if TYPE_CHECKING:
    from megatron_oreal.layout.compare import Comparison
    from megatron_oreal.layout.hf import TensorSource


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = shared.parser(__doc__)
    parser.add_argument("a", type=shared.directory, metavar="A")
    parser.add_argument("b", type=shared.directory, metavar="B")
    parser.add_argument("--dtype", choices=shared.DTYPES, help="round both sides to it before they are compared")
    parser.add_argument(
        "--hf-config", type=shared.directory, metavar="DIR", help="config.json of a Megatron directory without one"
    )
    parser.add_argument("--max-lines", type=int, default=20, metavar="N", help="lines of each kind (default 20)")
    parser.add_argument("--weights-only", action="store_true", help="leave optimizer states out")
    return shared.run(_compare, parser.parse_args(argv))


def _compare(arguments: argparse.Namespace) -> int:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("compare.py is a single process: start it without torchrun")
    if arguments.max_lines < 0:
        raise UserError(f"--max-lines={arguments.max_lines}: must be 0 or more")
    for path in (arguments.a, arguments.b, *([arguments.hf_config] if arguments.hf_config else [])):
        shared.check_directories(path)
    from megatron_oreal.layout.compare import compare_sources, compare_states
    from megatron_oreal.layout.megatron_checkpoint import MegatronSource
    from megatron_oreal.layout.model_spec import load_model_spec

    if arguments.hf_config:
        load_model_spec(arguments.hf_config)
    config = arguments.hf_config or _config_of(arguments.a, arguments.b)
    a, b = (_open(path, config) for path in (arguments.a, arguments.b))
    dtype = shared.torch_dtype(arguments.dtype) if arguments.dtype else None
    sources = [source for source in (a, b) if isinstance(source, MegatronSource)]
    states = len(sources) == 2 and not arguments.weights_only
    total = len(a.names()) * (1 + (len(sources[0].optimizer_states) if states else 0))
    with shared.shown_progress("compare", total) as bar:
        result = compare_sources(a, b, dtype=dtype, on_tensor=lambda name: bar.update(1))
        if states:
            result.join(compare_states(sources[0], sources[1], on_tensor=lambda name: bar.update(1)))
    for source in sources:
        if source.optimizer_states and not states:
            result.notes.append(f"{source.directory}: optimizer state is not compared")
    _report(result, arguments.max_lines, a, b)
    return 0 if result.equal else 1


def _report(result: Comparison, max_lines: int, a: TensorSource, b: TensorSource) -> None:
    lines = {
        "only in A": [_with_shape(name, a) for name in result.missing],
        "only in B": [_with_shape(name, b) for name in result.extra],
        "shape": [f"{name}: {list(one)} in A, {list(other)} in B" for name, (one, other) in result.shapes.items()],
        "dtype": [f"{name}: {_dtype(one)} in A, {_dtype(other)} in B" for name, (one, other) in result.dtypes.items()],
        "values": [
            f"{d.name}: {d.count} of {d.elements} elements differ, at most by {d.max_abs:.6g}; the first at "
            f"{list(d.first)}: {d.values[0]!r} in A, {d.values[1]!r} in B"
            for d in result.different
        ],
    }
    for kind, found in lines.items():
        for line in found[:max_lines]:
            print(f"{kind}: {line}")
        if len(found) > max_lines:
            print(f"{kind}: ... and {len(found) - max_lines} more")
    for note in result.notes:
        print(f"note: {note}")
    counts = ", ".join(f"{len(found)} {kind}" for kind, found in lines.items() if found)
    verdict = "equal" if result.equal else f"different ({counts})"
    print(f"{result.compared} tensors compared: {verdict}", flush=True)


def _with_shape(name: str, source: TensorSource) -> str:
    """A tensor with its shape; a key that is none of the model's, as it is."""
    return f"{name} {list(source.shape(name))}" if name in source else name


def _config_of(*paths: Path) -> Path | None:
    """Return a directory with a config that either side has: both are of one model, or they differ anyway."""
    from megatron_oreal.layout.files import is_file
    from megatron_oreal.layout.megatron_checkpoint import HF_FOLDER

    folders = [folder for path in paths for folder in (path, path / HF_FOLDER)]
    return next((folder for folder in folders if is_file(folder / "config.json")), None)


def _open(path: Path, hf_config: Path | None) -> TensorSource:
    from megatron_oreal.layout.files import is_file
    from megatron_oreal.layout.hf import INDEX_FILE, SINGLE_FILE, SafetensorsSource
    from megatron_oreal.layout.megatron_checkpoint import HF_FOLDER, is_megatron_checkpoint

    if is_megatron_checkpoint(path):
        source = shared.open_megatron(path, None if is_file(path / HF_FOLDER / "config.json") else hf_config)
        source.check_all()
        padding = source.padded_vocab - source.spec.vocab_size
        if padding:
            print(f"note: {path}: {padding} rows of vocabulary padding are not compared")
        return source
    if any(is_file(path / name) for name in (SINGLE_FILE, INDEX_FILE)):
        return SafetensorsSource(path, any_dtype=True)
    if shared.checkpoints_inside(path):
        return shared.open_megatron(path)
    raise UserError(f"{path}: neither a Hugging Face nor a dist_checkpointing directory")


def _dtype(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(main())
