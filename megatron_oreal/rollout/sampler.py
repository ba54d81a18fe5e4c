"""Draw responses with all ranks' engines and verify each as soon as it is there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from megatron_oreal.data.chat import ChatTemplate
from megatron_oreal.data.types import Prompt, Trajectory
from megatron_oreal.platform import Platform
from megatron_oreal.rollout.engine import Completion, Engine, Request, SamplingParams
from megatron_oreal.telemetry import progress
from megatron_oreal.verifier import VerifierPool
from megatron_oreal.verifier.verdict import Judgement, Verdict


class RolloutSampler:
    """Shares a step's requests over the ranks' engines and brings every rank all trajectories.

    The K samples of a prompt stay on one rank, whose engine then runs their common prompt once. Verification runs in
    other processes while the engine still generates; no rank waits inside a device collective for either.
    """

    def __init__(self, engine: Engine, verifier: VerifierPool, chat: ChatTemplate, platform: Platform):
        self.engine, self.verifier, self.chat, self.platform = engine, verifier, chat, platform

    def sample(
        self,
        prompts: Sequence[Prompt],
        num_samples: int,
        sampling: SamplingParams,
        seed_of: Callable[[int, int], int],
        label: str | None,
    ) -> list[Trajectory]:
        """``num_samples`` verified responses to each prompt, ordered by (group, sample), the same list on every rank.

        ``seed_of(group, sample)`` fixes each response wherever it is drawn. ``label`` None: no progress bars.
        """
        mine = [
            (group, sample)
            for group in range(self.platform.rank, len(prompts), self.platform.world_size)
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
                trajectory = self._trajectory(group, sample, requests[index], completion)
                trajectories[group, sample] = trajectory
                if completion.finish_reason == "abort":  # the engine's doing, not the model's: nothing to learn from
                    trajectory.judgement = Judgement(Verdict.UNKNOWN, "aborted by the engine")
                else:
                    gold = prompts[group].gold_answer
                    self.verifier.submit((group, sample), trajectory.text, gold, stopped=trajectory.stopped)
                tokens += len(completion.token_ids)
                bar.update(1, extra=f"{tokens / (time.perf_counter() - began):.0f} tok/s")
                for key, judgement in self.verifier.drain():
                    self._judge(trajectories, key, judgement)

            self.engine.generate(requests, sampling, take)
        if left := len(self.verifier):  # what was not verified while others still generated
            with progress("verify", total=left, unit="responses on rank 0", enabled=shown) as bar:
                for key, judgement in self.verifier.results():
                    self._judge(trajectories, key, judgement)
                    bar.update(1)
        gathered = [trajectory for part in self.platform.gather_objects(trajectories) for trajectory in part.items()]
        return [trajectory for _, trajectory in sorted(gathered)]

    def _trajectory(self, group: int, sample: int, request: Request, completion: Completion) -> Trajectory:
        return Trajectory(
            group=group,
            sample=sample,
            prompt_ids=request.prompt_ids,
            response_ids=completion.token_ids,
            engine_logp=completion.logp,
            stopped=completion.finish_reason == "stop",
            kept_mass=completion.kept_mass,
            text=self.chat.decode(completion.token_ids),
        )

    @staticmethod
    def _judge(trajectories: dict[tuple[int, int], Trajectory], key: object, judgement: Judgement) -> None:
        trajectories[key].judgement = judgement  # type: ignore[index]
