"""``examples/plans``: the committed plans are of the shipped configs, which all fit, and whose comments quote them."""

from __future__ import annotations

import importlib.util
import json
import re
from types import ModuleType
from typing import Any

import pytest
import tiny
from config_twins import CONFIGS, MACHINES, real_config

from megatron_oreal.cli import main

PLANS = tiny.REPOSITORY / "examples" / "plans"
GPU = "a100-80g"
"""The published runs' GPU, for which every config is planned."""
REMAKE = "examples/plans/make.sh writes the plans anew"
QUOTED = re.compile(r"\d[\d,.]* (?:GiB|tokens/s|ms\b|s\b)")


def committed(name: str, gpu: str = GPU) -> dict[str, Any]:
    return json.loads((PLANS / f"{name}.{gpu}.json").read_text())


def planned() -> list[str]:
    """``config.gpu`` of every committed plan."""
    return sorted(path.name.removesuffix(".json") for path in PLANS.glob("*.json"))


def test_every_config_has_a_plan_for_the_published_gpu_and_no_plan_is_of_anything_else() -> None:
    names = {plan.rpartition(".")[0] for plan in planned()}
    assert names == set(MACHINES) and {f"{name}.{GPU}" for name in MACHINES} <= set(planned())
    assert {path.stem for path in PLANS.glob("*.txt")} == set(planned())


@pytest.mark.parametrize("plan", planned())
def test_a_committed_plan_fits_and_is_of_the_config_as_it_is(plan: str) -> None:
    name, _, gpu = plan.rpartition(".")
    tree, config, machine = committed(name, gpu), real_config(name), MACHINES[name]
    assert tree["config"] == f"examples/configs/{name}.yaml" and not tree["overrides"]
    assert tree["fits"] and tree["memory"]["peak"] <= tree["memory"]["limit"], REMAKE
    assert tree["gpu"]["name"] == gpu and not tree["placement"]["checked"]["problems"]
    world = tree["world"]
    assert (world["ranks"], world["ranks_per_node"]) == (machine.ranks, machine.per_node)
    assert (world["tp"], world["pp"], world["dp"]) == (machine.tp, machine.pp, machine.dp), REMAKE
    assert world["engine_tp"] == config.rollout.engine_tp, REMAKE
    assert tree["reshard"]["received_total"] == 0, "trainer and engines hold the same bytes"


def approximately(value: Any) -> Any:
    """Floats within a millionth, all else equal."""
    if isinstance(value, dict):
        return {key: approximately(item) for key, item in value.items()}
    if isinstance(value, list):
        return [approximately(item) for item in value]
    return pytest.approx(value, rel=1e-6) if isinstance(value, float) else value


def test_a_fresh_plan_equals_the_committed_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "oreal_1.5b_one_gpu"
    monkeypatch.chdir(tiny.REPOSITORY)
    assert main(["plan", *script().options(name, 1, GPU), "--json"]) == 0
    fresh = json.loads(capsys.readouterr().out)
    assert fresh.keys() == committed(name).keys()
    for part, value in committed(name).items():
        assert fresh[part] == approximately(value), f"{part}: {REMAKE}"


@pytest.mark.parametrize("name", MACHINES)
def test_figures_in_a_configs_comments_are_its_plans(name: str) -> None:
    comments = [line.partition("#")[2] for line in (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()]
    quoted = QUOTED.findall(" ".join(comments))
    assert quoted, "the comments give the plan's numbers"
    text = "".join((PLANS / f"{plan}.txt").read_text() for plan in planned() if plan.startswith(f"{name}."))
    numbers = set(re.findall(r"\d[\d,]*(?:\.\d+)?", text))
    assert [figure for figure in quoted if figure.split()[0] not in numbers] == []


HOLDS_ALL = ("oreal_7b", "oreal_deepseek_distill_7b", "oreal_7b_without_reward_model", "oreal_32b")
"""Configs whose comments say that no response has to wait for the KV cache."""


@pytest.mark.parametrize("name", HOLDS_ALL)
def test_the_cache_of_the_large_runs_holds_every_response_at_full_length(name: str) -> None:
    rollout, tree = real_config(name).rollout, committed(name)
    assert tree["memory"]["cache_tokens"] >= rollout.max_running_requests * rollout.gen_max_length
    assert tree["world"]["engines"] * rollout.max_running_requests == rollout.prompts_per_step * rollout.prompt_repeat_k


SEARCHED = ("oreal_7b", "oreal_32b")
"""Configs whose comments say that the search ranks their sizes first."""


@pytest.mark.parametrize("name", SEARCHED)
def test_the_search_ranks_the_sizes_of_the_published_runs_first(name: str) -> None:
    lines = (PLANS / f"{name}.{GPU}.txt").read_text().splitlines()
    (head,) = (number for number, line in enumerate(lines) if line.split()[:2] == ["tokens/s/GPU", "step"])
    names = ("tokens", "step", "roll", "update", "tp", "pp", "vpp", "dp", "engine")
    first = dict(zip(names, lines[head + 1].split(), strict=False))
    machine, engine = MACHINES[name], real_config(name).rollout.engine_tp
    sizes = [str(size) for size in (machine.tp, machine.pp, machine.dp, engine)]
    assert [first[key] for key in ("tp", "pp", "dp", "engine")] == sizes


def script() -> ModuleType:
    """``examples/plans/make.py``."""
    spec = importlib.util.spec_from_file_location("make_plans", PLANS / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_the_documentation_is_the_plans() -> None:
    page = (tiny.REPOSITORY / "docs" / "configs.md").read_text(encoding="utf-8")
    assert script().with_table(page) == page, REMAKE
    assert all(f"`{name}.yaml`" in page for name in MACHINES)


def test_the_script_plans_every_config_for_its_world() -> None:
    assert {(name, ranks) for name, ranks, _ in script().RUNS} == {(name, m.ranks) for name, m in MACHINES.items()}
    assert {f"{name}.{gpu}" for name, _, gpu in script().RUNS} == set(planned())
