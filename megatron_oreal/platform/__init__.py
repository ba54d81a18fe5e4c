"""CUDA with NCCL or a CPU with gloo: nothing outside this room asks which."""

from megatron_oreal.platform.device import (
    Platform,
    choose_device,
    init_distributed,
    refuse_to_join,
    shutdown_distributed,
)

__all__ = ["Platform", "choose_device", "init_distributed", "refuse_to_join", "shutdown_distributed"]
