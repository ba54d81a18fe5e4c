"""A step's trajectories as JSON lines: to look at, and to replay a step without generating it again."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megatron_oreal.data.types import Trajectory
from megatron_oreal.errors import UserError
from megatron_oreal.verifier.verdict import Judgement, Verdict


class TrajectoryWriter:
    """Writes trajectories one by one; the file appears under its name only when the ``with`` block ends well.

    ``with TrajectoryWriter(path) as writer: writer.write(trajectory, prompt_id)``. Nothing is held in memory. A block
    that raises, or a process that dies, leaves a former file at ``path`` as it was. Token ids and float32
    log-probabilities survive bit for bit.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._partial = self._path.with_name(f".{self._path.name}.{os.getpid()}.partial")

    def __enter__(self) -> TrajectoryWriter:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._partial.open("wb")
        return self

    def write(self, trajectory: Trajectory, prompt_id: str) -> None:
        """Append one trajectory; ``prompt_id`` is the ``Prompt.id`` of its group."""
        self.write_encoded(encode_trajectory(trajectory, prompt_id))

    def write_encoded(self, lines: bytes) -> None:
        """Append what ``encode_trajectory`` has returned, on this rank or another, once or more often."""
        self._file.write(lines)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            with self._file:
                if kind is None:
                    self._file.flush()
                    os.fsync(self._file.fileno())
            if kind is None:
                self._partial.replace(self._path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                self._partial.unlink()


def encode_trajectory(trajectory: Trajectory, prompt_id: str) -> bytes:
    """Return one line of a trajectory file, its end included."""
    return json.dumps(_to_record(trajectory, prompt_id), ensure_ascii=False).encode() + b"\n"


def read_trajectories(path: str | Path) -> Iterator[tuple[str, Trajectory]]:
    """Yield (prompt id, trajectory) in the order they were written, one at a time.

    Raises ``UserError`` for a missing file, and with the line for a record that ``TrajectoryWriter`` did not write.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such trajectory file")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield _from_record(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path} line {number}: not a trajectory ({type(error).__name__}: {error})") from None


def _to_record(trajectory: Trajectory, prompt_id: str) -> dict[str, Any]:
    judgement = trajectory.judgement
    return {
        "prompt_id": prompt_id,
        "group": trajectory.group,
        "sample": trajectory.sample,
        "verdict": judgement.verdict.value if judgement else None,
        "reason": judgement.reason if judgement else None,
        "answer": judgement.answer if judgement else None,
        "stopped": trajectory.stopped,
        "kept_mass": trajectory.kept_mass,
        "text": trajectory.text,
        "prompt_ids": trajectory.prompt_ids.tolist(),
        "response_ids": trajectory.response_ids.tolist(),
        "engine_logp": trajectory.engine_logp.tolist(),
    }


def _from_record(record: dict[str, Any]) -> tuple[str, Trajectory]:
    judgement = None
    if record["verdict"] is not None:
        judgement = Judgement(Verdict(record["verdict"]), record["reason"], record["answer"])
    trajectory = Trajectory(
        group=record["group"],
        sample=record["sample"],
        prompt_ids=np.array(record["prompt_ids"], dtype=np.int32),
        response_ids=np.array(record["response_ids"], dtype=np.int32),
        engine_logp=np.array(record["engine_logp"], dtype=np.float32),
        stopped=record["stopped"],
        judgement=judgement,
        kept_mass=record["kept_mass"],
        text=record["text"],
    )
    return record["prompt_id"], trajectory
