"""Ranks that train with and without performance options, for ``test_actor_options``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import actor_cases
import torch
from megatron.core.optimizer import optimizer_config
from torch.overrides import TorchFunctionMode

from megatron_oreal.actor import actor as actor_module
from megatron_oreal.actor import batch as batch_module
from megatron_oreal.actor import options as options_module
from megatron_oreal.actor.actor import Actor
from megatron_oreal.actor.build import MegatronModel
from megatron_oreal.actor.parallel import destroy_parallel, init_parallel
from megatron_oreal.checkpoint import Checkpoints
from megatron_oreal.layout import load_model_spec
from megatron_oreal.platform import Platform, init_distributed, shutdown_distributed

FIXED = {
    "use_distributed_optimizer",
    "optimizer_cpu_offload",
    "optimizer_offload_fraction",
    "overlap_grad_reduce",
    "ddp_bucket_size",
}
"""What a resumed run keeps of the options: the form of the optimizer's state."""
STEPS = 2  # what an option puts off in the first step, the second one reads
Weights = dict[str, torch.Tensor]


class HostAndDevice(TorchFunctionMode):
    """Tells two places apart in one memory: pinned tensors, and what is made of them, are on the host; others are not.

    Megatron's hybrid optimizer decides by ``is_cuda`` what it moves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.host: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_host = bool(args) and any(args[0] is tensor for tensor in self.host)
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return not is_host
        if func is torch.Tensor.pin_memory:
            self.host.append(args[0])
            return args[0]
        made = func(*args, **(kwargs or {}))
        if is_host and func in (torch.Tensor.detach, torch.Tensor.clone, torch.Tensor.float):
            self.host.append(made)
        return made


@contextlib.contextmanager
def machine_for(options: dict[str, Any]) -> Iterator[None]:
    """What optimizer offload needs of a machine, in one without a GPU and without TransformerEngine.

    ``check_options`` is the real one: it is told that both are there.
    """
    if not options.get("optimizer_cpu_offload"):
        yield
        return
    check = options_module.check_options
    with (
        mock.patch.object(actor_module, "check_options", lambda parallel, kind, _is_cuda: check(parallel, kind, True)),
        mock.patch.object(options_module, "_installed", lambda module: module == "transformer_engine"),
        mock.patch.object(optimizer_config, "is_te_min_version", return_value=False),
        HostAndDevice(),
    ):
        yield


class PassSpy:
    """Counts packed micro-batches that go to the device, and keeps which ones each pass runs."""

    def __init__(self) -> None:
        self.moved, self.passes = 0, []
        self._to_device, self._run = batch_module.to_device, actor_module.run_microbatches

    def __enter__(self) -> PassSpy:
        def to_device(*args: Any, **kwargs: Any) -> Any:
            self.moved += 1
            return self._to_device(*args, **kwargs)

        def run(model: Any, batches: Any, *args: Any, **kwargs: Any) -> Any:
            self.passes.append([id(batch) for batch in batches])
            return self._run(model, batches, *args, **kwargs)

        batch_module.to_device, actor_module.run_microbatches = to_device, run
        return self

    def __exit__(self, *_: object) -> None:
        batch_module.to_device, actor_module.run_microbatches = self._to_device, self._run


def copied(model: MegatronModel) -> Weights:
    return {name: tensor.clone() for name, tensor in model.parameters().items()}


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def start(path: Path, work_dir: Path, parallel: dict[str, Any], dtype: str, platform: Platform) -> Actor:
    config = actor_cases.make_config(path, work_dir, parallel, model={"dtype": dtype})
    actor = Actor(config, load_model_spec(path), init_parallel(config.parallel, platform), platform)
    actor.load_hf()
    return actor


def update(actor: Actor, step: int) -> dict[str, Any]:
    result = actor.update(actor_cases.make_sequences(10), step)
    return {**result.sums.values, "policy": result.policy_grad_norm, "reward_model": result.reward_model_grad_norm}


def train(
    path: Path, work_dir: Path, parallel: dict[str, Any], dtype: str, platform: Platform, *, saves: bool
) -> dict[str, Any]:
    """Updates with everything that may be offloaded moved out between them; their numbers and the weights they left."""
    with machine_for(parallel):
        actor = start(path, work_dir, parallel, dtype, platform)
    found: dict[str, Any] = {"numbers": []}
    with PassSpy() as spy:
        for step in range(STEPS):
            found["numbers"].append(update(actor, step))
            actor.offloader.offload()
    found["passes"], found["moved"] = spy.passes, spy.moved
    actor.offloader.load()
    assert actor.reward_model is not None
    before = {"policy": copied(actor.policy), "reward_model": copied(actor.reward_model)}
    found["buckets"] = max(len(chunk.bucket_groups) for chunk in actor.policy.chunks)  # type: ignore[arg-type]
    found["optimizer"] = type(actor.policy_optimizer.parts[0].optimizer).__name__
    if saves:
        Checkpoints(work_dir, 1, platform).save(actor, STEPS, {})
    with platform.megatron():
        actor.reward_model.gather_parameters()
    found["weights"] = {"policy": copied(actor.policy), "reward_model": copied(actor.reward_model)}
    found["whole"] = {name: same(before[name], found["weights"][name]) for name in before}
    found["next"] = update(actor, STEPS) if saves else {}
    destroy_parallel()
    return found


def resume(path: Path, work_dir: Path, parallel: dict[str, Any], dtype: str, platform: Platform) -> dict[str, Any]:
    """The weights that the newest checkpoint gives, and the numbers of the update after it."""
    with machine_for(parallel):
        actor = start(path, work_dir, parallel, dtype, platform)
        Checkpoints(work_dir, 1, platform).load(actor, STEPS)
    assert actor.reward_model is not None
    loaded = {"policy": copied(actor.policy), "reward_model": copied(actor.reward_model)}
    following = update(actor, STEPS)
    destroy_parallel()
    return {"weights": loaded, "next": following}


def distance(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Largest relative difference of an update's numbers."""
    assert a.keys() == b.keys()
    return max(abs(a[name] - b[name]) / max(abs(a[name]), 1e-6) for name in a)


def compare(
    path: Path, work_dir: Path, cases: dict[str, tuple[dict[str, Any], str, dict[str, dict[str, Any]]]], resumes: bool
) -> dict[str, dict[str, Any]]:
    """``cases``: name -> (parallel sizes, dtype, options by variant). "case/variant" -> what it is against none."""
    platform = init_distributed("cpu", 400)
    found: dict[str, dict[str, Any]] = {}
    for case, (sizes, dtype, variants) in cases.items():
        plain = train(path, work_dir / case, sizes, dtype, platform, saves=False)
        found[case] = {"passes": plain["passes"], "moved": plain["moved"]}
        for variant, options in variants.items():
            folder = work_dir / f"{case}-{variant}"
            saves = resumes and not FIXED.isdisjoint(options)
            got = train(path, folder, sizes | options, dtype, platform, saves=saves)
            weights = [(plain["weights"][m], got["weights"][m]) for m in got["weights"]]
            found[f"{case}/{variant}"] = {
                "numbers": max(map(distance, plain["numbers"], got["numbers"])),
                "weights": max(float((a[n].float() - b[n].float()).abs().max()) for a, b in weights for n in a),
                **{key: got[key] for key in ("whole", "buckets", "optimizer")},
            }
            if saves:
                fixed = {key: options[key] for key in options if key in FIXED}
                resumed = resume(path, folder, sizes | fixed, dtype, platform)
                found[f"{case}/{variant}"] |= {
                    "resumed_weights": all(same(got["weights"][m], resumed["weights"][m]) for m in got["weights"]),
                    "resumed_numbers": distance(got["next"], resumed["next"]),
                }
        platform.barrier()
    shutdown_distributed()
    return found
