"""OREAL (arXiv 2502.06781) on Megatron-core actors and colocated rollout engines."""

__version__ = "0.1.0"
