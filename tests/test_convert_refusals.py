"""Checkpoints that hold more, or other things, than their config describes, and arguments that are mistakes."""

from __future__ import annotations

import argparse
import fractions
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from convert_cases import convert, shell, without_progress
from test_convert_errors import flip, refused
from test_convert_roundtrip import read_with_torch
from test_layout_checkpoint import random_weights, write_checkpoint
from test_layout_megatron import small_spec

from megatron_oreal.errors import UserError
from megatron_oreal.layout import open_source

QWEN2 = small_spec("qwen2")
LLAMA = small_spec("llama")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A qwen2 model in ``hf``, its checkpoint in ``m``, and configs of the same sizes in ``llama`` and ``three``."""
    folder = tmp_path_factory.mktemp("refusals")
    write_checkpoint(folder / "hf", QWEN2, random_weights(QWEN2))
    write_checkpoint(folder / "llama", LLAMA, {})
    write_checkpoint(folder / "three", replace(QWEN2, num_layers=3), {})
    assert convert("hf_to_megatron", "--hf", folder / "hf", "--out", folder / "m", "--tp", 2, "--pp", 2) == 0
    return folder


@pytest.fixture
def megatron(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "m", tmp_path / "m"))


def rewrite(source: Path, out: Path, per_layer: bool, **more: torch.Tensor) -> Path:
    """The tensors of a checkpoint, stacked or as ``non_homogeneous_layers``, and others, written by torch."""
    tensors: dict[str, Any] = {}
    for key, value in read_with_torch(source).items():
        if per_layer and ".layers." in key:
            rows = {key.replace(".layers.", f".layers.{i}."): row.clone() for i, row in enumerate(value)}
            tensors |= rows
        else:
            tensors[key] = value
    dcp.save(tensors | more, checkpoint_id=str(out), no_dist=True)
    return out


@pytest.mark.parametrize("per_layer", [False, True], ids=["stacked", "per layer"])
def test_weights_that_the_config_does_not_know_are_refused_not_dropped(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], per_layer: bool
) -> None:
    """Biases under a Llama config of the same sizes, from both kinds of key, in both tools and in the trainer."""
    folder = rewrite(made / "m", tmp_path / "t", per_layer)
    key = (
        "decoder.layers.0.self_attention.linear_qkv.bias"
        if per_layer
        else "decoder.layers.self_attention.linear_qkv.bias"
    )
    for tool in ("megatron_to_hf", "megatron_to_megatron"):
        more = ["--weights-only"] if tool == "megatron_to_megatron" else []
        arguments = ("--megatron", folder, "--out", tmp_path / "b", "--hf-config", made / "llama", *more)
        line = refused(capsys, tool, *arguments)
        assert f"{folder}: tensor {key!r} is stored, but config.json describes a llama model, which has none" in line
    with pytest.raises(UserError, match=r"linear_qkv\.bias' is stored"):
        open_source(folder, LLAMA)
    arguments = ("--megatron", folder, "--out", tmp_path / "b", "--hf-config", made / "hf")
    assert convert("megatron_to_hf", *arguments) == 0
    assert convert("compare", made / "hf", tmp_path / "b") == 0


def test_layers_beyond_the_last_are_refused_not_dropped(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = rewrite(made / "m", tmp_path / "t", per_layer=True)
    for tool in ("megatron_to_hf", "megatron_to_megatron"):
        arguments = ("--megatron", folder, "--out", tmp_path / "b", "--hf-config", made / "three")
        line = refused(capsys, tool, *arguments)
        assert "tensor 'decoder.layers.3." in line
        assert "is stored, but config.json says num_hidden_layers=3" in line
    with pytest.raises(UserError, match=r"num_hidden_layers=3"):
        open_source(folder, replace(QWEN2, num_layers=3))


@pytest.mark.parametrize(
    "key",
    [
        "embedding.position_embeddings.weight",
        "mtp.layers.0.eh_proj.weight",
        "decoder.layers.mlp.experts.experts.linear_fc1.weight",
        "decoder.layers.mlp.router.weight",
        "decoder.layers.mlp.linear_fc2.bias",
    ],
)
def test_parts_of_other_models_are_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    folder = rewrite(made / "m", tmp_path / "t", False, **{key: torch.ones(4, 3)})
    for tool in ("megatron_to_hf", "megatron_to_megatron"):
        arguments = ("--megatron", folder, "--out", tmp_path / "b", "--hf-config", made / "hf")
        assert f"tensor {key!r} is stored, but" in refused(capsys, tool, *arguments)


def with_state(source: Path, out: Path, change: float = 0.0) -> Path:
    """A checkpoint with an optimizer state ``exp_avg`` in the geometry of the weights, and padding that is not zero."""
    tensors = read_with_torch(source)
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        tensors[key][QWEN2.vocab_size :] = 3.0
    state = {f"optimizer.state.exp_avg.{key}": value.float() * 2 for key, value in tensors.items()}
    state["optimizer.state.exp_avg.decoder.final_layernorm.weight"][5] += change
    dcp.save(tensors | state, checkpoint_id=str(out), no_dist=True)
    torch.save({"iteration": 3}, out / "common.pt")
    shutil.copytree(source / "hf", out / "hf")
    return out


def test_compare_sees_optimizer_states(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = with_state(made / "m", tmp_path / "1"), with_state(made / "m", tmp_path / "2", change=0.5)
    assert convert("compare", one, one) == 0
    capsys.readouterr()
    assert convert("compare", one, two) == 1
    said = capsys.readouterr().out
    assert "values: exp_avg: model.norm.weight: 1 of 12 elements differ, at most by 0.5; the first at [5]:" in said
    assert said.count("values:") == 1
    assert convert("compare", one, two, "--weights-only") == 0
    for pair, side in (((one, made / "m"), "A"), ((made / "m", one), "B")):
        capsys.readouterr()
        assert convert("compare", *pair) == 1
        assert f"only in {side}: optimizer state exp_avg" in capsys.readouterr().out
    assert convert("compare", one, made / "hf") == 0
    assert "optimizer state is not compared" in capsys.readouterr().out


def test_trained_padding_is_kept_while_the_padded_size_stays(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = with_state(made / "m", tmp_path / "1")
    for divisor, rows in ((19, 38), (10, 40)):
        out = tmp_path / f"out{divisor}"
        layout = ("--tp", 2, "--pp", 2, "--make-vocab-size-divisible-by", divisor)
        assert convert("megatron_to_megatron", "--megatron", source, "--out", out, *layout) == 0
        tensors = read_with_torch(out)
        for prefix, value in (("", 3.0), ("optimizer.state.exp_avg.", 6.0)):
            for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
                padding = tensors[prefix + key][QWEN2.vocab_size :]
                assert len(padding) == rows - QWEN2.vocab_size
                assert torch.equal(padding, torch.full_like(padding, value if rows == 38 else 0.0))
        assert convert("compare", source, out) == 0


def test_a_dry_run_counts_what_is_read_of_the_optimizer_too(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = with_state(made / "m", tmp_path / "1")
    arguments = ("--megatron", source, "--out", tmp_path / "b", "--dry-run")
    read = []
    for more in ((), ("--weights-only",)):
        capsys.readouterr()
        assert convert("megatron_to_megatron", *arguments, *more) == 0
        said = capsys.readouterr().out
        read.append(float(said.split("process 0: reads ")[1].split(" kB")[0]))
    assert read[0] > 1.9 * read[1], read


def test_what_stands_beside_the_weights_is_carried_or_refused(
    megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Megatron-LM keeps its command line as an ``argparse.Namespace`` in common.pt, and sometimes other classes."""
    common, weights = megatron / "common.pt", ("--megatron", megatron, "--out", tmp_path / "b")
    torch.save({"iteration": 3, "args": argparse.Namespace(a=1), "checkpoint_version": 3.0}, common)
    assert convert("megatron_to_megatron", *weights) == 0
    with torch.serialization.safe_globals([argparse.Namespace]):
        assert torch.load(tmp_path / "b" / "common.pt")["args"] == argparse.Namespace(a=1)
    shutil.rmtree(tmp_path / "b")
    torch.save({"args": argparse.Namespace(a=fractions.Fraction(1, 2))}, common)
    line = refused(capsys, "megatron_to_megatron", *weights)
    assert f"{common}: holds fractions.Fraction objects" in line and "--weights-only" in line
    common.write_text("junk")
    line = refused(capsys, "megatron_to_megatron", *weights)
    assert f"{common}: damaged or not readable" in line and "\x1b" not in line and "weights_only" not in line
    common.unlink()
    assert f"{common}: missing: the checkpoint is incomplete" in refused(capsys, "megatron_to_megatron", *weights)
    assert convert("megatron_to_megatron", *weights, "--weights-only") == 0


@pytest.mark.parametrize("names", [["iter_0000010", "iter_0000020"], ["release"], ["policy"]])
def test_a_root_names_the_checkpoints_inside(
    megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], names: list[str]
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for name in names:
        shutil.copytree(megatron, root / name)
    (root / "latest_checkpointed_iteration.txt").write_text("20")
    line = refused(capsys, "megatron_to_hf", "--megatron", root, "--out", tmp_path / "b")
    assert "give one of " + ", ".join(str(root / name) for name in sorted(names, reverse=True)) in line


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("megatron_to_hf", ["--shard-size", "9" * 400 + "GB"], "is not a size such as 5GB"),
        ("megatron_to_hf", ["--shard-size", "0"], "'0' is not a size such as 5GB"),
        ("megatron_to_hf", ["--shard-size", "5XB"], "'5XB' is not a size such as 5GB"),
        ("megatron_to_hf", ["--hf-config", ""], "argument --hf-config: the name of a directory is empty"),
        ("megatron_to_hf", ["--tp", "2"], "unrecognized arguments: --tp 2"),
        ("megatron_to_megatron", ["--tp", "2.5"], "argument --tp: invalid int value: '2.5'"),
    ],
)
def test_arguments_that_argparse_refuses_are_one_line(
    capsys: pytest.CaptureFixture[str], tool: str, arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        convert(tool, "--megatron", "m", "--out", "b", *arguments)
    lines = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_sizes_have_the_units_that_people_write() -> None:
    from convert_cases import tool

    sizes = {"5TB": 5e12, "5G": 5e9, "5g": 5e9, "1.5GiB": 1.5 * 2**30, "2Ki": 2048, "7": 7, "7B": 7, "500 MB": 5e8}
    assert {text: tool("_shared").parse_size(text) for text in sizes} == sizes


def test_compare_refuses_mistakes_in_its_arguments(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--max-lines=-3: must be 0 or more" in refused(capsys, "compare", made / "m", made / "m", "--max-lines", -3)
    line = refused(capsys, "compare", made / "m", made / "m", "--hf-config", tmp_path / "none")
    assert "none: does not exist" in line
    line = refused(capsys, "compare", made / "m", made / "m", "--hf-config", tmp_path)
    assert "has no config.json" in line
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start it without torchrun" in refused(capsys, "compare", made / "m", made / "m")


def test_compare_reads_every_shape_and_dtype_of_a_hugging_face_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = {
        "scalar": torch.tensor(2.5),
        "nothing": torch.zeros(3, 0),
        "nowhere": torch.zeros(0, 3),
        "integers": torch.arange(6).view(2, 3),
        "flags": torch.tensor([True, False]),
        "eights": torch.ones(4).to(torch.float8_e4m3fn),
        "doubles": torch.ones(2, dtype=torch.float64),
    }
    write_checkpoint(tmp_path / "a", QWEN2, base)
    assert convert("compare", tmp_path / "a", tmp_path / "a") == 0
    changed = {name: value.clone() for name, value in base.items()}
    changed["scalar"] += 1
    changed["integers"][1, 2] = 9
    changed["flags"][1] = True
    changed["eights"] = torch.tensor([1.0, 1.0, 2.0, 1.0]).to(torch.float8_e4m3fn)
    changed["doubles"][1] += 1e-15
    write_checkpoint(tmp_path / "b", QWEN2, changed)
    capsys.readouterr()
    assert convert("compare", tmp_path / "a", tmp_path / "b") == 1
    said = capsys.readouterr().out
    for line in (
        "scalar: 1 of 1 elements differ, at most by 1; the first at []: 2.5 in A, 3.5 in B",
        "integers: 1 of 6 elements differ, at most by 4; the first at [1, 2]: 5.0 in A, 9.0 in B",
        "flags: 1 of 2 elements differ, at most by 1; the first at [1]: 0.0 in A, 1.0 in B",
        "eights: 1 of 4 elements differ, at most by 1; the first at [2]: 1.0 in A, 2.0 in B",
        "doubles: 1 of 2 elements differ, at most by 1.11022e-15; the first at [1]: 1.0 in A,",
    ):
        assert f"values: {line}" in said
    assert "nothing" not in said and "nowhere" not in said


def test_a_defect_does_not_look_like_a_difference(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import megatron_oreal.layout.compare as room

    def broken(*arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(room, "_slabs", broken)
    assert convert("compare", made / "hf", made / "hf") == 3
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_from_a_shell_a_mistake_is_one_line_and_the_status_two(made: Path, megatron: Path, tmp_path: Path) -> None:
    """All of standard error: before torch is imported, after it, and while the weights are read."""
    shutil.copytree(made / "hf", tmp_path / "hf")
    flip(megatron)
    for name, arguments, message in (
        ("hf_to_megatron", ["--hf", made / "hf", "--out", tmp_path / "b", "--tp", "two"], "invalid int value"),
        ("megatron_to_hf", ["--megatron", made / "m", "--out", tmp_path / "b", "--hf-config", made / "llama"], "bias"),
        ("megatron_to_hf", ["--megatron", megatron, "--out", tmp_path / "b"], "__0_0.distcp: tensor"),
        ("compare", [megatron, made / "m"], "__0_0.distcp: tensor"),
    ):
        done = shell(name, *arguments)
        assert done.returncode == 2, done.stderr
        lines = without_progress(done.stderr)
        assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
        assert message in lines[0]
        assert not (tmp_path / "b").exists()
