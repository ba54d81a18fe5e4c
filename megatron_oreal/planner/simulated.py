"""One rank of a world that is not there: torch's fake process group, and tensors without memory (``meta``).

Inside ``simulated_rank`` Megatron-core and this trainer run as on a CPU rank, except that

* every tensor for the device is on ``meta``, and collectives on it return at once;
* pipeline stages receive tensors of the sender's shape (on ``meta`` nobody can send a shape);
* questions about values are answered as for a healthy step: every row is read, no label is out of range, numbers are 1.

The process group and Megatron's parallel state are global: one simulated rank at a time, in a process without others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_map

from megatron_oreal.actor.parallel import ParallelGrid, current_grid, destroy_parallel
from megatron_oreal.config import ParallelConfig
from megatron_oreal.planner.live import LiveStorages
from megatron_oreal.platform import Platform

META = torch.device("meta")
_TYPE_NAMES = {torch.float32: "torch.cuda.FloatTensor", torch.bfloat16: "torch.cuda.BFloat16Tensor"}


@dataclass(frozen=True)
class SimulatedPlatform(Platform):
    """A rank whose device is ``meta`` and whose fellows say what it says."""

    def gather_objects(self, item: Any, what: str = "") -> list[Any]:
        """Alone: the others' are not needed for shapes."""
        return [item]

    def broadcast_object(self, item: Any, source: int = 0, what: str = "") -> Any:
        """The item."""
        return item

    def barrier(self) -> None:
        """Nobody to wait for."""


class _DeviceMeansMeta(TorchFunctionMode):
    """Map a request for the device to ``meta``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = META
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is torch.tensor and isinstance(args[0], list):
            args = tree_map(lambda leaf: 1.0 if isinstance(leaf, Tensor) and leaf.device == META else leaf, args)
        if func is Tensor.cuda:
            return args[0].to(META)
        if func is Tensor.type and len(args) == 1 and not kwargs and args[0].device == META:
            return _TYPE_NAMES.get(args[0].dtype, func(*args))
        if func is Tensor.to and len(args) > 1 and str(args[1]).startswith("cuda"):
            args = (args[0], META, *args[2:])
        return func(*args, **kwargs)


class SimulatedStorages(LiveStorages):
    """``LiveStorages`` for a simulated rank: collectives on ``meta`` do nothing, values are those of a healthy step."""

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Execute one operation, unless it needs a device."""
        if func.namespace == "c10d":
            return _without_communication(func, args, kwargs)
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device == META:
            return self._value(args[0])
        out = func(*args, **kwargs)
        if func is torch.ops.aten.any.default:
            out._is_any = True
        return out

    def _value(self, tensor: Tensor) -> Any:
        """``any`` (of mistakes) is False; every other question is answered by one."""
        if tensor.dtype == torch.bool:
            return not getattr(tensor, "_is_any", False)
        return 1.0 if tensor.dtype.is_floating_point else 1


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: float | None) -> Tensor:
    """The fused kernel's shapes; on meta torch takes its unfused form, whose matrix of scores no device allocates."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attention(query, key, value, 0.0, is_causal, scale=scale)[0]


def _without_communication(func: Any, args: Any, kwargs: Any) -> Any:
    """What a collective of the fake process group returns: its output tensors as they are, and a finished work."""
    work = FakeWork().boxed()
    returned = func._schema.returns
    if len(returned) == 1:
        return work
    outputs = args[0] if isinstance(args[0], list | tuple | Tensor) else []
    return outputs, work


class _Shapes:
    """Shapes that a stage would be told by its neighbours: micro-batches come in order, forward and backward alike."""

    def __init__(self) -> None:
        self.tokens: Sequence[int] = ()
        self.hidden_size = 0
        self._from_previous = self._from_next = 0

    def announce(self, tokens: Sequence[int], hidden_size: int) -> None:
        """The next pass: tokens of every micro-batch's hidden states on this rank."""
        self.tokens, self.hidden_size = tokens, hidden_size
        self._from_previous = self._from_next = 0

    def told(self, *_: Any, recv_prev: bool, recv_next: bool) -> tuple[list[int], list[int]]:
        """In place of ``P2PCommunicator._communicate_shapes``."""
        shapes = ([0, 0, 0], [0, 0, 0])
        if recv_prev:
            shapes = (self._shape(self._from_previous), shapes[1])
            self._from_previous += 1
        if recv_next:
            shapes = (shapes[0], self._shape(self._from_next))
            self._from_next += 1
        return shapes

    def _shape(self, index: int) -> list[int]:
        return [self.tokens[index], 1, self.hidden_size]


@dataclass
class SimulatedRank:
    """What runs in ``simulated_rank``: ``storages`` counts, ``shapes`` is announced before a pipeline's pass."""

    platform: SimulatedPlatform
    grid: ParallelGrid
    storages: SimulatedStorages
    shapes: _Shapes


@contextlib.contextmanager
def simulated_rank(parallel: ParallelConfig, rank: int, world_size: int) -> Iterator[SimulatedRank]:
    """Stand on one rank. Raises ``RuntimeError`` where a process group is there already, or CUDA."""
    from megatron_oreal.platform.megatron_cpu import megatron_on_cpu

    if dist.is_initialized():
        raise RuntimeError("simulated_rank: this process has joined a process group; plan in a process of its own")
    storages, shapes = SimulatedStorages(), _Shapes()

    def communicate_shapes(
        self: P2PCommunicator, send_next: Any, send_prev: Any, recv_prev: bool, recv_next: bool
    ) -> tuple[list[int], list[int]]:
        return shapes.told(recv_prev=recv_prev, recv_next=recv_next)

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        assert dist.group.WORLD is not None
        platform = SimulatedPlatform(META, rank, world_size, dist.group.WORLD)
        with contextlib.ExitStack() as stack:
            stack.enter_context(megatron_on_cpu())
            for target, name, replacement in _replacements(communicate_shapes):
                stack.enter_context(mock.patch.object(target, name, replacement))
            grid = _init_parallel(parallel)
            stack.callback(destroy_parallel)
            stack.enter_context(storages)
            stack.enter_context(_DeviceMeansMeta())
            yield SimulatedRank(platform, grid, storages, shapes)
    finally:
        dist.destroy_process_group()


def _replacements(communicate_shapes: Callable[..., Any]) -> list[tuple[Any, str, Any]]:
    from megatron.core.distributed import param_and_grad_buffer

    @contextlib.contextmanager
    def coalescing(*_: Any, **__: Any) -> Iterator[FakeWork]:
        yield FakeWork()

    def gather(objects: list[Any], item: Any, group: Any = None) -> None:
        objects[:] = [item] * len(objects)

    return [
        (torch.cuda, "current_device", lambda: META),
        (dist, "all_gather_object", gather),
        (F, "scaled_dot_product_attention", _fused_attention),
        (dist, "batch_isend_irecv", lambda _: []),
        (param_and_grad_buffer, "_coalescing_manager", coalescing),
        (P2PCommunicator, "_communicate_shapes", communicate_shapes),
        (mpu, "get_data_parallel_group_gloo", lambda *_, **__: mpu.get_data_parallel_group()),
        (mpu, "get_expert_data_parallel_group_gloo", lambda *_, **__: mpu.get_expert_data_parallel_group()),
    ]


def _init_parallel(parallel: ParallelConfig) -> ParallelGrid:
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        create_gloo_process_groups=False,
    )
    return current_grid(parallel)
