"""Failures in the middle of a training run on two ranks with a server each, and state that is saved while it rests."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny
import torch
from dist import TESTS
from faulty_checker import VICTIM
from safetensors.torch import load_file
from sglang_server import left_over, needs_sglang
from test_sglang_train import (
    EVERYTHING,
    QUICKSTART,
    assert_ports_are_free,
    left_of,
    overrides,
    quickstart,  # noqa: F401
    wait_until,
)

from megatron_oreal.data.trajectories import read_trajectories
from megatron_oreal.telemetry import names

pytestmark = needs_sglang
STEPS = 4
LEARN = ["algorithm.actor_freeze_steps=0", "optimizer.actor_lr=3e-3", "optimizer.actor_min_lr=3e-3"]
"""A version differs from the next by more than the engine's log-probabilities may."""
BUCKETS = "rollout.server.bucket_bytes=100000"


def train(keys: Sequence[str]) -> str:
    """Train on two ranks to the end; returns what was printed."""
    command = [sys.executable, "-m", "megatron_oreal", "train", str(QUICKSTART), "--nproc-per-node", "2", *keys]
    done = subprocess.run(
        command, cwd=tiny.REPOSITORY, env=environment(), capture_output=True, text=True, timeout=580, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done.stdout


def environment() -> dict[str, str]:
    path = f"{tiny.REPOSITORY}{os.pathsep}{TESTS}"
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["SIGKILL", "SIGSTOP"])
def test_a_server_that_fails_in_a_step_costs_no_sample_and_serves_the_next_steps(
    quickstart: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
):
    work_dir = tmp_path / "run"
    before = left_over([])
    keys = [f"total_steps={STEPS}", EVERYTHING, BUCKETS, *LEARN, "telemetry.save_trajectories=true"]
    keys += ["rollout.server.requests_per_server=2", "rollout.sglang.log_level=info", "evaluation.data=null"]
    keys += ["rollout.server.health_interval_s=1"]
    keys += ["rollout.server.health_timeout_s=8"] if fault == "SIGSTOP" else []
    keys += ["verifier.checker=faulty_checker:judge_response"]
    where = {"work_dir": str(work_dir), "signal": fault, "after": 16 + 4}  # in the second step
    monkeypatch.setenv("OREAL_TEST_FAULT", json.dumps(where))
    train(overrides(quickstart, work_dir, *keys))

    victims = json.loads((work_dir / "victims").read_text())
    assert len(victims) >= 3, "guard, server, worker"
    assert [pid for pid in victims if alive(pid)] == []
    records = tiny.metrics_of(work_dir)
    assert [record["step"] for record in records] == list(range(STEPS))
    for step, record in enumerate(records):
        drawn = [t for _, t in read_trajectories(work_dir / "trajectories" / f"step_{step:06d}.jsonl")]
        assert [(t.group, t.sample) for t in drawn] == [(group, k) for group in range(4) for k in range(4)]
        assert all(len(t.response_ids) for t in drawn)
        assert record[names.SEQUENCES_KEPT] == 16
        assert 0 < record[names.LOGP_DIFF_MAX] < 1e-4, "weights of another version answered"
    log = (work_dir / "sglang" / f"{VICTIM}.log").read_text()
    first, *later = log.split("Started server process")[1:]
    assert '"POST /generate HTTP/1.1" 200' in first
    assert len(later) == 1, "started again once"
    given, answered = later[0].find('"POST /update_weights_from_tensor'), later[0].find('"POST /generate HTTP/1.1" 200')
    assert 0 < given < answered, "the new server must have answered, after it was given weights"
    assert left_of(work_dir, before) == []
    assert_ports_are_free(work_dir)


def shared_memory() -> set[str]:
    return {str(path) for path in Path("/dev/shm").iterdir()} | {
        str(path) for path in Path(tempfile.gettempdir()).glob("oreal-sglang-*")
    }


def children_of(root: int) -> set[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["agent and ranks", "agent"])
def test_nothing_is_left_of_a_torchrun_of_two_ranks_that_is_killed(
    quickstart: Path,  # noqa: F811
    tmp_path: Path,
    killed: str,
):
    work_dir = tmp_path / "run"
    before, scratch = shared_memory(), left_over([])
    keys = overrides(quickstart, work_dir, "total_steps=100000", EVERYTHING, "evaluation.data=null")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "megatron_oreal", "train", str(QUICKSTART), *keys]
    with (tmp_path / "log").open("w") as log:
        agent = subprocess.Popen(command, cwd=tiny.REPOSITORY, env=environment(), stdout=log, stderr=log)
        try:
            wait_until(lambda: (work_dir / "metrics.jsonl").is_file() or agent.poll() is not None, 400)
            assert agent.poll() is None, (tmp_path / "log").read_text()[-4000:]
            during = shared_memory() - before
            everyone = children_of(agent.pid)
            servers = [each for each in left_of(work_dir, scratch) if "sglang" in each]
            assert len(servers) >= 4 and during, "there was something to leave behind"
        finally:
            trainers = [pid for pid in children_of(agent.pid) if is_trainer(pid)]
            for pid in [agent.pid, *(trainers if "ranks" in killed else [])]:  # none of which can clean up
                os.kill(pid, signal.SIGKILL)
            agent.wait()
    assert len(trainers) == 2
    wait_until(lambda: not any(alive(pid) for pid in everyone) and not (shared_memory() & during), 60)
    assert [pid for pid in everyone if alive(pid)] == []
    assert sorted(shared_memory() & during) == []
    assert left_of(work_dir, scratch) == []
    assert_ports_are_free(work_dir)


def is_trainer(pid: int) -> bool:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    own = any(each.startswith(b"LOCAL_RANK=") for each in environment)
    return own and b"megatron_oreal" in words and b"train" in words


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def drawn_in(work_dir: Path, step: int) -> list[tuple[int, int, list[int]]]:
    trajectories = read_trajectories(work_dir / "trajectories" / f"step_{step:06d}.jsonl")
    return [(t.group, t.sample, t.response_ids.tolist()) for _, t in trajectories]


@pytest.mark.slow
@pytest.mark.timeout(1300)
def test_a_checkpoint_of_offloaded_parts_is_resumed_to_the_same_bits(quickstart: Path, tmp_path: Path):  # noqa: F811
    """Everything is in host memory when the checkpoint of the second step is made, and the servers hold the device."""
    size = [f"total_steps={STEPS}", "checkpoint.every=2", "checkpoint.keep=5", "checkpoint.export_hf=true"]
    size += [EVERYTHING, BUCKETS, *LEARN, "parallel.use_distributed_optimizer=true", "evaluation.data=null"]
    size += ["rollout.max_running_requests=1", "telemetry.save_trajectories=true"]  # no batch, no rounding of batches
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    train(overrides(quickstart, whole, *size, "checkpoint.every=2"))
    saved = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert len(saved) == 2
    (rest / "checkpoints").mkdir(parents=True)
    shutil.copytree(whole / "checkpoints" / saved[0], rest / "checkpoints" / saved[0])
    said = train(overrides(quickstart, rest, *size, "checkpoint.every=2"))
    assert f"resumed from {rest / 'checkpoints' / saved[0]}" in said
    for step in (2, 3):
        one, other = (drawn_in(path, step) for path in (whole, rest))
        assert bool(one == other), f"step {step} drew something else"
    first, second = ({record["step"]: record for record in tiny.metrics_of(path)} for path in (whole, rest))
    assert sorted(second) == [2, 3]
    for step in second:
        for name in (names.GRAD_NORM_POLICY, names.KL_TO_REFERENCE, names.LOGP_DIFF_MAX):
            assert first[step][name] == second[step][name]
    one, other = (load_file(path / "hf" / "model.safetensors") for path in (whole, rest))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
