"""Convert a Megatron-core dist_checkpointing directory into a Hugging Face model; optimizer state is left out.

python megatron_to_hf.py --megatron DIR --out DIR --shard-size 5GB
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence

import _shared as shared


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = shared.parser(__doc__)
    parser.add_argument(
        "--megatron", type=shared.directory, required=True, metavar="DIR", help="dist_checkpointing directory"
    )
    shared.add_output(parser)
    parser.add_argument(
        "--shard-size", type=shared.parse_size, default="5GB", metavar="SIZE", help="of a safetensors file (5GB)"
    )
    parser.add_argument(
        "--hf-config",
        type=shared.directory,
        metavar="DIR",
        help="config.json and tokenizer; default: the folder hf inside",
    )
    return shared.run(_convert, parser.parse_args(argv))


def _convert(arguments: argparse.Namespace) -> int:
    shared.check_directories(arguments.megatron, arguments.out)
    from megatron_oreal.layout.blocks import full_rect
    from megatron_oreal.layout.convert import only_dtype, plan_hf_files, save_hf
    from megatron_oreal.layout.megatron_checkpoint import HF_FOLDER, VOCABULARY_KEYS, MegatronSource

    began = time.monotonic()
    with shared.team() as team:

        def prepare() -> MegatronSource:
            source = shared.open_megatron(arguments.megatron, arguments.hf_config)
            source.check_all()
            left_out = (source.spec.vocab_size, source.padded_vocab), (0, source.spec.hidden_size)
            if team.rank == 0 and source.read_stored(VOCABULARY_KEYS[0], left_out).any():
                shared.say(
                    f"note: embeddings beyond vocab_size={source.spec.vocab_size} are not zero: see that config.json "
                    "is this model's"
                )
            return source

        source = shared.prepare(prepare)
        if arguments.dtype:
            dtype = shared.torch_dtype(arguments.dtype)
        else:
            dtype = only_dtype(source, source.names(), arguments.megatron)
        files = plan_hf_files(source.spec, dtype, arguments.shard_size, source.reward_model)
        padding = source.padded_vocab - source.spec.vocab_size
        shared.say(
            f"{arguments.megatron} -> {arguments.out}: {shared.describe_model(source.spec, source.reward_model)}",
            f"Hugging Face, {len(files)} files, {str(dtype).removeprefix('torch.')}; {padding} rows of vocabulary "
            "padding are left out",
        )
        if states := source.optimizer_states:
            shared.say(f"note: optimizer state ({', '.join(sorted(states))}) is left out")
        if arguments.dry_run:
            rows = []
            for name, shapes in files.items():
                written = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
                read = source.cost((tensor, full_rect(shape)) for tensor, shape in shapes.items())
                rows.append((name, f"{len(shapes)} tensors", written, read))
            largest = max(math.prod(shape) for shapes in files.values() for shape in shapes.values()) * dtype.itemsize
            shared.print_plan(rows, team.size, largest)
            shared.say("dry run: nothing was written")
            return 0
        count = sum(len(files[name]) for name in team.mine(list(files)))
        with source, shared.bar("write", count) as on_bytes:
            save_hf(
                arguments.out,
                files,
                source,
                dtype,
                model_dir=arguments.hf_config or arguments.megatron / HF_FOLDER,
                reward_model=source.reward_model,
                team=team,
                on_bytes=on_bytes,
            )
    shared.say(f"wrote {arguments.out} in {time.monotonic() - began:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
