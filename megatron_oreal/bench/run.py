"""``megatron-oreal bench CONFIG``: build a run from the config, measure its parts, print and write the figures."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch

from megatron_oreal.actor.build import DTYPES
from megatron_oreal.bench.figures import table
from megatron_oreal.bench.flops import ModelFlops
from megatron_oreal.bench.options import BenchOptions
from megatron_oreal.bench.parts import MEASURES, Bench
from megatron_oreal.bench.workload import RandomWeights, SyntheticChat, Workload, has_weights
from megatron_oreal.config import Config
from megatron_oreal.config_check import check_config
from megatron_oreal.data.chat import ChatTemplate
from megatron_oreal.data.sampler import PromptOrder
from megatron_oreal.errors import UserError, of_key
from megatron_oreal.layout import ModelSpec, load_from_hf, load_model_spec
from megatron_oreal.planner.devices import device_of_name
from megatron_oreal.platform import Platform
from megatron_oreal.run import Inputs, Run, open_run
from megatron_oreal.telemetry import machine

FORMAT = 1


def bench(config: Config, options: BenchOptions) -> None:
    """Measure ``options.parts`` on all ranks; the first one prints the table and writes ``options.output``."""
    config = effective(config)
    drawn: list[Workload] = []

    def load(config: Config, platform: Platform, _: bool) -> Inputs:
        def draw() -> tuple[ModelSpec, Workload]:
            with of_key("model.path"):
                spec = load_model_spec(config.model.path)
            check_config(config, spec, platform.world_size, platform.ranks_per_node)
            return spec, Workload.draw(config, spec, options)

        spec, work = platform.fail_together(draw)
        require_same_work(options, work, platform)
        drawn.append(work)
        steps = options.warmup + options.repeats
        prompts = work.prompts(steps * len(work.lengths))
        return spec, cast(ChatTemplate, SyntheticChat(work)), PromptOrder(prompts, config.seed), []

    load_before = machine.load_average()
    with open_run(config, load_inputs=load) as run:
        weights = _load_weights(run)
        has_reward_model = run.actor.reward_model is not None
        measured = Bench(
            run,
            drawn[0],
            ModelFlops.of(run.spec, has_reward_model=has_reward_model),
            peak_flops(run.platform, config.model.dtype),
            options.warmup,
            options.repeats,
        )
        run.say(f"{run.spec.num_parameters():,} parameters ({weights}), {run.platform.world_size} ranks")
        run.say(headline(drawn[0]))
        for part in options.parts:
            run.say(f"measuring {part}: {options.warmup} + {options.repeats} repeats")
            MEASURES[part](measured)
            if run.platform.is_cuda:
                torch.cuda.empty_cache()  # a server beside takes its memory of what is free
        names = sorted(set(run.platform.gather_objects(device_name(run.platform))))
        if run.is_first_rank:
            print(f"\n{table(measured.figures)}", flush=True)
            record = _record(run, drawn[0], options, measured, weights=weights, devices=names)
            record["load_average"] = {"before": load_before, "after": machine.load_average()}
            if options.output is not None:
                Path(options.output).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
                print(f"\nwritten: {options.output}", flush=True)


def require_same_work(options: BenchOptions, work: Workload, platform: Platform) -> None:
    """Raise ``UserError`` on all ranks, a collective of them, when nodes were started to measure different things.

    Their ranks would wait for each other in different places.
    """
    digest = hashlib.sha256(work.lengths.tobytes()).hexdigest()[:12]
    mine = asdict(replace(options, output=None, note=None)) | {"lengths": f"{work.distribution} ({digest})"}
    every = platform.gather_objects(mine, "the options of the other nodes")
    for rank, other in enumerate(every):
        for name, first in every[0].items():
            if other[name] != first:
                raise UserError(
                    f"--{name.replace('_', '-')} is {first} on rank 0 and {other[name]} on rank {rank}: start every "
                    "node with the same options"
                )


def effective(config: Config) -> Config:
    """Leave out what a benchmark does not have: the judge's hosts, saved trajectories, held-out problems."""
    config = config.model_copy(deep=True)
    config.verifier.hosts = []
    config.telemetry.save_trajectories = False
    config.evaluation.data = None
    return config


def headline(work: Workload) -> str:
    """One line about what is drawn."""
    what = work.describe()
    return (
        f"{what['prompts']} prompts of {what['prompt_tokens']} tokens x {what['samples_per_prompt']} responses, "
        f"{what['response_lengths']}: mean {what['response_tokens_mean']:.0f}, longest "
        f"{what['response_tokens_longest']} tokens; {what['kept_sequences']} sequences kept"
    )


def _load_weights(run: Run) -> str:
    """Load the config's weights, or draw them where there are none; says which."""
    path, actor, platform = run.config.model.path, run.actor, run.platform
    found = platform.gather_objects(has_weights(run.config))
    if any(found):
        if not all(found):
            raise UserError(
                f"model.path={path!r} has weights for rank {found.index(True)} and none for rank "
                f"{found.index(False)}: give every node the same directory"
            )
        actor.load_hf()
        return f"weights from {run.config.model.megatron_checkpoint or path}"
    source = RandomWeights(run.spec, DTYPES[run.config.model.dtype], platform.device, run.config.seed)
    index, offloader = run.grid.model_index, actor.offloader
    with offloader.resident("policy"), offloader.resident("optimizer"):
        load_from_hf(source, actor.policy_layout.shards[index], actor.policy.parameters())
        actor.policy_optimizer.reload_model_params()
    if actor.reference is not None:
        with offloader.resident("reference"):
            load_from_hf(source, actor.policy_layout.shards[index], actor.reference.parameters())
    if actor.reward_model is not None and actor.reward_model_optimizer is not None:
        shard = actor.reward_model_layout.shards[index]
        with offloader.resident("reward_model"):
            load_from_hf(source, shard, actor.reward_model.parameters(), missing_ok={"score.weight"})
            actor.reward_model_optimizer.reload_model_params()
    return "random weights"


def device_name(platform: Platform) -> str:
    """This rank's GPU, or its processor."""
    return torch.cuda.get_device_name(platform.device) if platform.is_cuda else machine.processor()


def peak_flops(platform: Platform, dtype: str) -> float | None:
    """Dense operations a second of this rank's GPU in bf16; None for a CPU, another dtype or a GPU without an entry."""
    if not platform.is_cuda or dtype != "bf16":
        return None
    device = device_of_name(torch.cuda.get_device_name(platform.device))
    return None if device is None else device.flops


def _record(
    run: Run, work: Workload, options: BenchOptions, measured: Bench, *, weights: str, devices: list[str]
) -> dict[str, Any]:
    world = {"ranks": run.platform.world_size, "ranks_per_node": run.platform.ranks_per_node, "devices": devices}
    return {
        "what": "throughput of a step's parts; definitions: docs/bench.md",
        "format": FORMAT,
        "note": options.note,
        "options": {"parts": list(options.parts), "warmup": options.warmup, "repeats": options.repeats},
        "assumed": [
            f"weights: {weights}",
            "prompts and response lengths are drawn by config.seed; a response ends at its drawn length, never earlier",
            f"outcomes are drawn with --solve-rate {options.solve_rate:g}; the verifier works on texts of four "
            "characters a token and its verdicts are replaced; no judge",
        ],
        "world": world | {"device": run.platform.device.type, "transformer_impl": run.actor.implementation},
        "model": {"parameters": run.spec.num_parameters(), "shape": _shape(run.spec), "weights": weights},
        "workload": work.describe() | {"solve_rate": options.solve_rate},
        "parts": measured.facts,
        "figures": [figure.as_record() for figure in measured.figures],
        "hardware": machine.hardware(),
        "versions": machine.versions(),
        "git_commit": machine.git_commit(),
        "config": run.config.model_dump(mode="json"),
    }


def _shape(spec: ModelSpec) -> dict[str, Any]:
    keys = ("family", "num_layers", "hidden_size", "ffn_hidden_size", "num_heads", "num_kv_heads", "vocab_size")
    return {key: getattr(spec, key) for key in keys}
