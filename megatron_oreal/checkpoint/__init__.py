"""Atomic, resumable checkpoints in megatron-core's format."""

from megatron_oreal.checkpoint.checkpoint import Checkpoints

__all__ = ["Checkpoints"]
