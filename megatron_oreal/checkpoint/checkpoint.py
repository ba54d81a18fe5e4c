"""Save and resume a run through megatron-core's ``dist_checkpointing``.

``work_dir/checkpoints/step_XXXXXX`` holds ``policy`` and ``reward_model``, each a plain Megatron-core checkpoint (model
and optimizer under Megatron's own keys, the Hugging Face config and tokenizer in ``hf``), and ``run.json``, the run's
position and config. It is written under another name and renamed when every rank is done, so a directory with that name
is always whole. It may be resumed with another parallel layout, except where ``_optimizer_format`` says so.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from megatron_oreal.actor.actor import Actor
from megatron_oreal.actor.build import DTYPES, MegatronModel, unwrap
from megatron_oreal.actor.optimizer import ModelOptimizer
from megatron_oreal.checkpoint.changes import check_changes, record
from megatron_oreal.errors import UserError
from megatron_oreal.layout.directory import sync, together, write_companions, writing
from megatron_oreal.layout.files import read_json
from megatron_oreal.layout.megatron_checkpoint import HF_FOLDER
from megatron_oreal.platform import Platform

_NAME = re.compile(r"step_(\d{6,})")
_RUN_FILE = "run.json"


class Checkpoints:
    """The checkpoints of one run, of which the newest ``keep`` stay."""

    def __init__(self, work_dir: Path, keep: int, platform: Platform):
        self.folder = work_dir / "checkpoints"
        self.keep = keep
        self.platform = platform

    def steps(self) -> list[int]:
        """Steps that have a whole checkpoint, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(match[1]) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name)))

    def newest(self) -> int | None:
        """The step to resume from, as rank 0 sees the directory."""
        steps = self.platform.broadcast_object(self.steps())
        return steps[-1] if steps else None

    def path(self, step: int) -> Path:
        """Where the checkpoint that has seen ``step`` steps lies."""
        return self.folder / f"step_{step:06d}"

    def save(self, actor: Actor, step: int, position: dict[str, Any]) -> Path:
        """Write the state after ``step`` steps. ``position``: what JSON can hold, the same on every rank.

        Raises ``UserError`` on every rank when the first cannot write (a full disk).
        """
        final = self.path(step)
        partial = self.folder / f".{final.name}.incomplete"
        self._on_first_rank(lambda: _begin(partial, [key for key, _, _ in _trained(actor)]))
        formats = {key: _optimizer_format(optimizer, self.platform) for key, _, optimizer in _trained(actor)}
        with self.platform.megatron():
            for key, model, optimizer in _trained(actor):
                model.gather_parameters()
                state = _sharded_state(model, optimizer, formats[key], is_loading=False)
                with _saving(partial / key):
                    dist_checkpointing.save(state | {"iteration": step, "checkpoint_version": 3.0}, str(partial / key))
        run = {"step": step, "position": position, "optimizer_formats": formats} | record(actor.config, actor.spec)

        def finish() -> None:
            for key, _, _ in _trained(actor):
                _describe_model(partial / key / HF_FOLDER, actor, reward_model=key == "reward_model")
            with writing(partial / _RUN_FILE):
                (partial / _RUN_FILE).write_text(json.dumps(run, indent=2) + "\n")
                _give_name(partial, final)
                for old in self.steps()[: -self.keep]:
                    shutil.rmtree(self.path(old))

        self._on_first_rank(finish)
        return final

    def _on_first_rank(self, step: Callable[[], object]) -> None:
        """Run on rank 0; all ranks wait for it and fail with it."""
        together(self.platform.host_group, step if self.platform.rank == 0 else lambda: None)

    def load(self, actor: Actor, step: int) -> dict[str, Any]:
        """Restore models and optimizers in place and return ``position``; says which settings have changed since.

        All that is restored is on the device then, offloaded or not.
        Raises ``UserError`` when the checkpoint does not fit the models or the config.
        """
        path = self.path(step)
        run = self.platform.broadcast_object(
            self.platform.fail_together(lambda: read_json(path / _RUN_FILE) if self.platform.rank == 0 else None)
        )
        changes = check_changes(run, actor.config, actor.spec, path)
        if changes and self.platform.rank == 0:
            print(f"resuming with other settings than {path} was saved with: {changes}", flush=True)
        actor.offloader.load("policy", "optimizer", "reward_model")
        with self.platform.megatron():
            for key, model, optimizer in _trained(actor):
                if not (path / key).is_dir():
                    raise UserError(
                        f"{path}: has no {key}: resume with the config that wrote it, or use a new work_dir"
                    )
                try:
                    template = _sharded_state(model, optimizer, run["optimizer_formats"][key], is_loading=True)
                    state = dist_checkpointing.load(template, str(path / key))
                except (CheckpointingException, CheckpointException) as error:
                    reason = " ".join(str(error).split())[:300]
                    raise UserError(f"{path / key}: does not fit this model ({reason}): use a new work_dir") from None
                for name, chunk in zip(_chunk_keys(model), model.chunks, strict=True):
                    unwrap(chunk).load_state_dict(state[name], strict=False)
                optimizer.load_state_dict(state["optimizer"])
        return run["position"]


def _begin(partial: Path, keys: list[str]) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    with writing(partial):
        for key in keys:
            (partial / key).mkdir(parents=True)


@contextlib.contextmanager
def _saving(folder: Path) -> Iterator[None]:
    """Say in one line that Megatron could not write; it raises on every rank, and not an ``Exception``."""
    try:
        yield
    except CheckpointException as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise UserError(
            f"{folder}: cannot be written ({lines[-1][:300]}): free some space or check the disk, and start the run "
            "again; it resumes from the checkpoint before"
        ) from error


def _give_name(partial: Path, final: Path) -> None:
    """Wait until everything is on disk, then rename; what had the name before goes only afterwards."""
    for path in sorted(partial.rglob("*")):
        sync(path)
    sync(partial)
    replaced = final.with_name(f".{final.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():  # a run that resumed from before this step comes here again
        final.rename(replaced)
    partial.rename(final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _describe_model(folder: Path, actor: Actor, *, reward_model: bool) -> None:
    """Put config and tokenizer beside the weights, so that the checkpoint can be converted by itself."""
    model_dir = Path(actor.config.model.path)
    if not (model_dir / "config.json").is_file():  # moved away while the run went on: no reason to lose a checkpoint
        print(f"{folder.parent}: saved without {HF_FOLDER}/: {model_dir} has no config.json any more", flush=True)
        return
    with writing(folder):
        folder.mkdir()
    write_companions(folder, {}, model_dir, dtype=DTYPES[actor.config.model.dtype], reward_model=reward_model)


def _trained(actor: Actor) -> list[tuple[str, MegatronModel, ModelOptimizer]]:
    trained = [("policy", actor.policy, actor.policy_optimizer)]
    if actor.reward_model is not None and actor.reward_model_optimizer is not None:
        trained.append(("reward_model", actor.reward_model, actor.reward_model_optimizer))
    return trained


def _chunk_keys(model: MegatronModel) -> list[str]:
    """Megatron's names: ``model``, or ``model0``, ``model1``, ... with virtual pipeline chunks."""
    return ["model"] if len(model.chunks) == 1 else [f"model{index}" for index in range(len(model.chunks))]


def _optimizer_format(optimizer: ModelOptimizer, platform: Platform) -> str:
    """Megatron's format for the distributed optimizer's state: ``fully_reshardable`` where that is right.

    megatron-core 0.16-0.19 cuts that format at wrong places when a bucket before the last one is padded (it happens
    with small tied models under pipeline parallelism): such state is saved ``dp_reshardable``, for the same TP and PP.
    """
    padded = any(
        bucket.numel_unpadded != bucket.grad_data.numel()
        for part in optimizer.parts
        for buffer in getattr(part, "buffers", [])
        for bucket in buffer.buckets[:-1]
    )
    return "dp_reshardable" if any(platform.gather_objects(padded)) else "fully_reshardable"


def _sharded_state(
    model: MegatronModel, optimizer: ModelOptimizer, optimizer_format: str, *, is_loading: bool
) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": optimizer_format,
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True),
    }
    models = {
        key: unwrap(chunk).sharded_state_dict(metadata=metadata)
        for key, chunk in zip(_chunk_keys(model), model.chunks, strict=True)
    }
    return models | {"optimizer": optimizer.megatron.sharded_state_dict(models, is_loading, metadata=metadata)}
