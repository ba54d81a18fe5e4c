"""The CPU adaptation of Megatron-core leaves no trace, and the ranks refuse a mistake together."""

from __future__ import annotations

import datetime
import subprocess
import sys
from typing import Any

import pytest
import torch
from dist import run_ranks
from megatron.core import optimizer
from megatron.core.optimizer import clip_grads
from megatron.core.tensor_parallel import random as megatron_random

from megatron_oreal import platform as platforms
from megatron_oreal.errors import UserError
from megatron_oreal.platform import device
from megatron_oreal.platform.megatron_cpu import megatron_on_cpu

REPLACED: list[tuple[Any, str]] = [
    (torch.cuda, "current_device"),
    (torch.cuda, "synchronize"),
    (torch.cuda, "empty_cache"),
    (torch.cuda, "get_rng_state"),
    (torch.cuda, "set_rng_state"),
    (megatron_random, "_CUDA_RNG_STATE_TRACKER"),
    (megatron_random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED"),
    (megatron_random, "_get_cuda_rng_state"),
    (megatron_random, "_set_cuda_rng_state"),
]


def world_of(owner: Any) -> dict[str, Any]:
    return dict(vars(owner))


def is_adapted() -> bool:
    """True while a request for CUDA is answered by the CPU."""
    try:
        return torch.empty(1, device="cuda").device.type == "cpu"
    except (AssertionError, RuntimeError):  # what torch says without CUDA
        return False


@pytest.fixture(autouse=True)
def _without_cuda() -> None:
    if torch.cuda.is_available():
        pytest.skip("the adaptation is for machines without CUDA")


def test_everything_is_put_back_when_the_scope_ends() -> None:
    before = {owner.__name__: world_of(owner) for owner, _ in REPLACED}
    assert not is_adapted()
    with megatron_on_cpu():
        assert is_adapted()
        changed = [name for owner, name in REPLACED if getattr(owner, name) is not before[owner.__name__][name]]
        assert changed == [name for _, name in REPLACED]
    assert not is_adapted()
    for owner in (torch.cuda, megatron_random):
        after = world_of(owner)
        assert [name for name, value in before[owner.__name__].items() if after.get(name) is not value] == []
    assert torch.empty(1).type() == "torch.FloatTensor"


def test_everything_is_put_back_after_an_exception() -> None:
    before = [getattr(owner, name) for owner, name in REPLACED]
    with pytest.raises(KeyError, match="inside"), megatron_on_cpu():
        raise KeyError("inside")
    assert all(getattr(owner, name) is value for (owner, name), value in zip(REPLACED, before, strict=True))
    assert not is_adapted()


def test_a_nested_scope_ends_nothing_of_the_outer_one() -> None:
    before = [getattr(owner, name) for owner, name in REPLACED]
    with megatron_on_cpu():
        with pytest.raises(KeyError, match="inside"), megatron_on_cpu():
            raise KeyError("inside")
        assert is_adapted()
        with megatron_on_cpu():
            assert is_adapted()
        assert torch.cuda.current_device() == torch.device("cpu")
    assert not is_adapted()
    assert all(getattr(owner, name) is value for (owner, name), value in zip(REPLACED, before, strict=True))


def test_the_scope_can_be_entered_again() -> None:
    for _ in range(2):
        with megatron_on_cpu():
            assert is_adapted()
        assert not is_adapted()


def test_optimizers_without_cpu_code_give_way_to_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron takes TransformerEngine's or apex's wherever they are installed, on a machine without CUDA too."""
    fused = object()
    monkeypatch.setattr(optimizer, "Adam", fused)
    monkeypatch.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", False)
    for name in ("multi_tensor_applier", "l2_norm_impl"):
        monkeypatch.setattr(clip_grads, name, fused)
    with megatron_on_cpu():
        assert optimizer.Adam is torch.optim.AdamW
        assert optimizer.USING_PYTORCH_OPTIMIZER
        gradients = [torch.tensor([3.0]), torch.tensor([[4.0]])]
        norm, _ = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, torch.zeros(1), [gradients], False)
        assert float(norm) == 5.0
    assert optimizer.Adam is clip_grads.l2_norm_impl is clip_grads.multi_tensor_applier is fused
    assert optimizer.USING_PYTORCH_OPTIMIZER is False


def test_requests_for_cuda_are_answered_by_the_cpu() -> None:
    source = torch.arange(3.0)
    with megatron_on_cpu():
        made = [
            torch.zeros(2, device="cuda"),
            torch.ones(2, device="cuda:1"),
            torch.empty(2, device=torch.device("cuda", 3)),
            torch.tensor([1], device=torch.cuda.current_device()),
            torch.empty(2, pin_memory=True),
            source.to("cuda"),
            source.to(device="cuda"),
            source.to(torch.device("cuda"), torch.float64),
            source.cuda(),
            source.new_zeros(2, device="cuda"),
        ]
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    assert {tensor.device.type for tensor in made} == {"cpu"}
    assert made[7].dtype == torch.float64
    assert made[5].tolist() == [0.0, 1.0, 2.0]


def test_a_tensor_says_the_cuda_name_of_its_type_and_still_converts() -> None:
    with megatron_on_cpu():
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
        assert torch.zeros(1, dtype=torch.int64).type() == "torch.LongTensor"
        assert torch.zeros(1).type(torch.float64).dtype == torch.float64
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_megatrons_random_number_tracker_forks_without_cuda() -> None:
    with megatron_on_cpu():
        tracker = megatron_random.get_cuda_rng_tracker()
        torch.manual_seed(0)
        with tracker.fork():
            forked = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(forked, torch.rand(3))


def test_where_cuda_is_available_it_refuses_and_replaces_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [getattr(owner, name) for owner, name in REPLACED]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="machines without CUDA"), megatron_on_cpu():
        pytest.fail("entered")
    assert all(getattr(owner, name) is value for (owner, name), value in zip(REPLACED, before, strict=True))


def test_cuda_is_refused_where_there_is_none() -> None:
    assert platforms.choose_device("auto") == platforms.choose_device("cpu") == "cpu"
    with pytest.raises(UserError, match=r"device=cuda: .*set device=cpu"):
        platforms.choose_device("cuda")


# Ranks


def test_all_ranks_raise_the_first_mistake_that_any_of_them_sees_in_one_group_after_another() -> None:
    zero, one = run_ranks("platform_cases:fail_in_all_ways", 2)
    for answers in (zero, one):
        nobody, second, both = answers
        assert nobody["result"] == "done"
        assert second["error"] == "rank 1 misses its file"
        assert both["error"] == "rank 0 misses its file"
        assert all(answer["ranks"] == [0, 1] and answer["from rank 1"] == "of 1" for answer in answers)


def test_ranks_that_wait_are_told_who_refuses_to_come_and_at_their_deadline_how_many_have_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The ranks of two nodes one after the other, at the store that torchrun would keep for them."""
    store = torch.distributed.TCPStore("localhost", 0, is_master=True)
    environment = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": store.port}
    for name, value in (environment | {"TORCHELASTIC_USE_AGENT_STORE": True, "RANK": 1}).items():
        monkeypatch.setenv(name, str(value))
    rendezvous = device._rendezvous

    def reach(deadline: datetime.timedelta) -> tuple[torch.distributed.Store, int, int]:
        """The way to the store may take a busy machine longer than those who do not come are waited for."""
        reached, rank, world_size = rendezvous(datetime.timedelta(seconds=300))
        reached.set_timeout(deadline)
        return reached, rank, world_size

    monkeypatch.setattr(device, "_rendezvous", reach)
    monkeypatch.setattr(device, "_HEARD_S", 0.0)
    monkeypatch.setattr(device, "_joined", [])
    device.refuse_to_join("unknown key 'sead'")
    device.refuse_to_join("once is enough")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(device, "_joined", [])
    with pytest.raises(UserError, match=r"^rank 1 \(.+\): unknown key 'sead'$"):
        platforms.init_distributed("cpu", 30)
    with pytest.raises(UserError, match=r"^parallel\.distributed_timeout_s=1: 1 of 2 ranks have come by then"):
        platforms.init_distributed("cpu", 1)


@pytest.mark.parametrize(("hard", "said"), [(8192, "4608"), (2000, "2000"), (1100, "ulimit -Hn is 1100: each of 1024")])
def test_the_limit_of_open_files_is_raised_for_many_ranks_or_refused(hard: int, said: str) -> None:
    lines = [
        "import resource",
        "from megatron_oreal.errors import UserError",
        "from megatron_oreal.platform.device import allow_connections",
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (256, {hard}))",
        "try:",
        "    allow_connections(1024)",
        "    print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])",
        "except UserError as error:",
        "    print(error)",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(said)
