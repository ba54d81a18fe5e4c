"""``megatron-oreal bench`` with a real SGLang server: the lengths that were drawn, and the switch's phases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from sglang_server import needs_sglang
from test_bench import GROUPS, LENGTHS, MOST, PROMPT, REPEATS, SAMPLES, write_config

from megatron_oreal.data.lengths import parse_lengths

pytestmark = [needs_sglang, pytest.mark.slow]


def test_a_server_answers_with_the_drawn_lengths_and_its_switch_is_measured(tmp_path: Path) -> None:
    config, output = write_config(tmp_path), tmp_path / "result.json"
    overrides = ["rollout.engine=sglang", "parallel.offload=[optimizer,reward_model,reference,policy]"]
    options = ["--lengths", LENGTHS, "--prompt-tokens", PROMPT, "--repeats", REPEATS, "--parts", "rollout,switch,step"]
    done = tiny.cli("bench", config, *overrides, *options, "--output", output)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(output.read_text())
    drawn = parse_lengths(LENGTHS, MOST).draw(GROUPS * SAMPLES, seed=0).sum()
    assert record["parts"]["rollout"]["output_tokens"] == drawn
    assert record["parts"]["step"]["tokens"] == [drawn + GROUPS * SAMPLES * PROMPT] * REPEATS
    assert record["parts"]["switch"]["servers"] == 1
    phases = {figure["name"] for figure in record["figures"] if figure["part"] == "switch"}
    assert {f"phase {name}" for name in ("sleep", "sleep/release", "publish/load", "publish/wake_cache")} <= phases
