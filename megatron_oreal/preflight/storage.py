"""Files: the model that is read, the prompts, and the directory that everything is written to."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_oreal.config import Config
from megatron_oreal.data.chat import ChatTemplate
from megatron_oreal.data.prompts import load_prompts
from megatron_oreal.errors import UserError, of_key
from megatron_oreal.layout.convert import check_weights
from megatron_oreal.layout.load import open_source
from megatron_oreal.layout.megatron_checkpoint import MegatronSource
from megatron_oreal.layout.model_spec import ModelSpec
from megatron_oreal.preflight.host import reward_model_parameters
from megatron_oreal.preflight.result import Check, fail, ok, warning

_GIB = 2**30
_OPTIMIZER_BYTES = 12
"""A parameter's fp32 weight and two moments, in any checkpoint."""
SEEN_TIMEOUT_S = 20.0
"""A network file system may show a new file of another node some seconds late."""


def check_model(config: Config, spec: ModelSpec) -> Iterator[Check]:
    """Every tensor of the initial weights is there in its shape: headers and sizes of files, not the weights."""
    model = config.model
    origins = {"model.path": model.path}
    if model.megatron_checkpoint is not None:  # weights are read from there; model.path needs none
        origins = {"model.megatron_checkpoint": model.megatron_checkpoint}
    if model.reference_path is not None:
        origins["model.reference_path"] = model.reference_path
    for key, path in origins.items():
        name = "megatron checkpoint" if key == "model.megatron_checkpoint" else "model"
        try:
            with open_source(path, spec) as source:
                if isinstance(source, MegatronSource):
                    source.check_all()
                else:
                    check_weights(source, spec, reward_model=False, origin=path)
        except UserError as error:
            yield fail(name, f"{key}: {error}")
        else:
            billions = spec.num_parameters() / 1e9
            size = f"{billions:.2f} B" if billions >= 0.01 else f"{spec.num_parameters():,}"
            yield ok(name, f"{path}: {spec.family}, {size} parameters, all tensors there")


def check_data(config: Config, spec: ModelSpec) -> Iterator[Check]:
    """The tokenizer knows the stop word and the chat template, and prompts can be read."""
    model = config.model
    chat = ChatTemplate.load(
        model.path, stop_word=model.stop_word, chat_template=model.chat_template, system_prompt=model.system_prompt
    )
    if chat.stop_token_id >= spec.vocab_size:
        yield fail("data", f"model.stop_word={model.stop_word!r} is token {chat.stop_token_id}, beyond vocab_size")
        return
    with of_key("data.train"):
        count = len(load_prompts(config.data.train))
    parts = [f"{count} prompts in {config.data.train}"]
    if config.evaluation.data:
        with of_key("evaluation.data"):
            parts.append(f"{len(load_prompts(config.evaluation.data))} in {config.evaluation.data}")
    if count < config.rollout.prompts_per_step:
        yield warning(
            "data",
            f"data.train={config.data.train!r} has {count} prompts, fewer than rollout.prompts_per_step="
            f"{config.rollout.prompts_per_step}: a step draws some of them twice",
        )
    else:
        yield ok("data", ", ".join(parts))


def checkpoint_bytes(config: Config, spec: ModelSpec) -> int:
    """Size of one training checkpoint: weights and optimizer state of the policy and of the reward model."""
    itemsize = 2 if config.model.dtype == "bf16" else 4
    trained = spec.num_parameters() + (reward_model_parameters(spec) if config.model.reward_model else 0)
    return trained * (itemsize + _OPTIMIZER_BYTES)


def disk_bytes(config: Config, spec: ModelSpec) -> int:
    """What a whole run writes: ``keep`` checkpoints, the one that is being written, and the export."""
    saved = config.checkpoint.keep + 1 if config.checkpoint.every else 0
    exported = spec.num_parameters() * (2 if config.model.dtype == "bf16" else 4) if config.checkpoint.export_hf else 0
    return saved * checkpoint_bytes(config, spec) + exported


def check_disk(config: Config, spec: ModelSpec) -> Iterator[Check]:
    """Free space under ``work_dir`` against what the run will write beyond what is there already."""
    folder = _existing(config.work_path)
    free = shutil.disk_usage(folder).free
    there = sum(
        file.stat().st_size
        for part in ("checkpoints", "hf")
        for file in (config.work_path / part).rglob("*")
        if file.is_file()
    )
    needed = max(0, disk_bytes(config, spec) - there)
    text = f"{_size(free)} free under {folder}, {_size(needed)} more needed"
    if needed > free:
        yield fail(
            "disk",
            f"{text} (checkpoint.keep={config.checkpoint.keep} + 1 checkpoints of "
            f"{_size(checkpoint_bytes(config, spec))} and the export): free some, lower checkpoint.keep, or use "
            "another work_dir",
        )
    elif needed > 0.8 * free:
        yield warning("disk", f"{text}: little is left for logs and trajectories")
    else:
        yield ok("disk", text)


def _size(count: int) -> str:
    if count < _GIB:
        return f"{count / 2**20:.3g} MiB"
    return f"{count / _GIB:,.0f} GiB" if count >= 10 * _GIB else f"{count / _GIB:.1f} GiB"


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


@contextlib.contextmanager
def nonce_file(work_dir: Path, nonce: str) -> Iterator[Path]:
    """A file in ``work_dir`` with ``nonce`` in it; afterwards the file, and directories made for it, are gone again."""
    made = [folder for folder in (work_dir, *work_dir.parents) if not folder.exists()]
    work_dir.mkdir(parents=True, exist_ok=True)
    path = work_dir / f".preflight-{nonce}"
    try:
        with path.open("w", encoding="utf-8") as file:
            file.write(nonce)
            file.flush()
            os.fsync(file.fileno())
        yield path
    finally:
        path.unlink(missing_ok=True)
        for folder in made:
            with contextlib.suppress(OSError):  # in use by now
                folder.rmdir()


def check_seen(work_dir: Path, nonce: str, host: str, timeout_s: float | None = None) -> Iterator[Check]:
    """Node 0's nonce is seen here too: checkpoints need one directory of all nodes."""
    path = work_dir / f".preflight-{nonce}"
    end = time.monotonic() + (SEEN_TIMEOUT_S if timeout_s is None else timeout_s)
    while True:
        with contextlib.suppress(OSError):
            if path.read_text(encoding="utf-8") == nonce:
                yield ok("work_dir", f"{work_dir.absolute()} is shared by the nodes")
                return
        if time.monotonic() > end:
            break
        with contextlib.suppress(OSError):  # has a network file system look again
            os.listdir(work_dir)
        time.sleep(0.2)
    yield fail(
        "work_dir",
        f"work_dir={str(work_dir)!r} is not the same directory as on node 0 ({host}), whose file is not seen here: use "
        "a path on a shared file system, the same on every node",
    )
