"""What the ranks of ``test_rollout_draw.py`` do: both samplers against gathering everything to everybody."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_oreal import platform as platforms
from megatron_oreal.actor.sums import TokenSums
from megatron_oreal.algorithm import REWARD, request_seed, select
from megatron_oreal.data.trajectories import TrajectoryWriter
from megatron_oreal.data.types import Prompt, Trajectory
from megatron_oreal.platform import device
from megatron_oreal.rollout import dispatched
from megatron_oreal.rollout.dispatched import DispatchedSampler
from megatron_oreal.rollout.draw import Draw
from megatron_oreal.rollout.engine import Completion, EngineError, Request, SamplingParams
from megatron_oreal.rollout.sampler import RolloutSampler
from megatron_oreal.rollout.sglang.engine import SglangEngine
from megatron_oreal.step_metrics import rollout_metrics, unknown_causes, verdict_metrics
from megatron_oreal.telemetry import names
from megatron_oreal.verifier.judge_stats import JudgeStats
from megatron_oreal.verifier.verdict import Judgement, Verdict

GROUPS, K = 6, 4
PROMPTS = [Prompt(f"id {i}", "q" * (1 + i), str(i)) for i in range(GROUPS)]
SAMPLING = SamplingParams(1.0, 0.9, 0, 40, 64, 7)


def completion_of(request: Request) -> Completion:
    """Decided by the seed alone."""
    rng = np.random.default_rng(request.seed)
    length = int(rng.integers(1, 40))
    tokens = rng.integers(0, 2**31 - 1, length).astype(np.int32)
    return Completion(
        tokens, -rng.random(length, dtype=np.float32), "stop" if length < 30 else "length", float(rng.random())
    )


class OwnEngine:
    """In the place of a rank's embedded engine; the last response of a call comes first."""

    def generate(self, requests: list[Request], sampling: SamplingParams, on_complete: Any) -> None:
        for index in reversed(range(len(requests))):
            on_complete(index, completion_of(requests[index]))


class Servers(SglangEngine):
    """In the place of all servers, on the first rank. ``fails_at``: after so many responses."""

    def __init__(self, fails_at: int | None = None):
        self.fails_at = fails_at

    def generate(self, requests: Any, sampling: Any, on_complete: Any = None, **more: Any) -> list[Completion]:
        order = np.random.default_rng(5).permutation(len(requests)).tolist()
        done = False
        for number, index in enumerate(order):
            if number == self.fails_at:
                raise EngineError("server 3 is gone")
            empty = Completion(np.zeros(0, np.int32), np.zeros(0, np.float32), "abort")
            on_complete(index, empty if done else completion_of(requests[index]))
            done = done or (more["enough"] is not None and more["enough"]())
            if number % 5 == 0:
                more["on_progress"](None)
        return []


class TokenVerifier:
    """Verdicts by the text's length, handed out only when ``results`` are asked for or four of them are there."""

    def __init__(self) -> None:
        self._done: list[tuple[Any, Judgement]] = []
        self._asked = 0

    def __len__(self) -> int:
        return len(self._done)

    def submit(self, key: Any, text: str, gold: str, *, stopped: bool, question: str) -> None:
        verdict = [Verdict.CORRECT, Verdict.WRONG, Verdict.CORRECT, Verdict.UNKNOWN][len(text) % 4]
        self._asked += 1
        self._done.append((key, Judgement(verdict, f"judge reply: {len(text)} é", text[:3], 1.5)))

    def drain(self) -> list[tuple[Any, Judgement]]:
        return self.results() if len(self._done) >= 4 else []

    def results(self) -> list[tuple[Any, Judgement]]:
        done, self._done = self._done, []
        return done

    def stats(self) -> JudgeStats:
        asked, self._asked = self._asked, 0
        return JudgeStats(requests=asked, latencies=[0.25] * asked)


class Chat:
    def encode_prompt(self, question: str) -> np.ndarray:
        return np.arange(len(question), dtype=np.int32)

    def decode(self, ids: np.ndarray) -> str:
        return " ".join(map(str, ids.tolist()))


def sampler_of(platform: platforms.Platform, engine: Any) -> RolloutSampler:
    chat: Any = Chat()
    verifier: Any = TokenVerifier()
    if isinstance(engine, Servers):
        fleet: Any = SimpleNamespace(engine=engine, endpoints=[])
        return DispatchedSampler(fleet, verifier, chat, platform)
    return RolloutSampler(engine, verifier, chat, platform)


def draw(sampler: RolloutSampler, enough: int | None = None) -> Draw:
    return sampler.sample(PROMPTS, K, SAMPLING, lambda group, k: request_seed(3, 1, group, k), None, enough)


def gathered(drawn: Draw, world_size: int) -> list[Trajectory]:
    """Everything of everybody, as Python objects on every rank."""
    parts: list[Any] = [None] * world_size
    dist.all_gather_object(parts, drawn.own)
    return sorted((t for part in parts for t in part), key=lambda t: (t.group, t.sample))


def compare(platform: platforms.Platform, folder: Path, name: str, sampler: RolloutSampler, enough: int | None) -> Any:
    """One draw, and the same facts from its rows and from all trajectories."""
    drawn = draw(sampler, enough)
    everything = gathered(drawn, platform.world_size)
    rewards = np.array([REWARD[t.judgement.verdict] for t in everything if t.judgement], np.int8).reshape(-1, K)
    kept = select(rewards, run_seed=3, step=1)
    indices = [item.group * K + item.sample for item in reversed(kept)]
    brought = drawn.fetch(indices)
    drawn.write(folder / f"{name}.jsonl", PROMPTS)
    if platform.rank == 0:
        with TrajectoryWriter(folder / f"{name}.expected.jsonl") as writer:
            for t in everything:
                writer.write(t, PROMPTS[t.group].id)
    metrics, _ = rollout_metrics(drawn.samples, rewards, kept)
    masses, lengths = [t.kept_mass for t in everything], [len(t.response_ids) for t in everything]
    return {
        "keys": [(t.group, t.sample) for t in everything],
        "own groups": sorted({t.group for t in drawn.own}),
        "rewards": np.array_equal(drawn.samples.rewards(K), rewards),
        "kept": len(kept),
        "brought": all(
            np.array_equal(got.prompt_ids, want.prompt_ids)
            and np.array_equal(got.response_ids, want.response_ids)
            and got.engine_logp.tobytes() == want.engine_logp.tobytes()
            and (got.group, got.sample, got.stopped, got.kept_mass)
            == (want.group, want.sample, want.stopped, want.kept_mass)
            for got, want in zip(brought, (everything[i] for i in indices), strict=True)
        ),
        "mass": metrics[names.KEPT_MASS] == float(np.mean(masses)),
        "tokens": (metrics[names.TOKENS_GENERATED], metrics[names.LENGTH_MAX]) == (sum(lengths), max(lengths)),
        "truncated": metrics[names.TRUNCATED_SHARE] == float(np.mean([not t.stopped for t in everything])),
        "judge": verdict_metrics(drawn.samples, sampler.judge_stats),
        "unknown": sum(n for _, n in unknown_causes(drawn.samples)[0]) == int((rewards == 0).sum()),
        "metrics": metrics,
    }


def statistics(platform: platforms.Platform, spread: float) -> dict[str, Any]:
    """Sums of ranks 0, 1 and 3, of which rank 1 has no tokens; and what NumPy says of all tokens together."""
    sums = TokenSums()
    rng = np.random.default_rng(platform.rank)
    mine = [] if platform.rank == 1 else [(rng.standard_normal(n) * spread).astype(np.float32) for n in (900, 1, 600)]
    for gap in mine:
        sums.compare(torch.from_numpy(gap), np.zeros_like(gap))
    sums.add("loss", torch.tensor(0.1 * (platform.rank + 1)))
    found = sums.over_world(SimpleNamespace(speaks=platform.rank != 2), platform)  # type: ignore[arg-type]
    parts: list[Any] = [None] * platform.world_size
    dist.all_gather_object(parts, [] if platform.rank == 2 else mine)
    every = np.abs(np.concatenate([gap for part in parts for gap in part])).astype(np.float64)
    assert found.logp_gap is not None
    gap = found.logp_gap
    return {
        "values": found.values,
        "count": (gap.count, len(every)),
        "mean": (gap.mean, float(every.mean())),
        "p999": (gap.p999, float(np.quantile(every, 0.999))),
        "max": (gap.max, float(every.max())),
    }


def verifier_fails(platform: platforms.Platform, rank: int) -> tuple[str, float]:
    """What each rank's draw ends with when one rank's verifier fails, and after how many seconds."""
    sampler = sampler_of(platform, Servers())

    def submit(*given: Any, **more: Any) -> None:
        raise ValueError("the verifier is broken")

    if platform.rank == rank:
        sampler.verifier.submit = submit  # type: ignore[method-assign]
    began, said = time.monotonic(), ""
    try:
        draw(sampler)
    except (ValueError, RuntimeError) as error:
        said = str(error)
    return said, time.monotonic() - began


def everything(folder: Path) -> dict[str, Any]:
    """All cases in one world; messages and rounds small enough that there are several of each."""
    platform = platforms.init_distributed("cpu", 300, host_timeout_s=240)
    device.MESSAGE_BYTES, dispatched.ROUND_BYTES = 48, 700
    found: dict[str, Any] = {
        "embedded": compare(platform, folder, "embedded", sampler_of(platform, OwnEngine()), None),
        "served": compare(platform, folder, "served", sampler_of(platform, Servers()), None),
        "enough": compare(platform, folder, "enough", sampler_of(platform, Servers()), 3),
        "statistics": statistics(platform, 0.01),
        "not finite": statistics(platform, float("inf"))["p999"],
    }
    found["errors"] = []
    for fails_at in (0, 13):
        try:
            draw(sampler_of(platform, Servers(fails_at)))
        except EngineError as error:
            found["errors"].append(str(error))
    found["left alone"] = verifier_fails(platform, 2)
    return found  # the world is broken now


def wait_in_vain() -> tuple[str, float]:
    """Rank 1 waits for bytes that rank 0 never sends."""
    platform = platforms.init_distributed("cpu", 600, host_timeout_s=4)  # which making the group may take too
    said, began = "", time.monotonic()
    if platform.rank == 1:
        try:
            platform.receive_bytes(0, "a letter")
        except RuntimeError as error:
            said = str(error)
    took = time.monotonic() - began
    dist.barrier()  # of the other group: the first rank stays until then
    platforms.shutdown_distributed()
    return said, took
