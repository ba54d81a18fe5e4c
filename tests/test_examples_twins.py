"""Every config of ``examples/configs`` trains: two steps of its scaled-down twin on gloo ranks, the policy in the last.

The twins' parallel structure, algorithm, optimizer, sampling, recomputation and offloading are the shipped file's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path

import config_twins
import pytest
import tiny
import torch
from config_twins import MACHINES, STEPS, TWINS, Job, real_config
from safetensors.torch import load_file
from sglang_server import left_over, needs_sglang
from torch.distributed.checkpoint import FileSystemReader, load

from megatron_oreal.algorithm import learning_rate
from megatron_oreal.telemetry import names

LAUNCHES = (
    ("oreal_7b", "oreal_32b"),
    ("oreal_deepseek_distill_7b", "oreal_7b_without_reward_model", "oreal_7b_one_node"),
    ("oreal_1.5b_one_gpu",),
)
"""Twins that train one after the other in one ``torchrun`` launch; all but the first launch are slow."""
ALL = [pytest.param(name, marks=[pytest.mark.slow] if group else []) for group, n in enumerate(LAUNCHES) for name in n]
OFFLOADED = "oreal_32b"
"""Optimizer, reward model and reference wait in host memory: the most to lose on the way through a checkpoint."""


def prepare(name: str, folder: Path) -> Path:
    folder.mkdir(parents=True)
    config_twins.write_twin_model(name, folder / "model")
    config_twins.write_data(folder / "train.jsonl")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a config's twin: ``model``, and ``run`` after two steps. A launch starts when a test needs it."""
    root = tmp_path_factory.mktemp("twins")

    @functools.cache
    def launch(group: tuple[str, ...]) -> None:
        folders = {name: prepare(name, root / name) for name in group}
        config_twins.train_twins([Job(name, config_twins.overrides(name, path)) for name, path in folders.items()])

    def folder(name: str) -> Path:
        launch(next(group for group in LAUNCHES if name in group))
        return root / name

    return folder


def test_every_config_has_a_twin_that_trains() -> None:
    assert sorted(name for group in LAUNCHES for name in group) == sorted(MACHINES)


@pytest.mark.parametrize("name", MACHINES)
def test_a_twin_has_every_parallel_dimension_of_its_original(name: str) -> None:
    real, machine, twin = real_config(name), MACHINES[name], TWINS[name]
    assert (machine.tp, machine.pp) == (
        real.parallel.tensor_model_parallel_size,
        real.parallel.pipeline_model_parallel_size,
    )
    for size, small in zip((machine.tp, machine.pp, machine.dp), (twin.tp, twin.pp, twin.dp), strict=True):
        assert (size > 1) == (small > 1) and size % small == 0
    assert twin.ranks <= 4


@pytest.mark.parametrize("name", MACHINES)
def test_a_twin_differs_from_its_config_in_sizes_lengths_paths_and_engine_alone(name: str, tmp_path: Path) -> None:
    real = real_config(name).model_dump()
    twin = real_config(name, *config_twins.overrides(name, tmp_path)).model_dump()
    changed = {
        f"{section}.{key}" if isinstance(value, dict) else section
        for section, value in real.items()
        for key in (value if isinstance(value, dict) else [section])
        if (twin[section][key] != value[key] if isinstance(value, dict) else twin[section] != value)
    }
    paths = {"work_dir", "model.path", "data.train"}
    lengths = {"total_steps", "rollout.gen_max_new", "rollout.gen_max_length", "parallel.max_tokens_per_microbatch"}
    lengths |= {"algorithm.actor_freeze_steps", "checkpoint.every"}
    sizes = {f"parallel.{key}" for key in ("tensor_model_parallel_size", "recompute_num_layers")}
    sizes |= {f"rollout.{key}" for key in ("prompts_per_step", "prompt_repeat_k", "max_running_requests", "engine_tp")}
    engine = {"rollout.engine", "rollout.sglang", "device", "verifier.checker", "verifier.num_processes"}
    assert changed <= paths | lengths | sizes | engine


@pytest.mark.parametrize("name", ALL)
def test_a_twin_trains_two_steps_with_finite_losses_and_documented_metrics(
    trained: Callable[[str], Path], name: str
) -> None:
    records = tiny.metrics_of(trained(name) / "run")
    assert [record["step"] for record in records] == list(range(STEPS))
    for record in records:
        assert all(math.isfinite(value) for value in record.values())
        assert all(metric == "step" or names.describe(metric).meaning for metric in record)
        assert record[names.GROUPS_KEPT] > 0 and record[names.LOGP_DIFF_MEAN] < 0.05
        assert {names.LOSS_POSITIVE, names.LOSS_NEGATIVE, names.LOSS_KL, names.LOSS_TOTAL} <= record.keys()
        assert {names.ENTROPY, names.TOKENS_GENERATED, names.BALANCE, names.phase_metric("update")} <= record.keys()
    assert records[0][names.KL_TO_REFERENCE] == 0.0


@pytest.mark.parametrize("name", ALL)
def test_both_models_of_a_twin_learn_at_the_rates_of_its_config(trained: Callable[[str], Path], name: str) -> None:
    folder = trained(name)
    first, second = tiny.metrics_of(folder / "run")
    real = real_config(name)
    schedule = {"warmup_steps": real.optimizer.warmup_steps, "total_steps": STEPS}
    rate = learning_rate(1, base=real.optimizer.actor_lr, minimum=real.optimizer.actor_min_lr, **schedule)
    assert second[names.LR_POLICY] == rate == 1e-7  # two of ten steps of the warm-up to 5e-7
    assert second[names.GRAD_NORM_POLICY] > 0
    before = load_file(folder / "model" / "model.safetensors")
    after = load_file(folder / "run" / "hf" / "model.safetensors")
    assert before.keys() == after.keys()
    # bf16 weights move where 1e-7 crosses a rounding boundary, biases, which begin at zero, at once.
    assert all(not torch.equal(before[key], after[key]) for key in before if key.endswith("v_proj.bias"))
    if not real.model.reward_model:
        assert names.LOSS_REWARD_MODEL not in first and first[names.GRAD_NORM_POLICY] > 0
        return
    assert names.GRAD_NORM_POLICY not in first, "the first step is frozen"
    assert first[names.LOSS_REWARD_MODEL] == pytest.approx(math.log(2)) and first[names.POSITIVE_WEIGHT_NONZERO] == 0
    assert second[names.LOSS_REWARD_MODEL] < first[names.LOSS_REWARD_MODEL]
    assert second[names.POSITIVE_WEIGHT_NONZERO] > 0, "the reward model still scores zero"
    rate = learning_rate(
        1, base=real.optimizer.token_level_rm_lr, minimum=real.optimizer.token_level_rm_lr_min, **schedule
    )
    assert second[names.LR_REWARD_MODEL] == rate


def masters(checkpoint: Path, part: str) -> dict[str, torch.Tensor]:
    """A checkpoint's fp32 weights, which the distributed optimizer keeps."""
    reader = FileSystemReader(checkpoint / part)
    found = reader.read_metadata().state_dict_metadata
    wanted = {key: torch.zeros(found[key].size) for key in found if key.startswith("optimizer.state.param.")}
    load(wanted, storage_reader=reader, no_dist=True)
    return wanted


@pytest.mark.slow
def test_a_resumed_twin_repeats_metrics_and_weights_bit_for_bit(tmp_path: Path) -> None:
    folder = prepare(OFFLOADED, tmp_path / OFFLOADED)
    run, again = folder / "run", folder / "again"
    changes = [*config_twins.overrides(OFFLOADED, folder), "checkpoint.every=1"]
    resumed_at = str(run / "checkpoints" / "step_000001")
    jobs = [Job(OFFLOADED, changes), Job(OFFLOADED, [*changes, f"work_dir={again}"], resume_from=resumed_at)]
    config_twins.train_twins(jobs)
    timed = (names.TIME, "throughput/", names.PUBLISH_DIGEST_SHARE)

    def untimed(record: dict[str, float]) -> dict[str, float]:
        return {name: value for name, value in record.items() if not name.startswith(timed)}

    straight, resumed = tiny.metrics_of(run), tiny.metrics_of(again)
    assert [untimed(record) for record in resumed] == [untimed(straight[1])]
    for part in ("policy", "reward_model"):
        old, new, same = (
            masters(folder / "checkpoints" / f"step_{step:06d}", part)
            for folder, step in ((run, 1), (run, 2), (again, 2))
        )
        assert len(new) >= 9
        assert all(torch.equal(new[key], same[key]) for key in new)
        assert not any(torch.equal(old[key], new[key]) for key in new), f"{part} has tensors that did not learn"


@pytest.mark.slow
@needs_sglang
@pytest.mark.timeout(1200)
def test_a_twin_trains_beside_sglang_servers_as_large_as_its_tensor_parallel_groups(tmp_path: Path) -> None:
    before = left_over([])
    folder = prepare(OFFLOADED, tmp_path / OFFLOADED)
    job = Job(OFFLOADED, config_twins.overrides(OFFLOADED, folder, engine="sglang"))
    config_twins.train_twins([job], timeout_s=1100)
    records = tiny.metrics_of(folder / "run")
    assert [record["step"] for record in records] == list(range(STEPS))
    assert len(list((folder / "run" / "sglang").glob("engine*.json"))) == 2
    assert records[0][names.KL_TO_REFERENCE] == 0.0 and records[1][names.GRAD_NORM_POLICY] > 0
    assert all(record[names.GROUPS_KEPT] > 0 and record[names.LOGP_DIFF_MEAN] < 0.05 for record in records)
    assert records[1][names.PUBLISH_RECEIVED] == 0, "trainer and engines hold the same bytes"
    assert left_over(before) == []
