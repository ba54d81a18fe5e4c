"""A step's control path at up to 1,024 ranks and 16,384 samples: CPU time, messages and bytes of what grows.

    python benchmarks/control_path.py --output benchmarks/results/control_path.json --docs docs/scaling.md

All of it is the product's own code. The exchange between ranks (``control_world.py``: a thread a rank) draws from an
engine that answers at once and verifies with verdicts that are there at once, so what is left is dispatching, sharing,
selecting, fetching, packing, statistics and metrics, on the first rank and on the last one. The dispatcher runs on its
own against HTTP servers on real sockets, plans and digests from metadata. CPU times are of one thread on a machine that
others may use too; messages and bytes are exact. What a network takes for them is not in here.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform as host
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import control_parts
import numpy as np
import torch
from control_world import Member, Traffic, World

from megatron_oreal.actor.sums import TokenSums
from megatron_oreal.algorithm import request_seed, select
from megatron_oreal.data.packing import WorkModel, plan_microbatches
from megatron_oreal.data.trajectories import encode_trajectory
from megatron_oreal.data.types import Prompt, Trajectory
from megatron_oreal.rollout.dispatched import DispatchedSampler
from megatron_oreal.rollout.draw import Draw, Samples
from megatron_oreal.rollout.engine import Completion, SamplingParams
from megatron_oreal.rollout.fleet import Fleet
from megatron_oreal.rollout.sampler import RolloutSampler
from megatron_oreal.rollout.sglang.dispatcher import Endpoint
from megatron_oreal.rollout.sglang.engine import SglangEngine
from megatron_oreal.step_metrics import rollout_metrics, verdict_metrics
from megatron_oreal.telemetry.machine import processor_and_cores
from megatron_oreal.verifier.judge_stats import JudgeStats
from megatron_oreal.verifier.verdict import Judgement, Verdict

SAMPLES_A_PROMPT = 16
RANKS, SAMPLES = (8, 32, 128, 1024), (1024, 2048, 4096, 8192, 16384)
MAX_LENGTH = 16384
TP = 8
WORK = WorkModel(matmul_params=31_985_762_304, attention_width=64 * 5120)
"""Qwen2.5-32B."""


@dataclass(frozen=True)
class Setting:
    """``mean_tokens`` of a response (log-normal, sigma 0.8); ``ticks``: how often the first rank sends responses."""

    ranks: int
    samples: int
    mean_tokens: int = 3000
    prompt_tokens: int = 100
    ticks: int = 8
    served: bool = True
    save: bool = False


def lengths_of(setting: Setting) -> np.ndarray:
    """Tokens of every response, int64 [samples]."""
    drawn = np.random.default_rng(0).lognormal(math.log(setting.mean_tokens) - 0.32, 0.8, setting.samples)
    return np.clip(drawn, 1, MAX_LENGTH - setting.prompt_tokens).astype(np.int64)


class Answers:
    """Responses that are there at once: parts of one array of random tokens, a length for each sample."""

    def __init__(self, setting: Setting):
        rng = np.random.default_rng(1)
        self.lengths = lengths_of(setting)
        self._tokens = rng.integers(0, 150_000, MAX_LENGTH).astype(np.int32)
        self._logps = -rng.random(MAX_LENGTH, dtype=np.float32)

    def completion(self, index: int) -> Completion:
        """The response of a sample, by its place in the step."""
        length = int(self.lengths[index])
        ends = "length" if length == MAX_LENGTH else "stop"
        return Completion(self._tokens[:length], self._logps[:length], ends, 0.9)  # type: ignore[arg-type]


class ServedAnswers(SglangEngine):
    """In the place of all servers and their dispatcher; ``ticks`` times it says that a second has passed."""

    def __init__(self, answers: Answers, ticks: int):
        self.answers, self.ticks = answers, ticks

    def generate(
        self, requests: Sequence[Any], sampling: Any, on_complete: Any = None, **more: Any
    ) -> list[Completion]:
        """Complete all requests in a random order."""
        every = max(1, len(requests) // self.ticks)
        order = np.random.default_rng(2).permutation(len(requests)).tolist()
        for number, index in enumerate(order, 1):
            on_complete(index, self.answers.completion(index))
            if number % every == 0:
                more["on_progress"](None)
        return []


class EmbeddedAnswers:
    """In the place of a rank's own engine. ``indices``: which samples are asked for, in order."""

    def __init__(self, answers: Answers, indices: Sequence[int]):
        self.answers, self.indices = answers, indices

    def generate(self, requests: Sequence[Any], sampling: Any, on_complete: Any) -> None:
        """Complete all requests in their order."""
        assert len(requests) == len(self.indices)
        for number, index in enumerate(self.indices):
            on_complete(number, self.answers.completion(index))


def judgement_of(group: int, sample: int) -> Judgement:
    """Of every 16 samples 5 are correct, 1 is unknown, and the judge has decided 4."""
    place = (group + sample) % 16
    verdict = Verdict.CORRECT if place < 5 else Verdict.UNKNOWN if place == 5 else Verdict.WRONG
    reason = "judge deadline: 300 s" if place == 5 else "judge: wrong" if 5 < place < 10 else "not equal"
    return Judgement(verdict, reason, "42")


class InstantVerifier:
    """Verdicts at once, by key."""

    def __init__(self) -> None:
        self._done: list[tuple[Any, Judgement]] = []
        self._count = 0

    def __len__(self) -> int:
        return len(self._done)

    def submit(self, key: tuple[int, int], text: str, gold: str, **more: Any) -> None:
        """Decide."""
        self._done.append((key, judgement_of(*key)))
        self._count += 1

    def drain(self) -> list[tuple[Any, Judgement]]:
        """What has been decided since the last call."""
        done, self._done = self._done, []
        return done

    results = drain

    def stats(self) -> JudgeStats:
        """What the judge would have had to do."""
        return judge_stats(self._count)


def judge_stats(count: int) -> JudgeStats:
    """Of a rank that has verified ``count`` responses: a quarter of them asked the judge."""
    return JudgeStats(requests=count // 4, latencies=[0.5] * (count // 4))


class Chat:
    """Prompts of one length; responses have no text."""

    def __init__(self, prompt_tokens: int):
        self._prompt = np.arange(prompt_tokens, dtype=np.int32)

    def encode_prompt(self, question: str) -> np.ndarray:
        """Always the same tokens."""
        return self._prompt

    def decode(self, ids: np.ndarray) -> str:
        """Nothing."""
        return ""


class Others:
    """What the ranks that do not live give to the gathers of a step."""

    def __init__(self, setting: Setting, answers: Answers):
        self.setting, self.answers = setting, answers

    def own(self, rank: int) -> list[Trajectory]:
        """The responses that a rank has verified."""
        prompt = np.arange(self.setting.prompt_tokens, dtype=np.int32)
        found = []
        for group in range(rank, self.setting.samples // SAMPLES_A_PROMPT, self.setting.ranks):
            for k in range(SAMPLES_A_PROMPT):
                each = self.answers.completion(group * SAMPLES_A_PROMPT + k)
                ends = each.finish_reason == "stop"
                verdict = judgement_of(group, k)
                found.append(Trajectory(group, k, prompt, each.token_ids, each.logp, ends, verdict, each.kept_mass))
        return found

    def __call__(self, what: str, rank: int) -> Any:
        """The item of a rank in the gather of this name."""
        if what == "the verdicts of all ranks":
            own = self.own(rank)
            return Samples.of(own), judge_stats(len(own))
        if what == "the statistics of all ranks":
            return ({f"name {n}": 1.0 for n in range(11)} if rank % TP == 0 else {}), (0, 0.0, 0.0)
        return (endpoint(rank), None) if what == "every engine" else None

    def saved(self, prompts: Sequence[Prompt]) -> dict[tuple[int, int], list[np.ndarray]]:
        """Their mail to the first rank when it saves trajectories."""
        mail: dict[tuple[int, int], list[np.ndarray]] = {}
        for rank in range(1, self.setting.ranks - 1):
            groups: dict[int, list[bytes]] = {}
            for t in self.own(rank):
                groups.setdefault(t.group, []).append(encode_trajectory(t, prompts[t.group].id))
            for _, lines in sorted(groups.items()):
                text = np.frombuffer(b"".join(lines), np.uint8)
                mail.setdefault((rank, 0), []).extend([np.array([len(text)]).view(np.uint8), text])
        return mail


def step(setting: Setting, member: Member, answers: Answers, prompts: list[Prompt]) -> Draw:
    """What ``train_step`` does on a rank between prompts and optimizer, except for the models."""
    sampler = sampler_of(setting, member, answers, len(prompts))
    sampling = SamplingParams(1.0, 0.9, 0, MAX_LENGTH, MAX_LENGTH, 7)
    with member.piece("sample"):
        drawn = sampler.sample(
            prompts, SAMPLES_A_PROMPT, sampling, lambda group, sample: request_seed(0, 0, group, sample), None
        )
    with member.piece("select"):
        rewards = drawn.samples.rewards(SAMPLES_A_PROMPT)
        kept = select(rewards, run_seed=0, step=0)
    with member.piece("metrics"):
        rollout_metrics(drawn.samples, rewards, kept)
        verdict_metrics(drawn.samples, sampler.judge_stats)
    with member.piece("fetch"):
        chosen = drawn.fetch([item.group * SAMPLES_A_PROMPT + item.sample for item in kept])
    with member.piece("pack"):
        plan = plan_microbatches(
            [t.num_tokens for t in chosen], dp_size=max(1, member.world_size // TP), max_tokens=32768, work=WORK
        )
    statistics(member, chosen, plan)
    with member.piece("agree"):
        Fleet(None, member)._all_together(lambda: endpoint(member.rank), "every engine")  # type: ignore[arg-type]
        member.fail_together(lambda: None)
    if setting.save:
        with tempfile.TemporaryDirectory() as folder, member.piece("save"):
            drawn.write(Path(folder) / "step.jsonl", prompts)
    return drawn


def sampler_of(setting: Setting, member: Member, answers: Answers, num_prompts: int) -> RolloutSampler:
    """The sampler under test, with an engine and a verifier that take no time."""
    chat: Any = Chat(setting.prompt_tokens)
    verifier: Any = InstantVerifier()
    if setting.served:
        fleet: Any = SimpleNamespace(engine=ServedAnswers(answers, setting.ticks), endpoints=[])
        return DispatchedSampler(fleet, verifier, chat, member)
    groups = range(member.rank, num_prompts, member.world_size)
    indices = [group * SAMPLES_A_PROMPT + k for group in groups for k in range(SAMPLES_A_PROMPT)]
    engine: Any = EmbeddedAnswers(answers, indices)
    return RolloutSampler(engine, verifier, chat, member)


def statistics(member: Member, chosen: Sequence[Any], plan: Any) -> None:
    """The sums of an update whose log-probabilities are the engine's and a little more."""
    grid: Any = SimpleNamespace(speaks=member.rank % TP == 0)
    sums = TokenSums()
    if grid.speaks and member.rank // TP < len(plan.ranks):
        for index in (i for batch in plan.ranks[member.rank // TP] for i in batch):
            logp = chosen[index].engine_logp
            sums.compare(torch.from_numpy(logp + np.linspace(0, 0.01, len(logp), dtype=np.float32)), logp)
        for name in range(11):
            sums.add(f"name {name}", torch.ones(()))
    with member.piece("statistics"):
        sums.over_world(grid, member)


def endpoint(rank: int) -> Endpoint | None:
    """What an engine's owner acknowledges a version with."""
    return None if rank % TP else Endpoint(f"http://10.0.{rank // 256}.{rank % 256}:30000", "run:3")


def run_step(setting: Setting, *, all_alive: bool = False) -> dict[str, dict[str, Traffic]]:
    """Costs by piece, on the first rank and on the last, which alone live unless all do."""
    assert setting.samples % SAMPLES_A_PROMPT == 0 and setting.ranks > 1
    answers = Answers(setting)
    others = Others(setting, answers)
    world = World(setting.ranks, None if all_alive else {0, setting.ranks - 1}, others)
    prompts = [Prompt(f"p{i}", "?", "42") for i in range(setting.samples // SAMPLES_A_PROMPT)]
    if setting.save and not all_alive:
        world.mail = others.saved(prompts)

    def work(member: Member) -> dict[str, Traffic]:
        step(setting, member, answers, prompts)
        return member.pieces

    pieces = world.run(work)
    return {name: {"rank 0": pieces[0][name], "last rank": pieces[-1][name]} for name in pieces[0]}


# Orders


def slope(sizes: Sequence[float], costs: Sequence[float]) -> float | None:
    """Of a line through (log size, log cost), by least squares: the order of growth. None: nothing is there."""
    pairs = [(size, cost) for size, cost in zip(sizes, costs, strict=True) if cost > 0]
    if len(pairs) < 2:
        return None
    x, y = np.log(np.array(pairs, dtype=np.float64)).T
    return round(float(np.polyfit(x, y, 1)[0]), 2)


def measure_steps(say: Callable[[str], None]) -> dict[str, Any]:
    """Steps over ranks at the most samples, and over samples at the most ranks."""
    grid = {Setting(ranks, SAMPLES[-1]) for ranks in RANKS} | {Setting(RANKS[-1], samples) for samples in SAMPLES}
    rows = []
    for setting in sorted(grid, key=lambda s: (s.ranks, s.samples)):
        began = time.perf_counter()
        pieces = run_step(setting)
        rows.append({"ranks": setting.ranks, "samples": setting.samples, "pieces": _plain(pieces)})
        say(f"{setting}: {time.perf_counter() - began:.0f} s")
    other = {
        "embedded": run_step(Setting(RANKS[-1], SAMPLES[-1], served=False)),
        "saving": run_step(Setting(RANKS[-1], SAMPLES[-1], mean_tokens=300, save=True)),
    }
    return {
        "mean_tokens": Setting(1, 1).mean_tokens,
        "rows": rows,
        "orders": orders(rows),
        "embedded": _plain(other["embedded"])["sample"],
        "saving_300_tokens": _plain(other["saving"])["save"],
    }


def _plain(pieces: dict[str, dict[str, Traffic]]) -> dict[str, Any]:
    return {
        name: {rank: asdict(cost) | {"cpu_s": round(cost.cpu_s, 4)} for rank, cost in ranks.items()}
        for name, ranks in pieces.items()
    }


def orders(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Slopes of every cost of every piece on rank 0: over ranks at the most samples, and the other way round."""
    found: dict[str, Any] = {}
    for axis, other, top in (("ranks", "samples", SAMPLES[-1]), ("samples", "ranks", RANKS[-1])):
        line = [row for row in rows if row[other] == top]
        for piece in line[0]["pieces"]:
            for cost in ("bytes_in", "bytes_out", "messages_in", "messages_out", "cpu_s"):
                costs = [row["pieces"][piece]["rank 0"][cost] for row in line]
                found.setdefault(piece, {}).setdefault(cost, {})[axis] = slope([row[axis] for row in line], costs)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--docs", type=Path, help="replace the tables between the markers of this file")
    parser.add_argument("--only", choices=("steps", *control_parts.PARTS), help="one part, printed")
    options = parser.parse_args()
    parts: dict[str, Callable[[Callable[[str], None]], Any]] = {"steps": measure_steps, **control_parts.PARTS}
    say: Callable[[str], None] = lambda line: print(line, flush=True)  # noqa: E731
    if options.only:
        print(json.dumps(parts[options.only](say), indent=1))
        return
    report: dict[str, Any] = {
        "what": "control path of a step; see the docstring of benchmarks/control_path.py",
        "hardware": f"{processor_and_cores()}, one used",
        "versions": {"python": host.python_version(), "numpy": version("numpy"), "torch": version("torch")},
        **{name: measure(say) for name, measure in parts.items()},
        "load_average_at_the_end": round(os.getloadavg()[0], 2),
    }
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    if options.docs is not None:
        control_parts.write_tables(options.docs, report)


if __name__ == "__main__":
    main()
