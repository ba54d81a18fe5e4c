"""What the ranks of ``config_twins.train_twins`` do; apart from it, so that they import only what training needs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_oreal.config_load import load_config
from megatron_oreal.train import train

Training = tuple[Path, list[str], str | None]
"""A config file, overrides, and the checkpoint that its empty work_dir begins with."""


def train_in_turn(trainings: Sequence[Training]) -> None:
    """Train one after the other; each run joins a process group of its own and leaves it."""
    for path, overrides, resume_from in trainings:
        config = load_config(path, overrides)
        if resume_from is not None and os.environ["RANK"] == "0":  # the others wait for it to join the group
            source = Path(resume_from)
            shutil.copytree(source, config.work_path / "checkpoints" / source.name)
        train(config)
