"""``megatron-oreal bench`` on two gloo ranks: every part, and figures that follow from what was drawn."""

from __future__ import annotations

import contextlib
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import tiny
import torch
import yaml

from megatron_oreal.algorithm import select
from megatron_oreal.bench.flops import ModelFlops
from megatron_oreal.bench.options import PARTS, BenchOptions
from megatron_oreal.bench.parts import _require_lengths
from megatron_oreal.bench.run import _load_weights, require_same_work
from megatron_oreal.bench.workload import DrawnOutcomes, RandomWeights, SyntheticChat, Workload, has_weights
from megatron_oreal.cli import main
from megatron_oreal.config import Config, VerifierConfig
from megatron_oreal.config_load import parse_config
from megatron_oreal.data.lengths import parse_lengths
from megatron_oreal.errors import UserError
from megatron_oreal.layout.model_spec import load_model_spec
from megatron_oreal.planner.devices import device_of_name
from megatron_oreal.rollout.engine import Completion, EngineError, Request, SamplingParams
from megatron_oreal.rollout.sglang.client import generate_body
from megatron_oreal.run import Run
from megatron_oreal.verifier import Verifier
from megatron_oreal.verifier.verdict import Verdict

LENGTHS = "lognormal:median=9,sigma=0.6"
REPEATS, RANKS, GROUPS, SAMPLES, PROMPT, MOST = 2, 2, 4, 4, 6, 24
SHAPE = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 96,
}


def write_config(folder: Path, **changes: Any) -> Path:
    """A model directory with nothing but its config.json, and a config file without any data."""
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(SHAPE))
    tree = tiny.config_tree(folder, folder / "model")
    tree["rollout"] |= {"prompts_per_step": GROUPS, "prompt_repeat_k": SAMPLES, "gen_max_new": MOST}
    tree["rollout"] |= {"gen_max_length": MOST + PROMPT, "max_running_requests": 8}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree | changes))
    return path


def read(folder: Path) -> Config:
    return parse_config(yaml.safe_load((folder / "config.yaml").read_text()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    write_config(folder)
    return folder


@pytest.fixture(scope="module")
def measured(folder: Path) -> dict[str, Any]:
    """All parts under TP 2 on two ranks that the command starts itself."""
    output = folder / "result.json"
    options = ["--nproc-per-node", RANKS, "--lengths", LENGTHS, "--prompt-tokens", PROMPT, "--repeats", REPEATS]
    offload = "parallel.offload=[optimizer,reward_model,reference,policy]"
    done = tiny.cli(
        "bench", folder / "config.yaml", "parallel.tensor_model_parallel_size=2", offload, *options,
        "--note", "a note", "--output", output,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(output.read_text()) | {"stdout": done.stdout}


@pytest.fixture(scope="module")
def figures(measured: dict[str, Any]) -> dict[str, list[float]]:
    return {f"{figure['part']}/{figure['name']}": figure["values"] for figure in measured["figures"]}


@pytest.fixture(scope="module")
def workload(folder: Path) -> Workload:
    config, spec = read(folder), load_model_spec(folder / "model")
    return Workload.draw(config, spec, BenchOptions(lengths=LENGTHS, prompt_tokens=PROMPT))


def forward(tokens: int, *, head: int = SHAPE["vocab_size"]) -> int:  # type: ignore[assignment]
    """Forward operations of one sequence of this shape, by hand: 2 a weight and token, 4 a causal pair and column."""
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64  # query; key, value; output; gate, up, down
    pairs = tokens * (tokens + 1) // 2
    return 2 * tokens * (2 * layer + head * 32) + 4 * pairs * 2 * 32


def test_every_part_is_measured_in_every_repeat_without_the_warm_up(measured: dict[str, Any]) -> None:
    assert {figure["part"] for figure in measured["figures"]} == set(PARTS) == set(measured["parts"])
    for figure in measured["figures"]:
        assert len(figure["values"]) == REPEATS, figure
        assert all(math.isfinite(value) and value >= 0 for value in figure["values"]), figure
        assert figure["min"] <= figure["median"] <= figure["max"]
        spread = (figure["max"] - figure["min"]) / figure["median"] if figure["median"] else 0.0
        assert figure["spread"] == pytest.approx(spread)
        assert f"  {figure['name']} " in measured["stdout"]


def test_the_tokens_are_the_drawn_lengths(measured: dict[str, Any]) -> None:
    drawn = parse_lengths(LENGTHS, MOST).draw(GROUPS * SAMPLES, seed=0)
    rollout, step = measured["parts"]["rollout"], measured["parts"]["step"]
    assert measured["workload"]["response_tokens"] == rollout["output_tokens"] == drawn.sum()
    assert rollout["prompt_and_output_tokens"] == drawn.sum() + GROUPS * SAMPLES * PROMPT
    assert step["tokens"] == [rollout["prompt_and_output_tokens"]] * REPEATS
    assert measured["workload"]["response_tokens_longest"] == drawn.max() <= MOST


def test_what_is_learned_is_what_oreal_keeps_of_the_drawn_outcomes(
    measured: dict[str, Any], workload: Workload
) -> None:
    rewards = np.where(workload.correct, 1, -1).astype(np.int8)
    kept = select(rewards, run_seed=0, step=1)
    mixed = sum(0 < row.sum() < SAMPLES for row in workload.correct)
    assert len(kept) == 2 * mixed > 0
    assert measured["parts"]["update"]["sequences"] == len(kept)
    assert measured["parts"]["step"]["kept_sequences"] == [len(kept)] * REPEATS
    tokens = sum(PROMPT + int(workload.lengths[item.group, item.sample]) for item in kept)
    update = measured["parts"]["update"]
    assert update["tokens"] == measured["workload"]["kept_tokens"] == tokens
    assert (
        update["balance"] == 1.0 and update["padding_share"] == 0.0
    )  # one data-parallel rank, no sequence parallelism


def test_tokens_a_second_times_seconds_are_the_tokens(
    measured: dict[str, Any], figures: dict[str, list[float]]
) -> None:
    parts = measured["parts"]
    for rate, seconds, tokens in (
        ("rollout/output_tokens_per_s", "rollout/output_seconds", parts["rollout"]["output_tokens"]),
        ("update/tokens_per_s", "update/seconds", parts["update"]["tokens"]),
        ("step/tokens_per_s", "step/seconds", parts["step"]["tokens"][0]),
    ):
        assert np.multiply(figures[rate], figures[seconds]) == pytest.approx([tokens] * REPEATS)
    for each, seconds, tokens in (
        ("rollout/tokens_per_s_gpu", "rollout/output_seconds", parts["rollout"]["prompt_and_output_tokens"]),
        ("rollout/output_tokens_per_s_gpu", "rollout/output_seconds", parts["rollout"]["output_tokens"]),
        ("rollout/prefill_tokens_per_s_gpu", "rollout/prefill_seconds", GROUPS * PROMPT),
        ("update/policy_tokens_per_s_gpu", "update/policy_seconds", parts["update"]["tokens"]),
        ("loss/tokens_per_s_gpu", "loss/seconds", parts["loss"]["rows"]),
        ("step/tokens_per_s_gpu", "step/seconds", parts["step"]["tokens"][0]),
        ("step/samples_per_s_gpu", "step/seconds", GROUPS * SAMPLES),
    ):
        assert np.multiply(figures[each], figures[seconds]) == pytest.approx([tokens / RANKS] * REPEATS), each


def test_phases_are_within_their_whole(figures: dict[str, list[float]]) -> None:
    """Each is that of its slowest rank: what one rank is late in one phase, the other one waits for in the next."""
    for whole, parts in (
        ("update/seconds", [f"update/{phase}_seconds" for phase in ("reference", "reward_model", "policy")]),
        ("step/seconds", [f"step/phase {phase}" for phase in ("generate", "select", "update", "publish")]),
        ("switch/seconds", ["switch/phase update", "switch/phase publish"]),
    ):
        every = np.array([figures[part] for part in parts])
        assert (every <= figures[whole]).all(), whole
        assert (every.sum(axis=0) <= RANKS * np.array(figures[whole])).all(), whole
    tail, generation = figures["rollout/tail_seconds"], figures["rollout/output_seconds"]
    assert all(0 <= t < s for t, s in zip(tail, generation, strict=True))


def test_operations_are_those_of_the_formula_computed_by_hand(
    measured: dict[str, Any], figures: dict[str, list[float]], workload: Workload
) -> None:
    lengths = workload.kept_lengths(step=1)
    expected = {
        "reference": sum(map(forward, lengths)),
        "reward_model": 3 * sum(forward(length, head=1) for length in lengths),
        "policy": 3 * sum(map(forward, lengths)),
    }
    assert measured["parts"]["update"]["model_flops"] == expected
    for phase, count in expected.items():
        rates = np.multiply(figures[f"update/{phase}_tflops_gpu"], figures[f"update/{phase}_seconds"])
        assert rates * 1e12 * RANKS == pytest.approx([count] * REPEATS)
    drawn = sum(
        forward(PROMPT) + sum(forward(PROMPT + int(n)) - forward(PROMPT) for n in row) for row in workload.lengths
    )
    assert measured["parts"]["rollout"]["model_flops"] == measured["parts"]["step"]["model_flops_rollout"] == drawn


def test_a_cpu_has_no_utilisation_and_no_device_memory(
    measured: dict[str, Any], figures: dict[str, list[float]]
) -> None:
    assert not [name for name in figures if name.endswith("mfu")]
    for part in PARTS:
        assert measured["parts"][part]["mfu_peak_flops"] is None
        assert measured["parts"][part]["peak_memory_bytes"] == {"allocated": None, "reserved": None}


def test_the_record_says_on_what_and_of_what_it_was_measured(measured: dict[str, Any]) -> None:
    assert measured["note"] == "a note"
    assert measured["world"]["ranks"] == RANKS and measured["world"]["device"] == "cpu"
    assert measured["model"]["weights"] == "random weights"
    assert measured["versions"]["torch"] and measured["versions"]["megatron-core"]
    assert measured["hardware"]["cores"] and measured["config"]["parallel"]["tensor_model_parallel_size"] == 2
    assert any("verdicts are replaced" in line for line in measured["assumed"])
    assert re.fullmatch(r"None|[0-9a-f]{40}(-dirty)?", str(measured["git_commit"]))
    traffic = measured["parts"]["reshard"]
    assert traffic["received_bytes_max"] > 0 and traffic["engine_bytes"] == RANKS * 4 * measured["model"]["parameters"]


def test_a_peak_is_that_of_the_very_gpu() -> None:
    names = ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA H20")
    found = [device_of_name(name) for name in names]
    assert [device.flops for device in found if device is not None] == [989.5e12, 989.5e12, 312e12, 148e12]
    for other in ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA GeForce RTX 4090", "NVIDIA A100-SXM4-40GB"):
        assert device_of_name(other) is None


def test_a_7b_shape_counts_as_many_operations_as_its_weights_say() -> None:
    spec = load_model_spec(tiny.REPOSITORY / "examples" / "models" / "OREAL-7B-SFT")
    flops = ModelFlops.of(spec, has_reward_model=True)
    embedding = spec.vocab_size * spec.hidden_size
    assert flops.policy(1) == pytest.approx(2 * (spec.num_parameters() - embedding), rel=1e-3)
    counted = flops.update([4096])
    assert counted["policy"] == 3 * counted["reference"] and counted["reward_model"] < counted["policy"]
    assert set(ModelFlops.of(spec, has_reward_model=False).update([4096])) == {"reference", "policy"}


def test_a_request_s_own_limit_is_what_a_server_is_asked_for() -> None:
    sampling = SamplingParams(1.0, 1.0, 0, 20, 30, None, new_tokens_by_seed={5: 3, 6: 99})
    prompt = np.zeros(12, np.int32)
    for seed, expected in ((5, 3), (6, 18)):  # 18: what max_length leaves of the 20
        body = generate_body(Request(prompt, seed), sampling, rid="r", vocab_size=96, kept_mass=False)
        assert body["sampling_params"]["max_new_tokens"] == expected
        assert body["sampling_params"]["ignore_eos"] is True


def test_the_verifier_works_and_the_drawn_outcome_is_what_counts(workload: Workload) -> None:
    correct = np.array([[True, False]])
    text = SyntheticChat(workload).decode(np.zeros(50, np.int32))
    with Verifier(VerifierConfig(num_processes=1, deadline_s=300)) as verifier:
        drawn = DrawnOutcomes(verifier, correct)
        for sample in (0, 1):
            drawn.submit((0, sample), text, "42", stopped=True, question="")
        assert len(drawn) == len(verifier) == 2
        verdicts = {key: judgement.verdict for key, judgement in drawn.results()}
        verifier.submit((0, 2), text, "42")
        ((_, own),) = verifier.results()
    assert verdicts == {(0, 0): Verdict.CORRECT, (0, 1): Verdict.WRONG}
    assert own.verdict is Verdict.CORRECT  # by itself: the text really ends with the gold answer
    assert len(text) >= 200


def test_a_response_of_another_length_ends_the_measurement() -> None:
    three, none = (Completion(np.zeros(n, np.int32), np.zeros(n, np.float32), "length") for n in (3, 0))
    _require_lengths([three, none], [3, 0])
    with pytest.raises(EngineError, match=r"1 of 2 responses do not have the length .* \(1 of them aborted\)"):
        _require_lengths([three, replace(none, finish_reason="abort")], [3, 4])


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({}, None),
        ({"output": "elsewhere.json", "note": "node 1"}, None),
        ({"parts": ("loss",)}, "--parts"),
        ({"repeats": 5}, "--repeats is 3 on rank 0 and 5 on rank 1: start every node with the same options"),
        ({"lengths": "fixed:3"}, "--lengths"),
    ],
)
def test_nodes_that_would_measure_different_things_are_refused(
    workload: Workload, other: dict[str, Any], named: str | None
) -> None:
    """Their ranks would wait for each other in different collectives."""
    said: list[Any] = []

    def gather(item: Any, what: str = "") -> list[Any]:
        said.append(item)
        return said

    platform: Any = SimpleNamespace(gather_objects=gather)
    for options in (BenchOptions(), replace(BenchOptions(), **other)):
        with contextlib.nullcontext() if named is None or not said else pytest.raises(UserError, match=named):
            require_same_work(options, Workload.draw(workload.config, workload.spec, options), platform)


def test_weights_are_random_only_where_there_are_none_on_any_node(folder: Path, tmp_path: Path) -> None:
    config = read(folder)
    assert not has_weights(config)
    config.model.path = str(tmp_path)
    (tmp_path / "model.safetensors.index.json").touch()  # of a download that is not complete: no reason to draw some
    assert has_weights(config)
    platform = SimpleNamespace(gather_objects=lambda own: [own, not own])
    run = SimpleNamespace(config=config, platform=platform, actor=None)
    with pytest.raises(UserError, match="has weights for rank 0 and none for rank 1: give every node"):
        _load_weights(cast(Run, run))


def test_random_weights_agree_wherever_two_ranks_hold_the_same_rectangle(folder: Path) -> None:
    spec = load_model_spec(folder / "model")
    source, again = (RandomWeights(spec, torch.float32, torch.device("cpu"), 0) for _ in range(2))
    name, rect = "model.layers.0.mlp.gate_proj.weight", ((0, 64), (0, 32))
    weight = source.read(name, rect)
    assert torch.equal(weight, again.read(name, rect))
    assert weight.std() == pytest.approx(0.02, rel=0.1)
    assert len(torch.unique(weight, dim=0)) == 64
    assert not torch.equal(weight, source.read("model.layers.1.mlp.gate_proj.weight", rect))
    assert source.read("model.norm.weight", ((0, 32),)).tolist() == [1.0] * 32


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--parts", "rollout,updates"], "--parts 'updates' is not one of them (did you mean 'update'?)"),
        (["--parts", ""], "--parts=''"),
        (["--parts", "loss,loss"], "at most once"),
        (["--repeats", "0"], "--repeats=0: must be 1 or more"),
        (["--warmup", "-1"], "--warmup=-1: must be 0 or more"),
        (["--solve-rate", "1"], "--solve-rate=1: must lie between 0 and 1"),
        (["--prompt-tokens", "0"], "--prompt-tokens=0: must be 1 or more"),
        (["--output", "/nowhere/x.json"], "there is no directory /nowhere"),
        (["--tolerance", "0.1"], "--tolerance goes with --compare"),
        (["--compare", "a.json", "b.json"], "--compare takes two results and no config"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(
    folder: Path, options: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(folder / "config.yaml"), *options]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and named in said.err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (BenchOptions(prompt_tokens=MOST + PROMPT), "--prompt-tokens=30 leaves no room"),
        (BenchOptions(lengths="fixed:25"), "exceeds the 24 new tokens"),
        (BenchOptions(solve_rate=1e-9), "none of the 4 groups of 4 has correct and wrong responses"),
    ],
)
def test_a_workload_that_cannot_be_is_refused(folder: Path, options: BenchOptions, named: str) -> None:
    with pytest.raises(UserError, match=named):
        Workload.draw(read(folder), load_model_spec(folder / "model"), options)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "bench needs a config file, or --compare A.json B.json"),
        (["--lengths", "fixed:99"], "fixed:99 exceeds the 24 new tokens"),
        (["model.path=/nowhere"], "'/nowhere' has no config.json"),
    ],
)
def test_a_run_without_what_it_needs_ends_before_a_model_is_built(
    folder: Path, arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(folder / "config.yaml"), *arguments] if arguments else []
    assert main(["bench", *given]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and named in said.err
