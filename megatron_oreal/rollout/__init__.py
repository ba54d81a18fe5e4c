"""Rollout engines behind one protocol, and the sampler that shares a step's requests over them."""

from megatron_oreal.rollout.embedded import EmbeddedEngine
from megatron_oreal.rollout.engine import Completion, Engine, EngineError, Health, Request, SamplingParams

__all__ = ["Completion", "EmbeddedEngine", "Engine", "EngineError", "Health", "Request", "SamplingParams"]
