"""What the checks conclude: from what other machines print, from real files, servers and limits of this one."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny
from judge_server import JudgeServer, always
from ports import free_port

from megatron_oreal import cli
from megatron_oreal.config import Config
from megatron_oreal.config_load import load_config
from megatron_oreal.errors import UserError
from megatron_oreal.launch import threads_per_rank
from megatron_oreal.layout.families import hf_tensors
from megatron_oreal.layout.model_spec import load_model_spec
from megatron_oreal.preflight import devices, fabric, host, storage
from megatron_oreal.preflight.identity import differences, node_facts
from megatron_oreal.preflight.result import Check, NodeReport, as_text, checked, fail, ok, summary

TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version {}). Please update your GPU driver by downloading and "
    "installing a new version from the URL: http://www.nvidia.com/Download/index.aspx Alternatively, go to: "
    "https://pytorch.org to install a PyTorch version that has been compiled with your version of the CUDA driver."
)
NO_DRIVER = (
    "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver from "
    "http://www.nvidia.com/Download/index.aspx"
)
MISMATCH = (
    "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling NumCudaDevices() that "
    "might have already set an error? Error 803: system has unsupported display driver / cuda driver combination"
)
NOT_INITIALISED = MISMATCH.replace(
    "803: system has unsupported display driver / cuda driver combination", "802: system not yet initialized"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def run(tmp_path: Path, model: Path) -> Path:
    return tiny.write_run(tmp_path, model)


def only(checks: Any, name: str) -> Check:
    (found,) = [check for check in checks if check.name == name]
    return found


def check_command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Check], list[str]]:
    """Exit status, the findings by name, and the lines on standard error of ``megatron-oreal check``."""
    status = cli.main(["check", *map(str, arguments), "--json"])
    said = capsys.readouterr()
    (report,) = json.loads(said.out)
    return status, {item["name"]: Check(**item) for item in report["checks"]}, said.err.splitlines()


# The driver, from torch's words and NVML's number


@pytest.mark.parametrize(
    ("torch_cuda", "driver", "said", "parts"),
    [
        ("12.8", "470.86", TOO_OLD.format(11040), ["470.86, which supports CUDA 11.4", "12.8", "525.60.13 or newer"]),
        ("13.0", "535.183.01", TOO_OLD.format(12020), ["535.183.01, which supports CUDA 12.2", "580 or newer"]),
        ("12.8", None, TOO_OLD.format(11060), ["one that supports CUDA 11.6"]),
        ("12.4", "515.105.01", "no CUDA device is visible", ["driver 515.105.01:", "525.60.13 or newer"]),
        ("12.8", None, NO_DRIVER, ["no NVIDIA driver", "--gpus all"]),
        ("12.8", "550.54.15", MISMATCH, ["803", "reboot"]),
        ("12.8", "570.86.15", NOT_INITIALISED, ["802", "nvidia-fabricmanager"]),
    ],
)
def test_a_driver_that_torch_cannot_use_is_named_with_its_mend(
    torch_cuda: str, driver: str | None, said: str, parts: list[str]
) -> None:
    problem = devices.driver_problem(torch_cuda, driver, said)
    assert problem is not None
    assert [part for part in parts if part not in problem] == [], problem
    assert "\n" not in problem


@pytest.mark.parametrize(
    ("torch_cuda", "driver", "said"),
    [
        ("12.8", "470.86", None),  # it works: NVIDIA's compatibility package stands in for the driver
        ("12.8", "570.86.15", "no CUDA device is visible"),
        ("12.8", "525.60.13", "no CUDA device is visible"),
        (None, "470.86", "Torch not compiled with CUDA enabled"),
    ],
)
def test_a_driver_that_is_not_to_blame_is_left_alone(torch_cuda: str | None, driver: str, said: str | None) -> None:
    assert devices.driver_problem(torch_cuda, driver, said) is None


@pytest.mark.parametrize("requested", ["auto", "cuda"])
def test_training_does_not_fall_back_to_a_cpu_beside_a_gpu_with_an_old_driver(
    requested: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "torch_says", lambda: TOO_OLD.format(11040))
    monkeypatch.setattr(devices, "installed_driver", lambda: "470.86")
    monkeypatch.setattr(devices.torch.version, "cuda", "12.8")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UserError, match=r"driver 470\.86, which supports CUDA 11\.4: .* update the driver"):
        devices.require_gpus(requested, 8)
    found = list(devices.check_gpus(requested, 8))
    assert [(check.name, check.status) for check in found] == [("driver", "fail"), ("gpus", "fail")]


def test_training_does_not_fall_back_to_a_cpu_with_a_torch_that_has_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "torch_says", lambda: "Torch not compiled with CUDA enabled")
    monkeypatch.setattr(devices, "installed_driver", lambda: "570.86.15")
    monkeypatch.setattr(devices.torch.version, "cuda", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UserError, match=r"device=auto: .*not compiled with CUDA enabled\): install a CUDA build"):
        devices.require_gpus("auto", 8)


def test_a_hidden_gpu_and_a_machine_without_one_are_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "torch_says", lambda: NO_DRIVER)
    monkeypatch.setattr(devices.torch.version, "cuda", "12.8")
    monkeypatch.setattr(devices.torch.cuda, "is_available", lambda: False)
    for driver, visible in ((None, "0"), ("570.86.15", ""), ("570.86.15", "-1")):
        monkeypatch.setattr(devices, "installed_driver", lambda driver=driver: driver)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        devices.require_gpus("auto", 8)
        assert [check.status for check in devices.check_gpus("auto", 8)] == ["warning"]


# GPUs and links, from what nvidia-smi and sysfs say

TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tGPU3\tNIC0\tNIC1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV12\t{a}\t{b}\tPXB\tSYS\t48-63,176-191\t3\t\tN/A
GPU1\tNV12\t X \t{b}\t{a}\tPXB\tSYS\t48-63,176-191\t3\t\tN/A
GPU2\t{a}\t{b}\t X \tNV12\tSYS\tPXB\t16-31,144-159\t1\t\tN/A
GPU3\t{b}\t{a}\tNV12\t X \tSYS\tPXB\t16-31,144-159\t1\t\tN/A
NIC0\tPXB\tPXB\tSYS\tSYS\t X \tSYS\t\t\t\t
NIC1\tSYS\tSYS\tPXB\tPXB\tSYS\t X \t\t\t\t

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes (e.g., QPI/UPI)
"""


def test_links_between_gpus_are_read_and_those_to_network_cards_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere, pairs = TOPOLOGY.format(a="NV12", b="NV12"), TOPOLOGY.format(a="SYS", b="NODE")
    assert devices.slowest_links(everywhere, range(4)) == ["NV12"]
    assert devices.slowest_links(pairs, range(4)) == ["NODE", "NV12", "SYS"]
    assert devices.slowest_links(pairs, [2, 3]) == ["NV12"]
    assert devices.slowest_links(pairs, [0, 2]) == ["SYS"]
    assert devices.slowest_links("", range(4)) == []
    assert devices.slowest_links("Failed to query topology", range(2)) == []
    for visible, gpus in {"4,5,6": [4, 5], "GPU-1a2b,GPU-3c4d": [0, 1], "": [0, 1]}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert devices.visible_gpus(2) == gpus


def test_gpus_in_use_are_those_with_more_than_two_gib() -> None:
    assert devices.busy_devices("0, 4\n1, 71234\n2, [N/A]\n") == {1: 71234 * 2**20}


def write_port(root: Path, device: str, state: str) -> None:
    port = root / device / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text(f"{state}\n")
    (port / "rate").write_text("400 Gb/sec (4X NDR)\n")


def test_rdma_is_there_when_a_port_is_active(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCCL_IB_DISABLE", raising=False)
    assert devices.rdma(tmp_path).status == "warning"
    write_port(tmp_path, "mlx5_0", "1: DOWN")
    down = devices.rdma(tmp_path)
    assert down.status == "warning" and "mlx5_0 400 Gb/sec" in down.detail
    write_port(tmp_path, "mlx5_1", "4: ACTIVE")
    assert devices.rdma(tmp_path) == ok("rdma", "mlx5_1 400 Gb/sec (4X NDR); not active: mlx5_0 400 Gb/sec (4X NDR)")
    monkeypatch.setenv("NCCL_IB_DISABLE", "1")
    assert "NCCL_IB_DISABLE=1" in devices.rdma(tmp_path).detail


def test_bandwidth_is_that_of_the_bus_and_below_the_least_it_fails() -> None:
    assert fabric.bus_bandwidth(8, 10**9, 0.01) == pytest.approx(175.0)  # 2 x 7/8 x 1 GB / 10 ms
    found = fabric.Bandwidth("RDMA", 16, 2**28, 3.0, {"a": 200.0, "b": 150.0})
    slow = fabric.judge(found)
    assert slow.status == "fail"
    assert "3 GB/s" in slow.detail and "--min-bandwidth=10" in slow.detail and "least on b" in slow.detail
    assert fabric.judge(found, 2.5).status == "ok"
    inside = {"a": 200.0, "b": 20.0}
    for kinds, status in {("NVLink", "NVLink"): "fail", ("NVLink", "PCIe"): "ok"}.items():
        broken = fabric.judge(fabric.Bandwidth("RDMA", 16, 2**28, 19.0, inside, dict(zip("ab", kinds, strict=True))))
        assert broken.status == status
        assert ("within b the all-reduce has a bus bandwidth of 20 GB/s, less than 50" in broken.detail) == (
            status == "fail"
        )


def test_a_rank_that_never_got_on_is_named(tmp_path: Path) -> None:
    for rank, stages in {8: ["all to join", "the first all-reduce"], 9: ["all to join"], 10: []}.items():
        with fabric.Stages(tmp_path, 3600.0, rank) as seen:
            for stage in stages:
                seen.at(stage)

    def said(*ranks: int) -> str:
        found = fabric.read_result(tmp_path, ranks, 30.0)
        assert isinstance(found, Check) and found.status == "fail"
        return found.detail

    assert said(8, 9).startswith("a rank of this node ended by itself, while rank 9 waited for all to join: ")
    state = tmp_path / "rank_8.json"  # as at the deadline
    state.write_text(json.dumps(json.loads(state.read_text()) | {"waited": True}))
    assert said(8, 9).startswith("rank 9 has waited 30 s for all to join: ")
    assert said(8, 9, 10).startswith("rank 10 has waited 30 s for its start: ")


def test_a_result_that_is_being_written_at_the_deadline_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = fabric.Bandwidth("gloo", 2, 2**22, 1.0, {})
    stages = fabric.Stages(tmp_path, 3600.0, 0)
    stages.at("all to join")
    deadline, write, left = threading.Thread(target=stages._end), stages._write, []

    def late(state: dict[str, Any]) -> None:
        deadline.start()
        deadline.join(0.5)
        write(state)

    monkeypatch.setattr(stages, "_write", late)
    monkeypatch.setattr(fabric.os, "_exit", lambda _: left.append(fabric.read_result(tmp_path, [0], 3600.0)))
    stages.done(found)
    deadline.join()
    assert left == [found]


# Packages, memory, descriptors


def test_versions_are_compared_with_the_requirements() -> None:
    wanted = ["torch>=2.6", "torch>=99", "no-such-package>1", "also-missing>=1; extra == 'dev'", "numpy<1"]
    wrong = list(host.wrong_versions(wanted))
    assert len(wrong) == 3
    assert wrong[0].startswith("torch 2") and wrong[0].endswith("wanted >=99")
    assert wrong[1] == "no-such-package is not installed, wanted >1"


def test_ranks_share_the_cores_that_their_launcher_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(48, 64)))  # a job's part of a larger machine
    assert [threads_per_rank(ranks) for ranks in (1, 8, 32)] == [16, 2, 1]


def test_a_socket_for_every_request_in_flight(run: Path) -> None:
    config = load_config(run, ["rollout.engine=sglang", "rollout.engine_tp=2", "rollout.prompts_per_step=1000"])
    base = host.wanted_descriptors(load_config(run), 8)
    assert host.wanted_descriptors(config, 8) == base + 4 * 512 + 4  # four servers
    assert host.wanted_descriptors(config, 64) == base + 4000 + 32  # no more than there are samples
    config.verifier.hosts = ["a:1", "b:2"]
    assert host.wanted_descriptors(config, 64) == base + 4000 + 32 + 1 * 8


def test_too_low_a_limit_of_open_files_is_said(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(run, ["rollout.engine=sglang", "rollout.prompts_per_step=1000"])
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    found = only(host.check_descriptors(config, 8), "open files")
    assert found.status == "warning"
    assert "ulimit -Hn is 4096" in found.detail and "requests_per_server" in found.detail


def test_memory_is_what_the_container_leaves(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 2000000 kB\nMemAvailable:    1000000 kB\n")
    own = tmp_path / "own"
    assert host.available_memory(meminfo, tmp_path, own) == 1000000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("4096\n")
    assert host.available_memory(meminfo, tmp_path, own) == 1000000 * 1024
    (tmp_path / "memory.max").write_text("104096\n")
    assert host.available_memory(meminfo, tmp_path, own) == 100000
    (tmp_path / "memory.stat").write_text("file 4000\nactive_file 1000\ninactive_file 2000\n")
    assert host.available_memory(meminfo, tmp_path, own) == 103000, "files that were read count as used"


@pytest.mark.parametrize(
    ("line", "folder", "limit", "used", "prefix"),
    [
        ("0::/slurm/job_7/step_0", "slurm/job_7", "memory.max", "memory.current", ""),
        (
            "9:cpu,memory:/slurm/uid_1/job_7",
            "memory/slurm/uid_1",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_",
        ),
    ],
    ids=["version 2", "version 1"],
)
def test_memory_is_what_a_schedulers_job_leaves(
    tmp_path: Path, line: str, folder: str, limit: str, used: str, prefix: str
) -> None:
    """The limit stands at the job or above it, not at the root of the tree as in a container."""
    meminfo, own, job = tmp_path / "meminfo", tmp_path / "own", tmp_path / folder
    meminfo.write_text("MemAvailable:    1000000 kB\n")
    own.write_text(f"4:pids:/elsewhere\n{line}\n")
    job.mkdir(parents=True)
    (job / limit).write_text("500000\n")
    (job / used).write_text("200000\n")
    (job / "memory.stat").write_text(f"{prefix}active_file 50000\n{prefix}inactive_file 0\n")
    assert host.available_memory(meminfo, tmp_path, own) == 350000


def test_offloaded_bytes_of_a_rank(run: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = load_model_spec(model)
    policy, scorer = spec.num_parameters(), host.reward_model_parameters(spec)
    assert scorer == policy - (spec.vocab_size - 1) * spec.hidden_size  # a scalar head in the vocabulary's place
    config = load_config(run, ["model.dtype=bf16", "parallel.tensor_model_parallel_size=2"])
    assert host.offloaded_bytes(config, spec, 8) == 0
    config.parallel.offload = ["optimizer"]
    assert host.offloaded_bytes(config, spec, 8) == policy // 2 * 12 // 4
    config.parallel.offload = ["policy", "reference", "reward_model"]
    assert host.offloaded_bytes(config, spec, 8) == 2 * policy // 2 * 2 + scorer // 2 * 2 + scorer // 2 * 12 // 4
    monkeypatch.setattr(host, "available_memory", lambda: 512 * 2**30)
    found = list(host.check_memory(config, load_model_spec("examples/models/OREAL-32B-SFT"), 8, 8, "cuda"))
    assert found[0].status == "fail" and "parallel.offload" in found[0].detail


def test_weights_that_are_kept_for_servers_count(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = load_model_spec("examples/models/OREAL-32B-SFT")
    served = ["rollout.engine=sglang", "model.dtype=bf16"]
    config = load_config(run, [*served, "rollout.engine_tp=4"])
    assert host.kept_bytes(config, spec) * 4 == spec.num_parameters() * 2
    assert host.kept_bytes(load_config(run, ["rollout.engine=embedded"]), spec) == 0
    assert host.kept_bytes(load_config(run, [*served, "rollout.server.keep_weights=false"]), spec) == 0
    config.rollout.engine_tp = 1  # 8 copies of 61 GiB a node
    needed = host.kept_bytes(config, spec) * 8
    monkeypatch.setattr(host, "available_memory", lambda: needed - 1)
    found = list(host.check_memory(config, spec, 8, 8, "cuda"))
    assert found[0].status == "fail"
    assert f"{needed / 2**30:.0f} GiB pinned for parallel.offload and rollout.server.keep_weights" in found[0].detail
    assert "set rollout.server.keep_weights=false" in found[0].detail


def test_an_allocator_whose_memory_no_server_can_map_is_said_before_a_run(run: Path) -> None:
    config = load_config(run, ["rollout.engine=sglang"])
    set_so = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    found = checked("allocator", lambda: host.check_server_allocator(config, "cuda", set_so))
    assert [check.status for check in found] == ["fail"]
    assert "remove expandable_segments" in found[0].detail
    assert [check.status for check in host.check_server_allocator(config, "cuda", {})] == ["ok"]
    config.rollout.engine = "embedded"
    assert list(host.check_server_allocator(config, "cuda", set_so)) == []


# The command on one node: what is wrong ends it before a model is built


def test_a_sound_environment_passes_and_leaves_nothing_behind(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found, errors = check_command(capsys, run, "--nproc-per-node", 2)
    assert (status, errors) == (0, [])
    assert {check.status for check in found.values()} == {"ok"}
    expected = {"config", "gpus", "packages", "model", "data", "disk", "work_dir", "verifier", "host memory"}
    assert expected <= set(found)
    assert not (tmp_path / "run").exists()


def wrong_world(folder: Path, model: Path) -> list[str]:
    return ["parallel.tensor_model_parallel_size=2"]


def missing_gpu(folder: Path, model: Path) -> list[str]:
    return ["device=cuda"]


def unconverted(folder: Path, model: Path) -> list[str]:
    return [f"model.megatron_checkpoint={model}"]


def missing_tensors(folder: Path, model: Path) -> list[str]:
    """A download that was cut off: the first of two shards is there."""
    shutil.copytree(model, folder / "half")
    (folder / "half" / "model.safetensors").rename(folder / "half" / "model-00001-of-00002.safetensors")
    files = dict.fromkeys(hf_tensors(load_model_spec(model)), "model-00001-of-00002.safetensors")
    files |= {"model.norm.weight": "model-00002-of-00002.safetensors"}
    (folder / "half" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return [f"model.path={folder / 'half'}"]


def truncated_file(folder: Path, model: Path) -> list[str]:
    shutil.copytree(model, folder / "cut")
    path = folder / "cut" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return [f"model.path={folder / 'cut'}"]


def missing_prompts(folder: Path, model: Path) -> list[str]:
    return [f"data.train={folder / 'gone.jsonl'}"]


def full_disk(folder: Path, model: Path) -> list[str]:
    return [
        "model.path=examples/models/OREAL-32B-SFT",
        "model.dtype=bf16",
        "checkpoint.every=10",
        "checkpoint.keep=900",
    ]


def file_for_a_work_dir(folder: Path, model: Path) -> list[str]:
    (folder / "occupied").write_text("")
    return [f"work_dir={folder / 'occupied' / 'run'}"]


def unreachable_judge(folder: Path, model: Path) -> list[str]:
    return [f"verifier.hosts=[127.0.0.1:{free_port()}]"]


def foreign_address(folder: Path, model: Path) -> list[str]:
    return ["rollout.engine=sglang", "rollout.server.host=192.0.2.1"]  # of no machine (RFC 5737)


WRONG = [
    (wrong_world, "config", ["tensor_model_parallel_size=2", "world size 3", "start a multiple of 2 ranks"]),
    (missing_gpu, "gpus", ["device=cuda: torch sees no CUDA device", "device=cpu"]),
    (unconverted, "config", ["model.megatron_checkpoint=", "hf_to_megatron.py"]),
    (missing_tensors, "model", ["model.path:", "model-00002-of-00002.safetensors"]),
    (truncated_file, "model", ["model.path:", "cut/model.safetensors"]),
    (missing_prompts, "data", ["gone.jsonl: no such file"]),
    (full_disk, "disk", ["free under", "checkpoint.keep=900", "another work_dir"]),
    (file_for_a_work_dir, "work_dir", ["occupied"]),
    (unreachable_judge, "verifier", ["verifier.hosts: none of the 1 judge hosts", "start them"]),
    (foreign_address, "ports", ["rollout.server.host='192.0.2.1'", "hostname -I"]),
]


@pytest.mark.parametrize(("make", "name", "parts"), WRONG, ids=[make.__name__ for make, _, _ in WRONG])
def test_a_wrong_environment_is_one_line_with_its_mend(
    run: Path, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], make: Any, name: str, parts: list[str]
) -> None:
    status, found, errors = check_command(capsys, run, *make(tmp_path, model), "--nproc-per-node", 3)
    assert status == 1
    assert found[name].status == "fail"
    assert [part for part in parts if part not in found[name].detail] == [], found[name].detail
    (line,) = errors
    assert line.startswith("error: check ")
    assert not (tmp_path / "run").exists()


def test_a_mistake_in_the_command_is_status_two(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(run), "rollout.topp=1"]) == 2
    assert cli.main(["check", str(run), "--nnodes", "2", "--node-rank", "2"]) == 2
    assert cli.main(["check", str(run), "--master-port", "70000"]) == 2
    assert cli.main(["check", str(run), "--min-bandwidth", "nan"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 4


def test_a_taken_master_port_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        status, found, _ = check_command(capsys, run, "--nnodes", 2, "--master-port", port)
    assert status == 1
    assert f"--master-port={port} is taken" in found["nodes"].detail


def test_judges_are_asked_for_a_verdict(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with JudgeServer() as good, JudgeServer(always("INCORRECT")) as bad:
        hosts = f"verifier.hosts=[{good.host}, {bad.host}]"
        status, found, _ = check_command(capsys, run, hosts)
        asked = len(good.payloads)
    assert status == 0
    assert asked >= 1
    assert found["verifier"].status == "warning" and bad.host in found["verifier"].detail


# Files


def test_what_a_run_writes_is_counted(run: Path, model: Path, tmp_path: Path) -> None:
    spec = load_model_spec(model)
    policy, scorer = spec.num_parameters(), host.reward_model_parameters(spec)
    config = load_config(run, ["checkpoint.every=1", "checkpoint.keep=2", "model.dtype=bf16"])
    assert storage.disk_bytes(config, spec) == 3 * (policy + scorer) * 14 + policy * 2
    config.model.reward_model = False
    config.checkpoint.export_hf = False
    assert storage.disk_bytes(config, spec) == 3 * policy * 14
    config.checkpoint.every = 0
    assert storage.disk_bytes(config, spec) == 0


def test_another_directory_of_the_same_name_is_not_shared(tmp_path: Path) -> None:
    with storage.nonce_file(tmp_path / "a" / "run", "1234"):
        (same,) = storage.check_seen(tmp_path / "a" / "run", "1234", "node0", timeout_s=1)
        (other,) = storage.check_seen(tmp_path / "b", "1234", "node0", timeout_s=0.3)
    assert same.status == "ok"
    assert other.status == "fail" and "node0" in other.detail and "shared file system" in other.detail
    assert list(tmp_path.iterdir()) == []


# What nodes compare


def facts_of(config: Config, host_name: str, **changes: Any) -> dict[str, Any]:
    return node_facts(config, 8, "550.54.15") | {"host": host_name} | changes


def test_every_kind_of_difference_between_nodes_is_named(run: Path, model: Path, tmp_path: Path) -> None:
    config, other = load_config(run), load_config(run, ["optimizer.actor_lr=5e-4"])
    assert list(differences([facts_of(config, "a"), facts_of(config, "b")])) == []
    ((kind, line),) = differences([facts_of(config, "a"), facts_of(config, "b"), facts_of(other, "c")])
    assert kind == "config"
    assert line.startswith("optimizer.actor_lr is 0.001 on node 0 (a) and 0.0005 on node 2 (c): ")
    shutil.copytree(model, tmp_path / "copy")
    stem = facts_of(config, "a")
    (tmp_path / "copy" / "config.json").write_text((model / "config.json").read_text() + "\n")
    moved = load_config(run, [f"model.path={tmp_path / 'copy'}"])
    changed = facts_of(moved, "b") | {"config": stem["config"]}
    assert [kind for kind, _ in differences([stem, changed])] == ["model"]
    shutil.copy(config.data.train, tmp_path / "copy.jsonl")
    same = load_config(run, [f"data.train={tmp_path / 'copy.jsonl'}"])
    assert list(differences([stem, facts_of(same, "b") | {"config": stem["config"]}])) == []
    with (tmp_path / "copy.jsonl").open("a") as file:
        file.write("\n")
    longer = facts_of(same, "b") | {"config": stem["config"]}
    assert "data.train is" in dict(differences([stem, longer]))["prompts"]
    older = {kind: fact for kind, fact in stem.items() if kind != "prompts"} | {"code": {"megatron-oreal": "0.0.1"}}
    assert "code" in dict(differences([stem, older]))
    newer = facts_of(config, "b", packages=stem["packages"] | {"torch": "9.9"})
    assert "torch is" in dict(differences([stem, newer]))["packages"]
    fewer = facts_of(config, "b", **{"ranks a node": {"--nproc-per-node": 4}})
    assert "--nproc-per-node is 8 on node 0 (a) and 4 on node 1 (b)" in dict(differences([stem, fewer]))["ranks a node"]
    drivers = facts_of(config, "b", driver={"driver": "470.86"})
    assert list(differences([stem, drivers])) == []
    assert "550.54.15" in dict(differences([stem, drivers], soft=True))["driver"]


def test_the_address_of_a_nodes_own_servers_may_differ(run: Path) -> None:
    one, two = (load_config(run, [f"rollout.server.host=10.0.0.{number}"]) for number in (1, 2))
    assert list(differences([facts_of(one, "a"), facts_of(two, "b")])) == []


def test_the_table_names_the_node_of_a_complaint_and_a_check_that_all_passed_once() -> None:
    reports = [
        NodeReport(0, "a", [ok("gpus", "8 x H100"), ok("disk", "fine")]),
        NodeReport(1, "b", [ok("gpus", "8 x H100"), fail("disk", "full: free some")]),
    ]
    lines = as_text(reports).splitlines()
    assert lines == ["gpus  ok       8 x H100", "disk  fail     node 1 (b): full: free some"]
    assert summary(reports) == "check disk failed on node 1 (b): full: free some"
