"""The launch scripts: the exact commands that they print, and the scripts themselves on this machine.

``srun``, ``scontrol``, ``vllm`` and the Hugging Face hub are not here: programs and a server stand in for them that do
what the scripts rely on. The scripts, the trainer, the checks and the converters are the real ones.
"""

from __future__ import annotations

import http.server
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import tiny
from ports import free_port
from torch.distributed.run import get_args_parser

from megatron_oreal import cli
from megatron_oreal.config_load import load_config
from megatron_oreal.layout.model_spec import load_model_spec
from megatron_oreal.preflight.storage import checkpoint_bytes

EXAMPLES = tiny.REPOSITORY / "examples"
SCRIPTS = [
    "train_one_node",
    "train_multi_node",
    "slurm_train",
    "prepare",
    "launch_verifier",
    "export",
    "oreal_7b_32gpu",
    "oreal_32b_128gpu",
]


def environment(changes: Mapping[str, str] | None = None, path: Path | None = None) -> dict[str, str]:
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NNODES", "NODE_RANK")
    env = {name: value for name, value in os.environ.items() if name not in drop and not name.startswith("SLURM_")}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{tiny.REPOSITORY}"}
    if path is not None:
        env["PATH"] = f"{path}:{env['PATH']}"
    return env | dict(changes or {})


def script(
    name: str,
    *arguments: object,
    env: Mapping[str, str] | None = None,
    path: Path | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(EXAMPLES / f"{name}.sh"), *map(str, arguments)],
        env=environment(env, path),
        cwd=cwd or tiny.REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def printed(name: str, *arguments: object, env: Mapping[str, str] | None = None, path: Path | None = None) -> list[str]:
    """The commands of a dry run, line by line."""
    done = script(name, *arguments, "--dry-run", env=env, path=path)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def run(tmp_path: Path, model: Path) -> Path:
    return tiny.write_run(tmp_path, model)


# What would run


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_printed_and_a_wrong_option_is_one_line(name: str) -> None:
    shown = script(name, "--help")
    assert shown.returncode == 0 and shown.stderr == ""
    assert "usage: " in shown.stdout and "--dry-run" in shown.stdout
    done = script(name, "--no-such-option")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "--no-such-option" in line


def test_one_node_checks_and_trains() -> None:
    config = "examples/configs/oreal_7b_one_node.yaml"
    overrides = ["total_steps=3", 'verifier.hosts=["10.0.0.5:10003"]', "work_dir=a b"]
    quoted = f'{config} total_steps=3 verifier.hosts=\\[\\"10.0.0.5:10003\\"\\] work_dir=a\\ b --nproc-per-node 8'
    lines = printed("train_one_node", config, *overrides, "--nproc-per-node", 8)
    assert lines == [
        f"python3 -m megatron_oreal check {quoted} --fabric",
        f"python3 -m megatron_oreal train {quoted}",
    ]
    again = subprocess.run(["bash", "-c", f"printf '%s\\n' {quoted}"], capture_output=True, text=True, check=True)
    assert again.stdout.splitlines() == [config, *overrides, "--nproc-per-node", "8"], "it cannot be pasted"


def test_the_variables_of_the_field_are_defaults_and_options_come_first() -> None:
    variables = {"NNODES": "4", "NODE_RANK": "3", "MASTER_ADDR": "node0", "MASTER_PORT": "1234"}
    where = "--nnodes 4 --node-rank 3 --nproc-per-node 2 --master-addr node0 --master-port 1234"
    config = "examples/configs/oreal_7b.yaml"
    options = ["--nproc-per-node", 2, "--no-fabric", "--python", "py"]
    assert printed("train_multi_node", config, *options, env=variables) == [
        f"py -m megatron_oreal check {config} {where}",
        f"py -m megatron_oreal train {config} {where}",
    ]
    options += ["--master-addr", "other", "--launcher", "torchrun", "--skip-check", "seed=1"]
    assert printed("train_multi_node", config, *options, env=variables) == [
        f"py -m torch.distributed.run {where.replace('node0', 'other')} -m megatron_oreal train {config} seed=1"
    ]


@pytest.mark.parametrize(
    ("name", "config", "nodes"), [("oreal_7b_32gpu", "oreal_7b", 4), ("oreal_32b_128gpu", "oreal_32b", 16)]
)
def test_the_named_runs_are_their_configs_on_their_nodes(name: str, config: str, nodes: int) -> None:
    where = f"--nnodes {nodes} --node-rank 1 --nproc-per-node 8 --master-addr node0 --master-port 29500"
    lines = printed(name, "--node-rank", 1, "--master-addr", "node0", "total_steps=40")
    path = f"{EXAMPLES}/configs/{config}.yaml"
    assert lines == [
        f"python3 -m megatron_oreal check {path} total_steps=40 {where} --fabric",
        f"python3 -m megatron_oreal train {path} total_steps=40 {where}",
    ]
    assert load_config(path).model.path.startswith("models/OREAL-")


def parsed(line: str) -> tuple[str, str, list[str], int, int, int, str, int]:
    """What the command line or torchrun's own parser makes of a printed command: command, config, overrides, ranks."""
    words = shlex.split(line)
    at = words.index("megatron_oreal") + 1
    ours = cli._parse(words[at:])
    ranks = ours
    if "torch.distributed.run" in words:
        ranks = get_args_parser().parse_args(words[words.index("torch.distributed.run") + 1 :])
        assert ranks.module and ranks.training_script == "megatron_oreal"
    nproc, nnodes = int(ranks.nproc_per_node), int(ranks.nnodes)
    where = (int(ranks.node_rank), ranks.master_addr, int(ranks.master_port))
    return ours.command, ours.config, ours.overrides, nnodes, nproc, *where


def test_what_is_printed_means_the_same_to_the_programs_that_read_it(tmp_path: Path) -> None:
    config = "examples/configs/oreal_7b.yaml"
    overrides = ["total_steps=3", 'verifier.hosts=["10.0.0.5:10003"]']
    run = [*overrides, "--join-timeout", 60]
    where = ["--node-rank", 1, "--master-addr", "node0", "--master-port", 1234]
    found = [parsed(line) for line in printed("train_one_node", config, *overrides, "--nproc-per-node", 8)]
    assert found == [(name, config, overrides, 1, 8, 0, "localhost", 29500) for name in ("check", "train")]
    for launcher in ("megatron-oreal", "torchrun"):
        lines = printed("oreal_7b_32gpu", *run, *where, "--launcher", launcher)
        expected = [
            (name, f"{EXAMPLES}/configs/oreal_7b.yaml", overrides, 4, 8, 1, "node0", 1234)
            for name in ("check", "train")
        ]
        assert [parsed(line) for line in lines] == expected
    write_program(tmp_path / "scontrol", "#!/bin/bash\nprintf '%s\\n' gpu07 gpu08\n")
    job = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_JOB_NUM_NODES": "2"}
    (srun,) = printed("slurm_train", config, *run, "--nproc-per-node", 8, env=job, path=tmp_path)
    task = shlex.split(srun)[shlex.split(srun).index("bash") :]
    env = environment({"SLURM_NODEID": "1"})
    done = subprocess.run(
        [*task, "--dry-run"], env=env, cwd=tiny.REPOSITORY, capture_output=True, text=True, check=True
    )
    expected = [(name, config, overrides, 2, 8, 1, "gpu07", 23456) for name in ("check", "train")]
    assert [parsed(line) for line in done.stdout.splitlines()] == expected


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--nnodes is missing"),
        (["--nnodes", 2], "--node-rank is missing"),
        (["--nnodes", 2, "--node-rank", 0], "--master-addr is missing"),
        (["--nnodes", "two", "--node-rank", 0, "--master-addr", "h"], "--nnodes=two"),
        (["--nnodes", 2, "--node-rank", 0, "--master-addr", "h", "--launcher", "mpirun"], "--launcher mpirun"),
        (["--nnodes", 2, "--node-rank", 0, "--master-addr", "h", "gone.yaml"], "gone.yaml"),
        (["--nnodes"], "--nnodes needs a value"),
    ],
)
def test_what_several_nodes_need_is_asked_for(arguments: list[object], named: str) -> None:
    done = script("train_multi_node", *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and named in line


def test_verifiers_of_every_backend() -> None:
    common = ["--replicas", 2, "--tp", 2, "--address", "10.0.0.5", "--model", "M", "--port", 8000]
    commands = {
        "sglang": "python3 -m sglang.launch_server --model-path M --tp-size 2 --host 0.0.0.0 --port {}",
        "vllm": "vllm serve M --tensor-parallel-size 2 --host 0.0.0.0 --port {}",
        "lmdeploy": "lmdeploy serve api_server M --tp 2 --server-name 0.0.0.0 --server-port {}",
    }
    for backend, command in commands.items():
        assert printed("launch_verifier", *common, "--backend", backend) == [
            f"env CUDA_VISIBLE_DEVICES=0\\,1 {command.format(8000)}",
            f"env CUDA_VISIBLE_DEVICES=2\\,3 {command.format(8001)}",
            'verifier.hosts=["10.0.0.5:8000","10.0.0.5:8001"]',
        ]
    done = script(
        "launch_verifier", "--dry-run", "--address", "h", "--gpus", "4,5,6,7", "--", "--chat-template", "qwen"
    )
    assert done.stdout.splitlines()[0].startswith("env CUDA_VISIBLE_DEVICES=4\\,5\\,6\\,7 python3 -m sglang")
    assert done.stdout.splitlines()[0].endswith("--port 10003 --chat-template qwen")
    assert "7 GPUs" not in done.stderr
    few = script("launch_verifier", "--dry-run", "--gpus", "4,5", "--tp", 4)
    assert few.returncode == 2 and "2 GPUs for --replicas 1 x --tp 4" in few.stderr


def test_preparation_and_export() -> None:
    prepare, tools = f"{EXAMPLES}/prepare", f"{tiny.REPOSITORY}/tools/checkpoint_convert"
    assert printed("prepare", "--model", "internlm/OREAL-32B-SFT", "--megatron", "models/m", "--tp", 8) == [
        f"python3 {prepare}/fetch_model.py internlm/OREAL-32B-SFT models/OREAL-32B-SFT --revision main",
        f"python3 {prepare}/fetch_prompts.py internlm/OREAL-RL-Prompts data/OREAL-RL-Prompts.jsonl",
        f"python3 {tools}/hf_to_megatron.py --hf models/OREAL-32B-SFT --out models/m --tp 8 --pp 1",
    ]
    done = script("export", "gone", "--out", "x", "--dry-run")
    assert done.returncode == 2 and "gone/checkpoints has no step_XXXXXX" in done.stderr


def test_a_slurm_job_starts_one_launcher_a_node(tmp_path: Path) -> None:
    write_program(tmp_path / "scontrol", "#!/bin/bash\nprintf '%s\\n' gpu07 gpu08\n")
    job = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_JOB_NUM_NODES": "2"}
    job |= {"SLURM_GPUS_ON_NODE": "8"}
    options = ["--srun-arg", "--container-image=i", "--srun-arg", "-E", "--no-fabric", "--join-timeout", 60, "seed=1"]
    (line,) = printed("slurm_train", "examples/configs/oreal_7b.yaml", *options, env=job, path=tmp_path)
    assert line == (
        "srun --nodes 2 --ntasks 2 --ntasks-per-node 1 --kill-on-bad-exit=1 --container-image=i -E env -u NODE_RANK "
        f"bash {EXAMPLES}/train_multi_node.sh examples/configs/oreal_7b.yaml seed=1 --nnodes 2 --nproc-per-node 8 "
        "--master-addr gpu07 --master-port 23456 --join-timeout 60 --no-fabric --python python3"
    )
    done = script("slurm_train", "examples/configs/oreal_7b.yaml")
    assert done.returncode == 2 and "sbatch" in done.stderr


def test_a_script_that_sbatch_has_copied_finds_the_repository(tmp_path: Path) -> None:
    copy = tmp_path / "slurm_script"
    copy.write_text((EXAMPLES / "slurm_train.sh").read_text())
    command = ["bash", str(copy), "examples/configs/oreal_7b.yaml", "--nproc-per-node", "8", "--dry-run"]
    done = subprocess.run(
        command, env=environment({"SLURM_SUBMIT_DIR": str(tiny.REPOSITORY)}), cwd=tiny.REPOSITORY, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and f"{EXAMPLES}/train_multi_node.sh" in done.stdout
    lost = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert lost.returncode == 2 and "submit from the root" in lost.stderr


# What does run


def test_a_failed_check_ends_the_script_with_its_line(run: Path, tmp_path: Path) -> None:
    options = ["--nproc-per-node", 1, "--python", sys.executable, "device=cuda"]
    done = script("train_one_node", run, *options)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: check gpus failed: device=cuda: torch sees no CUDA device")
    assert not (tmp_path / "run").exists()


def test_a_python_without_the_package_is_said(run: Path, tmp_path: Path) -> None:
    write_program(tmp_path / "py", "#!/bin/bash\nexit 1\n")
    done = script("train_one_node", run, "--nproc-per-node", 1, "--python", tmp_path / "py")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'py'} has no megatron_oreal: ")


def test_a_python_that_finds_the_package_and_not_what_it_needs_is_said(run: Path, tmp_path: Path) -> None:
    """In the root of the repository every Python finds the package."""
    write_program(tmp_path / "py", f'#!/bin/bash\nexec "{sys.executable}" -S "$@"\n')
    done = script("train_one_node", run, "--nproc-per-node", 1, "--python", tmp_path / "py")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path / 'py'} has no megatron_oreal (ModuleNotFoundError: No module named ")


FAKE_VLLM = """#!{python}
import sys, threading
sys.path.insert(0, "{tests}")
from judge_server import JudgeServer
assert sys.argv[1:4] == ["serve", "some-model", "--tensor-parallel-size"], sys.argv
with JudgeServer(port=int(sys.argv[sys.argv.index("--port") + 1])):
    threading.Event().wait()
"""


def test_verifiers_are_started_announced_and_ended_together(tmp_path: Path) -> None:
    write_program(tmp_path / "vllm", FAKE_VLLM.format(python=sys.executable, tests=tiny.REPOSITORY / "tests"))
    bystander = subprocess.Popen(["sleep", "600"])
    port = free_port(2)
    arguments = ["--backend", "vllm", "--model", "some-model", "--replicas", "2", "--gpus", "none", "--port", str(port)]
    command = ["bash", str(EXAMPLES / "launch_verifier.sh"), *arguments, "--address", "127.0.0.1"]
    command += ["--python", sys.executable, "--log-dir", str(tmp_path / "logs")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    service = subprocess.Popen(command, env=environment(path=tmp_path), text=True, **pipes)
    try:
        assert service.stdout is not None and service.stderr is not None
        hosts = service.stdout.readline().strip()
        assert hosts == f'verifier.hosts=["127.0.0.1:{port}","127.0.0.1:{port + 1}"]', service.stderr.read()
        again = script("launch_verifier", *arguments, "--python", sys.executable, path=tmp_path, cwd=tmp_path)
        assert again.returncode == 2 and f"port {port} is taken" in again.stderr
        groups = [int(line.split("process group ")[1].split(",")[0]) for line in service.stderr.readline().splitlines()]
        service.send_signal(signal.SIGTERM)
        assert service.wait(120) == 143
    finally:
        service.kill()
        service.communicate()
    assert bystander.poll() is None, "it ended what it had not started"
    bystander.kill()
    bystander.wait()
    assert len(groups) == 1
    for number in (port, port + 1):
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", number), timeout=60)


def test_the_log_of_the_verifier_that_ended_is_shown(tmp_path: Path) -> None:
    port = free_port(2)
    write_program(
        tmp_path / "vllm", f"#!/bin/bash\n[[ ${{@: -1}} != {port} ]] || exec sleep 600\necho no memory\nexit 3\n"
    )
    options = ["--backend", "vllm", "--replicas", 2, "--gpus", "none", "--port", port, "--python", sys.executable]
    done = script("launch_verifier", *options, "--log-dir", tmp_path / "logs", path=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[2:] == [
        "no memory",
        f"error: a server ended before all answered; see {tmp_path / 'logs' / f'verifier_{port + 1}.log'}",
    ]


def test_a_verifier_that_cannot_start_is_the_end_of_all(tmp_path: Path) -> None:
    write_program(tmp_path / "vllm", "#!/bin/bash\necho out of memory\nexit 3\n")
    port = free_port()
    options = ["--backend", "vllm", "--gpus", "none", "--port", port, "--python", sys.executable]
    done = script("launch_verifier", *options, "--log-dir", tmp_path / "logs", path=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[1:] == [
        "out of memory",
        f"error: a server ended before all answered; see {tmp_path / 'logs' / f'verifier_{port}.log'}",
    ]


class Hub(http.server.BaseHTTPRequestHandler):
    """What a download asks the Hugging Face hub for: a model's description, its files by name, and each of them."""

    folder: Path

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/some/model"):
            sizes = {path.name: path.stat().st_size for path in self.folder.iterdir()}
            sizes |= {"pytorch_model.bin": 10**15}  # not wanted
            tree = [{"type": "file", "path": name, "size": size, "oid": name} for name, size in sizes.items()]
            siblings = [{"rfilename": name, "size": size} for name, size in sizes.items()]
            info = {"id": "some/model", "sha": "a" * 40, "siblings": siblings}
            self._send(
                json.dumps(tree if "/tree/" in self.path else info).encode(), {"Content-Type": "application/json"}
            )
        else:
            self._send_file(with_body=True)

    def do_HEAD(self) -> None:
        self._send_file(with_body=False)

    def _send_file(self, *, with_body: bool) -> None:
        path = self.folder / self.path.rsplit("/", 1)[1]
        if not path.is_file():
            self.send_error(404)
            return
        body = path.read_bytes()
        self._send(body, {"X-Repo-Commit": "a" * 40, "ETag": f'"{path.name}"'}, with_body=with_body)

    def _send(self, body: bytes, headers: Mapping[str, str], *, with_body: bool = True) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def hub(model: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The variables with which a script downloads from a hub on this machine."""
    handler = type("ModelHub", (Hub,), {"folder": model})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_ETAG_TIMEOUT": "240",  # the server is a thread of a process that has other things to do
            "HF_HUB_DOWNLOAD_TIMEOUT": "240",
            "NO_PROXY": "127.0.0.1",
        }
        server.shutdown()


def test_a_model_is_downloaded_converted_and_not_fetched_twice(
    tmp_path: Path, model: Path, hub: dict[str, str]
) -> None:
    (tmp_path / "source.jsonl").write_text('{"question": "1+1", "gold_answer": "2", "pass_rate": 0.5}\n')
    options = ["--model", "some/model", "--prompts", "source.jsonl", "--prompts-file", "data/p.jsonl"]
    options += ["--megatron", "models/m", "--python", sys.executable]
    done = script("prepare", *options, env=hub, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    fetched = tmp_path / "models" / "model"
    names = {path.name for path in model.iterdir()}
    assert {path.name for path in fetched.iterdir()} - {".cache"} == names
    assert all((fetched / name).read_bytes() == (model / name).read_bytes() for name in names)
    prompt = json.loads((tmp_path / "data" / "p.jsonl").read_text())
    assert (prompt["question"], prompt["gold_answer"], prompt["pass_rate"]) == ("1+1", "2", 0.5)
    assert (tmp_path / "models" / "m" / "metadata.json").is_file()
    again = script("prepare", *options, env=hub, cwd=tmp_path)
    assert again.returncode == 0
    assert "0.0 GB to download" in again.stdout
    assert again.stdout.count("is there already") == 2


def test_a_local_model_is_left_alone(tmp_path: Path, hub: dict[str, str]) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "mine" / name).write_text("mine")
    options = ["--model", "some/model", "--model-dir", "mine", "--prompts", "", "--python", sys.executable]
    done = script("prepare", *options, env=hub, cwd=tmp_path)
    assert done.returncode == 0 and "mine is there already" in done.stdout, done.stderr
    assert {path.name: path.read_text() for path in (tmp_path / "mine").iterdir()} == {
        "config.json": "mine",
        "model.safetensors": "mine",
    }


def start_nodes(run: Path, port: int, *overrides: str) -> list[subprocess.CompletedProcess[str]]:
    """``train_multi_node.sh`` as two nodes of one rank each."""
    options = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    options += ["--python", sys.executable, "--skip-check"]
    command = ["bash", str(EXAMPLES / "train_multi_node.sh"), str(run), *options, *overrides]
    nodes = [
        subprocess.Popen(
            command,
            env=environment({"NODE_RANK": str(rank)}),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=tiny.REPOSITORY,
        )
        for rank in range(2)
    ]
    said = [node.communicate(timeout=300) for node in nodes]
    return [
        subprocess.CompletedProcess(node.args, node.returncode, *text) for node, text in zip(nodes, said, strict=True)
    ]


@pytest.mark.slow
def test_two_nodes_train_and_their_checkpoint_is_exported(run: Path, tmp_path: Path) -> None:
    nodes = start_nodes(run, free_port(), "total_steps=1", "checkpoint.every=1", "algorithm.actor_freeze_steps=0")
    assert [node.returncode for node in nodes] == [0, 0], nodes[0].stderr + nodes[1].stderr
    assert [record["step"] for record in tiny.metrics_of(tmp_path / "run")][:1] == [0]
    step = tmp_path / "run" / "checkpoints" / "step_000001"
    written = sum(path.stat().st_size for path in step.rglob("*.distcp"))
    config = load_config(run)
    predicted = checkpoint_bytes(config, load_model_spec(config.model.path))
    assert predicted <= written <= 1.5 * predicted, "the disk check does not know what a checkpoint takes"
    done = script("export", tmp_path / "run", "--out", tmp_path / "exported", "--python", sys.executable)
    assert done.returncode == 0, done.stderr
    assert "compared: equal" in done.stdout
    assert (tmp_path / "exported" / "model.safetensors").is_file()


FAKE_SRUN = """#!/bin/bash
# Starts the command as two tasks, one a "node", and kills both when one fails, as --kill-on-bad-exit does.
while [[ $1 == -* ]]; do [[ $1 == --*=* ]] && shift || shift 2; done
pids=()
trap 'kill "${pids[@]}" 2>/dev/null' TERM
for node in 0 1; do SLURM_NODEID=$node SLURM_PROCID=$node "$@" & pids+=("$!"); done
for _ in 0 1; do wait -n || { status=$?; kill "${pids[@]}" 2>/dev/null; wait; exit $status; }; done
"""
FAKE_SCONTROL = """#!/bin/bash
case $1 in
    show) printf '%s\\n' 127.0.0.1 127.0.0.1 ;;
    requeue) echo "$2" >>"{log}" ;;
esac
"""


def slurm(tmp_path: Path) -> dict[str, str]:
    write_program(tmp_path / "srun", FAKE_SRUN)
    write_program(tmp_path / "scontrol", FAKE_SCONTROL.format(log=tmp_path / "requeued"))
    job = {"SLURM_JOB_ID": str(10000 + free_port() % 10000), "SLURM_JOB_NODELIST": "n[0-1]", "SLURM_JOB_NUM_NODES": "2"}
    return job | {"SLURM_GPUS_ON_NODE": "1"}


@pytest.mark.slow
def test_a_slurm_job_checks_measures_and_trains(run: Path, tmp_path: Path) -> None:
    options = [
        "--python",
        sys.executable,
        "--master-port",
        free_port(),
        "total_steps=1",
        "algorithm.actor_freeze_steps=0",
    ]
    done = script("slurm_train", run, *options, env=slurm(tmp_path), path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "nodes          ok       2 with one config" in done.stdout
    assert "all-reduce of 4 MiB over 2 ranks (gloo): bus bandwidth" in done.stdout
    assert (tmp_path / "run" / "metrics.jsonl").is_file()


def test_a_slurm_job_whose_step_fails_fails_with_it(run: Path, tmp_path: Path) -> None:
    """The package need not be there where the batch script runs, outside of the container that the tasks are in."""
    lines = ["#!/bin/bash", "[[ -n $SLURM_NODEID ]] || exit 3", "[[ $1 != -c ]] || exit 0"]
    lines += ["[[ $* == *--node-rank\\ $SLURM_NODEID\\ * ]] || exit 4", "exit 7\n"]
    write_program(tmp_path / "py", "\n".join(lines))
    options = ["--python", tmp_path / "py"]
    env = slurm(tmp_path) | {"NODE_RANK": "5"}  # of the shell that submitted the job
    assert script("slurm_train", run, *options, env=env, path=tmp_path).returncode == 7


@pytest.mark.parametrize(("restarts", "requeued"), [("0", True), ("20", False)])
def test_before_its_time_limit_a_slurm_job_goes_back_into_the_queue(
    run: Path, tmp_path: Path, restarts: str, requeued: bool
) -> None:
    write_program(tmp_path / "py", f"#!/bin/bash\n[[ $1 == -c ]] && exit\ntouch {tmp_path}/up; exec sleep 600\n")
    env = slurm(tmp_path)
    job = subprocess.Popen(
        ["bash", str(EXAMPLES / "slurm_train.sh"), str(run), "--python", str(tmp_path / "py"), "--skip-check"],
        env=environment(env | {"SLURM_RESTART_COUNT": restarts}, tmp_path),
        cwd=tiny.REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        end = time.monotonic() + 240
        while not (tmp_path / "up").exists() and time.monotonic() < end:
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
        while not (tmp_path / "requeued").exists() and requeued and time.monotonic() < end:
            time.sleep(0.05)
        if not requeued:
            assert job.stderr is not None
            said = job.stderr.readline()
            assert "--max-requeues=20 is used up" in said, said
        assert job.poll() is None, "the signal alone ended it; Slurm decides when"
        job.send_signal(signal.SIGTERM)
        output, _ = job.communicate(timeout=240)
    finally:
        job.kill()
        job.communicate()
    assert job.returncode != 0
    if requeued:
        assert (tmp_path / "requeued").read_text().split() == [env["SLURM_JOB_ID"]]
        assert "goes back into the queue" in output
    else:
        assert not (tmp_path / "requeued").exists()
