"""Measured numbers in place of assumed ones, from results that ``megatron-oreal bench`` wrote on the same kind of GPU.

Times that a result has directly are taken over. Efficiencies are solved for: the cost model is run on the measured
config and workload, and the efficiency with which it gives the measured time is the calibrated one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_oreal.config import RolloutConfig
from megatron_oreal.config_load import parse_config
from megatron_oreal.data.lengths import LengthDistribution, parse_lengths
from megatron_oreal.errors import UserError
from megatron_oreal.layout import ModelSpec
from megatron_oreal.planner.assumptions import Assumptions
from megatron_oreal.planner.cost import CostModel, Workload
from megatron_oreal.planner.devices import Device, device_of_name
from megatron_oreal.planner.placement import place
from megatron_oreal.planner.types import Setting

_DIRECT = {
    "sleep_s": "phase sleep",
    "wake_weights_s": "phase publish/wake_weights",
    "wake_cache_s": "phase publish/wake_cache",
    "publish_fixed_s": "phase publish/load",
}
"""Assumption -> figure of the part ``switch``, whose time it is."""
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class BenchResult:
    """One file. ``figures``: median by (part, name)."""

    file: Path
    record: Mapping[str, Any]
    figures: Mapping[tuple[str, str], float]

    @property
    def served(self) -> bool:
        """Whether engines were servers beside the ranks, which sleep and wake."""
        return self.record["config"]["rollout"]["engine"] == "sglang"


def calibrate(
    assumed: Assumptions, device: Device, spec: ModelSpec, results: str | Path | None
) -> tuple[Assumptions, list[str]]:
    """Return the assumptions with everything that was measured on this kind of GPU, and notes for the reader.

    ``results``: a directory of ``bench_*.json``; None: that of the source tree, when there is one. Of several files
    the one whose model is nearest in size counts, each with its own parts. Raises ``UserError`` for a directory that
    is not there, or a file that is not a result of the command.
    """
    folder = Path(results) if results is not None else _source_tree_results()
    if results is not None and not folder.is_dir():
        raise UserError(f"--results {str(results)!r} is not a directory: give one with bench_*.json files")
    notes: list[str] = []
    for found in sorted(_matching(folder, device), key=lambda each: _distance(each, spec), reverse=True):
        assumed = _apply(assumed, device, spec, found, notes)  # the nearest comes last and wins
    return assumed, notes


def _source_tree_results() -> Path:
    """``benchmarks/results`` of the source tree; absent in an installed package."""
    return Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def _matching(folder: Path, device: Device) -> Iterator[BenchResult]:
    for file in sorted(folder.glob("bench_*.json")) if folder.is_dir() else ():
        found = _read(file)
        names = found.record["world"]["devices"]
        on_gpu = found.record["world"]["device"] == "cuda"
        known = [device_of_name(name) for name in names]
        if on_gpu and known and all(each is not None and each.name == device.name for each in known):
            yield found


def _read(file: Path) -> BenchResult:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        figures = {(each["part"], each["name"]): float(each["median"]) for each in record["figures"]}
        for key in (("world", "devices"), ("world", "device"), ("world", "ranks"), ("model", "parameters")):
            record[key[0]][key[1]]
        record["config"]["rollout"]["engine"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a result of 'megatron-oreal bench' ({type(error).__name__}: {error})") from None
    return BenchResult(file, record, figures)


def _distance(found: BenchResult, spec: ModelSpec) -> float:
    return abs(math.log(found.record["model"]["parameters"] / spec.num_parameters()))


def _apply(assumed: Assumptions, device: Device, spec: ModelSpec, found: BenchResult, notes: list[str]) -> Assumptions:
    source = f"measured: {found.file.name}"
    if found.served:
        for name, figure in _DIRECT.items():
            seconds = found.figures.get(("switch", figure))
            if seconds is not None:
                assumed = assumed.override(name, seconds, source)
    for name, part in (("matmul_efficiency", "update"), ("decode_hbm_efficiency", "rollout")):
        measured, predict = _measured_s(found, part), _prediction(part, assumed, device, spec, found)
        if measured is None or predict is None:
            continue
        value = solve_efficiency(partial(_at, predict, assumed, name), measured)
        if value is None:
            notes.append(f"{found.file.name}: {part} took {measured:.2f} s, which no {name} gives; it stays as it was")
        else:
            assumed = assumed.override(name, value, source)
    return assumed


def _at(predict: Callable[[Assumptions], float], assumed: Assumptions, name: str, value: float) -> float:
    return predict(replace(assumed, **{name: value}))  # type: ignore[arg-type]


def _measured_s(found: BenchResult, part: str) -> float | None:
    """Seconds that a part took; of an update without the copies of offloaded parts, which ``switch`` has alone."""
    if part == "rollout":
        return found.figures.get((part, "output_seconds"))
    seconds = found.figures.get((part, "seconds"))
    return None if seconds is None else seconds - found.figures.get(("switch", "phase update"), 0.0)


def _prediction(
    part: str, assumed: Assumptions, device: Device, spec: ModelSpec, found: BenchResult
) -> Callable[[Assumptions], float] | None:
    """Seconds of a measured part by the cost model; None when the result's model is not of the planned family."""
    record = found.record
    shape = record["model"].get("shape", {})
    if any(key not in shape for key in ("num_layers", "hidden_size", "ffn_hidden_size", "num_heads", "num_kv_heads")):
        return None
    same = {key: value for key, value in shape.items() if hasattr(spec, key)}
    measured_spec = replace(spec, **same, head_dim=shape.get("head_dim", shape["hidden_size"] // shape["num_heads"]))
    world, config = record["world"], parse_config(record["config"], str(found.file))
    setting = Setting(config, measured_spec, world["ranks"], world.get("ranks_per_node", world["ranks"]))
    placement = place(setting)
    work = record.get("workload", {})
    lengths = _measured_lengths(config.rollout, work)
    given = {"prompt_tokens": float(work.get("prompt_tokens", assumed.prompt_tokens))}
    if config.algorithm.filter == "pair" and work.get("kept_sequences"):
        given["kept_groups"] = min(1.0, work["kept_sequences"] / 2 / config.rollout.prompts_per_step)

    def predict(trial: Assumptions) -> float:
        trial = replace(trial, **given)  # type: ignore[arg-type]
        model = CostModel(device, trial, Workload.draw(setting, lengths, trial))
        if part == "rollout":
            return model.rollout(setting, placement, None).seconds
        return sum(each.seconds for each in model.update(setting, placement).passes.values())

    return predict


def _measured_lengths(rollout: RolloutConfig, work: Mapping[str, Any]) -> LengthDistribution:
    """The measured distribution; recorded lengths, which a result does not repeat, as a log-normal of their median."""
    most, text = min(rollout.gen_max_new, rollout.gen_max_length - 1), work.get("response_lengths")
    try:
        return parse_lengths(text, most)
    except UserError:
        return LengthDistribution.lognormal(most, max(1.0, float(work["response_tokens_median"])))


def solve_efficiency(seconds_at: Callable[[float], float], measured: float) -> float | None:
    """The efficiency in (0, 1] at which a time that falls with it equals ``measured``; None when there is none."""
    low, high = 1e-3, 1.0
    if not seconds_at(high) <= measured <= seconds_at(low):
        return None
    while high - low > _TOLERANCE:
        middle = math.sqrt(low * high)
        if seconds_at(middle) > measured:
            low = middle
        else:
            high = middle
    return high
