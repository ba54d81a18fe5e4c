"""Megatron-core's optimizer for one model, with the learning rate of ``algorithm.md`` set before every step."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_oreal.actor.build import DTYPES, MegatronModel
from megatron_oreal.actor.options import optimizer_options
from megatron_oreal.config import OptimizerConfig, ParallelConfig
from megatron_oreal.errors import UserError
from megatron_oreal.platform import Platform

_TORCH_ADAM = (torch.optim.Adam, torch.optim.AdamW)  # one is the other's base from torch 2.7 on


class NonFiniteGradientError(RuntimeError):
    """The gradient norm is not a number: the update destroyed the model, so the run stops before it is published."""


def _load_without_step(optimizer: DistributedOptimizer) -> None:
    """Let a ``fully_reshardable`` checkpoint be loaded into torch's AdamW.

    megatron-core 0.16-0.19 leaves the step count out of the tensors that it loads (it restores it from the parameter
    groups) and then asks for it, because torch, unlike TransformerEngine and apex, keeps it beside the moments.
    """
    load = optimizer._set_main_param_and_optimizer_states

    def load_with_step(model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        group, order = optimizer.model_param_group_index_map[model_param]
        state = optimizer.optimizer.state[optimizer.optimizer.param_groups[group]["params"][order]]
        load(model_param, tensors | ({"step": state["step"]} if "step" in state else {}))

    optimizer._set_main_param_and_optimizer_states = load_with_step


def _allocate_moments(part: Any) -> None:
    """Start AdamW's moments, and torch's step counts, at zero now, as the first update would.

    Megatron cannot save an optimizer that has made no update, which a frozen policy's has not.
    """
    if isinstance(part.optimizer, HybridDeviceOptimizer):
        _allocate_hybrid_moments(part.optimizer)
    elif part.config.use_precision_aware_optimizer:
        _allocate_precision_aware_state(part.optimizer)
    else:
        part.init_state_fn(part.optimizer, part.config)
    _complete_step_counts(part)


def _allocate_precision_aware_state(optimizer: Any) -> None:
    """The same for TransformerEngine's FusedAdam that keeps the main weights itself.

    Megatron's ``init_state_fn`` leaves out an argument that ``initialize_state`` demands from TransformerEngine 2.1 on
    (NVIDIA/Megatron-LM#7288): whether only the 16 bits that bf16 lacks are kept of an fp32 main weight.
    """
    takes_remainders = "store_param_remainders" in inspect.signature(optimizer.initialize_state).parameters
    for group in optimizer.param_groups:
        for param in group["params"]:
            if not optimizer.state[param]:
                remainders = (
                    (optimizer.store_param_remainders and param.dtype == torch.bfloat16,) if takes_remainders else ()
                )
                optimizer.initialize_state(param, *remainders)


@torch.no_grad()
def _allocate_hybrid_moments(optimizer: HybridDeviceOptimizer) -> None:
    """The same for an optimizer whose state is on the CPU, by Megatron's ``dummy_step``.

    At the rate of zero that it is built with, the weights stay; what the step leaves in the state is cleared.
    """
    # Its parameter groups name them, and torch reads a checkpoint's classes only when it has been told to.
    torch.serialization.add_safe_globals([optimizer.cpu_optimizer_cls, optimizer.gpu_optimizer_cls])
    optimizer.dummy_step()
    for state in optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq", "step"):
            if isinstance(state.get(name), Tensor):
                state[name].zero_()
    for group in [*optimizer.param_groups, *(g for inner in optimizer.sub_optimizers for g in inner.param_groups)]:
        if "step" in group:
            group["step"] = group["step"] * 0


def _reload_main_params(part: Any) -> None:
    """Refresh fp32 weights that Megatron's ``reload_model_params`` leaves to the inner optimizer, which keeps them."""
    optimizer = part.optimizer
    if isinstance(optimizer, HybridDeviceOptimizer):
        for weight, copy in optimizer.gpu_params_map_cpu_copy.items():
            copy.data.copy_(weight.data)
    elif getattr(part.config, "use_precision_aware_optimizer_no_fp8_or_ds_fp8", False):
        optimizer.state.clear()
        _allocate_moments(part)


def _complete_step_counts(part: Any) -> None:
    """Give every parameter of torch's AdamW a step count of its own; other implementations keep one in the group.

    Megatron's loading gives all parameters one step tensor, which AdamW would then count up once for each, or none when
    the count was zero.
    """
    if isinstance(part.optimizer, (*_TORCH_ADAM, HybridDeviceOptimizer)):
        for state in part.optimizer.state.values():
            if isinstance(part.optimizer, HybridDeviceOptimizer) and "step" not in state:
                continue  # on the device, where TransformerEngine's Adam keeps it in the group
            state["step"] = torch.as_tensor(state.get("step", 0.0), dtype=torch.float32).clone()


class ModelOptimizer:
    """AdamW over one model's chunks, distributed over data-parallel ranks when the config says so."""

    def __init__(
        self, model: MegatronModel, config: OptimizerConfig, parallel: ParallelConfig, dtype: str, platform: Platform
    ):
        self.model = model
        self.platform = platform
        self.config = config
        try:
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
                **optimizer_options(parallel),
            )
        except (AssertionError, RuntimeError, ValueError) as error:  # such as a TransformerEngine that is too old
            said = " ".join(str(error).split())
            raise UserError(f"parallel: megatron-core refuses these optimizer settings: {said}") from None
        # An empty dict: no exceptions, decay on every parameter. None: Megatron's default, which spares 1-D ones.
        overrides: dict[Any, Any] | None = {} if config.wd_on_norms_and_biases else None
        with platform.megatron():
            self.megatron = get_megatron_optimizer(megatron_config, model.chunks, config_overrides=overrides)
            for part in self.parts:
                _allocate_moments(part)
                if isinstance(part, DistributedOptimizer):
                    _load_without_step(part)

    @property
    def parts(self) -> list[Any]:
        """Megatron's optimizers, out of the chain that it may put them in."""
        return list(getattr(self.megatron, "chained_optimizers", [self.megatron]))

    def inner_optimizers(self) -> list[torch.optim.Optimizer]:
        """Those whose state is on the device: all, but for ``parallel.optimizer_cpu_offload``."""
        found: list[torch.optim.Optimizer] = []
        for part in self.parts:
            hybrid = isinstance(part.optimizer, HybridDeviceOptimizer)
            inner = part.optimizer.gpu_optimizer if hybrid else part.optimizer
            found += [] if inner is None else [inner]
        return found

    def zero_grad(self) -> None:
        """Clear gradient buffers; call before the first micro-batch of a step."""
        with self.platform.megatron():
            for chunk in self.model.chunks:
                chunk.zero_grad_buffer()  # type: ignore[operator]
            self.megatron.zero_grad()

    def reload_model_params(self) -> None:
        """Refresh the optimizer's fp32 copies after weights were loaded into the model."""
        with self.platform.megatron():
            self.megatron.reload_model_params()
            with torch.no_grad():
                for part in self.parts:
                    _reload_main_params(part)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``sharded_state_dict`` saved; call inside ``platform.megatron()``."""
        inner = state.get("optimizer", state)
        # Of torch's AdamW that is not distributed, Megatron leaves a step count of zero out.
        if "state" in inner and isinstance(self.parts[0].optimizer, _TORCH_ADAM):
            inner["state"].setdefault("common_step", torch.zeros(()))
        self.megatron.load_state_dict(state)
        for part in self.parts:
            _complete_step_counts(part)

    def step(self, learning_rate: float) -> float:
        """Clip, update, and return the gradient norm before clipping. Raises ``NonFiniteGradientError``."""
        for group in self.megatron.param_groups:
            group["lr"] = learning_rate * group.get("lr_mult", 1.0)
            group["weight_decay"] = self.config.wd * group.get("wd_mult", 1.0)
            # A checkpoint's parameter groups bring those of the config that it was saved with.
            group["betas"], group["eps"] = self.config.betas, self.config.eps
        with self.platform.megatron():
            _, norm, _ = self.megatron.step()
        norm = float(norm)
        if not math.isfinite(norm):
            raise NonFiniteGradientError(
                f"gradient norm is {norm}: the step's losses or the data are broken; resume from the last checkpoint"
            )
        return norm
