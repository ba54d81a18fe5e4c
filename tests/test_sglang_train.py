"""Training with SGLang servers beside the actors: real steps, successive syncs against Hugging Face, nothing left."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mixed_checker
import numpy as np
import pytest
import tiny
import torch
from dist import TESTS, run_ranks
from sglang_server import holders, left_over, needs_sglang, processes
from transformers import AutoModelForCausalLM

from megatron_oreal.actor.batch import TrainSequence
from megatron_oreal.config_load import load_config
from megatron_oreal.data.packing import PackItem
from megatron_oreal.data.trajectories import read_trajectories
from megatron_oreal.data.types import Trajectory
from megatron_oreal.run import open_run
from megatron_oreal.telemetry import names
from megatron_oreal.verifier.verdict import Verdict

pytestmark = needs_sglang
STEPS = 3
SGLANG = ["rollout.engine=sglang", "rollout.sglang.enable_memory_saver=true", "device=cpu"]
"""With the memory saver, weights that sleep took away are NaN until they are loaded: a forgotten sync shows."""
EVERYTHING = "parallel.offload=[optimizer,reward_model,reference,policy]"
QUICKSTART = tiny.REPOSITORY / "examples" / "configs" / "quickstart.yaml"


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's model, untrained, and a few of its problems."""
    folder = tmp_path_factory.mktemp("quickstart")
    prepare = tiny.quickstart()
    prepare.make_model(0).save_pretrained(folder / "model")
    prepare.make_tokenizer().save_pretrained(folder / "model")
    problems = [{"question": f"{a}+{2 * a}", "gold_answer": str(3 * a)} for a in range(111, 119)]
    tiny.write_lines(folder / "train.jsonl", problems[:6])
    tiny.write_lines(folder / "held_out.jsonl", problems[6:])
    return folder


def overrides(folder: Path, work_dir: Path, *more: str) -> list[str]:
    """The quickstart scaled down to seconds, its random model judged by ``mixed_checker``."""
    paths = [f"work_dir={work_dir}", f"model.path={folder / 'model'}", f"data.train={folder / 'train.jsonl'}"]
    size = [f"total_steps={STEPS}", "rollout.prompts_per_step=4", "rollout.prompt_repeat_k=4", "rollout.gen_max_new=24"]
    size += ["rollout.max_running_requests=16", f"evaluation.data={folder / 'held_out.jsonl'}"]
    size += ["evaluation.num_samples=1", "evaluation.every=0"]
    learn = ["algorithm.filter=none", "algorithm.actor_freeze_steps=1", "optimizer.warmup_steps=0"]
    learn += ["optimizer.warmup_after_freeze=false", "verifier.checker=mixed_checker:judge_response"]
    learn += ["verifier.deadline_s=300"]  # of a machine that stands still for seconds
    return [*paths, *size, *learn, "checkpoint.every=0", *SGLANG, *more]


def left_of(work_dir: Path, before: Sequence[str]) -> list[str]:
    """Scratch files that were not there ``before`` and that nobody uses, and processes of a run."""
    return left_over(before) + [f"{pid}: {text}" for pid, text in processes().items() if str(work_dir) in text]


def assert_ports_are_free(work_dir: Path) -> None:
    settings = [json.loads(path.read_text())["server_args"] for path in (work_dir / "sglang").glob("engine*.json")]
    assert settings
    ports = [server[name] for server in settings for name in ("port", "nccl_port")]
    wait_until(lambda: all(is_given_back(port, work_dir) for port in ports), 60)
    assert [port for port in ports if not is_given_back(port, work_dir)] == []


def is_given_back(port: int, work_dir: Path) -> bool:
    """Whether nobody listens there, or another than the run, whom the kernel has given the port since."""
    try:
        with socket.create_server(("127.0.0.1", port)):
            return True
    except OSError:
        held_by = holders(port)
        return bool(held_by) and not any(str(work_dir) in text for text in held_by)


@pytest.fixture(scope="module")
def trained(quickstart: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Three steps of the quickstart on TP 2 actors, each beside a server of its own; and what was left afterwards."""
    work_dir = tmp_path_factory.mktemp("trained") / "run"
    before = left_over([])
    keys = overrides(quickstart, work_dir, EVERYTHING, "telemetry.save_trajectories=true")
    tiny.succeed("train", QUICKSTART, "--nproc-per-node", 2, *keys)
    return work_dir, left_of(work_dir, before)


def test_the_quickstart_trains_three_steps_and_the_engine_agrees_with_the_actors(trained: tuple[Path, list[str]]):
    records = tiny.metrics_of(trained[0])
    assert [record["step"] for record in records] == [*range(STEPS), STEPS]
    for record in records[:STEPS]:
        assert record[names.SEQUENCES_KEPT] == 16
        assert 0 < record[names.LOGP_DIFF_MEAN] <= record[names.LOGP_DIFF_P999] <= record[names.LOGP_DIFF_MAX] < 1e-4
        assert record[names.KEPT_MASS] == 1.0
    assert records[0][names.KL_TO_REFERENCE] == 0.0
    assert all(record[names.GRAD_NORM_POLICY] > 0 for record in records[1:STEPS])
    assert records[2][names.KL_TO_REFERENCE] > 0, "the engine's third step must have drawn from a policy that moved"
    assert {names.EVAL_PASS_AT_1, names.EVAL_GREEDY} <= records[0].keys() & records[-1].keys()


def test_every_sample_of_a_step_is_there_once_and_judged(trained: tuple[Path, list[str]]):
    for step in range(STEPS):
        drawn = list(read_trajectories(trained[0] / "trajectories" / f"step_{step:06d}.jsonl"))
        assert [(t.group, t.sample) for _, t in drawn] == [(group, k) for group in range(4) for k in range(4)]
        for _, t in drawn:
            assert t.judgement is not None
            right = t.stopped and mixed_checker.judge_response(t.text, t.stopped, "").verdict is Verdict.CORRECT
            assert (t.judgement.verdict is Verdict.CORRECT) == right
        assert len({t.response_ids.tobytes() for _, t in drawn}) > 8


def test_the_phases_of_a_colocated_step_are_timed_and_documented(trained: tuple[Path, list[str]]):
    parts = {
        "sleep": ["release"],
        "update": ["reference/load", "reference/offload", "reward_model/load", "reward_model/offload", "policy/load"],
        "publish": ["offload", "wake_weights", "plan", "transfer", "digest", "load", "wake_cache"],
    }
    for record in tiny.metrics_of(trained[0])[:STEPS]:
        for phase, inner in parts.items():
            times = [record[names.phase_metric(f"{phase}/{part}")] for part in inner]
            assert 0 < sum(times) <= record[names.phase_metric(phase)]
            assert all(names.phase_metric(f"{phase}/{part}") in names.REGISTRY for part in inner)


def test_a_finished_run_leaves_no_process_port_or_shared_memory(trained: tuple[Path, list[str]]):
    assert trained[1] == []
    assert_ports_are_free(trained[0])


def sync_twice(quickstart: Path, folder: Path, keys: Sequence[str]) -> list[list[Trajectory]]:
    """Two versions: publish, export, draw greedily; an update in between. What this rank has of each version."""
    versions = []
    with open_run(load_config(QUICKSTART, keys)) as run:
        run.actor.load_hf()
        greedy = replace(run.sampling, temperature=0.0, top_p=1.0)
        for version in range(2):
            run.publish()
            run.actor.export(folder / f"version{version}")
            drawn = run.rollouts.sample(run.held_out, 1, greedy, lambda group, sample: 0, None)
            versions.append(drawn.fetch(range(len(drawn))))
            drawn = versions[-1]
            run.sleep()
            items = [PackItem.of(t) for t in drawn]
            rewards = [1 if i % 2 else -1 for i in range(len(items))]
            run.actor.update(
                [TrainSequence(item, r, float(r), 0.5) for item, r in zip(items, rewards, strict=True)], version
            )
    return versions


def greedy_of(model_dir: Path, prompt: np.ndarray, count: int) -> tuple[list[int], torch.Tensor]:
    """Transformers' own greedy tokens, and its log-probabilities of every token after the prompt, [count, V]."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    ids = torch.tensor(prompt).long()[None]
    out = model.generate(ids, do_sample=False, max_new_tokens=count, output_scores=True, return_dict_in_generate=True)
    return out.sequences[0, ids.shape[1] :].tolist(), torch.cat(out.scores).log_softmax(-1)


@pytest.mark.slow
@pytest.mark.parametrize("engine_tp", [1, 2])
def test_successive_syncs_from_pipeline_stages_equal_the_exported_model(
    quickstart: Path, tmp_path: Path, engine_tp: int
):
    keys = overrides(quickstart, tmp_path / "run", EVERYTHING, f"rollout.engine_tp={engine_tp}")
    keys += ["parallel.tensor_model_parallel_size=1", "parallel.pipeline_model_parallel_size=2"]
    keys += ["parallel.num_layers_in_first_pipeline_stage=2", "parallel.num_layers_in_last_pipeline_stage=1"]
    keys += ["algorithm.actor_freeze_steps=0", "optimizer.actor_lr=3e-3", "optimizer.actor_min_lr=3e-3"]
    before = left_over([])
    arguments = {"quickstart": quickstart, "folder": tmp_path, "keys": keys}
    first, second = run_ranks("test_sglang_train:sync_twice", 2, arguments, timeout_s=500)
    for version in range(2):
        assert len(first[version]) == 2
        for drawn, seen in zip(first[version], second[version], strict=True):
            tokens = drawn.response_ids.tolist()
            assert seen.response_ids.tolist() == tokens
            expected, logps = greedy_of(tmp_path / f"version{version}", drawn.prompt_ids, len(tokens))
            assert tokens == expected
            own = logps[torch.arange(len(tokens)), torch.tensor(tokens)].numpy()
            assert np.abs(drawn.engine_logp - own).max() < 1e-4
    old, new = (torch.tensor(first[version][0].engine_logp) for version in range(2))
    length = min(len(old), len(new))
    assert (old[:length] - new[:length]).abs().max() > 1e-2, "the second sync must bring another model"
    assert left_of(tmp_path / "run", before) == []


def test_nothing_is_left_of_a_trainer_that_is_killed(quickstart: Path, tmp_path: Path):
    work_dir = tmp_path / "run"
    before = left_over([])
    keys = overrides(quickstart, work_dir, "total_steps=100000", "parallel.tensor_model_parallel_size=1")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-m", "megatron_oreal", "train", str(QUICKSTART), *keys]
    with (tmp_path / "log").open("w") as log:
        trainer = subprocess.Popen(command, cwd=tiny.REPOSITORY, env=environment, stdout=log, stderr=log)
        try:
            wait_until(lambda: (work_dir / "metrics.jsonl").is_file() or trainer.poll() is not None, 240)
            assert trainer.poll() is None, (tmp_path / "log").read_text()[-4000:]
            assert len(left_of(work_dir, before)) > 1
        finally:
            trainer.send_signal(signal.SIGKILL)
            trainer.wait()
    wait_until(lambda: not left_of(work_dir, before), 120)
    assert left_of(work_dir, before) == []
    assert_ports_are_free(work_dir)


def wait_until(holds: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.1)


@pytest.mark.slow
def test_supervised_phase_evaluation_and_over_sampling_draw_from_servers(quickstart: Path, tmp_path: Path):
    prepare = tiny.quickstart()
    pairs = [(100 + i, 200 + 3 * i) for i in range(40)]
    lines = [{"question": f"{a}+{b}", "solution": prepare.worked_solution(a, b)} for a, b in pairs]
    solutions = tiny.write_lines(tmp_path / "solutions.jsonl", lines)
    keys = overrides(quickstart, tmp_path / "run", "optimizer.wd=0", EVERYTHING)
    said = tiny.succeed(
        "sft",
        QUICKSTART,
        *keys,
        "parallel.tensor_model_parallel_size=1",
        f"sft.data={solutions}",
        f"sft.output={tmp_path / 'taught'}",
        *["sft.max_steps=4", "sft.eval_every=2", "sft.stop_at_pass_rate=0.9", "sft.batch_size=8"],
        "verifier.checker=megatron_oreal.verifier.rules:judge_response",
    )
    assert "supervised step 2: held-out pass@1" in said and "supervised step 4: held-out pass@1" in said
    taught = [f"model.path={tmp_path / 'taught'}", "parallel.tensor_model_parallel_size=1"]
    said = tiny.succeed("eval", QUICKSTART, *keys, *taught)
    assert "pass@1 on 2 problems" in said
    over = ["rollout.oversample_prompts=2", "telemetry.save_trajectories=true", "total_steps=2"]
    tiny.succeed("train", QUICKSTART, *keys, *taught, *over)
    for step in range(2):
        drawn = [t for _, t in read_trajectories(tmp_path / "run" / "trajectories" / f"step_{step:06d}.jsonl")]
        groups = sorted({t.group for t in drawn})
        assert len(groups) == 4 and groups[-1] < 6
        assert [(t.group, t.sample) for t in drawn] == [(group, k) for group in groups for k in range(4)]
    assert [record[names.SEQUENCES_KEPT] for record in tiny.metrics_of(tmp_path / "run")[:2]] == [16, 16]
