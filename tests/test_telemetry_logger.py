from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from dist import run_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_oreal.config import TelemetryConfig
from megatron_oreal.errors import UserError
from megatron_oreal.telemetry import MetricLogger, StepTable, names, progress, records

JSON_ONLY = TelemetryConfig(tensorboard=False)


def write(work_dir: Path, steps: range, first_step: int | None = None, config: TelemetryConfig = JSON_ONLY) -> None:
    first = steps.start if first_step is None else first_step
    with MetricLogger(work_dir, config, enabled=True, first_step=first) as logger:
        for step in steps:
            logger.log(step, {names.LOSS_TOTAL: 100.0 * first + step})


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def test_a_disk_that_is_full_is_one_line(tmp_path):
    (tmp_path / records.FILE_NAME).symlink_to("/dev/full")
    with (
        pytest.raises(UserError, match=r"^work_dir: cannot write the metrics of step 3 \(No space left on device\)"),
        MetricLogger(tmp_path, JSON_ONLY, enabled=True) as logger,
    ):
        logger.log(3, {names.LOSS_TOTAL: 1.0})


def test_every_line_is_strict_json_on_disk_at_once_and_reads_back_exactly(tmp_path):
    metrics = {
        "a/float": 0.1 + 0.2,
        "a/nan": math.nan,
        "a/inf": math.inf,
        "a/minus_inf": -math.inf,
        "a/count": np.int64(7),
        "a/tensor": torch.tensor(0.5),
        "a/bool": True,
    }
    with MetricLogger(tmp_path, JSON_ONLY, enabled=True) as logger:
        logger.log(0, metrics)
        (line,) = (tmp_path / records.FILE_NAME).read_text().splitlines()
        parsed = json.loads(line, parse_constant=refuse_constant)
        assert parsed == {
            "step": 0,
            "a/float": 0.1 + 0.2,
            "a/nan": "nan",
            "a/inf": "inf",
            "a/minus_inf": "-inf",
            "a/count": 7,
            "a/tensor": 0.5,
            "a/bool": 1,
        }
        assert isinstance(parsed["a/count"], int)
    (record,) = records.read(tmp_path / records.FILE_NAME)
    assert math.isnan(record["a/nan"])
    assert {name: record[name] for name in metrics if name != "a/nan"} == {
        name: float(value) for name, value in metrics.items() if name != "a/nan"
    }


def test_resume_drops_the_steps_it_repeats_and_leaves_the_others_byte_for_byte(tmp_path):
    write(tmp_path, range(6))
    path = tmp_path / records.FILE_NAME
    before = path.read_text().splitlines()
    write(tmp_path, range(4, 8))
    after = path.read_text().splitlines()
    assert after[:4] == before[:4]
    assert [json.loads(line)["step"] for line in after] == list(range(8))
    assert json.loads(after[4])[names.LOSS_TOTAL] == 404.0
    assert [file.name for file in tmp_path.iterdir()] == [records.FILE_NAME]


def test_resume_removes_a_torn_last_line_before_it_appends(tmp_path, caplog):
    write(tmp_path, range(3))
    path = tmp_path / records.FILE_NAME
    path.write_text(path.read_text()[:-20])
    with caplog.at_level(logging.WARNING):
        write(tmp_path, range(2, 4))
    assert "line 3 is not a complete record" in caplog.text
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]


def test_a_failed_cut_leaves_the_old_file_whole(tmp_path, monkeypatch):
    write(tmp_path, range(6))
    path = tmp_path / records.FILE_NAME
    before = path.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match=r"work_dir: cannot write metrics in .*No space left"):
        MetricLogger(tmp_path, JSON_ONLY, enabled=True, first_step=3)
    assert path.read_bytes() == before


def test_starting_over_keeps_the_previous_file_aside(tmp_path):
    write(tmp_path, range(5))
    write(tmp_path, range(2))
    assert [record["step"] for record in records.read(tmp_path / records.FILE_NAME)] == [0, 1]
    assert [record["step"] for record in records.read(tmp_path / records.PREVIOUS_FILE_NAME)] == [0, 1, 2, 3, 4]


def test_a_step_cannot_be_logged_twice_nor_before_the_resumed_one(tmp_path):
    with MetricLogger(tmp_path, JSON_ONLY, enabled=True, first_step=3) as logger:
        with pytest.raises(ValueError, match="step 2"):
            logger.log(2, {})
        logger.log(3, {})
        with pytest.raises(ValueError, match="step 3"):
            logger.log(3, {})


def test_a_metric_cannot_overwrite_the_step(tmp_path):
    with MetricLogger(tmp_path, JSON_ONLY, enabled=True) as logger, pytest.raises(ValueError, match="'step'"):
        logger.log(0, {"step": 4.0})


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    config = TelemetryConfig(tensorboard=True)
    write(tmp_path, range(6), config=config)
    # TensorBoard reads files in the order of their names, which begin with the second in which they were begun.
    (first,) = (tmp_path / "tensorboard").iterdir()
    first.rename(first.with_name("events.out.tfevents.1000000000.host.1.0"))
    write(tmp_path, range(4, 8), config=config)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = events.Scalars(names.LOSS_TOTAL)
    assert [scalar.step for scalar in scalars] == list(range(8))
    assert [scalar.value for scalar in scalars] == [0, 1, 2, 3, 404, 405, 406, 407]


def test_a_missing_package_is_named_with_its_mend_before_the_old_metrics_are_cut(tmp_path, monkeypatch):
    write(tmp_path, range(6))
    before = (tmp_path / records.FILE_NAME).read_bytes()
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"telemetry\.wandb_project=oreal .*pip install wandb"):
        MetricLogger(tmp_path, TelemetryConfig(wandb_project="oreal"), enabled=True, first_step=3)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.delattr(torch.utils, "tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match=r"telemetry\.tensorboard=true .*pip install tensorboard"):
        MetricLogger(tmp_path, TelemetryConfig(tensorboard=True), enabled=True, first_step=3)
    assert (tmp_path / records.FILE_NAME).read_bytes() == before


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_folder_that_weights_and_biases_left_behind_is_not_taken_for_the_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        with pytest.raises(UserError, match="pip install wandb"):
            MetricLogger(tmp_path, TelemetryConfig(wandb_project="oreal"), enabled=True)
        assert sys.modules["wandb"].__file__ is None, "the folder was not what the import found"
    finally:
        sys.modules.pop("wandb", None)


def test_weights_and_biases_offline_continues_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = TelemetryConfig(tensorboard=False, wandb_project="oreal")
    write(tmp_path, range(3), config=config)
    run_id = (tmp_path / "wandb_run_id").read_text()
    write(tmp_path, range(2, 4), config=config)
    assert (tmp_path / "wandb_run_id").read_text() == run_id
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{run_id.strip()}"))) == 2


def test_a_work_dir_that_is_a_file_is_a_user_error(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match=r"work_dir: cannot write metrics in .*run"):
        MetricLogger(tmp_path / "run", JSON_ONLY, enabled=True)


def same_calls_on_every_rank(folder: str) -> list[str]:
    rank = int(os.environ["RANK"])
    work_dir = Path(folder) / str(rank)
    enabled = rank == 0
    sys.stdout = sys.stderr = (Path(folder) / f"output{rank}").open("w")
    table = StepTable(enabled)
    with MetricLogger(work_dir, TelemetryConfig(), enabled) as logger:
        for step in range(2):
            with progress("generate", total=1, interval_s=3600) as bar:
                bar.update()
            logger.log(step, {names.LOSS_TOTAL: 1.0})
            table.row(step, {names.LOSS_TOTAL: 1.0})
    sys.stdout.flush()
    return sorted(path.name for path in work_dir.iterdir()) if work_dir.exists() else []


def test_under_torchrun_the_same_calls_leave_nothing_on_ranks_above_0(tmp_path):
    files = run_ranks("test_telemetry_logger:same_calls_on_every_rank", 2, {"folder": str(tmp_path)})
    assert files == [[records.FILE_NAME, "tensorboard"], []]
    assert len((tmp_path / "output0").read_text().splitlines()) == 5
    assert (tmp_path / "output1").read_text() == ""
