"""Convert a Hugging Face model into a Megatron-core dist_checkpointing directory.

python hf_to_megatron.py --hf DIR --out DIR --tp 4 --pp 2
torchrun --nproc-per-node 8 hf_to_megatron.py --hf DIR --out DIR --tp 4 --pp 2
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import _shared as shared


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = shared.parser(__doc__)
    parser.add_argument(
        "--hf", type=shared.directory, required=True, metavar="DIR", help="Hugging Face model directory"
    )
    shared.add_output(parser)
    shared.add_layout(parser)
    parser.add_argument(
        "--reward-model",
        action="store_true",
        help="write a token reward model: a scalar head, zero where the source has none, instead of the vocabulary's",
    )
    return shared.run(_convert, parser.parse_args(argv))


def _convert(arguments: argparse.Namespace) -> int:
    shared.check_layout(arguments)
    shared.check_directories(arguments.hf, arguments.out)
    from megatron_oreal.layout.convert import Team, check_weights, only_dtype, save_megatron
    from megatron_oreal.layout.families import hf_tensors
    from megatron_oreal.layout.hf import SafetensorsSource
    from megatron_oreal.layout.megatron_writer import Section, ShardFile, padded_rows, plan_files
    from megatron_oreal.layout.model_spec import load_model_spec

    began = time.monotonic()
    spec = load_model_spec(arguments.hf)
    reward_model = arguments.reward_model or _is_classifier(arguments.hf)
    target = shared.megatron_target(arguments, spec, reward_model)
    with shared.team() as team:

        def prepare(team: Team) -> tuple[list[ShardFile], SafetensorsSource, Section]:
            files = plan_files(spec, target, files_per_shard=-(-team.size // (target.tp * target.pp)))
            source = SafetensorsSource(arguments.hf)
            options = {"reward_model": reward_model, "new_head": arguments.reward_model}
            for note in check_weights(source, spec, origin=arguments.hf, **options):
                shared.say(f"note: {note}")
            if arguments.dtype:
                dtype = shared.torch_dtype(arguments.dtype)
            else:
                dtype = only_dtype(source, list(hf_tensors(spec, reward_model=reward_model)), arguments.hf)
            return files, source, Section("", source, dtype)

        files, source, section = shared.prepare(lambda: prepare(team))
        dtype = str(section.dtype).removeprefix("torch.")
        shared.say(
            f"{arguments.hf} -> {arguments.out}: {shared.describe_model(spec, reward_model)}",
            f"Megatron {target}, {dtype}, vocabulary {spec.vocab_size} + {padded_rows(spec, target)} rows of padding",
        )
        if arguments.dry_run:
            size = section.dtype.itemsize
            largest = max(chunk.elements for file in files for chunk in file.chunks) * size
            shared.print_plan(shared.megatron_rows(files, target, size, source), team.size, largest)
            shared.say("dry run: nothing was written")
            return 0
        with source, shared.bar("write", sum(len(file.chunks) for file in team.mine(files))) as on_bytes:
            save_megatron(
                arguments.out,
                files,
                [section],
                model_dir=arguments.hf,
                reward_model=reward_model,
                common={"checkpoint_version": 3.0, "iteration": 0},
                team=team,
                on_bytes=on_bytes,
            )
    shared.say(f"wrote {arguments.out} in {time.monotonic() - began:.1f} s")
    return 0


def _is_classifier(model_dir: Path) -> bool:
    """Whether the model is a reward model by its own config."""
    from megatron_oreal.layout.families import CLASSIFIER
    from megatron_oreal.layout.files import read_json

    return str(read_json(model_dir / "config.json")["architectures"][0]).endswith(CLASSIFIER)


if __name__ == "__main__":
    sys.exit(main())
