"""Draw responses with all ranks' engines and verify each as soon as it is there."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from megatron_oreal.data.chat import ChatTemplate
from megatron_oreal.data.types import Prompt, Trajectory
from megatron_oreal.platform import Platform
from megatron_oreal.rollout.draw import Draw, Samples, owner_of
from megatron_oreal.rollout.engine import Completion, Engine, Request, SamplingParams
from megatron_oreal.telemetry import progress
from megatron_oreal.verifier import Verifier
from megatron_oreal.verifier.judge_stats import JudgeStats
from megatron_oreal.verifier.verdict import Judgement, Verdict


class RolloutSampler:
    """Shares a step's requests over the ranks' own engines; every rank verifies and keeps what it has drawn.

    The K samples of a prompt stay on one rank, whose engine then runs their common prompt once. Verification runs in
    other processes and threads while the engine still generates; no rank waits inside a device collective for either.
    ``judge_stats`` are those of the last ``sample``, summed over the ranks; None without a judge.
    """

    def __init__(self, engine: Engine, verifier: Verifier, chat: ChatTemplate, platform: Platform):
        self.engine, self.verifier, self.chat, self.platform = engine, verifier, chat, platform
        self.judge_stats: JudgeStats | None = None

    def sample(
        self,
        prompts: Sequence[Prompt],
        num_samples: int,
        sampling: SamplingParams,
        seed_of: Callable[[int, int], int],
        label: str | None,
        enough: int | None = None,
    ) -> Draw:
        """``num_samples`` verified responses to each prompt: a row for each on every rank, ordered by (group, sample).

        ``seed_of(group, sample)`` fixes each response wherever it is drawn. ``label`` None: no progress bars.
        ``enough``: groups after which drawing ends, for engines that can end it.
        """
        assert enough is None or enough >= len(prompts), "embedded engines draw everything"
        mine = [
            (group, sample)
            for group in range(len(prompts))
            if owner_of(group, self.platform.world_size) == self.platform.rank
            for sample in range(num_samples)
        ]
        encoded = {group: self.chat.encode_prompt(prompts[group].question) for group, _ in mine}
        requests = [Request(encoded[group], seed_of(group, sample)) for group, sample in mine]
        trajectories: dict[tuple[int, int], Trajectory] = {}
        shown = False if label is None else None
        began = time.perf_counter()
        tokens = 0
        with progress(label or "", total=len(requests), unit="responses on rank 0", enabled=shown) as bar:

            def take(index: int, completion: Completion) -> None:
                nonlocal tokens
                group, sample = mine[index]
                trajectory = self.trajectory(group, sample, requests[index].prompt_ids, completion)
                trajectory.text = self.chat.decode(completion.token_ids)
                trajectories[group, sample] = trajectory
                if completion.finish_reason == "abort":  # the engine's doing, not the model's: nothing to learn from
                    trajectory.judgement = Judgement(Verdict.UNKNOWN, "aborted by the engine")
                else:
                    self.submit(prompts[group], trajectory)
                tokens += len(completion.token_ids)
                bar.update(1, extra=f"{tokens / (time.perf_counter() - began):.0f} tok/s")
                self.judge(trajectories)

            self.engine.generate(requests, sampling, take)
        self.await_verdicts(trajectories, shown)
        return self.share(trajectories)

    def submit(self, prompt: Prompt, trajectory: Trajectory) -> None:
        """Hand a response to the verifier."""
        self.verifier.submit(
            (trajectory.group, trajectory.sample),
            trajectory.text,
            prompt.gold_answer,
            stopped=trajectory.stopped,
            question=prompt.question,
        )

    def judge(self, trajectories: Mapping[tuple[int, int], Trajectory]) -> None:
        """Give trajectories the verdicts that have come."""
        for key, judgement in self.verifier.drain():
            trajectories[key].judgement = judgement  # type: ignore[index]

    def await_verdicts(self, trajectories: Mapping[tuple[int, int], Trajectory], shown: bool | None) -> None:
        """Wait for the verdicts that have not come while others still generated."""
        if left := len(self.verifier):
            with progress("wait for verdicts", total=left, unit="responses on rank 0", enabled=shown) as bar:
                for key, judgement in self.verifier.results():
                    trajectories[key].judgement = judgement  # type: ignore[index]
                    bar.update(1)

    def share(self, own: Mapping[tuple[int, int], Trajectory]) -> Draw:
        """All ranks' responses that count, by their rows; sums the judge's statistics on the way."""
        mine = [own[key] for key in sorted(own)]
        part = Samples.of(mine), self.verifier.stats()
        found = self.platform.gather_objects(part, "the verdicts of all ranks")
        stats = [stats for _, stats in found if stats is not None]
        self.judge_stats = JudgeStats.total(stats) if stats else None
        return Draw(Samples.merged(samples for samples, _ in found), mine, self.platform)

    def trajectory(self, group: int, sample: int, prompt_ids: np.ndarray, completion: Completion) -> Trajectory:
        """A response as a trajectory, without its text and its verdict."""
        return Trajectory(
            group=group,
            sample=sample,
            prompt_ids=prompt_ids,
            response_ids=completion.token_ids,
            engine_logp=completion.logp,
            stopped=completion.finish_reason == "stop",
            kept_mass=completion.kept_mass,
            text="",
        )
