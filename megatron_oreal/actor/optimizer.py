"""Megatron-core's optimizer for one model, with the learning rate of ``algorithm.md`` set before every step."""

from __future__ import annotations

import math
from typing import Any

from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer

from megatron_oreal.actor.build import DTYPES, MegatronModel
from megatron_oreal.config import OptimizerConfig, ParallelConfig
from megatron_oreal.platform import Platform


class NonFiniteGradientError(RuntimeError):
    """The gradient norm is not a number: the update would destroy the model, so the run stops before it is published."""


class ModelOptimizer:
    """AdamW over one model's chunks, distributed over data-parallel ranks when the config says so."""

    def __init__(
        self, model: MegatronModel, config: OptimizerConfig, parallel: ParallelConfig, dtype: str, platform: Platform
    ):
        self.model = model
        self.platform = platform
        self.weight_decay = config.wd
        megatron_config = MegatronOptimizerConfig(
            optimizer="adam",
            lr=0.0,
            min_lr=0.0,
            weight_decay=config.wd,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            adam_eps=config.eps,
            clip_grad=config.max_grad_norm,
            bf16=dtype == "bf16",
            params_dtype=DTYPES[dtype],
            use_distributed_optimizer=parallel.use_distributed_optimizer,
        )
        # An empty dict means no exceptions: decay on every parameter. None is Megatron's default, which spares 1-D ones.
        overrides: dict[Any, Any] | None = {} if config.wd_on_norms_and_biases else None
        with platform.megatron():
            self.megatron = get_megatron_optimizer(megatron_config, model.chunks, config_overrides=overrides)

    def zero_grad(self) -> None:
        """Clear gradient buffers; call before the first micro-batch of a step."""
        with self.platform.megatron():
            for chunk in self.model.chunks:
                chunk.zero_grad_buffer()
            self.megatron.zero_grad()

    def reload_model_params(self) -> None:
        """Refresh the optimizer's fp32 copies after weights were loaded into the model."""
        with self.platform.megatron():
            self.megatron.reload_model_params()

    def step(self, learning_rate: float) -> float:
        """Clip, update, and return the gradient norm before clipping. Raises ``NonFiniteGradientError``."""
        for group in self.megatron.param_groups:
            group["lr"] = learning_rate * group.get("lr_mult", 1.0)
            group["weight_decay"] = self.weight_decay * group.get("wd_mult", 1.0)
        with self.platform.megatron():
            _, norm, _ = self.megatron.step()
        norm = float(norm)
        if not math.isfinite(norm):
            raise NonFiniteGradientError(
                f"gradient norm is {norm}: the step's losses or the data are broken; resume from the last checkpoint"
            )
        return norm
