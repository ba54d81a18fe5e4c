from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from megatron_oreal.data.trajectories import TrajectoryWriter, read_trajectories
from megatron_oreal.data.types import Trajectory
from megatron_oreal.errors import UserError
from megatron_oreal.verifier.verdict import Judgement, Verdict


def trajectory(group, sample, judgement):
    rng = np.random.default_rng([group, sample])
    n = int(rng.integers(1, 200))
    return Trajectory(
        group=group,
        sample=sample,
        prompt_ids=rng.integers(0, 151_000, 5).astype(np.int32),
        response_ids=rng.integers(0, 151_000, n).astype(np.int32),
        engine_logp=-rng.exponential(1.0, n).astype(np.float32),
        stopped=bool(sample % 2),
        judgement=judgement,
        kept_mass=float(rng.random()),
        text='line\n"two" \u2028 π',
    )


STEP = [
    ("a", trajectory(0, 0, Judgement(Verdict.CORRECT, "equal", "2"))),
    ("a", trajectory(0, 1, Judgement(Verdict.UNKNOWN, "judge timed out"))),
    ("b", trajectory(1, 0, None)),
]


def same(left: Trajectory, right: Trajectory) -> bool:
    for field in dataclasses.fields(Trajectory):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if isinstance(a, np.ndarray):
            if a.dtype != b.dtype or a.tobytes() != b.tobytes():
                return False
        elif a != b:
            return False
    return True


def write(path, step):
    with TrajectoryWriter(path) as writer:
        for prompt_id, item in step:
            writer.write(item, prompt_id)


def test_a_step_survives_writing_and_reading_bit_for_bit(tmp_path):
    path = tmp_path / "new" / "step.jsonl"
    write(path, STEP)
    back = list(read_trajectories(path))
    assert [prompt_id for prompt_id, _ in back] == ["a", "a", "b"]
    assert all(same(a, b) for (_, a), (_, b) in zip(STEP, back, strict=True))
    assert os.listdir(path.parent) == ["step.jsonl"]


def test_reading_streams(tmp_path):
    path = tmp_path / "step.jsonl"
    write(path, STEP)
    with path.open("a") as file:
        file.write("cut off")
    reader = read_trajectories(path)
    for _ in STEP:
        next(reader)
    with pytest.raises(UserError, match=r"step\.jsonl line 4: not a trajectory"):
        next(reader)


def test_a_failed_write_leaves_the_former_file(tmp_path):
    path = tmp_path / "step.jsonl"
    write(path, STEP[:1])
    before = path.read_bytes()
    with pytest.raises(AttributeError):
        write(path, [STEP[1], ("b", "no trajectory")])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["step.jsonl"]


def test_a_killed_process_leaves_the_former_file(tmp_path):
    path = tmp_path / "step.jsonl"
    write(path, STEP[:1])
    before = path.read_bytes()
    program = (
        "import os, signal, sys\n"
        "from megatron_oreal.data.trajectories import TrajectoryWriter, read_trajectories\n"
        "item = next(read_trajectories(sys.argv[1]))[1]\n"
        "with TrajectoryWriter(sys.argv[1]) as writer:\n"
        "    for _ in range(1000): writer.write(item, 'x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == before


@pytest.mark.parametrize("line", [b"[]", b"{}", b'{"prompt_id": "a", "verdict": "maybe"}', b"\xff\xfe{\x00"])
def test_a_record_of_something_else_is_refused_with_its_line(tmp_path, line):
    path = tmp_path / "step.jsonl"
    path.write_bytes(line + b"\n")
    with pytest.raises(UserError, match="line 1: not a trajectory"):
        list(read_trajectories(path))
    with pytest.raises(UserError, match="no such trajectory file"):
        list(read_trajectories(tmp_path / "none.jsonl"))
