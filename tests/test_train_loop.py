"""``megatron-oreal`` end to end: the supervised phase, training, resuming, evaluation and the report, on real ranks."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_oreal import cli as command_line
from megatron_oreal.config_load import load_config
from megatron_oreal.data.trajectories import read_trajectories
from megatron_oreal.errors import UserError
from megatron_oreal.sft import supervise
from megatron_oreal.telemetry import names
from megatron_oreal.train import train
from megatron_oreal.verifier.verdict import Verdict

STEPS = 3
TRAIN = ["--nproc-per-node", 2, "checkpoint.every=1", "checkpoint.keep=9", "telemetry.save_trajectories=true"]


def weights_of(model_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(model_dir / "model.safetensors")


def assert_same_bits(one: Path, other: Path) -> None:
    left, right = weights_of(one), weights_of(other)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def without_times(record: dict[str, float]) -> dict[str, float]:
    timed = (names.TIME, "throughput/", names.PUBLISH_DIGEST_SHARE)
    return {name: value for name, value in record.items() if not name.startswith(timed)}


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that ``megatron-oreal sft`` on two tensor-parallel ranks has taught to answer 0 or 1 by chance."""
    folder = tmp_path_factory.mktemp("supervised")
    config = tiny.write_run(folder, tiny.write_model(folder / "model"))
    solutions = tiny.write_lines(folder / "solutions.jsonl", tiny.coin_solutions())
    keys = ["sft.max_steps=30", "sft.batch_size=20", "sft.lr=1e-2", "sft.warmup_steps=2"]
    paths = [f"sft.data={solutions}", f"sft.output={folder / 'taught'}"]
    said = tiny.succeed("sft", config, "--nproc-per-node", 2, "parallel.tensor_model_parallel_size=2", *paths, *keys)
    assert f"supervised model: {folder / 'taught'}" in said
    return folder / "taught"


@pytest.fixture(scope="module")
def trained(taught: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Config and standard output of a run of three steps on two data-parallel ranks, the first step frozen."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny.write_run(folder, taught)
    return config, tiny.succeed("train", config, *TRAIN, f"evaluation.data={folder / 'train.jsonl'}")


def test_supervised_phase_teaches_the_solutions_it_was_given(taught: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(taught)
    model = AutoModelForCausalLM.from_pretrained(taught, dtype=torch.float32)
    prompt = tokenizer("<|user|>3<|assistant|>\\boxed{", return_tensors="pt", add_special_tokens=False)["input_ids"]
    chances = model(prompt).logits[0, -1].softmax(-1)
    zero, one = (chances[tokenizer.convert_tokens_to_ids(digit)].item() for digit in "01")
    assert zero + one > 0.95
    assert min(zero, one) > 0.2


def test_a_supervised_phase_that_cannot_know_whether_to_stop_stops_and_keeps_its_model(
    taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # for the verifier's workers
    config = tiny.write_run(tmp_path, taught)
    solutions = tiny.write_lines(tmp_path / "solutions.jsonl", tiny.coin_solutions())
    keys = [f"sft.data={solutions}", f"sft.output={tmp_path / 'taught'}", "sft.max_steps=4", "sft.eval_every=2"]
    keys += ["sft.stop_at_pass_rate=0.5", f"evaluation.data={tmp_path / 'train.jsonl'}"]
    keys += ["evaluation.max_problems=2", "verifier.checker=verifier_checkers:no_verdict"]
    with pytest.raises(UserError, match=r"^verifier\.max_unknown_share=0\.2: 100% of the evaluation's verdicts"):
        supervise(load_config(config, keys))
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()][-2:] == [
        "supervised step 2",
        "supervised model",
    ]
    assert weights_of(tmp_path / "taught")


def test_metrics_have_every_step_once_under_documented_names(trained: tuple[Path, str]) -> None:
    records = tiny.metrics_of(trained[0].parent / "run")
    assert [record["step"] for record in records] == [*range(STEPS), STEPS]  # the last is the final evaluation
    for record in records:
        for name, value in record.items():
            assert name == "step" or names.describe(name).meaning
            assert isinstance(value, int | float) and math.isfinite(value), (name, value)
    assert {names.EVAL_PASS_AT_1, names.EVAL_GREEDY} <= records[0].keys() & records[-1].keys()
    assert all(0 < record[names.PASS_RATE] < 1 for record in records[:-1])


def test_first_step_policy_is_the_reference_and_the_engine_agrees(trained: tuple[Path, str]) -> None:
    first, second = tiny.metrics_of(trained[0].parent / "run")[:2]
    assert first[names.KL_TO_REFERENCE] == 0.0
    for record in (first, second):
        assert 0.0 <= record[names.LOGP_DIFF_MAX] < 1e-4
    assert first[names.GROUPS_KEPT] > 0


def test_a_frozen_step_trains_the_reward_model_alone(trained: tuple[Path, str]) -> None:
    frozen, *free, _ = tiny.metrics_of(trained[0].parent / "run")
    assert names.GRAD_NORM_POLICY not in frozen
    assert frozen[names.LR_POLICY] == 0.0
    assert frozen[names.GRAD_NORM_REWARD_MODEL] > 0
    assert frozen[names.LOSS_REWARD_MODEL] == pytest.approx(math.log(2))  # the score head starts at zero
    assert free[0][names.KL_TO_REFERENCE] == 0.0, "the policy has moved in the frozen step"
    assert all(record[names.GRAD_NORM_POLICY] > 0 for record in free)
    assert free[1][names.KL_TO_REFERENCE] > 0


def test_every_update_is_published_verified_and_timed(trained: tuple[Path, str]) -> None:
    frozen, *free, _ = tiny.metrics_of(trained[0].parent / "run")
    assert names.PUBLISH_DIGEST_SHARE not in frozen, "the policy did not change, nothing was to be published"
    for record in free:
        parts = [record[names.phase_metric(f"publish/{part}")] for part in ("plan", "transfer", "digest")]
        assert 0 < sum(parts) <= record[names.phase_metric("publish")]
        assert record[names.PUBLISH_DIGEST_SHARE] == parts[-1] / record[names.phase_metric("publish")]
        assert record[names.PUBLISH_DRIFTED] == 0
        assert record[names.PUBLISH_RECEIVED] == 0, "two replicas that hold the whole model lack nothing"


def test_a_run_leaves_a_report_tensorboard_events_and_a_model_that_transformers_loads(
    taught: Path, trained: tuple[Path, str]
) -> None:
    config, said = trained
    work_dir = config.parent / "run"
    assert (work_dir / "report.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (work_dir / "tensorboard").glob("events.out.tfevents.*")]
    assert f"export: {work_dir / 'hf'}" in said
    model = AutoModelForCausalLM.from_pretrained(work_dir / "hf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(work_dir / "hf")
    assert torch.isfinite(model(tokenizer("<|user|>3", return_tensors="pt")["input_ids"]).logits).all()
    before, after = weights_of(taught), weights_of(work_dir / "hf")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before if "proj.weight" in name)


def test_saved_trajectories_are_what_the_metrics_speak_of(trained: tuple[Path, str]) -> None:
    work_dir = trained[0].parent / "run"
    for record in tiny.metrics_of(work_dir)[:STEPS]:
        drawn = list(read_trajectories(work_dir / "trajectories" / f"step_{record['step']:06d}.jsonl"))
        assert [(t.group, t.sample) for _, t in drawn] == [(group, k) for group in range(4) for k in range(4)]
        verdicts = [t.judgement.verdict for _, t in drawn if t.judgement]
        assert len(verdicts) == 16
        assert verdicts.count(Verdict.CORRECT) / 16 == record[names.PASS_RATE]
        assert sum(len(t.response_ids) for _, t in drawn) == record[names.TOKENS_GENERATED]
        assert all(
            ("\\boxed{1}" in t.text) == (t.judgement.verdict is Verdict.CORRECT) for _, t in drawn if t.judgement
        )


@pytest.mark.parametrize(
    "step", [pytest.param(1, marks=pytest.mark.slow), 2], ids=["before-the-first-policy-update", "after-it"]
)
def test_a_resumed_run_repeats_metrics_and_weights_bit_for_bit(
    trained: tuple[Path, str], tmp_path: Path, step: int
) -> None:
    config = trained[0]
    work_dir, again = config.parent / "run", tmp_path / "run"
    shutil.copytree(work_dir, again, ignore=shutil.ignore_patterns("hf", "tensorboard", "trajectories", "report.png"))
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(again / "checkpoints" / f"step_{later:06d}")
    evaluation = f"evaluation.data={config.parent / 'train.jsonl'}"
    said = tiny.succeed("train", config, *TRAIN, f"work_dir={again}", evaluation)
    assert f"resumed from {again}/checkpoints/step_{step:06d}" in said
    assert [p.name for p in sorted((again / "trajectories").iterdir())] == [
        f"step_{later:06d}.jsonl" for later in range(step, STEPS)
    ], "which steps were run again"
    first, second = tiny.metrics_of(work_dir), tiny.metrics_of(again)
    assert list(map(without_times, second)) == list(map(without_times, first))
    assert_same_bits(again / "hf", work_dir / "hf")


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_leaves_the_one_before(
    trained: tuple[Path, str], tmp_path: Path
) -> None:
    config, again = trained[0], tmp_path / "run"
    before = shutil.copytree(config.parent / "run/checkpoints/step_000001", again / "checkpoints/step_000001")
    kept = {path: path.read_bytes() for path in before.rglob("*") if path.is_file()}
    largest = max(len(content) for path, content in kept.items() if path.suffix == ".distcp")
    limit = largest // 1024 // 2
    done = tiny.cli("train", config, *TRAIN, "telemetry.tensorboard=false", f"work_dir={again}", max_file_kb=limit)
    assert done.returncode == 2, done.stderr
    assert "error: " in done.stderr and "step_000002.incomplete" in done.stderr and "free some space" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in (again / "checkpoints").iterdir() if path.name.startswith("step_")] == [before.name]
    assert {path: path.read_bytes() for path in before.rglob("*") if path.is_file()} == kept


def test_resume_false_refuses_a_work_dir_with_checkpoints(trained: tuple[Path, str]) -> None:
    config = trained[0]
    before = (config.parent / "run" / "metrics.jsonl").read_bytes()
    done = tiny.cli("train", config, "checkpoint.resume=false")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: checkpoint.resume=false")
    assert "step_000003" in line and "set resume=true" in line
    assert (config.parent / "run" / "metrics.jsonl").read_bytes() == before


def test_fewer_steps_than_a_checkpoint_has_seen_are_refused(trained: tuple[Path, str]) -> None:
    with pytest.raises(UserError, match=r"^total_steps=2: .*step_000003 has seen 3 steps: raise it, remove that"):
        train(load_config(trained[0], ["total_steps=2"]))


def test_a_checkpoint_without_its_run_file_is_one_line(taught: Path, tmp_path: Path) -> None:
    config = tiny.write_run(tmp_path, taught)
    (tmp_path / "run" / "checkpoints" / "step_000001").mkdir(parents=True)
    with pytest.raises(UserError, match=r"step_000001/run\.json: cannot be read \(No such file or directory\)"):
        train(load_config(config))


def test_a_gradient_that_is_not_finite_ends_the_run_in_one_line_before_anything_is_saved(
    taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.write_run(tmp_path, taught)
    keys = ["optimizer.token_level_rm_lr=1e37", "checkpoint.every=2", "telemetry.tensorboard=false"]
    assert command_line.main(["train", str(config), *keys]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: gradient norm is nan: ")
    assert [record["step"] for record in tiny.metrics_of(tmp_path / "run")] == [0]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_eval_of_the_export_finds_what_the_run_logged_at_its_end(trained: tuple[Path, str]) -> None:
    config = trained[0]
    work_dir = config.parent / "run"
    said = tiny.succeed(
        "eval", config, f"model.path={work_dir / 'hf'}", f"evaluation.data={config.parent / 'train.jsonl'}"
    )
    last = tiny.metrics_of(work_dir)[-1]
    assert f"pass@1 on 10 problems: sampled {last[names.EVAL_PASS_AT_1]:.3f} " in said
    assert f"greedy {last[names.EVAL_GREEDY]:.3f}" in said


def test_report_reads_a_finished_run(trained: tuple[Path, str]) -> None:
    work_dir = trained[0].parent / "run"
    (work_dir / "report.png").unlink()
    said = tiny.succeed("report", work_dir)
    assert f"curves: {work_dir / 'report.png'}" in said
    assert "steps 0-3" in said
    assert (work_dir / "report.png").stat().st_size > 10_000


def test_a_response_that_fills_the_context_is_wrong_and_a_run_that_keeps_no_group_goes_on(
    taught: Path, tmp_path: Path
) -> None:
    """Prompts have 3 tokens and answers 4 with the stop word: in a context of 6 the right answer is there, unended."""
    config = tiny.write_run(tmp_path, taught)
    lengths = ["rollout.gen_max_length=6", "rollout.gen_max_new=5"]
    keys = ["total_steps=2", "algorithm.actor_freeze_steps=0", "telemetry.save_trajectories=true"]
    said = tiny.succeed("train", config, *lengths, *keys)
    for step in range(2):
        assert f"step {step}: no group kept (0 all correct, 4 all wrong, 0 with" in said
    records = tiny.metrics_of(tmp_path / "run")
    assert [record["step"] for record in records] == [0, 1]
    assert all(record[names.SEQUENCES_KEPT] == 0 and record[names.PASS_RATE] == 0 for record in records)
    assert not any(name.startswith(("loss/", "grad_norm/", "lr/")) for record in records for name in record)
    drawn = [t for _, t in read_trajectories(tmp_path / "run" / "trajectories" / "step_000000.jsonl")]
    cut = [t for t in drawn if len(t.prompt_ids) + len(t.response_ids) == 6]
    assert any("\\boxed{1}" in t.text for t in cut)
    assert all(not t.stopped and t.judgement and t.judgement.verdict is Verdict.WRONG for t in cut)
    assert records[0][names.TRUNCATED_SHARE] == len(cut) / len(drawn)
    assert_same_bits(tmp_path / "run" / "hf", taught)


@pytest.mark.slow
def test_fewer_kept_sequences_than_ranks_give_the_step_of_one_rank(taught: Path, tmp_path: Path) -> None:
    """One prompt: two of three ranks draw nothing, and one of them has no sequence to train on."""
    config = tiny.write_run(tmp_path, taught)
    keys = ["total_steps=1", "algorithm.actor_freeze_steps=0", "rollout.prompts_per_step=1"]
    keys += ["rollout.prompt_repeat_k=8", "checkpoint.export_hf=false"]
    tiny.succeed("train", config, *keys, f"work_dir={tmp_path / 'alone'}")
    tiny.succeed("train", config, "--nproc-per-node", 3, *keys, f"work_dir={tmp_path / 'three'}")
    alone, three = (tiny.metrics_of(tmp_path / name)[0] for name in ("alone", "three"))
    assert alone[names.SEQUENCES_KEPT] == three[names.SEQUENCES_KEPT] == 2
    assert three[names.BALANCE] > 1  # of three ranks, one is idle
    spoken = [n for n in alone if n.startswith(("loss/", "grad_norm/", "weights/", "policy/", "reward_model/"))]
    assert len(spoken) > 10
    assert {n: three[n] for n in spoken} == pytest.approx({n: alone[n] for n in spoken}, rel=1e-4, abs=1e-7)
