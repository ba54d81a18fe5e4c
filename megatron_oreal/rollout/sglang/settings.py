"""``rollout.server`` as the modules here want it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from megatron_oreal.config import ServerConfig
from megatron_oreal.rollout.sglang.dispatcher import DispatchSettings


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """``rollout.server``. ``window``: requests that a server has at a time, those that wait there included.

    ``bucket_bytes``: of the staging memory of ``stage``; ``keep_weights``: whether a copy of its weights is kept.
    """

    host: str = "127.0.0.1"
    start_timeout_s: float = 600.0
    control_timeout_s: float = 300.0
    max_restarts: int = 3
    window: int = 512
    bucket_bytes: int = 512 * 2**20
    keep_weights: bool = True
    dispatch: DispatchSettings = field(default_factory=DispatchSettings)


def settings_from(config: ServerConfig) -> ServerSettings:
    """Take ``rollout.server`` apart."""
    names = {item.name for item in dataclasses.fields(DispatchSettings)}
    return ServerSettings(
        host=config.host,
        start_timeout_s=config.start_timeout_s,
        control_timeout_s=config.control_timeout_s,
        max_restarts=config.max_restarts,
        window=config.requests_per_server,
        bucket_bytes=config.bucket_bytes,
        keep_weights=config.keep_weights,
        dispatch=DispatchSettings(**{name: getattr(config, name) for name in names}),
    )
