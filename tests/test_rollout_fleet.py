"""What moves all engines together: measured memory, agreement on failures, and the limits that stop a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from dist import run_ranks

from megatron_oreal import platform as platforms
from megatron_oreal.config_check import check_config
from megatron_oreal.config_load import load_config
from megatron_oreal.errors import UserError
from megatron_oreal.layout import load_model_spec
from megatron_oreal.rollout.embedded import EmbeddedEngine
from megatron_oreal.rollout.engine import EngineError
from megatron_oreal.rollout.fleet import Fleet, ReleasedMemory
from megatron_oreal.rollout.sglang.engine import SglangEngine
from megatron_oreal.telemetry import names
from megatron_oreal.train import _require_agreement

GIB = 2**30


class Device:
    """Free bytes of a device, one reading after the other; the last one stays."""

    def __init__(self, *readings: int):
        self.readings = list(readings)

    def __call__(self) -> int:
        return self.readings.pop(0) if len(self.readings) > 1 else self.readings[0]


def test_memory_counts_when_it_is_there_and_not_before() -> None:
    device = Device(2 * GIB, 2 * GIB, 3 * GIB, 9 * GIB, 12 * GIB)
    memory = ReleasedMemory(device, 6 * GIB, timeout_s=20.0)
    memory.mark()
    assert memory.wait() == 10 * GIB  # 7 would have been enough, but more was on its way
    assert device.readings == [12 * GIB]


def test_later_all_of_what_came_back_the_first_time_must_come_back() -> None:
    """The weights alone are not enough then: a KV cache that stays would leave the actors too little."""
    memory = ReleasedMemory(Device(0, 10 * GIB, 10 * GIB, 0, 6 * GIB), 6 * GIB, timeout_s=0.3)
    memory.mark()
    assert memory.wait() == 10 * GIB
    memory.mark()
    with pytest.raises(EngineError, match=r"6144 MiB .* came back within 0\.3 s .* 10240 MiB were expected"):
        memory.wait()


class Engine(SglangEngine):
    """Falls asleep; ``restarts`` says how often its server was started again."""

    def __init__(self) -> None:
        self.restarts = 0

    @property
    def num_restarts(self) -> int:
        return self.restarts

    def sleep(self, tags: Sequence[str] = ()) -> None:
        """It does."""


class Alone:
    """A platform of one rank."""

    def gather_objects(self, value: Any, what: str = "") -> list[Any]:
        return [value]


def test_a_server_that_was_started_again_may_have_less_memory_than_the_one_before() -> None:
    """SGLang sizes its caches by what is free at its start, and then the actors are there."""
    memory = ReleasedMemory(Device(0, 10 * GIB, 10 * GIB, 0, 7 * GIB, 7 * GIB, 0, 6 * GIB), 6 * GIB, timeout_s=0.3)
    engine = Engine()
    fleet = Fleet(engine, Alone(), memory=memory)  # type: ignore[arg-type]
    assert fleet.sleep() == 10 * GIB
    fleet._asleep, engine.restarts = False, 1
    assert fleet.sleep() == 7 * GIB
    fleet._asleep = False
    with pytest.raises(EngineError, match="7168 MiB were expected"):
        fleet.sleep()


def load_where_one_engine_refuses(path: Path) -> dict[str, Any]:
    platform = platforms.init_distributed("cpu", 200, host_timeout_s=190)
    engine = EmbeddedEngine(load_model_spec(path), dtype=torch.float32, max_running_requests=1, max_length=8)
    fleet = Fleet(engine, platform)
    fleet.load_weights(3 if platform.rank else 0)
    said = None
    try:
        fleet.load_weights(2)  # on rank 1 it is not newer
    except EngineError as error:
        said = str(error)
    fleet.load_weights(4)
    versions = platform.gather_objects(engine.health().version)
    platforms.shutdown_distributed()
    return {"said": said, "versions": versions, "own_group": platform.host_group is not torch.distributed.group.WORLD}


def test_a_version_that_one_engine_refuses_is_refused_on_every_rank(tmp_path: Path) -> None:
    path = tiny.write_model(tmp_path / "model")
    for answer in run_ranks("test_rollout_fleet:load_where_one_engine_refuses", 2, {"path": path}):
        assert answer["said"] == "load_weights: version 2 is not newer than the loaded version 3"
        assert answer["versions"] == [4, 4]
        assert answer["own_group"], "the host group must have a timeout of its own"


def config(tmp_path: Path, *overrides: str) -> Any:
    return load_config(tiny.write_run(tmp_path, tiny.write_model(tmp_path / "model")), list(overrides))


def test_a_run_whose_engine_draws_from_another_policy_is_stopped_with_the_numbers(tmp_path: Path) -> None:
    metrics = {names.LOGP_DIFF_MEAN: 0.31, names.LOGP_DIFF_P999: 2.5, names.LOGP_DIFF_MAX: 4.25}
    with pytest.raises(UserError) as caught:
        _require_agreement(config(tmp_path), 7, metrics)
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith("rollout.max_logp_difference=0.2: in step 7 ")
    assert all(number in said for number in ("0.31 nats", "2.5", "4.25"))
    _require_agreement(config(tmp_path, "rollout.max_logp_difference=0.32"), 7, metrics)
    _require_agreement(config(tmp_path, "rollout.max_logp_difference=null"), 7, metrics)
    _require_agreement(config(tmp_path), 7, {})  # a step that kept nothing
    with pytest.raises(UserError):
        _require_agreement(config(tmp_path), 7, metrics | {names.LOGP_DIFF_MEAN: float("nan")})


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["rollout.engine_tp=3"],
            r"rollout\.engine_tp=3 does not divide the 4 ranks of a node.*\(use one of 1,",
        ),
        (["rollout.engine_tp=4"], r"rollout\.engine_tp=4: SGLang pads the model's intermediate_size=64 to a multiple"),
    ],
)
def test_sglang_engines_that_do_not_fit_are_refused(tmp_path: Path, overrides: list[str], said: str) -> None:
    pytest.importorskip("sglang", reason="needs sglang: bash tests/setup_sglang.sh PYTHON")
    keys = ["rollout.engine=sglang", *overrides]
    with pytest.raises(UserError, match=said):
        check_config(config(tmp_path, *keys), load_model_spec(tmp_path / "model"), 8, 4)


def test_the_embedded_engine_gives_no_response_up(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rollout\.oversample_prompts=2 needs rollout\.engine=sglang"):
        check_config(config(tmp_path, "rollout.oversample_prompts=2"), load_model_spec(tmp_path / "model"), 1)
