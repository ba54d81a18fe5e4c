from __future__ import annotations

import time

import pytest

from megatron_oreal.telemetry import PhaseTimers


def test_phases_and_other_add_up_to_the_step_and_parts_are_not_counted_twice():
    timers = PhaseTimers()
    with timers("generate"):
        time.sleep(0.02)
    with timers("update"):
        with timers("forward"):
            time.sleep(0.03)
        time.sleep(0.01)
    time.sleep(0.02)
    with timers("generate"):
        time.sleep(0.01)
    seconds = timers.collect()
    assert set(seconds) == {"time/generate", "time/update", "time/update/forward", "time/other", "time/step"}
    top = seconds["time/generate"] + seconds["time/update"]
    assert top + seconds["time/other"] == pytest.approx(seconds["time/step"], abs=1e-9)
    assert seconds["time/generate"] >= 0.03
    assert seconds["time/update/forward"] >= 0.03
    assert seconds["time/update"] >= seconds["time/update/forward"] + 0.01
    assert seconds["time/other"] >= 0.02


def test_a_nested_phase_may_give_its_full_name():
    timers = PhaseTimers()
    with timers("update"), timers("update/forward"), timers("layer"):
        pass
    assert {"time/update", "time/update/forward", "time/update/forward/layer"} <= set(timers.collect())


def test_a_name_with_a_slash_outside_its_parent_still_counts_as_covered_time():
    timers = PhaseTimers()
    with timers("update/forward"):
        time.sleep(0.02)
    seconds = timers.collect()
    assert seconds["time/other"] <= seconds["time/step"] - 0.02


def test_collect_begins_a_new_step_and_loses_no_time_between_two():
    timers = PhaseTimers()
    before = time.perf_counter()
    timers.reset()
    after = time.perf_counter()
    with timers("generate"):
        pass
    first = timers.collect()
    time.sleep(0.02)
    least = time.perf_counter() - after
    second = timers.collect()
    most = time.perf_counter() - before
    assert set(second) == {"time/other", "time/step"}
    assert second["time/other"] >= 0.02
    assert least <= first["time/step"] + second["time/step"] <= most


def test_the_time_of_a_phase_that_raises_is_kept_and_the_device_left_alone():
    calls = []
    timers = PhaseTimers(synchronize=lambda: calls.append(1))
    with pytest.raises(ZeroDivisionError), timers("update"):
        raise ZeroDivisionError
    assert len(calls) == 1
    assert "time/update" in timers.collect()


def test_the_device_is_waited_for_inside_the_phase_it_worked_for():
    timers = PhaseTimers(synchronize=lambda: time.sleep(0.02))
    with timers("update"):
        pass
    seconds = timers.collect()
    assert seconds["time/update"] >= 0.02
    assert seconds["time/other"] >= 0.02


def test_collect_inside_a_phase_names_the_phase():
    timers = PhaseTimers()
    with timers("update"), pytest.raises(RuntimeError, match="'update' is still open"):
        timers.collect()


@pytest.mark.parametrize("name", ["other", "step"])
def test_names_that_collect_fills_in_are_refused(name):
    with pytest.raises(ValueError, match=name), PhaseTimers()(name):
        pass
