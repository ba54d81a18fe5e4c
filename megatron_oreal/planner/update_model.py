"""How long the training half of a step takes: three models over the kept sequences, on Megatron's own schedules.

Floating-point operations are those of ``data.packing.WorkModel``, micro-batches those of ``plan_microbatches``, the
order of work that of ``planner/pipeline.py``; what is assumed is in ``planner/assumptions.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from megatron_oreal.config import Config
from megatron_oreal.data.packing import MicrobatchPlan, WorkModel, plan_for
from megatron_oreal.layout import ModelSpec, pipeline_layer_split
from megatron_oreal.planner.activations import layer_bytes
from megatron_oreal.planner.assumptions import Assumptions
from megatron_oreal.planner.devices import Device
from megatron_oreal.planner.pipeline import Op, pipeline_time
from megatron_oreal.planner.placement import ITEMSIZE, Placement
from megatron_oreal.planner.types import Setting

OPTIMIZER_BYTES = 34
"""A parameter's bytes in one AdamW step of bf16 training: gradient zeroed and read (8), fp32 weight and two moments
read and written (24), bf16 weight written (2)."""


_REPLICAS = 3


@dataclass(frozen=True)
class PassTime:
    """One model's pass over a step's sequences. Parts are of the slowest data-parallel replica and add up to
    ``seconds``: ``compute_s`` of the busiest stage's kernels, ``tp_s`` its tensor-parallel collectives, ``host_s`` its
    micro-batch overhead, ``bubble_s`` what the pipeline waits, ``dp_s`` gradients and parameters over data-parallel
    ranks, ``optimizer_s`` the optimizer step. ``flops``: of the whole world, recompute left out.
    """

    seconds: float
    compute_s: float
    tp_s: float
    host_s: float
    bubble_s: float
    dp_s: float = 0.0
    optimizer_s: float = 0.0
    flops: float = 0.0


@dataclass(frozen=True)
class _Costs:
    """Seconds of one micro-batch in one chunk: kernels and collectives, forward and backward."""

    compute: tuple[float, float]
    collective: tuple[float, float]
    host: float


class UpdateModel:
    """The update of one setting. ``sequences``: prompt and response tokens of each kept sequence, ``responses`` the
    response's alone.
    """

    def __init__(
        self,
        setting: Setting,
        device: Device,
        assumed: Assumptions,
        placement: Placement,
        sequences: Sequence[int],
        responses: Sequence[int],
    ):
        self.setting, self.device, self.assumed, self.placement = setting, device, assumed, placement
        self.sequences, self.responses = list(sequences), list(responses)
        self.itemsize = ITEMSIZE[setting.config.model.dtype]
        self.work = WorkModel.from_spec(self.spec)
        head = self.spec.vocab_size * self.spec.hidden_size
        self.layer_work = replace(self.work, matmul_params=self.work.matmul_params - head)

    @property
    def spec(self) -> ModelSpec:
        """The model."""
        return self.setting.spec

    @property
    def config(self) -> Config:
        """The config."""
        return self.setting.config

    @cached_property
    def plan(self) -> MicrobatchPlan:
        """Micro-batches as the trainer will make them (``actor.batch.make_batch``)."""
        return plan_for(self.config.parallel, self.sequences, dp_size=self.placement.grid.dp, work=self.work)

    def reference(self) -> PassTime:
        """The reference's log-probabilities: forward alone."""
        return self._pass(head=True, backward=False)

    def reward_model(self) -> PassTime:
        """Scores and update of the token reward model."""
        return self._pass(head=False, backward=True)

    def policy(self) -> PassTime:
        """The policy's update."""
        return self._pass(head=True, backward=True)

    def _pass(self, *, head: bool, backward: bool) -> PassTime:
        slowest = max(
            (self._replica(rank, head=head, backward=backward) for rank in self._heaviest_replicas()),
            key=lambda each: each.seconds,
        )
        gradients_s, weights_s, optimizer_s = self._learn(head) if backward else (0.0, 0.0, 0.0)
        parallel, one_batch = self.config.parallel, slowest.compute_s / self.plan.num_microbatches
        if parallel.overlap_grad_reduce:  # behind the last micro-batch's backward: the first that has whole gradients
            gradients_s = max(0.0, gradients_s - one_batch * 2 / 3)
        if parallel.overlap_param_gather and not head:  # behind the next forward; the policy's are published at once
            weights_s = max(0.0, weights_s - one_batch / 3)
        dp_s = gradients_s + weights_s
        passes = 3 if backward else 1
        flops = passes * sum(self.layer_work(length) for length in self.sequences)
        if head:
            flops += passes * 2 * self.spec.vocab_size * self.spec.hidden_size * sum(self.responses)
        seconds = slowest.seconds + dp_s + optimizer_s
        return replace(slowest, seconds=seconds, dp_s=dp_s, optimizer_s=optimizer_s, flops=float(flops))

    def _heaviest_replicas(self) -> list[int]:
        """The few data-parallel ranks with most work: the slowest is one of them, but for ends of pipelines."""

        def work(rank: int) -> int:
            return sum(self.work(self.sequences[i]) for batch in self.plan.ranks[rank] for i in batch)

        return sorted(range(len(self.plan.ranks)), key=work, reverse=True)[:_REPLICAS]

    def _replica(self, rank: int, *, head: bool, backward: bool) -> PassTime:
        grid, parallel = self.placement.grid, self.config.parallel
        vpp = parallel.virtual_pipeline_model_parallel_size
        split = pipeline_layer_split(
            self.spec,
            pp=grid.pp,
            vpp=vpp,
            first=parallel.num_layers_in_first_pipeline_stage,
            last=parallel.num_layers_in_last_pipeline_stage,
        )
        members, padded = self.plan.ranks[rank], self.plan.tokens[rank]
        table: dict[tuple[int, int, int], _Costs] = {}
        for stage, chunks in enumerate(split):
            for chunk, layers in enumerate(chunks):
                is_head = head and stage == grid.pp - 1 and chunk == len(chunks) - 1
                for index, batch in enumerate(members):
                    table[stage, chunk, index] = self._costs(
                        batch, padded[index], layers, is_head=is_head, backward=backward
                    )
        ops = (0, 1) if backward else (0,)

        def duration(stage: int, op: Op) -> float:
            costs, side = table[stage, op.chunk, op.microbatch], int(op.kind == "B")
            return costs.compute[side] + costs.collective[side] + costs.host

        crosses = {
            (a, b): self.placement.stages_cross_nodes(a, b)
            for stage in range(grid.pp)
            for a, b in ((stage, (stage + 1) % grid.pp), ((stage + 1) % grid.pp, stage))
        }

        def transfer(source: int, target: int, microbatch: int) -> float:
            return self._message_s(crosses[source, target], padded[microbatch])

        time = pipeline_time(grid.pp, vpp, len(members), duration, transfer, forward_only=not backward)
        busiest = max(range(grid.pp), key=lambda stage: time.busy[stage])
        mine = [costs for (stage, _, _), costs in table.items() if stage == busiest]
        return PassTime(
            seconds=time.seconds,
            compute_s=sum(costs.compute[side] for costs in mine for side in ops),
            tp_s=sum(costs.collective[side] for costs in mine for side in ops),
            host_s=sum(costs.host for costs in mine for _ in ops),
            bubble_s=time.seconds - time.busy[busiest],
        )

    def _costs(self, batch: list[int], padded: int, layers: int, *, is_head: bool, backward: bool) -> _Costs:
        """One micro-batch in one chunk of ``layers`` layers; ``is_head``: with the vocabulary head behind them."""
        spec, parallel, tp = self.spec, self.config.parallel, self.placement.grid.tp
        rate = self.device.flops * self.assumed.matmul_efficiency * tp
        share = layers / spec.num_layers
        lengths = [self.sequences[i] for i in batch]
        surplus = padded - sum(lengths)  # padding multiplies weights; its attention is negligible
        forward = share * (sum(map(self.layer_work, lengths)) + 2 * self.layer_work.matmul_params * surplus) / rate
        collective = layers * self._layer_collectives_s(padded)
        regather = 1.5 if parallel.sequence_parallel else 1.0  # inputs are gathered again for weights
        again, recollect = self._recompute(forward, collective, lengths, layers, rate) if backward else (0.0, 0.0)
        forward_s, backward_s = forward, 2 * forward + again
        if backward and parallel.cpu_offloading_num_layers:  # each way behind a pass, which waits for what is late
            saved = parallel.cpu_offloading_num_layers * layer_bytes(self.setting, padded).saved
            copies = saved / (self.device.pcie * self.assumed.pcie_efficiency)
            forward_s, backward_s = max(forward_s, copies), max(backward_s, copies)
        if is_head:
            read = sum(self.responses[i] for i in batch)
            product = 2 * spec.vocab_size * spec.hidden_size * read / rate
            passes = self.assumed.logits_passes * 2 * spec.vocab_size * read / tp
            logits = passes / (self.device.hbm * self.assumed.hbm_efficiency)
            forward_s, backward_s = forward_s + product + logits, backward_s + 2 * product
        return _Costs(
            (forward_s, backward_s),
            (collective, collective * regather + recollect),
            self.assumed.microbatch_overhead_s,
        )

    def _recompute(
        self, forward: float, collective: float, lengths: list[int], layers: int, rate: float
    ) -> tuple[float, float]:
        """Seconds of kernels and of collectives that a chunk's backward runs again."""
        parallel, spec = self.config.parallel, self.spec
        if parallel.recompute_granularity is None or not layers:
            return 0.0, 0.0
        if parallel.recompute_granularity == "full":
            again = layers
            if parallel.recompute_method == "block":
                again = min(layers, parallel.recompute_num_layers or layers)
            return forward * again / layers, collective * again / layers
        modules = parallel.recompute_modules or ["core_attn"]
        seconds = recollect = 0.0
        if "core_attn" in modules:
            share = layers / spec.num_layers
            seconds += share * sum(2 * self.work.attention_width * n * (n + 1) for n in lengths) / rate
        if "mlp" in modules:
            seconds += 2 * 3 * layers * spec.hidden_size * spec.ffn_hidden_size * sum(lengths) / rate
            recollect = collective / 2
        return seconds, recollect

    def _layer_collectives_s(self, tokens: int) -> float:
        """One layer's forward: two all-reduces of [tokens, hidden], or as many bytes of gathers and scatters."""
        tp = self.placement.grid.tp
        if tp == 1:
            return 0.0
        size = tokens * self.spec.hidden_size * self.itemsize
        count = 4 if self.config.parallel.sequence_parallel else 2
        bandwidth = self._bandwidth(self.placement.tp_crosses_nodes)
        seconds = 4 * size * (tp - 1) / tp / bandwidth + count * self.assumed.collective_latency_s
        return seconds * (1 - self.assumed.tp_overlap * self.config.parallel.tp_comm_overlap)

    def _message_s(self, crosses_nodes: bool, tokens: int) -> float:
        """Activations from one stage to another; with sequence parallelism each rank sends its own part."""
        parallel, tp = self.config.parallel, self.placement.grid.tp
        size = tokens * self.spec.hidden_size * self.itemsize / (tp if parallel.sequence_parallel else 1)
        return size / self._bandwidth(crosses_nodes) + self.assumed.collective_latency_s

    def _bandwidth(self, crosses_nodes: bool) -> float:
        if crosses_nodes:
            return self.device.network * self.assumed.network_efficiency
        return self.device.nvlink * self.assumed.nvlink_efficiency

    def _learn(self, head: bool) -> tuple[float, float, float]:
        """Seconds to exchange gradients and weights, and of the optimizer step, on the stage with most parameters.

        Gradients are fp32. With the distributed optimizer they are reduce-scattered and parameters all-gathered, each
        once; without it gradients are all-reduced and every rank steps all parameters. A ring over nodes uses the
        adapters of all its members in a node.
        """
        grid, parallel = self.placement.grid, self.config.parallel
        params = self.placement.parameters_of_busiest_rank(self.spec, self.config.parallel, head=head)
        sharded = parallel.use_distributed_optimizer
        moved = params * (grid.dp - 1) / grid.dp  # by a rank in a reduce-scatter or an all-gather, elements
        bandwidth = self._bandwidth(self.placement.dp_crosses_nodes)
        if self.placement.dp_crosses_nodes:
            bandwidth *= self.placement.dp_members_a_node
        stepped = params / grid.dp if sharded else params
        on_host = parallel.optimizer_offload_fraction if parallel.optimizer_cpu_offload else 0.0
        optimizer_s = (1 - on_host) * stepped * OPTIMIZER_BYTES / (self.device.hbm * self.assumed.hbm_efficiency)
        if on_host:
            copies = on_host * stepped * (4 + self.itemsize) / (self.device.pcie * self.assumed.pcie_efficiency)
            adam = on_host * stepped * OPTIMIZER_BYTES / self.assumed.host_adam_bytes_per_s
            optimizer_s += max(copies, adam) if parallel.overlap_cpu_optimizer_d2h_h2d else copies + adam
        gradients, weights = (4, self.itemsize) if sharded else (8, 0)
        return moved * gradients / bandwidth, moved * weights / bandwidth, optimizer_s
