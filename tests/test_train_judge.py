"""Training with a judge: heard before a model is built, asked during the step, never trusted when it fails."""

from pathlib import Path

import judge_server as servers
import pytest
import tiny
from judge_server import JudgeServer

from megatron_oreal.telemetry import names


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("model"))


def train(folder: Path, model: Path, *hosts: str, overrides=()):
    config = tiny.write_run(folder, model)
    limits = ["max_retries=0", "connect_timeout_s=120", "timeout_s=120", "deadline_s=240", "retry_delay_s=0.01"]
    keys = [f"verifier.hosts=[{', '.join(hosts)}]", "total_steps=2", "checkpoint.export_hf=false"]
    return tiny.cli("train", config, *keys, *(f"verifier.judge.{limit}" for limit in limits), *overrides)


def test_a_step_counts_what_the_judge_did_for_it(tmp_path, model):
    with JudgeServer(servers.always("CORRECT")) as server:
        done = train(tmp_path, model, server.host)
    assert done.returncode == 0, done.stderr[-4000:]
    records = tiny.metrics_of(tmp_path / "run")
    assert len(records) == 2
    for record in records:
        assert record[names.BY_RULES_SHARE] + record[names.BY_JUDGE_SHARE] == pytest.approx(1.0)
        assert record[names.UNKNOWN_SHARE] == record[names.JUDGE_UNKNOWN_REPLY] == record[names.JUDGE_RETRIES] == 0.0
    assert max(record[names.BY_JUDGE_SHARE] for record in records) > 0
    asked = sum(record[names.JUDGE_REQUESTS] for record in records)
    assert asked == len(server.payloads) - 1  # the check before the first step is not the step's
    assert (tmp_path / "run" / "judge_cache.txt").stat().st_size > 0


def test_a_step_whose_judge_fails_stops_with_counts_by_cause_and_the_mend(tmp_path, model):
    with JudgeServer(servers.in_turn(servers.always("CORRECT"), servers.status(500, text="boom"))) as server:
        done = train(
            tmp_path, model, server.host, overrides=["verifier.max_unknown_share=0", "rollout.prompts_per_step=16"]
        )
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: verifier.max_unknown_share=0.0: ")
    for part in ("of this step's 64 verdicts are unknown (", " x judge refused", "HTTP 500", "raise the limit"):
        assert part in line
    assert "Traceback" not in done.stderr


def test_a_judge_that_is_not_there_is_one_line_before_any_step(tmp_path, model):
    done = train(tmp_path, model, "127.0.0.1:1", "127.0.0.1:2")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "error: verifier.hosts: none of the 2 judge hosts gives a verdict (http://127.0.0.1:1/v1: Cannot"
    )
    assert "http://127.0.0.1:2/v1: " in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
