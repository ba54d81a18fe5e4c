"""What a step has drawn: a row a response on every rank, the response itself on the rank that verified it.

A step of 16,384 responses is gigabytes of tokens, log-probabilities and texts, and nearly all ranks need to see nearly
none of it. All that selection and metrics ask for is a row of fixed size. The tokens of the few that are learned from
are fetched (``Draw.fetch``); the rest never leaves the rank that verified it, unless trajectories are saved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_oreal.algorithm import REWARD
from megatron_oreal.data.trajectories import TrajectoryWriter, encode_trajectory
from megatron_oreal.data.types import Prompt, Trajectory
from megatron_oreal.platform import Platform
from megatron_oreal.verifier.verdict import Verdict

ROW = np.dtype(
    [
        ("group", np.int32),
        ("sample", np.int32),
        ("prompt_tokens", np.int32),
        ("response_tokens", np.int32),
        ("reward", np.int8),
        ("stopped", np.bool_),
        ("by_judge", np.bool_),
        ("kept_mass", np.float64),
    ]
)
"""``reward``: +1 correct, -1 wrong, 0 unknown. ``by_judge``: who spoke last. The rest as in ``Trajectory``."""


def owner_of(group: int, world_size: int) -> int:
    """The rank that verifies a group's responses and keeps them."""
    return group % world_size


@dataclass(frozen=True)
class Samples:
    """``rows``: of dtype ``ROW`` [n], by (group, sample). ``unknown``: reasons of unknown verdicts and their counts."""

    rows: np.ndarray
    unknown: Counter[str]

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory]) -> Samples:
        """Rows of trajectories in their order; one without a verdict counts as unknown."""
        rows = np.empty(len(trajectories), dtype=ROW)
        unknown: Counter[str] = Counter()
        for i, t in enumerate(trajectories):
            verdict = Verdict.UNKNOWN if t.judgement is None else t.judgement.verdict
            by_judge = t.judgement is not None and t.judgement.decided_by == "judge"
            tokens = len(t.prompt_ids), len(t.response_ids)
            rows[i] = (t.group, t.sample, *tokens, REWARD[verdict], t.stopped, by_judge, t.kept_mass)
            if verdict is Verdict.UNKNOWN:
                unknown["" if t.judgement is None else t.judgement.reason] += 1
        return cls(rows, unknown)

    @classmethod
    def merged(cls, parts: Iterable[Samples]) -> Samples:
        """The rows of all parts, ordered; time and memory linear in them (and one sort)."""
        parts = list(parts)
        unknown: Counter[str] = Counter()
        for part in parts:
            unknown.update(part.unknown)
        rows = np.concatenate([part.rows for part in parts])
        return cls(rows[np.lexsort((rows["sample"], rows["group"]))], unknown)

    def __len__(self) -> int:
        """Return the number of responses."""
        return len(self.rows)

    def rewards(self, num_samples: int) -> NDArray[np.int8]:
        """R, int8 [G, K], with ``num_samples`` = K responses to every prompt."""
        return self.rows["reward"].reshape(-1, num_samples)


class Draw:
    """The responses of one ``RolloutSampler.sample`` call.

    ``samples``: a row for each of them, the same on every rank. ``own``: those that this rank has verified, ordered by
    (group, sample). ``fetch`` and ``write`` are collectives on the host, over all ranks.
    """

    def __init__(self, samples: Samples, own: Sequence[Trajectory], platform: Platform):
        self.samples, self.own, self._platform = samples, list(own), platform

    def __len__(self) -> int:
        """Return the number of responses on all ranks."""
        return len(self.samples)

    def fetch(self, indices: Sequence[int]) -> list[Trajectory]:
        """Bring the responses in these rows of ``samples`` to every rank, in this order, the same bits everywhere.

        With tokens and log-probabilities; verdict and text stay with their rank. Every rank that has some of them
        broadcasts these in one array: what a rank sends and receives is linear in the tokens that are asked for.
        """
        rows, world = self.samples.rows, self._platform.world_size
        wanted: dict[int, list[int]] = {}
        for index in dict.fromkeys(indices):
            wanted.setdefault(owner_of(int(rows["group"][index]), world), []).append(index)
        own = {(t.group, t.sample): t for t in self.own}
        found: dict[int, Trajectory] = {}
        for owner, members in sorted(wanted.items()):
            chosen = rows[members]
            words = int((chosen["prompt_tokens"] + 2 * chosen["response_tokens"].astype(np.int64)).sum())
            if owner == self._platform.rank:
                held = [own[int(row["group"]), int(row["sample"])] for row in chosen]
                buffer = np.concatenate([_bytes_of(t) for t in held])
                assert len(buffer) == 4 * words
            else:
                buffer = np.empty(4 * words, dtype=np.uint8)
            self._platform.broadcast_bytes(buffer, owner, f"the responses that rank {owner} has verified")
            found |= dict(zip(members, _from_bytes(buffer, chosen), strict=True))
        return [found[index] for index in indices]

    def write(self, path: Path, prompts: Sequence[Prompt]) -> None:
        """Save all responses as JSON lines, by (group, sample), on the first rank (``data/trajectories.py``).

        Every rank encodes its own and sends a group at a time, when the first rank is there.
        """
        platform = self._platform
        groups = np.unique(self.samples.rows["group"]).tolist()
        lines: dict[int, list[Trajectory]] = {}
        for t in self.own:
            lines.setdefault(t.group, []).append(t)

        def encoded(group: int) -> bytes:
            return b"".join(encode_trajectory(t, prompts[group].id) for t in lines[group])

        if platform.rank:
            for group in groups:
                if owner_of(group, platform.world_size) == platform.rank:
                    self._platform.send_bytes(encoded(group), 0, "the first rank to write trajectories")
            return
        with TrajectoryWriter(path) as writer:
            for group in groups:
                owner = owner_of(group, platform.world_size)
                what = f"the trajectories of rank {owner}"
                writer.write_encoded(encoded(group) if owner == 0 else platform.receive_bytes(owner, what))


def _bytes_of(trajectory: Trajectory) -> np.ndarray:
    """Prompt, response and log-probabilities: uint8 [4 (P + 2 n)]."""
    parts = (
        trajectory.prompt_ids.astype(np.int32),
        trajectory.response_ids.astype(np.int32),
        trajectory.engine_logp.astype(np.float32),
    )
    return np.concatenate([part.view(np.uint8) for part in parts])


def _from_bytes(buffer: np.ndarray, rows: np.ndarray) -> list[Trajectory]:
    """Views of ``buffer``, which are kept alive by it."""
    words, at, found = buffer.view(np.int32), 0, []
    for row in rows:
        prompt, response = int(row["prompt_tokens"]), int(row["response_tokens"])
        ends = at + prompt, at + prompt + response, at + prompt + 2 * response
        found.append(
            Trajectory(
                group=int(row["group"]),
                sample=int(row["sample"]),
                prompt_ids=words[at : ends[0]],
                response_ids=words[ends[0] : ends[1]],
                engine_logp=words[ends[1] : ends[2]].view(np.float32),
                stopped=bool(row["stopped"]),
                kept_mass=float(row["kept_mass"]),
            )
        )
        at = ends[2]
    return found
