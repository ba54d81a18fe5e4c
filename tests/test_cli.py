"""The command line as users start it: a mistake is one line that names its mend and exit status 2, nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import yaml

from megatron_oreal import __version__
from megatron_oreal import cli as command_line
from megatron_oreal.config_load import load_config, parse_config
from megatron_oreal.errors import UserError
from megatron_oreal.evaluate import evaluate_model
from megatron_oreal.preflight import devices
from megatron_oreal.run import open_run
from megatron_oreal.sft import supervise


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def config(tmp_path: Path, model: Path) -> Path:
    return tiny.write_run(tmp_path, model)


def refused(*arguments: object) -> str:
    """The one line on standard error with which the command line refuses ``arguments``, without ``error: ``."""
    return the_one_line(tiny.cli(*arguments))


def the_one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


# What is printed without a run


def test_version_is_the_packages() -> None:
    assert tiny.succeed("--version") == f"megatron-oreal {__version__}\n"


def test_help_says_what_every_command_does_and_what_every_option_means() -> None:
    (commands,) = (action.choices for action in command_line._parser()._actions if isinstance(action.choices, dict))
    assert list(commands) == ["train", "sft", "eval", "bench", "check", "verify", "plan", "env", "report"]
    assert [name for name, command in commands.items() if not command.description] == []
    silent = [
        (name, action.dest) for name, command in commands.items() for action in command._actions if not action.help
    ]
    assert silent == []


def test_a_reader_that_goes_away_is_no_error(config: Path) -> None:
    """As under ``| head -1``; the read end is closed before a byte is written."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "megatron_oreal", "train", str(config), "--print-config"]
    try:
        done = subprocess.run(command, check=False, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=300)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, "")


def test_a_missing_config_is_all_that_is_missed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command_line.main(["train"])
    assert capsys.readouterr().err.endswith("error: the following arguments are required: config\n")


def test_print_config_shows_the_effective_tree_and_starts_nothing(config: Path, tmp_path: Path) -> None:
    said = tiny.succeed("train", config, "optimizer.actor_lr=5e-7", "--print-config", "rollout.top_k=3")
    shown = parse_config(yaml.safe_load(said))
    assert shown == load_config(config, ["optimizer.actor_lr=5e-7", "rollout.top_k=3"])
    assert (shown.optimizer.actor_lr, shown.rollout.top_k) == (5e-7, 3)
    assert not (tmp_path / "run").exists()


def test_overrides_may_stand_before_and_after_options(config: Path) -> None:
    orders = [
        ["train", config, "seed=3", "--print-config", "total_steps=7"],
        ["train", config, "--print-config", "seed=3", "total_steps=7"],
        ["train", "--print-config", config, "seed=3", "total_steps=7"],
    ]
    said = [tiny.succeed(*order) for order in orders]
    assert yaml.safe_load(said[0])["seed"] == 3
    assert yaml.safe_load(said[0])["total_steps"] == 7
    assert said[0] == said[1] == said[2]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "COMMAND"),
        (["trian"], "trian"),
        (["train"], "config"),
        (["train", "c.yaml", "--nproc", "x"], "--nproc"),
        (["train", "c.yaml", "--no-such-option"], "--no-such-option"),
        (["report", "w", "extra"], "extra"),
    ],
)
def test_a_wrong_command_line_shows_its_usage(arguments: list[str], named: str) -> None:
    done = tiny.cli(*arguments)
    assert done.returncode == 2
    usage, *_, line = done.stderr.splitlines()
    assert usage.startswith("usage: megatron-oreal")
    assert named in line
    assert "Traceback" not in done.stderr


# Mistakes that are found before anything heavy is imported


@pytest.mark.parametrize("nproc", [[], ["--nproc-per-node", 2]], ids=["alone", "launched"])
@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("rollout.topp=0.9", ["unknown key 'rollout.topp'", "did you mean 'top_p'"]),
        ("rollout.top_p=1.5", ["rollout.top_p=1.5", "less than or equal to 1"]),
        ("rollout.top_p", ["'rollout.top_p'", "key=value"]),
    ],
)
def test_a_mistake_in_an_override(config: Path, nproc: list[object], override: str, parts: list[str]) -> None:
    line = refused("train", config, *nproc, override)
    assert [part for part in parts if part not in line] == [], line


@pytest.mark.parametrize("command", ["train", "sft", "eval"])
def test_a_missing_config_file(tmp_path: Path, command: str) -> None:
    assert refused(command, tmp_path / "nowhere.yaml") == f"config file '{tmp_path / 'nowhere.yaml'}' does not exist"


def test_malformed_yaml(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("seed: 1\nmodel: {path: m\n")
    assert refused("train", path).startswith(f"{path}:3: not valid YAML")


@pytest.mark.parametrize("nproc", [0, -1])
def test_a_number_of_ranks_that_cannot_be(config: Path, nproc: int) -> None:
    line = refused("train", config, f"--nproc-per-node={nproc}")
    assert f"--nproc-per-node={nproc}" in line and "1 or more" in line


@pytest.mark.parametrize("option", ["--nnodes=2", "--node-rank=1"])
def test_nodes_without_a_number_of_ranks(
    config: Path, option: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert command_line.main(["train", str(config), option]) == 2
    assert capsys.readouterr().err.startswith(f"error: {option} needs --nproc-per-node")


def test_a_node_that_is_not_among_the_nodes(config: Path) -> None:
    line = refused("train", config, "--nproc-per-node=1", "--nnodes=2", "--node-rank=2")
    assert "--node-rank=2" in line and "--nnodes=2" in line


def test_report_of_a_directory_without_a_run(tmp_path: Path) -> None:
    assert f"{tmp_path / 'metrics.jsonl'}: no such file" in refused("report", tmp_path)


# Mistakes that are found with the data and the model's shape, before a model is built


def malformed_line(folder: Path) -> list[str]:
    path = folder / "bad.jsonl"
    path.write_text('{"question": "1", "gold_answer": "1"}\n{"question": "2", \n')
    return [f"data.train={path}"]


def empty_data(folder: Path) -> list[str]:
    path = folder / "empty.jsonl"
    path.write_text("\n")
    return [f"data.train={path}"]


INPUTS: dict[str, tuple[Callable[[Path], list[str]], list[str]]] = {
    "malformed JSON": (malformed_line, ["bad.jsonl line 2: malformed JSON"]),
    "no prompts": (empty_data, ["empty.jsonl: the data set has no prompts"]),
    "missing model": (lambda folder: [f"model.path={folder / 'gone'}"], ["model.path: ", "gone' has no config.json"]),
    "stop word of two tokens": (
        lambda _: ["model.stop_word='12'"],
        ["model.stop_word='12' must be one token", "makes 2 of it: ['1', '2']", "'<|end|>'"],
    ),
}


@pytest.mark.parametrize("case", list(INPUTS))
def test_a_mistake_in_the_input_is_one_line_before_anything_is_written(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    make, parts = INPUTS[case]
    assert command_line.main(["train", str(config), *make(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert [part for part in parts if part not in line] == [], line
    assert not (tmp_path / "run").exists()


def test_a_mistake_in_the_input_of_launched_ranks_is_said_once(config: Path, tmp_path: Path) -> None:
    line = refused("train", config, "--nproc-per-node", 2, *malformed_line(tmp_path))
    assert "bad.jsonl line 2: malformed JSON" in line


def test_a_mistake_under_torchrun_is_said_once(config: Path, tmp_path: Path) -> None:
    """torchrun reports its failed ranks itself; ours must be one line among it."""
    done = tiny.torchrun(2, "train", config, f"data.train={tmp_path / 'gone.jsonl'}")
    ours = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(ours) == 1
    assert "gone.jsonl: no such file" in ours[0]


def test_a_mistake_that_only_a_later_rank_sees_is_said_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command_line, "_FIRST_RANK_SPEAKS_S", 0.01)
    for name, value in (("RANK", "9"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "16")):
        monkeypatch.setenv(name, value)
    assert command_line.main(["train", str(tmp_path / "nowhere.yaml")]) == 2
    assert capsys.readouterr().err == f"error: rank 9: config file '{tmp_path / 'nowhere.yaml'}' does not exist\n"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("data.train=gone.jsonl", ["data.train: gone.jsonl: no such file"]),
        ("evaluation.data=gone.jsonl", ["evaluation.data: gone.jsonl: no such file"]),
        (
            "parallel.tensor_model_parallel_size=2",
            ["parallel.tensor_model_parallel_size=2", "the world size 1", "multiple of 2 ranks"],
        ),
        ("model.reference_path=gone", ["model.reference_path: ", "'gone' has no config.json"]),
        ("model.chat_template=orael", ["model.chat_template='orael'", "did you mean 'oreal'"]),
        ("data.max_prompt_tokens=2", ["data.max_prompt_tokens=2: all 10 prompts are longer"]),
    ],
)
def test_other_inputs_are_checked_before_a_model_is_built(config: Path, override: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught, open_run(load_config(config, [override])):
        pytest.fail("the run was opened")
    assert [part for part in parts if part not in str(caught.value)] == [], caught.value


def test_a_rank_beside_a_gpu_with_an_old_driver_does_not_train_on_a_cpu(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where torchrun has started it, or nothing."""
    monkeypatch.setattr(devices, "torch_says", lambda: "The NVIDIA driver on your system is too old")
    monkeypatch.setattr(devices, "installed_driver", lambda: "470.86")
    monkeypatch.setattr(devices.torch.version, "cuda", "12.8")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UserError, match=r"^driver 470\.86: "), open_run(load_config(config, ["device=auto"])):
        pytest.fail("the run was opened")


def test_tensor_parallelism_that_does_not_divide_the_heads_starts_no_rank(tmp_path: Path) -> None:
    config = tiny.write_run(tmp_path, tiny.write_model(tmp_path / "model", heads=2, kv_heads=1))
    line = refused("train", config, "parallel.tensor_model_parallel_size=4", "--nproc-per-node", 4)
    assert line.startswith("parallel.tensor_model_parallel_size=4 does not divide the model's 2 attention heads")
    assert "(use one of 1, 2)" in line


def test_a_phase_without_its_data(config: Path) -> None:
    with pytest.raises(UserError, match=r"sft\.data is missing: "):
        supervise(load_config(config))
    with pytest.raises(UserError, match=r"sft\.output is missing: "):
        supervise(load_config(config, ["sft.data=solutions.jsonl"]))
    with pytest.raises(UserError, match=r"evaluation\.data is missing: "):
        evaluate_model(load_config(config))


HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
print("process 7 on node3", file=file, flush=True)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_run_in_a_work_dir_is_refused_before_it_touches_the_first(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work_dir = tmp_path / "run"
    work_dir.mkdir()
    (work_dir / "metrics.jsonl").write_text("{}\n")
    command = [sys.executable, "-c", HOLDER, str(work_dir / ".running")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        assert command_line.main(["train", str(config), f"work_dir={work_dir}"]) == 2
        other.communicate()
    line = capsys.readouterr().err
    assert line.startswith(f"error: work_dir='{work_dir}': process 7 on node3 is training in it: end that run")
    assert line.count("\n") == 1
    assert sorted(path.name for path in work_dir.iterdir()) == [".running", "metrics.jsonl"]
    with open_run(load_config(config, [f"work_dir={work_dir}"])):  # the other has ended
        assert (work_dir / ".running").read_text().startswith(f"process {os.getpid()} on ")


def test_a_locale_that_lacks_a_character_does_not_end_a_command(config: Path) -> None:
    command = [sys.executable, "-m", "megatron_oreal", "train", str(config), "work_dir=übung", "--print-config"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("work_dir: \\xfcbung\n")


def test_a_work_dir_that_cannot_be_written(config: Path, tmp_path: Path) -> None:
    """A process of its own, as far as training goes: nothing else is on its standard error."""
    (tmp_path / "file").write_text("")
    line = refused("train", config, f"work_dir={tmp_path / 'file' / 'run'}")
    assert line.startswith("work_dir: cannot write") and "Not a directory" in line
