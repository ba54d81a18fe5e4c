from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from megatron_oreal.config import TelemetryConfig
from megatron_oreal.errors import UserError
from megatron_oreal.telemetry import MetricLogger, names, panels, records, summary, write_report

PHASES = ("generate", "verify", "reference", "update_policy", "update_reward_model", "reshard", "sleep", "wake")


def metrics(step: int) -> dict[str, float]:
    found = {
        names.PASS_RATE: 0.3 + 0.004 * step,
        names.GROUPS_KEPT: 30 + step % 7,
        names.LOSS_REWARD_MODEL: 0.69 - 0.002 * step,
        names.KL_TO_REFERENCE: 1e-5 * step,
        names.ENTROPY: 0.6 - 0.002 * step,
        names.LENGTH_MEAN: 5000.0 + step,
        names.LENGTH_MAX: 14000,
        names.TRUNCATED_SHARE: 0.05,
        names.phase_metric("update_policy/forward"): 1.0,
        names.TIME_OTHER: 0.5,
    }
    found |= {names.phase_metric(phase): 8.0 - place for place, phase in enumerate(PHASES)}
    found[names.TIME_STEP] = sum(8.0 - place for place in range(len(PHASES))) + 0.5
    if step >= 2:
        found |= {names.LOSS_POSITIVE: 0.1, names.LOSS_NEGATIVE: 0.05, names.LOSS_KL: 1e-4, names.LOSS_TOTAL: 0.1501}
    if step % 10 == 0:
        rate = 0.4 + 0.003 * step
        found |= {names.EVAL_PASS_AT_1: rate, names.EVAL_PASS_AT_1_LOW: rate - 0.05, names.EVAL_GREEDY: rate + 0.02}
        found |= {names.EVAL_PASS_AT_1_HIGH: rate + 0.05}
    return found


def run(work_dir: Path, steps: int) -> Path:
    with MetricLogger(work_dir, TelemetryConfig(tensorboard=False), enabled=True) as logger:
        for step in range(steps):
            logger.log(step, metrics(step))
    return work_dir


def colours(image: np.ndarray) -> set[str]:
    """The palette colours that a drawn picture shows in at least 20 pixels."""
    pixels = (image[..., :3].reshape(-1, 3) * 255).round().astype(int)
    found = set()
    for name in ("BLUE", "ORANGE", "GREEN", "VERMILION", "PURPLE", "SKY", "YELLOW", "GREY"):
        code = getattr(panels, name)
        rgb = [int(code[i : i + 2], 16) for i in (1, 3, 5)]
        if (pixels == rgb).all(axis=1).sum() >= 20:
            found.add(name)
    return found


@pytest.mark.parametrize("steps", [1, 30, 150])
def test_a_run_of_any_length_is_drawn_with_every_series(tmp_path, steps):
    path = write_report(run(tmp_path, steps))
    assert path == tmp_path / "report.png"
    image = imread(path)
    assert image.shape[:2] == (1200, 1920)
    assert colours(image) == {"BLUE", "ORANGE", "GREEN", "VERMILION", "PURPLE", "SKY", "YELLOW", "GREY"}
    assert sorted(file.name for file in tmp_path.iterdir()) == [records.FILE_NAME, "report.png"]


def texts(canvas) -> list[str]:
    figure = canvas.figure
    return [text.get_text() for text in figure.texts] + [t.get_text() for axes in figure.axes for t in axes.texts]


def test_panels_without_data_say_so_and_the_others_do_not():
    full = panels.draw([metrics(step) | {"step": step} for step in range(5)], "run", "")
    assert "no data" not in texts(full)
    bare = panels.draw([{"step": 0, names.PASS_RATE: 0.5}], "run", "")
    assert texts(bare).count("no data") == len(bare.figure.axes) - 1


def test_the_title_names_the_run_and_its_steps(tmp_path):
    work_dir = run(tmp_path / "oreal-7b", 21)
    first_line = summary(work_dir).splitlines()[0]
    assert first_line == "oreal-7b          steps 0-20 · 13 min · held-out pass@1 0.460 [0.410, 0.510] at step 20"


def test_no_legend_lies_on_the_data():
    canvas = panels.draw([metrics(step) | {"step": step} for step in range(12)], "run", "")
    canvas.draw()
    legends = [(axes, axes.get_legend()) for axes in canvas.figure.axes if axes.get_legend() is not None]
    assert len(legends) == 4
    for axes, legend in legends:
        box, frame = legend.get_window_extent(), axes.get_window_extent()
        assert box.y0 >= frame.y1 or box.x0 >= frame.x1
        assert box.x1 <= canvas.figure.bbox.x1


def test_stacked_phases_reach_the_time_of_the_step_without_counting_parts_twice():
    canvas = panels.draw([metrics(step) | {"step": step} for step in range(4)], "run", "")
    times = canvas.figure.axes[-1]
    assert times.get_legend().get_texts()[0].get_text() == "other"
    tops = [patch.get_data().values for patch in times.patches]
    assert tops[-1] == pytest.approx([metrics(step)[names.TIME_STEP] for step in range(4)])


def test_smoothing_is_a_mean_that_leaves_gaps_alone():
    values = np.array([1.0, 2.0, np.nan, 4.0, 6.0])
    smooth = panels._centred_mean(values, 1)
    assert smooth[[0, 1, 3, 4]] == pytest.approx([1.5, 1.5, 5.0, 5.0])
    assert np.isnan(smooth[2])


def test_a_torn_last_line_is_skipped_with_a_warning(tmp_path, caplog):
    path = run(tmp_path, 5) / records.FILE_NAME
    path.write_bytes(path.read_bytes()[:-30])
    with caplog.at_level(logging.WARNING):
        assert "steps 0-3" in summary(tmp_path)
        write_report(tmp_path)
    assert "line 5 is not a complete record" in caplog.text


def test_values_that_are_not_finite_are_reported_and_do_not_stop_the_drawing(tmp_path):
    with MetricLogger(tmp_path, TelemetryConfig(tensorboard=False), enabled=True) as logger:
        for step, loss in enumerate((0.5, math.nan, math.inf)):
            logger.log(step, metrics(step) | {names.LOSS_TOTAL: loss, names.EVAL_PASS_AT_1: loss})
    write_report(tmp_path)
    text = summary(tmp_path)
    assert "loss/total 2 x, first at step 1" in text
    assert "best       0.500" in text


def test_the_summary_gives_first_best_and_last_and_where_the_time_went(tmp_path):
    lines = summary(run(tmp_path, 30)).splitlines()
    assert "pass@1 first      0.400 [0.350, 0.450], greedy 0.420 at step 0" in lines
    assert "pass@1 best       0.460 [0.410, 0.510], greedy 0.480 at step 20" in lines
    assert "kept groups       30 -> 31, mean 32.83" in lines
    (time_line,) = [line for line in lines if line.startswith("time ")]
    assert "36.5 s a step: generate 22 %, verify 19 %" in time_line
    assert "forward" not in time_line


def test_a_run_without_evaluation_or_timers_is_summarised(tmp_path):
    with MetricLogger(tmp_path, TelemetryConfig(tensorboard=False), enabled=True) as logger:
        logger.log(0, {names.PASS_RATE: 0.5})
    assert "held-out pass@1   no data" in summary(tmp_path)
    write_report(tmp_path)


def test_curves_that_cannot_be_written_are_a_user_error_that_names_them(tmp_path):
    with MetricLogger(tmp_path, TelemetryConfig(tensorboard=False), enabled=True) as logger:
        logger.log(0, {names.PASS_RATE: 0.5})
    (tmp_path / "report.png.partial").mkdir()
    with pytest.raises(UserError, match=r"report\.png: cannot be written \(Is a directory\)"):
        write_report(tmp_path)


def test_a_missing_or_empty_file_is_a_user_error_that_names_it(tmp_path):
    (tmp_path / "a_file").touch()
    for report in (summary, write_report):
        for place in (tmp_path, tmp_path / "a_file"):
            with pytest.raises(UserError, match=r"metrics\.jsonl: no such file; give the work_dir"):
                report(place)
    (tmp_path / records.FILE_NAME).touch()
    for report in (summary, write_report):
        with pytest.raises(UserError, match=r"metrics\.jsonl: holds no complete step yet"):
            report(tmp_path)
