"""Every rank of the world looked at from metadata: who owns which element, whether engines are complete, who gets what.

The layouts (``layout/``) are held against the rules of Megatron and SGLang written down a second time here, as owners
of rows and columns instead of as rectangles, so that a mistake in either shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_oreal.layout import Layout, ModelSpec, hf_tensors, padded_vocab_size, pipeline_layer_split
from megatron_oreal.layout.families import EMBEDDING, FINAL_NORM, LM_HEAD
from megatron_oreal.planner.placement import Placement, place
from megatron_oreal.planner.traffic import engine_layout, policy_layout
from megatron_oreal.planner.types import Setting
from megatron_oreal.rollout.draw import owner_of
from megatron_oreal.rollout.sglang.build import shard_ranks
from megatron_oreal.rollout.sglang.schedule import Schedule

Owners = np.ndarray
"""Bool [ranks, size]: which rank of one model copy holds each row (or column) of a tensor."""


@dataclass(frozen=True)
class PlacementCheck:
    """What was looked at; ``problems``: one line for each thing that is not as it should be, none for a sound run."""

    ranks: int
    tensors: int
    elements: int
    trainer_copies: int
    engines: int
    requests: int
    problems: tuple[str, ...]


def check_placement(setting: Setting) -> PlacementCheck:
    """Check the trainer's ranks, the engines and a step's requests of a whole world."""
    placement = place(setting)
    spec = setting.spec
    problems: list[str] = []
    problems += _check_grid(placement)
    problems += _check_layout(policy_layout(setting), spec, _trainer_owners(setting), "trainer")
    problems += _check_layout(engine_layout(setting), spec, _engine_owners(setting), "engine")
    problems += _check_engines(placement)
    problems += _check_requests(setting, placement)
    shapes = hf_tensors(spec)
    rollout = setting.config.rollout
    return PlacementCheck(
        ranks=setting.world_size,
        tensors=len(shapes),
        elements=spec.num_parameters(),
        trainer_copies=placement.grid.dp,
        engines=len(placement.engines),
        requests=(rollout.prompts_per_step + rollout.oversample_prompts) * rollout.prompt_repeat_k,
        problems=tuple(problems),
    )


def _check_grid(placement: Placement) -> list[str]:
    """Every global rank holds exactly one shard, and every shard has one holder in each data-parallel replica."""
    grid = placement.grid
    holders = grid.replicas()
    ranks = sorted(rank for held in holders.values() for rank in held)
    problems = []
    if ranks != list(range(grid.world_size)):
        problems.append("trainer: the shards' holders are not the world's ranks, each once")
    for index, held in holders.items():
        replicas = sorted(grid.coordinates(rank)[2] for rank in held)
        if replicas != list(range(grid.dp)) or any(grid.model_index(rank) != index for rank in held):
            problems.append(f"trainer: shard {index} is not held once in each of {grid.dp} replicas")
    return problems


def _check_layout(
    layout: Layout, spec: ModelSpec, expected: Callable[[str], tuple[int, Owners]], what: str
) -> list[str]:
    """Every element of every HF tensor on exactly the ranks that should hold it."""
    shapes = hf_tensors(spec)
    blocks: dict[str, list[tuple[int, tuple]]] = {name: [] for name in shapes}
    problems = []
    for rank, shard in enumerate(layout.shards):
        for block in shard.blocks:
            if block.tensor not in blocks:
                problems.append(f"{what}: rank {rank} holds {block.tensor}, which the model has not")
            else:
                blocks[block.tensor].append((rank, block.source))
    for name, shape in shapes.items():
        dim, owners = expected(name)
        found = np.zeros((len(layout.shards), shape[dim]), dtype=np.int16)
        for rank, rect in blocks[name]:
            whole = all(rect[other] == (0, size) for other, size in enumerate(shape) if other != dim)
            if not whole:
                problems.append(f"{what}: rank {rank} holds a part of {name} that is cut along two dimensions")
            found[rank, rect[dim][0] : rect[dim][1]] += 1
        wanted = owners.astype(np.int16)
        if not np.array_equal(found, wanted):
            wrong = np.argwhere(found != wanted)
            rank, place_ = wrong[0].tolist()
            problems.append(
                f"{what}: {name} index {place_} of dimension {dim}: rank {rank} holds it {found[rank, place_]} times, "
                f"should {wanted[rank, place_]} ({len(wrong)} such places)"
            )
    return problems


def _cut(size: int, of: int) -> np.ndarray:
    """Which of ``of`` equal runs each of ``size`` places belongs to."""
    return np.arange(size) * of // size


def _trainer_owners(setting: Setting) -> Callable[[str], tuple[int, Owners]]:
    """Megatron's rules: (dimension that is cut, owners over ``pp_rank * tp + tp_rank``) of a tensor."""
    spec, parallel = setting.spec, setting.config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    vpp = parallel.virtual_pipeline_model_parallel_size
    split = pipeline_layer_split(
        spec,
        pp=pp,
        vpp=vpp,
        first=parallel.num_layers_in_first_pipeline_stage,
        last=parallel.num_layers_in_last_pipeline_stage,
    )
    stage_of_layer = [stage for chunk in range(vpp or 1) for stage in range(pp) for _ in range(split[stage][chunk])]
    divisor = parallel.make_vocab_size_divisible_by
    padded = padded_vocab_size(spec.vocab_size, tp=tp, vocab_divisor=divisor)
    vocabulary = np.arange(spec.vocab_size) // (padded // tp)
    stack = _query_group_stack(spec, tp)
    shapes = hf_tensors(spec)

    def owners(name: str) -> tuple[int, Owners]:
        dim, tp_owner = _tp_owner(name, spec, tp, vocabulary, stack)
        stages = {0} if name == EMBEDDING else {pp - 1}
        if name == EMBEDDING and spec.tied_embeddings:
            stages = {0, pp - 1}
        if name.startswith("model.layers."):
            stages = {stage_of_layer[int(name.split(".")[2])]}
        size = shapes[name][dim] if tp_owner is None else len(tp_owner)
        table = np.zeros((pp, tp, size), dtype=bool)
        for stage in stages:
            table[stage] = True if tp_owner is None else tp_owner[None, :] == np.arange(tp)[:, None]
        return dim, table.reshape(pp * tp, size)

    return owners


def _query_group_stack(spec: ModelSpec, tp: int) -> dict[str, np.ndarray]:
    """Owner of each row of q, k and v in Megatron's stack of query groups ``[q heads | k | v]``, cut into tp runs."""
    heads_a_group = spec.num_heads // spec.num_kv_heads
    group_rows = (heads_a_group + 2) * spec.head_dim
    run = spec.num_kv_heads * group_rows // tp
    q, kv = np.arange(spec.q_size), np.arange(spec.kv_size)
    q_group, q_inside = np.divmod(q, heads_a_group * spec.head_dim)
    kv_group, kv_inside = np.divmod(kv, spec.head_dim)
    q_place = q_group * group_rows + q_inside
    k_place = kv_group * group_rows + heads_a_group * spec.head_dim + kv_inside
    return {"q": q_place // run, "k": k_place // run, "v": (k_place + spec.head_dim) // run}


def _tp_owner(
    name: str, spec: ModelSpec, tp: int, vocabulary: np.ndarray, stack: dict[str, np.ndarray]
) -> tuple[int, np.ndarray | None]:
    """(dimension that is cut, tensor-parallel owner of each place in it); None: every rank has the whole tensor."""
    if name in (EMBEDDING, LM_HEAD):
        return 0, vocabulary
    module = name.split(".")[-2]
    if module in ("q_proj", "k_proj", "v_proj"):
        return 0, stack[module[0]]
    if module in ("gate_proj", "up_proj"):
        return 0, _cut(spec.ffn_hidden_size, tp)
    if module == "o_proj":
        return 1, _cut(spec.q_size, tp)
    if module == "down_proj":
        return 1, _cut(spec.ffn_hidden_size, tp)
    assert name == FINAL_NORM or module.endswith("norm"), name
    return 0, None


def _engine_owners(setting: Setting) -> Callable[[str], tuple[int, Owners]]:
    """SGLang's rules: whole heads a rank, KV heads repeated where there are more ranks, the vocabulary padded to 64."""
    spec = setting.spec
    served = setting.config.rollout.engine == "sglang"
    tp = setting.config.rollout.engine_tp if served else 1
    padded = -(-spec.vocab_size // 64) * 64 if served else spec.vocab_size
    if padded % tp:
        padded = -(-spec.vocab_size // (64 * tp)) * 64 * tp
    vocabulary = np.arange(spec.vocab_size) // (padded // tp)
    stack = {"q": _cut(spec.q_size, tp)}
    shapes = hf_tensors(spec)

    def owners(name: str) -> tuple[int, Owners]:
        module = name.split(".")[-2]
        ranks = np.arange(tp)[:, None]
        if module in ("k_proj", "v_proj"):
            head = np.arange(spec.kv_size) // spec.head_dim
            held = ranks * spec.num_kv_heads // tp  # the first head of each rank
            count = max(1, spec.num_kv_heads // tp)
            return 0, (head[None, :] >= held) & (head[None, :] < held + count)
        dim, owner = _tp_owner(name, spec, tp, vocabulary, stack)
        if owner is None:
            return dim, np.ones((tp, shapes[name][dim]), dtype=bool)
        return dim, owner[None, :] == ranks

    return owners


def _check_engines(placement: Placement) -> list[str]:
    """Every rank stages for exactly one engine, engines stay on their node, and each has all its shards."""
    problems = []
    ranks = sorted(rank for engine in placement.engines for rank in engine)
    if ranks != list(range(placement.grid.world_size)):
        problems.append("engines: their ranks are not the world's ranks, each once")
    for number, engine in enumerate(placement.engines):
        if len({placement.node(rank) for rank in engine}) > 1:
            problems.append(f"engine {number}: its ranks {engine[0]} to {engine[-1]} are on several nodes")
    shards = shard_ranks([list(engine) for engine in placement.engines])
    for index, held in shards.items():
        if len(held) != len(placement.engines):
            problems.append(f"engines: shard {index} is staged for {len(held)} of {len(placement.engines)} engines")
    return problems


def _check_requests(setting: Setting, placement: Placement) -> list[str]:
    """Run the dispatcher's own bookkeeping over a step: every request goes out once and ends once."""
    rollout = setting.config.rollout
    groups = rollout.prompts_per_step + rollout.oversample_prompts
    prompts = [group for group in range(groups) for _ in range(rollout.prompt_repeat_k)]
    world = placement.grid.world_size
    verified = Counter(owner_of(group, world) for group in range(groups))
    if not all(0 <= rank < world for rank in verified) or max(verified.values()) > -(-groups // world):
        return ["verification: groups do not go to the world's ranks evenly"]
    if not placement.is_served:  # each rank draws the groups that it verifies
        return []
    window = rollout.server.requests_per_server
    schedule = Schedule(
        prompts, [1] * len(prompts), len(placement.engines), window=window, expected_new_tokens=rollout.gen_max_new
    )
    sent: list[int] = []
    problems, done = [], 0
    while not schedule.done:
        while (given := schedule.next()) is not None:
            sent.append(given.index)
            if len(schedule.in_flight(given.engine)) > window:
                problems.append(f"dispatcher: engine {given.engine} has more than {window} requests")
        if done == len(sent):
            problems.append(f"dispatcher: {len(prompts) - done} requests are never sent")
            break
        schedule.finished(sent[done], 1)
        done += 1
    if sorted(sent) != list(range(len(prompts))):
        problems.append("dispatcher: not every request is sent exactly once")
    return problems
