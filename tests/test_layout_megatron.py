"""Layouts against an oracle that fuses and splits whole tensors as Megatron and SGLang do, and against real names."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from megatron_oreal.errors import UserError
from megatron_oreal.layout import (
    Layout,
    ModelSpec,
    RankGrid,
    RopeSpec,
    embedded_layout,
    hf_layout,
    hf_tensors,
    make_plan,
    megatron_layout,
    padded_vocab_size,
    pipeline_layer_split,
)
from megatron_oreal.layout.blocks import to_slices
from megatron_oreal.layout.families import FAMILY_LAYERS, has_role

Arrays = dict[str, np.ndarray]
EMPTY = -1


def small_spec(
    family: str = "qwen2", *, tied: bool = False, heads: int = 4, kv_heads: int = 2, layers: int = 4, vocab: int = 37
) -> ModelSpec:
    return ModelSpec(
        family=family,
        num_layers=layers,
        hidden_size=12,
        ffn_hidden_size=24,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=4,
        vocab_size=vocab,
        max_position_embeddings=64,
        norm_eps=1e-6,
        tied_embeddings=tied,
        qkv_bias=has_role(family, "qkv_bias"),
        qk_norm=has_role(family, "q_norm"),
        rope=RopeSpec(1e4),
    )


def unique_values(spec: ModelSpec, reward_model: bool = False) -> Arrays:
    """Every element of the model has a value of its own, none of them 0 or EMPTY."""
    count = itertools.count(1)
    return {
        name: np.fromiter(itertools.islice(count, int(np.prod(shape))), np.int64).reshape(shape)
        for name, shape in hf_tensors(spec, reward_model=reward_model).items()
    }


def empty_shards(layout: Layout) -> list[Arrays]:
    return [{name: np.full(shape, EMPTY) for name, shape in shard.params} for shard in layout.shards]


def fill_zeros(layout: Layout, shards: list[Arrays]) -> None:
    for shard, arrays in zip(layout.shards, shards, strict=True):
        for name, rect in shard.padding:
            assert (arrays[name][to_slices(rect)] == EMPTY).all(), f"{name}: padding overlaps a block"
            arrays[name][to_slices(rect)] = 0


def place(layout: Layout, hf: Arrays) -> list[Arrays]:
    """What the layout says, taken literally; fails when an element is written twice or never."""
    shards = empty_shards(layout)
    for shard, arrays in zip(layout.shards, shards, strict=True):
        for block in shard.blocks:
            target = arrays[block.param][to_slices(block.dest)]
            assert (target == EMPTY).all(), f"{block} writes an element again"
            target[...] = hf[block.tensor][to_slices(block.source)]
    fill_zeros(layout, shards)
    assert all((array != EMPTY).all() for arrays in shards for array in arrays.values())
    return shards


def follow_plan(source: Layout, dest: Layout, shards: list[Arrays]) -> list[Arrays]:
    """Run a plan of one replica on each side in one process; fails when an element is written twice or never."""
    ranks = max(len(source.shards), len(dest.shards))
    plan = make_plan(
        source, {i: [i] for i in range(len(source.shards))}, dest, {j: ranks - 1 - j for j in range(len(dest.shards))}
    )
    result = empty_shards(dest)
    for copy in plan.copies():
        target = result[ranks - 1 - copy.dst_rank][copy.dst_param][to_slices(copy.dst_rect)]
        assert (target == EMPTY).all(), f"{copy} writes an element again"
        target[...] = shards[copy.src_rank][copy.src_param][to_slices(copy.src_rect)]
    for rank, rects in plan.zeros.items():
        for name, rect in rects:
            result[ranks - 1 - rank][name][to_slices(rect)] = 0
    assert all((array != EMPTY).all() for arrays in result for array in arrays.values())
    return result


def assert_same(got: list[Arrays], want: list[Arrays]) -> None:
    assert len(got) == len(want)
    for mine, theirs in zip(got, want, strict=True):
        assert mine.keys() == theirs.keys()
        for name in theirs:
            np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)


def megatron_oracle(
    spec: ModelSpec,
    hf: Arrays,
    tp: int,
    pp: int,
    vpp: int | None = None,
    divisor: int = 1,
    engine: bool = False,
    reward_model: bool = False,
    split: Sequence[Sequence[int]] | None = None,
) -> list[Arrays]:
    """Every rank's parameters made the way Megatron's own loaders make them: whole tensors, fused, then split."""
    chunks = vpp or 1
    split = split or [[spec.num_layers // (pp * chunks)] * chunks] * pp
    numbers = itertools.count()
    layers_of = {(c, s): [next(numbers) for _ in range(split[s][c])] for c in range(chunks) for s in range(pp)}
    groups = spec.num_kv_heads
    norm_in = "self_attention.linear_qkv.layer_norm_weight" if engine else "input_layernorm.weight"
    norm_mlp = "mlp.linear_fc1.layer_norm_weight" if engine else "pre_mlp_layernorm.weight"

    def vocab(table: np.ndarray) -> list[np.ndarray]:
        multiple = divisor * tp
        extra = (multiple - len(table) % multiple) % multiple
        return np.split(np.concatenate([table, np.zeros((extra, table.shape[1]), table.dtype)]), tp)

    def interleave(kind: str, layer: str) -> list[np.ndarray]:
        parts = [hf[f"{layer}self_attn.{which}_proj.{kind}"] for which in "qkv"]
        grouped = [part.reshape(groups, -1, *part.shape[1:]) for part in parts]
        fused = np.concatenate(grouped, axis=1)
        return np.split(fused.reshape(-1, *parts[0].shape[1:]), tp)

    ranks = []
    for stage, rank in itertools.product(range(pp), range(tp)):
        held: Arrays = {}
        for chunk in range(chunks):
            prefix = f"{chunk}:" if chunks > 1 else ""
            if stage == 0 and chunk == 0:
                held[f"{prefix}embedding.word_embeddings.weight"] = vocab(hf["model.embed_tokens.weight"])[rank]
            for local, number in enumerate(layers_of[chunk, stage]):
                theirs = f"model.layers.{number}."
                mine = f"{prefix}decoder.layers.{local}."
                held[mine + norm_in] = hf[theirs + "input_layernorm.weight"]
                held[mine + norm_mlp] = hf[theirs + "post_attention_layernorm.weight"]
                held[mine + "self_attention.linear_qkv.weight"] = interleave("weight", theirs)[rank]
                if spec.qkv_bias:
                    held[mine + "self_attention.linear_qkv.bias"] = interleave("bias", theirs)[rank]
                if spec.qk_norm:
                    for which in "qk":
                        held[f"{mine}self_attention.{which}_layernorm.weight"] = hf[
                            f"{theirs}self_attn.{which}_norm.weight"
                        ]
                held[mine + "self_attention.linear_proj.weight"] = np.split(
                    hf[theirs + "self_attn.o_proj.weight"], tp, 1
                )[rank]
                gate, up = (np.split(hf[f"{theirs}mlp.{which}_proj.weight"], tp)[rank] for which in ("gate", "up"))
                held[mine + "mlp.linear_fc1.weight"] = np.concatenate([gate, up])
                held[mine + "mlp.linear_fc2.weight"] = np.split(hf[theirs + "mlp.down_proj.weight"], tp, 1)[rank]
            if stage == pp - 1 and chunk == chunks - 1:
                held[prefix + "decoder.final_layernorm.weight"] = hf["model.norm.weight"]
                if reward_model:
                    held[prefix + "output_layer.weight"] = hf["score.weight"]
                elif not spec.tied_embeddings:
                    held[prefix + "output_layer.weight"] = vocab(hf["lm_head.weight"])[rank]
                elif pp > 1:
                    held[prefix + "output_layer.weight"] = vocab(hf["model.embed_tokens.weight"])[rank]
        ranks.append(held)
    return ranks


ARRANGEMENTS = [
    (1, 1, None),
    (2, 1, None),
    (4, 1, None),
    (1, 2, None),
    (2, 2, None),
    (2, 2, 2),
    (4, 2, 2),
    (1, 4, None),
]
FAMILIES = list(FAMILY_LAYERS)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_megatron_shard_is_what_megatron_would_build(family: str, tied: bool) -> None:
    spec = small_spec(family, tied=tied)
    hf = unique_values(spec)
    for (tp, pp, vpp), divisor, impl in itertools.product(ARRANGEMENTS, (1, 16), ("local", "transformer_engine")):
        layout = megatron_layout(spec, tp=tp, pp=pp, vpp=vpp, vocab_divisor=divisor, transformer_impl=impl)
        want = megatron_oracle(spec, hf, tp, pp, vpp, divisor, impl == "transformer_engine")
        assert_same(place(layout, hf), want)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_hf_to_megatron_to_hf_is_the_identity(family: str, tied: bool) -> None:
    spec = small_spec(family, tied=tied)
    hf = unique_values(spec)
    for (tp, pp, vpp), divisor in itertools.product(ARRANGEMENTS, (1, 16)):
        layout = megatron_layout(spec, tp=tp, pp=pp, vpp=vpp, vocab_divisor=divisor)
        shards = follow_plan(hf_layout(spec), layout, [hf])
        assert_same(shards, megatron_oracle(spec, hf, tp, pp, vpp, divisor))
        assert_same(follow_plan(layout, hf_layout(spec), shards), [hf])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp"),
    [(9, 3, 3), (9, 3, 1), (12, 3, 6), (8, 2, 4), (8, 2, 8), (4, 4, 2), (8, 1, 4), (6, 3, 6)],
)
def test_head_counts_that_divide_unevenly_survive_the_round_trip(heads: int, kv_heads: int, tp: int) -> None:
    spec = replace(small_spec("qwen2", heads=heads, kv_heads=kv_heads), ffn_hidden_size=72)
    hf = unique_values(spec)
    layout = megatron_layout(spec, tp=tp, pp=2)
    assert_same(place(layout, hf), megatron_oracle(spec, hf, tp, 2))
    assert_same(follow_plan(layout, hf_layout(spec), place(layout, hf)), [hf])


@pytest.mark.parametrize("tied", [False, True])
def test_megatron_to_megatron_equals_loading_the_target_directly(tied: bool) -> None:
    spec = small_spec("qwen2", tied=tied)
    hf = unique_values(spec)
    for a, b in itertools.permutations(ARRANGEMENTS, 2):
        source = megatron_layout(spec, tp=a[0], pp=a[1], vpp=a[2], vocab_divisor=8)
        dest = megatron_layout(spec, tp=b[0], pp=b[1], vpp=b[2], transformer_impl="transformer_engine")
        assert_same(follow_plan(source, dest, place(source, hf)), megatron_oracle(spec, hf, *b, engine=True))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_engine_parameters_are_stacked_as_sglang_stacks_them(family: str, tied: bool) -> None:
    spec = small_spec(family, tied=tied)
    hf = unique_values(spec)
    want = {
        name: value
        for name, value in hf.items()
        if ".layers." not in name or "norm" in name or name.endswith(("o_proj.weight", "down_proj.weight"))
    }
    for layer in range(spec.num_layers):
        for kind in ("weight", "bias") if spec.qkv_bias else ("weight",):
            at = f"model.layers.{layer}.self_attn."
            want[f"{at}qkv_proj.{kind}"] = np.concatenate([hf[f"{at}{part}_proj.{kind}"] for part in "qkv"])
        at = f"model.layers.{layer}.mlp."
        want[f"{at}gate_up_proj.weight"] = np.concatenate([hf[f"{at}gate_proj.weight"], hf[f"{at}up_proj.weight"]])
    assert ("lm_head.weight" in want) is not tied
    source = megatron_layout(spec, tp=2, pp=2, vocab_divisor=16)
    assert_same(place(embedded_layout(spec), hf), [want])
    assert_same(follow_plan(source, embedded_layout(spec), place(source, hf)), [want])


@pytest.mark.parametrize("tied", [False, True])
def test_reward_model_has_its_score_on_every_tp_rank_of_the_last_stage(tied: bool) -> None:
    spec = small_spec("qwen2", tied=tied)
    hf = unique_values(spec, reward_model=True)
    assert "lm_head.weight" not in hf
    for tp, pp, vpp in ARRANGEMENTS:
        layout = megatron_layout(spec, tp=tp, pp=pp, vpp=vpp, reward_model=True)
        shards = place(layout, hf)
        assert_same(shards, megatron_oracle(spec, hf, tp, pp, vpp, reward_model=True))
        assert_same(follow_plan(layout, hf_layout(spec, reward_model=True), shards), [hf])


def test_layer_split_moves_whole_layers_between_stages() -> None:
    spec = small_spec("llama", layers=7, tied=True)
    hf = unique_values(spec)
    for vpp, split in (
        (None, [[2], [5]]),
        (None, [[0], [4], [3]]),
        (2, [[1, 3], [2, 1]]),
        (2, [[0, 2], [1, 3], [1, 0]]),
    ):
        layout = megatron_layout(spec, tp=2, pp=len(split), vpp=vpp, layer_split=split)
        shards = place(layout, hf)
        assert_same(shards, megatron_oracle(spec, hf, 2, len(split), vpp, split=split))
        assert_same(follow_plan(layout, hf_layout(spec), shards), [hf])


@pytest.mark.parametrize(
    ("layers", "sizes", "split"),
    [
        (8, {"pp": 2}, [[4], [4]]),
        (8, {"pp": 2, "first": 3}, [[3], [5]]),
        (8, {"pp": 2, "last": 3}, [[5], [3]]),
        (8, {"pp": 2, "first": 3, "last": 5}, [[3], [5]]),
        (10, {"pp": 4, "first": 2, "last": 2}, [[2], [3], [3], [2]]),
        (10, {"pp": 4, "last": 1}, [[3], [3], [3], [1]]),
        (16, {"pp": 4, "vpp": 2, "first": 2, "last": 6}, [[1, 1], [2, 2], [2, 2], [3, 3]]),
    ],
)
def test_pipeline_layer_split_cuts_as_megatron_names_it(layers: int, sizes: dict, split: list) -> None:
    assert pipeline_layer_split(small_spec(layers=layers), **sizes) == tuple(map(tuple, split))


@pytest.mark.parametrize(
    ("layers", "sizes", "message"),
    [
        (8, {"pp": 1, "first": 8}, "num_layers_in_first_pipeline_stage=8 needs pipeline_model_parallel_size above 1"),
        (8, {"pp": 2, "first": 3, "last": 3}, "leaves 2 of num_hidden_layers=8 for the other 0"),
        (8, {"pp": 3, "first": 3}, "leaves 5 of num_hidden_layers=8 for the other 2"),
        (8, {"pp": 4, "first": 8}, "leaves 0 of num_hidden_layers=8 for the other 3"),
        (8, {"pp": 2, "last": 9}, "num_layers_in_last_pipeline_stage=9 leaves -1"),
        (8, {"pp": 2, "first": 0, "last": 8}, "num_layers_in_first_pipeline_stage=0 is not a positive number"),
        (8, {"pp": 2, "vpp": 2, "first": 3}, "a stage of 3 layers does not divide"),
        (9, {"pp": 2}, "num_hidden_layers=9 does not divide into pipeline_model_parallel_size=2"),
    ],
)
def test_pipeline_splits_that_do_not_work_out_are_user_errors(layers: int, sizes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        pipeline_layer_split(small_spec(layers=layers), **sizes)
    assert "\n" not in str(caught.value)


def test_vocabulary_padding_is_named_and_only_there() -> None:
    spec = small_spec("llama", vocab=37)
    assert padded_vocab_size(37, tp=4) == 40
    assert padded_vocab_size(37, tp=4, vocab_divisor=16) == 64
    assert padded_vocab_size(40, tp=4) == 40
    layout = megatron_layout(spec, tp=4, pp=1, vocab_divisor=16)
    names = ("embedding.word_embeddings.weight", "output_layer.weight")
    assert [shard.padding for shard in layout.shards] == [
        (),
        (),
        tuple((name, ((5, 16), (0, 12))) for name in names),
        tuple((name, ((0, 16), (0, 12))) for name in names),
    ]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tp": 3, "pp": 1}, "tensor_model_parallel_size=3 does not divide num_attention_heads=4"),
        ({"tp": 1, "pp": 3}, "num_hidden_layers=4 does not divide into pipeline_model_parallel_size=3"),
        ({"tp": 1, "pp": 2, "vpp": 4}, "virtual_pipeline_model_parallel_size=4"),
        ({"tp": 1, "pp": 1, "vpp": 2}, "needs pipeline_model_parallel_size above 1"),
        ({"tp": 1, "pp": 2, "layer_split": [[1], [2]]}, "does not add up to num_hidden_layers=4"),
        ({"tp": 1, "pp": 2, "layer_split": [[4]]}, "does not have 2 stages"),
    ],
)
def test_sizes_that_megatron_refuses_are_user_errors(sizes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as caught:
        megatron_layout(small_spec(), **sizes)
    assert "\n" not in str(caught.value)


def test_kv_heads_and_ffn_that_do_not_fit_tp_are_user_errors() -> None:
    with pytest.raises(UserError, match="num_key_value_heads=3"):
        megatron_layout(small_spec(heads=6, kv_heads=3), tp=2, pp=1)
    with pytest.raises(UserError, match="intermediate_size=24"):
        megatron_layout(small_spec(heads=16, kv_heads=16), tp=16, pp=1)
    with pytest.raises(UserError, match="rows of linear_qkv"):
        megatron_layout(replace(small_spec(heads=48, kv_heads=1), head_dim=1), tp=48, pp=1)


def test_rank_grid_is_megatrons_default_order() -> None:
    from megatron.core.parallel_state import RankGenerator

    order = RankGenerator(tp=2, ep=1, dp=3, pp=4, cp=1, order="tp-cp-ep-dp-pp")
    grid = RankGrid(tp=2, pp=4, dp=3)
    assert sorted(grid.replicas().values()) == sorted(map(tuple, order.get_ranks("dp")))
    assert {
        tuple(grid.global_rank(tp_rank=t, pp_rank=p, dp_rank=d) for t in range(2)) for p in range(4) for d in range(3)
    } == set(map(tuple, order.get_ranks("tp")))
    for rank in range(grid.world_size):
        t, p, d = grid.coordinates(rank)
        assert grid.global_rank(tp_rank=t, pp_rank=p, dp_rank=d) == rank
        assert rank in grid.replicas()[grid.model_index(rank)]
