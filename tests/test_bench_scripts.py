"""The benchmark scripts for machines with GPUs: what they would run is accepted by the commands that they call."""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import tiny

from megatron_oreal.actor.specs import choose_implementation
from megatron_oreal.bench.options import BenchOptions, read_options
from megatron_oreal.bench.workload import Workload
from megatron_oreal.cli import _parse
from megatron_oreal.config_check import check_config
from megatron_oreal.config_load import load_config
from megatron_oreal.layout.model_spec import load_model_spec

BENCHMARKS = tiny.REPOSITORY / "benchmarks"
SIZES = {"throughput_7b_32.sh": (32, "OREAL-7B-SFT"), "throughput_32b_128.sh": (128, "OREAL-32B-SFT")}


def gpu_script(name: str) -> ModuleType:
    """``benchmarks/gpu/NAME.py``."""
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", BENCHMARKS / "gpu" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[f"gpu_{name}"] = module
    spec.loader.exec_module(module)
    return module


def gpu_bench() -> ModuleType:
    """``benchmarks/gpu/bench.py``."""
    return gpu_script("bench")


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
    work = tmp_path / "work"
    line = _parse(module.command(case, tmp_path, "embedded", work)[3:])
    assert read_options(line).repeats == 2
    assert load_config(line.config, line.overrides).work_path.is_relative_to(work)


def test_a_case_takes_the_attention_that_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = gpu_bench()
    monkeypatch.setenv("ATTENTION", "triton")
    config = load_config(module.CONFIG, module.overrides("1.5b", tmp_path, "sglang"))
    assert config.rollout.sglang["attention_backend"] == "triton" and config.rollout.sglang["mem_fraction_static"]
    monkeypatch.delenv("ATTENTION")
    config = load_config(module.CONFIG, module.overrides("1.5b", tmp_path, "sglang"))
    assert "attention_backend" not in config.rollout.sglang


def test_of_a_case_that_failed_the_ends_of_its_logs_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "servers").mkdir()
    (tmp_path / "servers" / "server0.log").write_text("".join(f"line {i}\n" for i in range(50)) + "no kernel image\n")
    gpu_bench().print_logs(tmp_path)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "-- server0.log" and printed[-1] == "no kernel image" and "line 19" not in printed


def test_a_case_that_hangs_is_ended_and_the_others_have_their_turn() -> None:
    run, python = gpu_bench().run, [sys.executable, "-S", "-c"]
    assert run([*python, "import sys; sys.exit(3)"], 60) == 3
    began = time.monotonic()
    assert run([*python, "import time; time.sleep(600)"], 0.5) is None
    assert time.monotonic() - began < 60


def test_the_first_run_asks_for_no_layers_that_refuse_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    first_run = gpu_script("first_run")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # TransformerEngine is installed
    asked = first_run.combinations(engine=True)
    assert ("transformer_engine", "bf16") in asked and first_run.combinations(engine=False) == asked[1:]
    for implementation, dtype in asked:
        assert choose_implementation(implementation, dtype, is_cuda=True) == implementation


@pytest.mark.parametrize(("major", "files"), [(9, ["flash_ops.abi3.so"]), (9, ["flash_attn.py"]), (8, None)])
def test_fa3_is_asked_for_only_where_its_library_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, major: int, files: list[str] | None
) -> None:
    machine = gpu_script("machine")
    for name in files or []:
        (tmp_path / name).touch()
    kernels = None if files is None else SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: kernels)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (major, 0))
    assert machine.attention_backend() == ("fa3" if files == ["flash_ops.abi3.so"] else "triton")


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
