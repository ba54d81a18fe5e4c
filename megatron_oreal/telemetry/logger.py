"""Where metrics go: JSON lines always, TensorBoard and Weights & Biases when the config says so."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from megatron_oreal.config import TelemetryConfig
from megatron_oreal.errors import UserError
from megatron_oreal.telemetry import records

WANDB_ID_FILE_NAME = "wandb_run_id"


class _Sink(Protocol):
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricLogger:
    """Sends each step's metrics to every sink the config names; ``enabled=False`` (ranks > 0) touches nothing.

    ``first_step``: the step the run begins or resumes with. What earlier attempts logged for it and later steps is
    dropped: from ``metrics.jsonl`` in one atomic rename, from TensorBoard by a purge, so that no step is there twice.
    Weights & Biases continues the same run; it keeps what was sent and shows repeated steps again.
    ``run_config``: settings shown beside the run in Weights & Biases.

    Raises ``UserError`` when a package is missing, Weights & Biases refuses, or ``work_dir`` cannot be written.
    """

    def __init__(
        self,
        work_dir: str | Path,
        config: TelemetryConfig,
        enabled: bool,
        first_step: int = 0,
        run_config: Mapping[str, Any] | None = None,
    ) -> None:
        self._sinks: list[_Sink] = []
        self._last_step = first_step - 1
        if not enabled:
            return
        work_dir = Path(work_dir)
        # JSON lines last: a run that cannot start must not have cut the old file.
        modules = _import_sinks(config)
        try:
            work_dir.mkdir(parents=True, exist_ok=True)
            if config.wandb_project is not None:
                self._sinks.append(_Wandb(modules["wandb"], work_dir, config.wandb_project, first_step, run_config))
            if config.tensorboard:
                self._sinks.append(_TensorBoard(modules["tensorboard"], work_dir, first_step))
            self._sinks.append(_JsonLines(work_dir, first_step))
        except OSError as error:
            raise UserError(f"work_dir: cannot write metrics in {work_dir}: {error.strerror or error}") from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one record. Raises ``ValueError`` when ``step`` is not newer than the last.

        ``UserError`` when it cannot be written (a full disk).

        An evaluation belongs to the record of the step that would be trained next (its policy has had ``step``
        updates); the one after the last step is a record of its own, with ``step == total_steps``.
        """
        if step <= self._last_step:
            raise ValueError(f"step {step} was logged already, or lies before the step that the run resumed with")
        self._last_step = step
        try:
            for sink in self._sinks:
                sink.log(step, metrics)
        except OSError as error:
            raise UserError(
                f"work_dir: cannot write the metrics of step {step} ({error.strerror or error}): free some space or "
                "check the disk, and start the run again"
            ) from error

    def close(self) -> None:
        """Flush and close every sink. Idempotent."""
        while self._sinks:
            self._sinks.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _import_sinks(config: TelemetryConfig) -> dict[str, Any]:
    """Import what the config needs and nothing else; a missing package is a ``UserError`` that names the mend."""
    modules: dict[str, Any] = {}
    if config.tensorboard:
        try:
            from torch.utils import tensorboard
        except ImportError as error:
            raise UserError(
                "telemetry.tensorboard=true needs the package tensorboard: pip install tensorboard, or set it to false"
            ) from error
        modules["tensorboard"] = tensorboard
    if config.wandb_project is not None:
        try:
            import wandb

            # W&B's own output folder is called wandb: where it lies in the current directory and the package is
            # missing, the import succeeds with an empty namespace package.
            modules["wandb"] = wandb if hasattr(wandb, "init") else None
        except ImportError:
            modules["wandb"] = None
        if modules["wandb"] is None:
            raise UserError(
                f"telemetry.wandb_project={config.wandb_project} needs the package wandb: pip install wandb, "
                "or set it to null"
            )
    return modules


class _JsonLines:
    def __init__(self, work_dir: Path, first_step: int) -> None:
        path = work_dir / records.FILE_NAME
        records.cut(path, first_step)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._file.write(records.encode(step, metrics))
        self._file.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a line that could not be written, which was said
            self._file.close()


class _TensorBoard:
    def __init__(self, module: Any, work_dir: Path, first_step: int) -> None:
        self._writer = module.SummaryWriter(str(work_dir / "tensorboard"), purge_step=first_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, float(value), step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(
        self, module: Any, work_dir: Path, project: str, first_step: int, run_config: Mapping[str, Any] | None
    ) -> None:
        id_file = work_dir / WANDB_ID_FILE_NAME
        run_id = id_file.read_text().strip() if first_step > 0 and id_file.exists() else None
        try:
            self._run = module.init(
                project=project,
                name=work_dir.resolve().name,
                id=run_id,
                resume="allow" if run_id else None,
                dir=str(work_dir),
                config=dict(run_config or {}),
            )
        except module.errors.Error as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"telemetry.wandb_project={project}: Weights & Biases refused ({reason}); run 'wandb login', "
                "or set the environment variable WANDB_MODE=offline"
            ) from error
        id_file.write_text(self._run.id + "\n")
        # W&B's own step may not go back, which a resumed run does; ours is a metric that the plots use as their axis.
        self._run.define_metric(records.STEP)
        self._run.define_metric("*", step_metric=records.STEP)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({records.STEP: step, **{name: float(value) for name, value in metrics.items()}})

    def close(self) -> None:
        self._run.finish()
