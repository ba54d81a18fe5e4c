"""Exports on real gloo ranks, and everything that can go wrong while a model is written."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from test_layout_checkpoint import assert_equal, expected, random_weights, write_checkpoint
from test_layout_execute import TP2_PP2, launch, loaded
from test_layout_megatron import small_spec
from torch import Tensor

from megatron_oreal.errors import UserError
from megatron_oreal.layout import ModelSpec, NewDirectory, RankGrid, export_hf, load_model_spec, megatron_layout
from megatron_oreal.layout.directory import write_companions, write_safetensors


def export_worker(
    model_dir: str, spec: ModelSpec, sizes: dict, dp: int, out_dir: str, options: dict, file_limit: int | None = None
) -> str | None:
    """What this rank raises; ``file_limit``: rank 1 may write no file of more bytes (``ulimit -f``)."""
    layout, grid = megatron_layout(spec, **sizes), RankGrid(sizes["tp"], sizes["pp"], dp)
    rank, live = loaded(spec, model_dir, layout, grid)
    common = {"rank": rank, "model_dir": model_dir, "reward_model": sizes.get("reward_model", False)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if file_limit is not None and rank == 1:
        sys.dont_write_bytecode = True  # a .pyc file that the limit cuts breaks every later import
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, limits[1]))
    try:
        export_hf(out_dir, spec, layout, grid.replicas(), live, **common, **options)
    except (UserError, RuntimeError, OSError) as failure:
        return f"{type(failure).__name__}: {failure}"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return None


def export_case(folder: Path, spec: ModelSpec, sizes: dict, dp: int = 1, **kwargs: Any) -> tuple[str, dict]:
    """A launch of ``export_worker`` from ``folder/in`` to ``folder/out``."""
    places = {"model_dir": str(folder / "in"), "out_dir": str(folder / "out")}
    return "export_worker", places | {"spec": spec, "sizes": sizes, "dp": dp, "options": {}} | kwargs


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


COPIED = {
    "additional_chat_templates/tools.jinja": "{{y}}",
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{ }",
    "chat_template.jinja": "{{x}}",
    "merges.txt": "a b",
}
NOT_COPIED = {"README.md": "of the original", "pytorch_model.bin": "old"}
EXPORTS: dict[str, tuple[str, bool, dict, int]] = {
    "qwen2 tied TP2 PP2": ("qwen2", True, TP2_PP2, 1),
    "qwen3 TP2 PP2 VPP2": ("qwen3", False, TP2_PP2 | {"vpp": 2}, 1),
    "llama DP4": ("llama", False, {"tp": 1, "pp": 1}, 4),
    "reward model": ("qwen2", True, TP2_PP2 | {"reward_model": True}, 1),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, ModelSpec, dict[str, Tensor], list]]:
    cases, inputs = {}, {}
    for name, (family, tied, sizes, dp) in EXPORTS.items():
        spec = small_spec(family, tied=tied)
        folder = tmp_path_factory.mktemp("export")
        weights = random_weights(spec, reward_model=name == "reward model")
        write_checkpoint(folder / "in", spec, weights, files=2)
        (folder / "in" / "additional_chat_templates").mkdir()
        for file, text in (COPIED | NOT_COPIED).items():
            (folder / "in" / file).write_text(text)
        options: dict[str, Any] = {"max_shard_bytes": 3000, "bucket_bytes": 1000}
        if name == "reward model":
            options = {"dtype": torch.float32, "writers": [2]}
        if name == "llama DP4":
            (folder / "out").mkdir()  # an empty directory may be there
        cases[name] = export_case(folder, spec, sizes, dp, options=options)
        inputs[name] = folder / "out", spec, weights
    done = launch(__name__, 4, cases)
    return {name: (*inputs[name], done[name]) for name in cases}


@pytest.mark.parametrize("case", [name for name in EXPORTS if name != "reward model"])
def test_export_is_the_original_bit_for_bit_and_transformers_reads_it(case: str, exported: dict) -> None:
    out, spec, weights, errors = exported[case]
    assert errors == [None] * 4
    assert_equal(stored(out), weights)
    assert all((out / name).read_text() == text for name, text in COPIED.items())
    assert not any((out / name).exists() for name in NOT_COPIED)
    assert load_model_spec(out) == spec
    assert not list(out.parent.glob(".*"))
    assert not list(out.glob(".*"))

    import transformers

    model, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    name = "model.layers.3.self_attn.k_proj.weight"
    assert torch.equal(model.state_dict()[name], weights[name])


@pytest.mark.parametrize("case", ["qwen2 tied TP2 PP2", "llama DP4"])
def test_index_metadata_and_permissions_are_those_that_transformers_writes(
    case: str, exported: dict, tmp_path: Path
) -> None:
    import transformers

    out, _, _, _ = exported[case]
    transformers.AutoModelForCausalLM.from_pretrained(out).save_pretrained(tmp_path / "theirs", max_shard_size=3000)
    ours, theirs = (folder / "model.safetensors.index.json" for folder in (out, tmp_path / "theirs"))
    indices = [json.loads(path.read_text()) for path in (ours, theirs)]
    assert indices[0]["metadata"] == indices[1]["metadata"]
    assert list(indices[0]) == list(indices[1])
    assert list(indices[0]["weight_map"]) == list(indices[1]["weight_map"])
    for tensor, file in indices[0]["weight_map"].items():
        with safe_open(out / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert tensor in opened.keys()  # noqa: SIM118
    plain = tmp_path / "plain"
    plain.touch()
    modes = {path.name: stat.filemode(path.stat().st_mode) for path in out.iterdir() if path.is_file()}
    assert modes == dict.fromkeys(modes, stat.filemode(plain.stat().st_mode))


def test_exported_reward_model_is_a_sequence_classifier_in_the_asked_dtype(exported: dict) -> None:
    out, spec, weights, errors = exported["reward model"]
    assert errors == [None] * 4
    assert sorted(path.name for path in out.glob("*.safetensors*")) == ["model.safetensors"]
    assert_equal(stored(out), {name: value.float() for name, value in weights.items()})
    assert load_model_spec(out) == spec

    import transformers

    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert model.dtype == torch.float32
    assert torch.equal(model.score.weight, weights["score.weight"].float())


def test_export_that_cannot_succeed_fails_on_every_rank_and_a_retry_succeeds(tmp_path: Path) -> None:
    """Rank 1 hits a real limit of its file sizes in the middle of the export."""
    spec, sizes = small_spec("llama"), {"tp": 2, "pp": 1}
    weights = random_weights(spec)
    for folder in ("full", "taken"):
        write_checkpoint(tmp_path / folder / "in", spec, weights)
    (tmp_path / "taken" / "out").mkdir()
    (tmp_path / "taken" / "out" / "keep").write_text("precious")
    options = {"max_shard_bytes": 3000}
    done = launch(
        __name__,
        2,
        {
            "taken": export_case(tmp_path / "taken", spec, sizes),
            "limited": export_case(tmp_path / "full", spec, sizes, options=options, file_limit=1000),
            "look": ("listing", {"folder": str(tmp_path / "full")}),
            "retry": export_case(tmp_path / "full", spec, sizes, options=options),
        },
    )
    assert (
        done["taken"]
        == [f"UserError: {tmp_path}/taken/out: already exists: choose another directory, or remove it first"] * 2
    )
    assert [path.name for path in (tmp_path / "taken" / "out").iterdir()] == ["keep"]
    for said in done["limited"]:
        assert said.startswith(f"UserError: {tmp_path}/full/.out.incomplete/model-00")
        assert "cannot be written (File too large)" in said and "ulimit -f" in said
        assert "\n" not in said
    assert done["look"] == [["in"]] * 2
    assert done["retry"] == [None, None]
    assert_equal(stored(tmp_path / "full" / "out"), weights)


def listing(folder: str) -> list[str]:
    dist.barrier()  # the first rank removes what the others have reported already
    names = sorted(path.name for path in Path(folder).iterdir())
    dist.barrier()
    return names


def test_killed_export_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    spec = small_spec("llama", layers=8)
    weights = random_weights(spec)
    write_checkpoint(tmp_path / "in", spec, weights)
    folder = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": f"{folder}:{folder.parent}", "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, __file__, str(tmp_path)], env=env)
    try:
        deadline = time.monotonic() + 400
        while not list(tmp_path.glob(".out.incomplete/*.safetensors")):
            assert child.poll() is None, "the export failed before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(UserError, match="another process is writing it"):
            export_alone(tmp_path, spec, weights)
        assert list(tmp_path.glob(".out.incomplete/*.safetensors")), "the other export lost its files"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.incomplete").exists()
    export_alone(tmp_path, spec, weights)
    assert_equal(stored(tmp_path / "out"), weights)
    assert not (tmp_path / ".out.incomplete").exists()


def export_alone(tmp_path: Path, spec: ModelSpec, weights: dict[str, Tensor]) -> None:
    layout = megatron_layout(spec, tp=1, pp=1, vocab_divisor=8)
    live = expected(layout.shards[0], weights)
    export_hf(
        tmp_path / "out", spec, layout, {0: [0]}, live, rank=0, model_dir=tmp_path / "in", max_shard_bytes=2000
    )  # fmt: skip


def _export_one_file(tmp_path: Path) -> None:
    """Begin an export and stay in it until somebody ends this process."""
    import megatron_oreal.layout.export as room

    save = room.write_safetensors

    def save_and_wait(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        time.sleep(600)

    room.write_safetensors = save_and_wait
    spec = small_spec("llama", layers=8)
    export_alone(tmp_path, spec, random_weights(spec))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB and 32 files."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", "size=1m,nr_inodes=32", "tmpfs"]
    mount = ["mount", *options, disk]
    if shutil.which("mount") is None or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_model_larger_than_the_free_space_is_refused_before_anything_is_written(small_disk: Path) -> None:
    with pytest.raises(UserError, match=rf"{small_disk}/out: needs 0\.01 GB and the file system has 0\.00105 GB free"):
        NewDirectory(small_disk / "out").begin(required_bytes=10**7)
    assert not list(small_disk.iterdir())


@pytest.mark.parametrize("full", ["space", "files"])
def test_a_disk_that_fills_up_during_the_export_leaves_nothing(small_disk: Path, tmp_path: Path, full: str) -> None:
    spec = small_spec("llama", layers=8)
    weights = random_weights(spec)
    write_checkpoint(tmp_path / "in", spec, weights)
    (small_disk / "in").symlink_to(tmp_path / "in")
    if full == "files":
        for number in range(22):
            (small_disk / f"other{number}").touch()
    else:
        (tmp_path / "in" / "tokenizer.json").write_bytes(b" " * 2**20)  # what is not weights comes last
    before = sorted(small_disk.iterdir())
    with pytest.raises(UserError, match="No space left on device") as caught:
        export_alone(small_disk, spec, weights)
    said = str(caught.value)
    assert said.startswith(f"{small_disk}/.out.incomplete/" + ("model-" if full == "files" else "tokenizer.json"))
    assert "\n" not in said and "free some space" in said
    assert sorted(small_disk.iterdir()) == before


def test_a_safetensors_file_that_does_not_fit_is_named(small_disk: Path) -> None:
    path = small_disk / "model.safetensors"
    with pytest.raises(UserError, match=rf"{path}: cannot be written \(No space left on device\): free some space"):
        write_safetensors(path, {"weight": torch.zeros(2**20)})


def unwritable(folder: Path, case: str) -> tuple[Path, str]:
    """A path to write to, and what the system says to that."""
    (folder / "file").write_text("in the way")
    if case == "a file is in the path":
        return folder / "file" / "out", os.strerror(errno.EEXIST)
    if case == "a file has the name":
        return folder / "file", "already exists"
    if case == "a link has the name":
        (folder / "link").symlink_to(folder / "nowhere")
        return folder / "link", "already exists"
    return Path("/proc/self/out"), os.strerror(errno.ENOENT)  # where nobody can make a directory, root neither


@pytest.mark.parametrize(
    "case", ["a file is in the path", "a file has the name", "a link has the name", "no directory can be made"]
)
def test_where_nothing_can_be_written_is_said_in_one_line_that_names_it(tmp_path: Path, case: str) -> None:
    path, reason = unwritable(tmp_path, case)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as caught:
        NewDirectory(path).begin()
    assert reason in str(caught.value)
    assert str(path.parent) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_what_appears_under_the_name_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    out = NewDirectory(tmp_path / "out")
    out.begin()
    (out.partial / "weights").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "theirs").write_text("precious")
    with pytest.raises(UserError, match=r"out: cannot be written \(Directory not empty\)"):
        out.commit()
    out.abandon()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]


def test_a_second_writer_whom_the_first_has_overtaken_is_refused_and_removes_nothing(tmp_path, monkeypatch):
    """Both find what a killed writer left: one opens it to take its lock, and the other removes it and begins anew."""
    (tmp_path / ".out.incomplete").mkdir()
    first, second = NewDirectory(tmp_path / "out"), NewDirectory(tmp_path / "out")
    flock = fcntl.flock

    def overtaken(descriptor, operation):
        monkeypatch.setattr(fcntl, "flock", flock)
        first.begin()
        (first.partial / "weights").write_text("the first's")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", overtaken)
    with pytest.raises(UserError, match="another process is writing it"):
        second.begin()
    first.commit()
    assert (tmp_path / "out" / "weights").read_text() == "the first's"


def test_a_directory_whose_writing_raises_is_removed_and_one_that_is_complete_stays(tmp_path: Path) -> None:
    def interrupted() -> None:
        with NewDirectory(tmp_path / "a" / "out") as out:
            (out.partial / "weights").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in tmp_path.rglob("*")] == ["a"]
    with NewDirectory(tmp_path / "a" / "out") as out:
        (out.partial / "weights").write_text("whole")
    out.abandon()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "out", "weights"]


def test_companions_need_a_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"in/config\.json: cannot be read"):
        write_companions(tmp_path, {}, tmp_path / "in", dtype=torch.bfloat16)


if __name__ == "__main__":
    _export_one_file(Path(sys.argv[1]))
