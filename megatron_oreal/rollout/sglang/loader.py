"""SGLang's custom weight loader: runs inside every tensor-parallel worker, on an order from ``weights.py``.

SGLang calls ``load(model, named_tensors)``. The one tensor is an order as JSON bytes; the weights themselves stand in
memory that the order describes, this worker's own shard of them, in the engine's layout. The answer goes to the
worker's mailbox before SGLang replies, and SGLang replies when all workers have returned. An exception here would end
the whole server, so every failure is an answer too.
"""

from __future__ import annotations

import gc
import json
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_oreal.layout import load_model_spec
from megatron_oreal.rollout.sglang.digests import shard_digester
from megatron_oreal.rollout.sglang.staging import Segment, answer, open_segment, views

ORDER = "megatron_oreal.order"
"""Name of the tensor that carries the order: uint8 [n]."""

_MOST_SEGMENTS = 3
"""That a worker keeps mapped: two buckets and the kept shard."""

_opened: dict[str, Segment] = {}
_arrived: set[str] = set()
"""Parameters that the version which is being loaded has brought so far."""


def load(model: torch.nn.Module, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Obey the order and answer it."""
    (name, tensor), *rest = named_tensors
    assert name == ORDER and not rest, [name for name, _ in named_tensors]
    order = json.loads(bytes(tensor.cpu().tolist()))
    try:
        value = _ORDERS[order["order"]](model, order)
    except Exception as error:
        value = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    answer(order["mailbox"], {"sequence": order["sequence"], **value})


def _load(model: torch.nn.Module, order: Mapping[str, Any]) -> dict[str, Any]:
    """Copy what is staged, and wait until the device has done it.

    The last order of a version is answered with the digests of all that stands in the engine then, or with an error
    when a parameter was not among what the version's orders have brought.
    """
    params = dict(model.named_parameters())
    staging = order["staging"]
    dtype = getattr(torch, staging["dtype"])
    if order["first"]:
        _arrived.clear()
        _settle()
    if complaint := _mismatch(params, staging["offsets"], dtype):
        return {"error": complaint}
    if order["noise_seed"] is not None:
        fill_with_noise(params.values(), order["noise_seed"])
    source = views(_open(staging["segment"]).tensor, staging["offsets"], dtype)
    with torch.no_grad():
        for name, tensor in source.items():
            params[name].data.copy_(tensor)
    _arrived.update(source)
    device = next(iter(params.values())).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # from here on the trainer may write into the staging memory again
    if not order["last"]:
        return {}
    if missing := sorted(params.keys() - _arrived):
        return {"error": f"the engine's parameters {missing[:3]} get no weights"}
    digester = shard_digester(load_model_spec(order["model_dir"]), order["tp"], device.type, dtype)
    digests = digester.hash_dest(order["tp"] + order["rank"], params).tolist()
    digester.release()
    return {"digests": digests}


def _forget(model: torch.nn.Module, order: Mapping[str, Any]) -> dict[str, Any]:
    """Let go of every segment, so that the trainer's memory can be freed, and of what the digests worked in."""
    for segment in _opened.values():
        segment.close()
    _opened.clear()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()
    return {}


_ORDERS = {"load": _load, "forget": _forget}


def _mismatch(params: Mapping[str, Tensor], offered: Mapping[str, Any], dtype: torch.dtype) -> str | None:
    """Say what of the offered parameters is not the model's, or is of another shape or dtype there."""
    if unknown := sorted(offered.keys() - params.keys()):
        return f"{unknown[:3]} are not the engine's parameters"
    for name, (_, shape) in offered.items():
        param = params[name]
        if list(param.shape) != shape or param.dtype != dtype:
            return (
                f"{name!r} is {list(param.shape)} {param.dtype} in the engine, the trainer's layout says "
                f"{shape} {dtype}"
            )
    return None


def _settle() -> None:
    """Take what SGLang has made so far out of Python's garbage collection, once.

    SGLang's CPU engine collects garbage whenever its cache is flushed, which would look at a million objects that never
    become garbage, for about a second.
    """
    if not gc.get_freeze_count():
        gc.collect()
        gc.freeze()


def fill_with_noise(params: Any, seed: int) -> None:
    """Overwrite parameters with uniform numbers in [-1, 1): whatever is not written afterwards speaks nonsense."""
    with torch.no_grad():
        for number, param in enumerate(params):
            generator = torch.Generator(device=param.device).manual_seed(seed + number)
            param.data.uniform_(-1, 1, generator=generator)


def _open(description: Mapping[str, Any]) -> Segment:
    key = json.dumps(description, sort_keys=True)
    if key not in _opened:
        while len(_opened) >= _MOST_SEGMENTS:  # what was mapped first has moved
            _opened.pop(next(iter(_opened))).close()
        _opened[key] = open_segment(description)
    return _opened[key]
