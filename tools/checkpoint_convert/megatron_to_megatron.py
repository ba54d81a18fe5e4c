"""Cut a Megatron-core dist_checkpointing directory anew for other TP, PP and VPP, with its optimizer state.

Megatron-core loads a checkpoint into any layout; one that is cut for the layout that reads it is read faster, and its
vocabulary is padded for it.

python megatron_to_megatron.py --megatron DIR --out DIR --tp 8 --pp 1
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import _shared as shared

from megatron_oreal.errors import UserError

if TYPE_CHECKING:
    from megatron_oreal.layout.megatron_checkpoint import MegatronSource
    from megatron_oreal.layout.megatron_writer import MegatronTarget, Section


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = shared.parser(__doc__)
    parser.add_argument(
        "--megatron", type=shared.directory, required=True, metavar="DIR", help="dist_checkpointing directory"
    )
    shared.add_output(parser, dtype=False)
    shared.add_layout(parser)
    parser.add_argument("--weights-only", action="store_true", help="leave optimizer state and everything else out")
    parser.add_argument("--dtype", choices=shared.DTYPES, help="of the weights, with --weights-only")
    parser.add_argument(
        "--hf-config",
        type=shared.directory,
        metavar="DIR",
        help="config.json and tokenizer; default: the folder hf inside",
    )
    return shared.run(_convert, parser.parse_args(argv))


def _convert(arguments: argparse.Namespace) -> int:
    shared.check_layout(arguments)
    if arguments.dtype and not arguments.weights_only:
        raise UserError("--dtype goes with --weights-only: the optimizer's state belongs to the weights as they are")
    shared.check_directories(arguments.megatron, arguments.out)
    from megatron_oreal.layout.convert import save_megatron
    from megatron_oreal.layout.megatron_checkpoint import HF_FOLDER
    from megatron_oreal.layout.megatron_writer import padded_rows, plan_files

    began = time.monotonic()
    with shared.team() as team:

        def prepare() -> tuple[MegatronSource, MegatronTarget, list[Section], dict]:
            source = shared.open_megatron(arguments.megatron, arguments.hf_config)
            source.check_all()
            target = shared.megatron_target(arguments, source.spec, source.reward_model)
            sections, common = _sections(source, target, arguments)
            return source, target, sections, common

        source, target, sections, common = shared.prepare(prepare)
        files = plan_files(source.spec, target, files_per_shard=-(-team.size // (target.tp * target.pp)))
        shared.say(
            f"{arguments.megatron} -> {arguments.out}: {shared.describe_model(source.spec, source.reward_model)}",
            f"Megatron {target}, vocabulary {source.spec.vocab_size} + {padded_rows(source.spec, target)} rows of "
            f"padding (was {source.padded_vocab - source.spec.vocab_size})",
        )
        for section in sections:
            name = section.prefix.removeprefix(source.prefix) or "weights"
            shared.say(f"  {name.rstrip('.')}: {str(section.dtype).removeprefix('torch.')}")
        if arguments.dry_run:
            size = sum(section.dtype.itemsize for section in sections)
            largest = max(chunk.elements for file in files for chunk in file.chunks)
            shared.print_plan(
                shared.megatron_rows(files, target, size, *(section.source for section in sections)),
                team.size,
                largest * max(section.dtype.itemsize for section in sections),
            )
            shared.say("dry run: nothing was written")
            return 0
        count = sum(len(file.chunks) for file in team.mine(files)) * len(sections)
        with source, shared.bar("write", count) as on_bytes:
            save_megatron(
                arguments.out,
                files,
                sections,
                model_dir=arguments.hf_config or arguments.megatron / HF_FOLDER,
                reward_model=source.reward_model,
                common=common,
                team=team,
                on_bytes=on_bytes,
            )
    shared.say(f"wrote {arguments.out} in {time.monotonic() - began:.1f} s")
    return 0


def _sections(
    source: MegatronSource, target: MegatronTarget, arguments: argparse.Namespace
) -> tuple[list[Section], dict]:
    """The weights, and, unless they alone are wanted, every optimizer state and what stands beside the tensors."""
    from megatron_oreal.layout.convert import only_dtype
    from megatron_oreal.layout.megatron_writer import Section, padded_rows

    keep = source.padded_vocab == source.spec.vocab_size + padded_rows(source.spec, target)
    if arguments.dtype:
        dtype = shared.torch_dtype(arguments.dtype)
    else:
        dtype = only_dtype(source, source.names(), arguments.megatron, "choose one with --weights-only --dtype")
    sections = [Section(source.prefix, source, dtype, keep)]
    if arguments.weights_only:
        return sections, {"checkpoint_version": 3.0, "iteration": 0}
    if others := source.other_keys():
        raise UserError(
            f"{arguments.megatron}: {others[0]!r} and {len(others) - 1} more are kept by rank, not by tensor, and "
            "cannot be cut for another layout: give --weights-only to leave them out"
        )
    for name in source.optimizer_states:
        state = source.state(name)
        dtype = only_dtype(state, state.names(), f"{arguments.megatron}: {name}", "leave it out with --weights-only")
        sections.append(Section(state.prefix, state, dtype, keep))
    return sections, source.common_state()


if __name__ == "__main__":
    sys.exit(main())
