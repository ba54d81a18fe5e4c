"""``megatron-oreal plan`` as users run it: its report, its JSON, its exit status, and one line for every mistake."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from megatron_oreal import cli as command_line

REPOSITORY = Path(__file__).parent.parent
CONFIG_7B = REPOSITORY / "examples" / "configs" / "oreal_7b.yaml"
SHAPE = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """configs/run.yaml beside models/small/config.json; nothing else that it names exists."""
    (tmp_path / "models" / "small").mkdir(parents=True)
    (tmp_path / "models" / "small" / "config.json").write_text(json.dumps(SHAPE))
    tree = {
        "work_dir": "/nowhere/work",
        "model": {"path": "/nowhere/small", "stop_word": "<|im_end|>", "megatron_checkpoint": "/nowhere/checkpoint"},
        "data": {"train": "/nowhere/train.jsonl"},
        "rollout": {
            "engine": "sglang",
            "engine_tp": 2,
            "prompts_per_step": 8,
            "prompt_repeat_k": 4,
            "gen_max_new": 1000,
            "gen_max_length": 2000,
            "sglang": {"mem_fraction_static": 0.5},
        },
        "verifier": {"hosts": ["judge.invalid:1"]},
        "parallel": {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "sequence_parallel": True,
            "max_tokens_per_microbatch": 4096,
        },
    }
    (tmp_path / "configs").mkdir()
    path = tmp_path / "configs" / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(status, standard output, standard error) of ``plan``."""
    status = command_line.main(["plan", *map(str, arguments)])
    said = capsys.readouterr()
    return status, said.out, said.err


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    status, out, err = run(capsys, *arguments)
    assert status == 2, (status, out, err)
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0]


def test_a_run_that_fits_is_reported_in_120_columns_with_status_0(
    capsys: pytest.CaptureFixture[str], config: Path
) -> None:
    status, out, _ = run(capsys, config, "--world-size", 16, "--gpu", "h100", "--rank", 9)
    assert status == 0
    for heading in ("MEMORY", "PLACEMENT", "RESHARD", "STEP", "ASSUMPTIONS"):
        assert sum(line.startswith(heading) for line in out.splitlines()) == 1, heading
    assert max(map(len, out.splitlines())) <= 120
    assert "fits: " in out
    assert "DOES NOT FIT" not in out
    assert "16 on 2 nodes of 8" in out
    assert "node 1, local rank 1, TP 1 of 8-9, PP 1 of 1-9 by 8, DP 0 of 9-15 by 2, engine 4 of 8-9" in out
    assert "\nrank 9:" in out
    assert str(config) in out
    assert "requests sent once each: as it should be" in " ".join(out.split())


@pytest.mark.slow
def test_torch_native_layers_have_more_phases_and_still_120_columns(
    capsys: pytest.CaptureFixture[str], config: Path
) -> None:
    one_stage = "parallel.pipeline_model_parallel_size=1"
    status, out, _ = run(capsys, config, "--world-size", 8, "parallel.transformer_impl=local", one_stage)
    assert status == 0
    assert max(map(len, out.splitlines())) <= 120
    assert ", local\n" in out


def test_json_holds_the_whole_plan(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    status, out, _ = run(capsys, config, "--world-size", 8, "--json", "parallel.offload=[optimizer]")
    plan = json.loads(out)
    assert status == 0
    assert plan["fits"] is True
    assert plan["nearest"] is None
    assert plan["world"] == {
        "ranks": 8,
        "ranks_per_node": 8,
        "nodes": 1,
        "tp": 2,
        "pp": 2,
        "vpp": None,
        "dp": 2,
        "engines": 4,
        "engine_tp": 2,
    }
    worst = max(plan["memory"]["ranks"], key=lambda rank: rank["peak"])
    assert worst["peak"] == plan["memory"]["peak"] <= plan["memory"]["limit"]
    assert all(
        phase["total"] == sum(phase["live"].values())
        for rank in plan["memory"]["ranks"]
        for phase in rank["phases"].values()
    )
    assert plan["step"]["seconds"] == pytest.approx(sum(plan["step"]["phases"].values()))
    assert plan["step"]["tokens_per_s_per_gpu"] == pytest.approx(plan["step"]["tokens"] / plan["step"]["seconds"] / 8)
    assert plan["placement"]["checked"]["problems"] == []
    assert {"name", "value", "unit", "source", "meaning"} == set(plan["assumptions"][0])
    assert plan["overrides"] == ["parallel.offload=[optimizer]"]
    assert undocumented(plan) == set()


def undocumented(plan: dict[str, Any]) -> set[str]:
    """Keys of the object and of its fixed parts that the page's table of the JSON does not name."""
    page = (REPOSITORY / "docs" / "planner.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_]+)(?:\[\])?`", page.partition("\n## JSON\n")[2].partition("\n## ")[0]))
    step = plan["step"]
    parts = [plan, *(plan[key] for key in ("model", "gpu", "world", "memory", "placement", "reshard"))]
    parts += [plan["memory"]["ranks"][0], step, step["rollout"], step["update"], step["update"]["passes"]["policy"]]
    return {key for part in parts for key in part} - named


def test_what_does_not_fit_has_status_1_and_a_setting_that_does(
    capsys: pytest.CaptureFixture[str], config: Path
) -> None:
    arguments = ["--world-size", 8, "--gpu", "h100", "--gpu-memory-gib", 6]
    fraction = "rollout.sglang.mem_fraction_static=0.9"
    status, out, _ = run(capsys, config, fraction, *arguments)
    assert status == 1
    assert "DOES NOT FIT" in out
    advice = " ".join(out.split()).partition("nearest fits with ")[2].partition(" (peak ")[0].split()
    assert advice
    status, out, _ = run(capsys, config, fraction, *advice, *arguments, "--json")
    plan = json.loads(out)
    assert (status, plan["fits"]) == (0, True), advice
    assert plan["overrides"] == [fraction, *advice]


def test_a_cache_below_one_response_does_not_fit(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    status, out, _ = run(capsys, config, "rollout.sglang.mem_fraction_static=0.000001", "--world-size", 8)
    assert status == 1
    assert "the KV cache holds less than one response of 2,000 tokens" in out


def test_the_reserve_is_an_assumption_like_the_others(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    status, out, _ = run(capsys, config, "--world-size", 8, "--json", "--assume", "reserve=5.5")
    plan = json.loads(out)
    assert status == 0
    assert plan["memory"]["reserve"] == int(5.5 * 2**30)
    assert all(phase["live"]["reserve"] == int(5.5 * 2**30) for phase in plan["memory"]["ranks"][0]["phases"].values())
    assert [row["source"] for row in plan["assumptions"] if row["name"] == "reserve"] == ["--assume"]


def test_a_search_ranks_settings_and_says_why_others_fall_out(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_oreal.planner import search
    from megatron_oreal.planner.plan import make_report
    from megatron_oreal.planner.report import as_text
    from megatron_oreal.planner.report_json import as_json

    monkeypatch.setattr(search, "POWERS", (1, 2))
    monkeypatch.setattr(search, "VIRTUAL", (None,))
    arguments = [str(config), "parallel.pipeline_model_parallel_size=1", "--world-size", "2", "--gpu", "h100"]
    report = make_report(command_line._parser().parse_args(["plan", *arguments, "--search", "--top", "2"]))
    found = json.loads(as_json(report))["search"]
    assert found["considered"] == found["fitting"] + sum(found["fell_out"].values())
    assert len(found["best"]) == 2
    first, second = (each["tokens_per_s_per_gpu"] for each in found["best"])
    assert first >= second
    out = as_text(report)
    assert "SEARCH" in out
    assert "fell out" in out
    assert max(map(len, out.splitlines())) <= 120


def test_the_shape_comes_from_where_the_report_says(
    capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path
) -> None:
    def read(*more: object) -> str:
        return json.loads(run(capsys, config, "--world-size", 8, "--json", *more)[1])["model"]["shape_from"]

    committed = tmp_path / "models" / "small"
    assert Path(read()).resolve() == committed / "config.json"
    own = shutil.copytree(committed, tmp_path / "own" / "small")
    assert Path(read(f"model.path={own}")).resolve() == own / "config.json"
    other = shutil.copytree(committed, tmp_path / "other")
    assert Path(read("--model-shape", other)).resolve() == other / "config.json"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--world-size", 0], "--world-size 0: must be between 1 and 65536"),
        (["--world-size", -8], "--world-size -8"),
        (["--world-size", 10**9], "--world-size 1000000000: must be"),
        (["--world-size", 7], "does not divide the world size 7"),
        (["--world-size", 12], "--world-size 12 is not a multiple of --ranks-per-node 8"),
        (["--world-size", 8, "--ranks-per-node", 0], "--ranks-per-node 0"),
        (["--world-size", 8, "--rank", 8], "--rank 8 is not one of the ranks 0 to 7"),
        (["--world-size", 8, "--rank", -1], "--rank -1"),
        (["--world-size", 8, "--top", 0], "--top 0"),
        (["--world-size", 8, "--gpu", "rtx"], "--gpu 'rtx' is not known"),
        (["--world-size", 8, "--gpu-memory-gib", "nan"], "--gpu-memory-gib nan"),
        (["--world-size", 8, "--gpu-memory-gib", -1], "--gpu-memory-gib -1"),
        (["--world-size", 8, "--network-gbps", "inf"], "--network-gbps inf"),
        (["--world-size", 8, "--network-gbps", 0], "--network-gbps 0"),
        (["--world-size", 8, "--lengths", "gauss"], "lengths 'gauss'"),
        (["--world-size", 8, "--lengths", "file:/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--world-size", 8, "--lengths", "fixed:99999"], "fixed:99999"),
        (["--world-size", 8, "--assume", "speed=1"], "there is no assumption 'speed'"),
        (["--world-size", 8, "--results", "/nowhere"], "--results '/nowhere' is not a directory"),
        (["--world-size", 8, "--model-shape", "/nowhere"], "'/nowhere' has no config.json"),
        (["--world-size", 8, "model.path=unknown"], "model.path='unknown': the shape of the model is not known"),
        (["--world-size", 8, "parallel.tensor_model_parallel_size=3"], "parallel.tensor_model_parallel_size=3"),
        (["--world-size", 8, "rollout.engine_tp=16"], "rollout.engine_tp=16 does not divide the 8 ranks of a node"),
        (["--world-size", 8, "rollout.gen_max_length=99999"], "rollout.gen_max_length=99999"),
        (["--world-size", 8, "rollout.sglang.mem_fraction_static=abc"], "mem_fraction_static='abc': must be a number"),
        (["--world-size", 8, "rollout.sglang.mem_fraction_static=2"], "mem_fraction_static=2: must be a number"),
        (["--world-size", 8, "rollout.sglang.max_total_tokens=abc"], "max_total_tokens='abc': must be a whole number"),
        (["--world-size", 8, "parallel.tensor=2"], "unknown key 'parallel.tensor'"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], config: Path, arguments: list[object], said: str
) -> None:
    assert said in refused(capsys, config, *arguments)


def test_a_missing_or_broken_config_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "does not exist" in refused(capsys, tmp_path / "none.yaml", "--world-size", 8)
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    assert "not valid YAML" in refused(capsys, broken, "--world-size", 8)


@pytest.mark.slow
def test_the_shell_sees_the_same_and_no_warning() -> None:
    """A process of its own: no GPU, no network, none of the files that the config names."""
    done = tiny.cli("plan", CONFIG_7B, "--world-size", "32", "--gpu", "h200")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "7.62 B parameters" in done.stdout
    assert "examples/models/OREAL-7B-SFT/config.json" in done.stdout


def test_options_are_read_without_torch() -> None:
    code = "import sys; from megatron_oreal import cli; cli._parser(); sys.exit('torch' in sys.modules)"
    assert tiny._run([sys.executable, "-c", code]).returncode == 0


def test_the_page_lists_every_assumption_and_the_committed_prediction() -> None:
    from megatron_oreal.planner.assumptions import Assumptions

    page = (REPOSITORY / "docs" / "planner.md").read_text()
    for row in Assumptions().rows():
        assert f"| `{row['name']}` | {row['unit']} | {row['meaning']} |" in page
    committed = json.loads((REPOSITORY / "examples" / "plans" / "oreal_7b.a100-80g.json").read_text())
    step, rollout = committed["step"], committed["step"]["rollout"]
    said = " ".join(page.split())
    assert f"predicts {step['seconds']:.1f} s for `oreal_7b.yaml`" in said
    assert f"{step['phases']['generate']:.1f} s of it generation" in said
    assert f"{360 / step['seconds']:.1f} times less" in said
    assert f"the {rollout['first_step_s'] * 1e3:.1f} ms that the model gives" in said
    assert rollout["most_running"] == 128
