"""The benchmark scripts for machines with GPUs: what they would run is accepted by the commands that they call."""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import tiny

from megatron_oreal.bench.options import BenchOptions, read_options
from megatron_oreal.bench.workload import Workload
from megatron_oreal.cli import _parse
from megatron_oreal.config_check import check_config
from megatron_oreal.config_load import load_config
from megatron_oreal.layout.model_spec import load_model_spec

BENCHMARKS = tiny.REPOSITORY / "benchmarks"
SIZES = {"throughput_7b_32.sh": (32, "OREAL-7B-SFT"), "throughput_32b_128.sh": (128, "OREAL-32B-SFT")}


def gpu_bench() -> ModuleType:
    """``benchmarks/gpu/bench.py``."""
    spec = importlib.util.spec_from_file_location("gpu_bench", BENCHMARKS / "gpu" / "bench.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_bench"] = module
    spec.loader.exec_module(module)
    return module


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(BENCHMARKS / name), *arguments]
    drop = ("NNODES", "NODE_RANK", "SLURM_NODEID", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in drop}
    return subprocess.run(command, capture_output=True, text=True, cwd=tiny.REPOSITORY, env=env, check=False)


def dry_run(name: str, *arguments: str) -> list[list[str]]:
    """The commands that a script prints in place of running them."""
    done = script(name, "--dry-run", "--python", "python", *arguments)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("case", ["1.5b", "7b", "7b_half"])
def test_a_case_for_one_gpu_is_a_valid_config_and_workload(case: str, tmp_path: Path) -> None:
    module = gpu_bench()
    config = load_config(module.CONFIG, module.overrides(case, tmp_path, "embedded"))
    spec = load_model_spec(config.model.path)
    check_config(config, spec, world_size=1)
    work = Workload.draw(config, spec, BenchOptions(prompt_tokens=256))
    assert work.kept(work.first_step) and max(work.kept_lengths(work.first_step)) <= config.rollout.gen_max_length
    assert spec.num_layers == (14 if case == "7b_half" else 28)
    line = _parse(module.command(case, tmp_path, "embedded")[3:])
    assert read_options(line).repeats == 2


@pytest.mark.parametrize("name", SIZES)
def test_a_throughput_script_checks_and_then_starts_every_rank(name: str) -> None:
    world, model = SIZES[name]
    check, plan, bench = "check", "plan", "bench"
    place = ["--node-rank", "0", "--master-addr", "node0"]
    assert [line[3] for line in dry_run(name, *place)] == [plan, check, bench]
    assert [line[3] for line in dry_run(name, "--node-rank", "1", "--master-addr", "node0")] == [check, bench]
    assert [line[3] for line in dry_run(name, *place, "--skip-check")] == [bench]
    weights = f"examples/models/{model}"
    planned, measured = dry_run(name, *place, "--random-weights", weights, "--repeats", "5", "seed=3")
    assert planned[3] == plan and planned[planned.index("--world-size") + 1] == str(world)
    line = _parse(measured[3:])
    assert (line.nnodes * line.nproc_per_node, line.node_rank, line.master_addr) == (world, 0, "node0")
    assert read_options(line).repeats == 5
    config = load_config(line.config, line.overrides)
    assert config.seed == 3 and config.model.path == weights
    spec = load_model_spec(tiny.REPOSITORY / weights)
    assert Workload.draw(config, spec, BenchOptions()).describe()["samples_per_prompt"] == 16


def test_torchrun_is_started_with_the_same_arguments() -> None:
    place = ["--node-rank", "2", "--master-addr", "node0", "--skip-check"]
    ours, theirs = (
        dry_run("throughput_7b_32.sh", *place, "--launcher", kind)[0] for kind in ("megatron-oreal", "torchrun")
    )
    ranks = theirs[3 : theirs.index("-m", 3)]
    assert theirs[:3] == ["python", "-m", "torch.distributed.run"]
    assert all(word in ours for word in ranks)
    assert [word for word in ours[3:] if word not in ranks] == [
        word for word in theirs[3:] if word not in [*ranks, "-m", "megatron_oreal"]
    ]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--node-rank", "4", "--master-addr", "x"], "--node-rank 4 is not one of --nnodes 4"),
        (["--node-rank", "1"], "--master-addr is missing"),
        (["--node-rank", "one", "--master-addr", "x"], "--node-rank=one: must be a whole number"),
        (["--bogus"], "unknown option --bogus"),
        (["--repeats"], "--repeats needs a value"),
        (["--random-weights", "/nowhere", "--master-addr", "x"], "/nowhere: there is no config.json in it"),
        (["--launcher", "srun", "--master-addr", "x"], "megatron-oreal or torchrun"),
    ],
)
def test_a_mistake_ends_a_throughput_script_in_one_line(arguments: list[str], named: str) -> None:
    done = script("throughput_7b_32.sh", *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and named in done.stderr
