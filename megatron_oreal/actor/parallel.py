"""Megatron-core's parallel state: initialised once from the config, asked everywhere through one small record."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_oreal.config import ParallelConfig
from megatron_oreal.errors import UserError
from megatron_oreal.layout.megatron import RankGrid
from megatron_oreal.platform import Platform


@dataclass(frozen=True)
class ParallelGrid:
    """This rank's coordinates and the groups that its collectives use.

    ``global rank = tp_rank + tp * (dp_rank + dp * pp_rank)``, Megatron's default order.
    """

    tp: int
    pp: int
    dp: int
    vpp: int | None
    tp_rank: int
    pp_rank: int
    dp_rank: int
    tp_group: dist.ProcessGroup

    @property
    def is_last_stage(self) -> bool:
        """True where the last model chunk, and so the loss, lives."""
        return self.pp_rank == self.pp - 1

    @property
    def speaks(self) -> bool:
        """True on one rank of each data-parallel replica: it adds the replica's numbers to a sum over the world."""
        return self.is_last_stage and self.tp_rank == 0

    def ranks(self) -> RankGrid:
        """The whole grid, as the layout room describes it."""
        return RankGrid(tp=self.tp, pp=self.pp, dp=self.dp)

    @property
    def model_index(self) -> int:
        """This rank's model-parallel index."""
        return self.pp_rank * self.tp + self.tp_rank


def init_parallel(config: ParallelConfig, platform: Platform) -> ParallelGrid:
    """Create Megatron's process groups. Raises ``UserError`` when the sizes do not divide the world."""
    tp, pp = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    if platform.world_size % (tp * pp):
        raise UserError(
            f"parallel: tensor_model_parallel_size={tp} x pipeline_model_parallel_size={pp} does not divide the world "
            f"size {platform.world_size}: start a multiple of {tp * pp} ranks"
        )
    with platform.megatron():
        mpu.initialize_model_parallel(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=config.virtual_pipeline_model_parallel_size,
            create_gloo_process_groups=True,
            distributed_timeout_minutes=max(1, config.distributed_timeout_s // 60),
        )
        if platform.is_cuda:  # Megatron initialises parallel layers under this generator's states, and wants them there
            model_parallel_cuda_manual_seed(0)
    return current_grid(config)


def current_grid(config: ParallelConfig) -> ParallelGrid:
    """This rank's place in the groups that Megatron has made for ``config``."""
    return ParallelGrid(
        tp=config.tensor_model_parallel_size,
        pp=config.pipeline_model_parallel_size,
        dp=mpu.get_data_parallel_world_size(),
        vpp=config.virtual_pipeline_model_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        pp_rank=mpu.get_pipeline_model_parallel_rank(),
        dp_rank=mpu.get_data_parallel_rank(),
        tp_group=mpu.get_tensor_model_parallel_group(),
    )


def destroy_parallel() -> None:
    """Forget Megatron's process groups: a process may open one run after another."""
    mpu.destroy_model_parallel()
