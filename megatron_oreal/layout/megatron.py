"""Megatron-core's layout: tensor, pipeline and virtual pipeline parallel, by the parameter names of ``GPTModel``.

Names and splits are those of megatron-core 0.16:

* ``linear_qkv`` stacks query groups, ``[q heads of group g | k_g | v_g]`` for each KV head ``g``, weight and bias
  alike, and tensor parallelism cuts the stack into ``tp`` equal runs of rows. With ``num_kv_heads % tp == 0`` a run is
  whole groups. With fewer KV heads than ranks (``tp % num_kv_heads == 0``) a run is a part of one group and may end
  inside a head: nothing is replicated, Megatron gathers the activations and then picks each rank's heads
  (``SelfAttention.get_query_key_value_tensors``).
* ``linear_fc1`` holds ``[gate shard | up shard]`` on every rank; ``linear_proj`` and ``linear_fc2`` are cut by columns.
* Embedding and output layer are cut by rows, after zero rows were added up to ``padded_vocab_size``.
* With tied embeddings and more than one stage, ``output_layer.weight`` of the last stage is a second copy of the
  embedding; with one stage there is no such parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_oreal.errors import UserError
from megatron_oreal.layout.blocks import (
    Layout,
    Rows,
    ShardBuilder,
    ShardLayout,
    Split,
    add_split,
    cut_rows,
    even_rows,
    vocab_rows,
)
from megatron_oreal.layout.families import Role, embedding, final_norm, head, layer_weights
from megatron_oreal.layout.model_spec import ModelSpec

TransformerImpl = Literal["local", "transformer_engine"]
_Split = Split | Literal["query_groups"]

_LAYER: dict[Role, tuple[str, _Split]] = {
    "attention_norm": ("input_layernorm.weight", "replicated"),
    "qkv_weight": ("self_attention.linear_qkv.weight", "query_groups"),
    "qkv_bias": ("self_attention.linear_qkv.bias", "query_groups"),
    "q_norm": ("self_attention.q_layernorm.weight", "replicated"),
    "k_norm": ("self_attention.k_layernorm.weight", "replicated"),
    "attention_out": ("self_attention.linear_proj.weight", "columns"),
    "mlp_norm": ("pre_mlp_layernorm.weight", "replicated"),
    "gate_up": ("mlp.linear_fc1.weight", "each_part"),
    "down": ("mlp.linear_fc2.weight", "columns"),
}
_TRANSFORMER_ENGINE_NAMES: dict[Role, str] = {
    "attention_norm": "self_attention.linear_qkv.layer_norm_weight",
    "mlp_norm": "mlp.linear_fc1.layer_norm_weight",
}


@dataclass(frozen=True, slots=True)
class RankGrid:
    """Megatron's default rank order ``tp-cp-ep-dp-pp`` with EP 1; ``dp`` counts context-parallel ranks too.

    ``global rank = tp_rank + tp * (dp_rank + dp * pp_rank)``. A *model index* numbers the shards of one replica,
    ``pp_rank * tp + tp_rank``, as ``megatron_layout(...).shards`` does.
    """

    tp: int
    pp: int
    dp: int

    @property
    def world_size(self) -> int:
        """Number of global ranks."""
        return self.tp * self.pp * self.dp

    def global_rank(self, *, tp_rank: int, pp_rank: int, dp_rank: int) -> int:
        """Return the rank in the default process group."""
        return tp_rank + self.tp * (dp_rank + self.dp * pp_rank)

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """``(tp_rank, pp_rank, dp_rank)`` of a global rank."""
        return rank % self.tp, rank // (self.tp * self.dp), rank // self.tp % self.dp

    def model_index(self, rank: int) -> int:
        """Which shard of the layout a global rank holds."""
        tp_rank, pp_rank, _ = self.coordinates(rank)
        return pp_rank * self.tp + tp_rank

    def replicas(self) -> dict[int, tuple[int, ...]]:
        """Model index to the global ranks that hold it: the ``source_ranks`` of ``make_plan``."""
        return {
            pp_rank * self.tp + tp_rank: tuple(
                self.global_rank(tp_rank=tp_rank, pp_rank=pp_rank, dp_rank=dp_rank) for dp_rank in range(self.dp)
            )
            for pp_rank in range(self.pp)
            for tp_rank in range(self.tp)
        }


def padded_vocab_size(vocab_size: int, *, tp: int, vocab_divisor: int = 1) -> int:
    """Rows of embedding and output layer over all TP ranks: the next multiple of ``vocab_divisor * tp``."""
    multiple = vocab_divisor * tp
    return -(-vocab_size // multiple) * multiple


def param_key(name: str, chunk: int, vpp: int | None) -> str:
    """Return a parameter's key in a shard: Megatron's name, after ``"{chunk}:"`` when a rank has several chunks."""
    return name if vpp is None or vpp == 1 else f"{chunk}:{name}"


def even_layer_split(spec: ModelSpec, *, pp: int, vpp: int | None = None) -> tuple[tuple[int, ...], ...]:
    """Megatron's default: the same number of layers in every chunk of every stage, ``[stage][chunk]``."""
    chunks = vpp or 1
    if spec.num_layers % (pp * chunks):
        raise UserError(
            f"num_hidden_layers={spec.num_layers} does not divide into pipeline_model_parallel_size={pp} stages of "
            f"virtual_pipeline_model_parallel_size={chunks} chunks: choose sizes whose product divides it"
        )
    return ((spec.num_layers // (pp * chunks),) * chunks,) * pp


def pipeline_layer_split(
    spec: ModelSpec, *, pp: int, vpp: int | None = None, first: int | None = None, last: int | None = None
) -> tuple[tuple[int, ...], ...]:
    """Layers of every chunk, ``[stage][chunk]``, with ``first`` and ``last`` layers on the first and the last stage.

    They are Megatron's ``num_layers_in_first_pipeline_stage`` and ``num_layers_in_last_pipeline_stage``: the other
    stages share the rest evenly, and every stage cuts its own into ``vpp`` equal chunks (``get_num_layers_to_build``
    of megatron-core 0.16). Both ``None`` is ``even_layer_split``. Raises ``UserError`` for counts that do not work out.
    """
    if first is None and last is None:
        return even_layer_split(spec, pp=pp, vpp=vpp)
    given = {"num_layers_in_first_pipeline_stage": first, "num_layers_in_last_pipeline_stage": last}
    keys = ", ".join(f"{key}={count}" for key, count in given.items() if count is not None)
    for key, count in given.items():
        if count is not None and count < 1:
            raise UserError(f"{key}={count} is not a positive number")
    if pp == 1:
        raise UserError(f"{keys} needs pipeline_model_parallel_size above 1: leave it unset")
    rest = spec.num_layers - (first or 0) - (last or 0)
    others = pp - (first is not None) - (last is not None)
    if rest < others or rest % max(others, 1) or (others == 0 and rest):
        raise UserError(
            f"{keys} leaves {rest} of num_hidden_layers={spec.num_layers} for the other {others} of "
            f"pipeline_model_parallel_size={pp} stages: they must get the same number each, at least 1"
        )
    each = rest // others if others else 0
    stages = [each if first is None else first, *[each] * (pp - 2), each if last is None else last]
    chunks = vpp or 1
    for count in stages:
        if count % chunks:
            raise UserError(
                f"{keys}: a stage of {count} layers does not divide into virtual_pipeline_model_parallel_size={chunks} "
                "chunks"
            )
    return tuple((count // chunks,) * chunks for count in stages)


def megatron_layout(
    spec: ModelSpec,
    *,
    tp: int,
    pp: int,
    vpp: int | None = None,
    vocab_divisor: int = 1,
    transformer_impl: TransformerImpl = "local",
    reward_model: bool = False,
    layer_split: Sequence[Sequence[int]] | None = None,
) -> Layout:
    """One model replica over ``tp * pp`` ranks; ``shards[pp_rank * tp + tp_rank]``.

    ``vocab_divisor`` is Megatron's ``make_vocab_size_divisible_by``. ``layer_split[stage][chunk]`` counts layers
    (default: ``even_layer_split``; see ``pipeline_layer_split``; what a ``pipeline_model_parallel_layout`` says can be
    given too); chunk ``c`` of all stages comes before chunk ``c + 1`` of any. A reward model has
    ``output_layer.weight`` [1, hidden] on every TP rank of the last stage instead of the output layer.
    Parameters are keyed by ``param_key``. Raises ``UserError`` for sizes that Megatron-core refuses.
    """
    _check_sizes(spec, tp, pp, vpp)
    split = tuple(map(tuple, layer_split)) if layer_split is not None else even_layer_split(spec, pp=pp, vpp=vpp)
    _check_split(spec, split, pp, vpp)
    shards = []
    for pp_rank in range(pp):
        for tp_rank in range(tp):
            shards.append(
                _shard(spec, split, (tp_rank, tp), (pp_rank, pp), vpp, vocab_divisor, transformer_impl, reward_model)
            )
    label = f"Megatron tp={tp} pp={pp}" + (f" vpp={vpp}" if vpp else "") + (" reward model" if reward_model else "")
    return Layout(label, tuple(shards))


def _shard(
    spec: ModelSpec,
    split: tuple[tuple[int, ...], ...],
    tp_place: tuple[int, int],
    pp_place: tuple[int, int],
    vpp: int | None,
    vocab_divisor: int,
    transformer_impl: TransformerImpl,
    reward_model: bool,
) -> ShardLayout:
    tp_rank, tp = tp_place
    pp_rank, pp = pp_place
    builder = ShardBuilder()
    padded_vocab = padded_vocab_size(spec.vocab_size, tp=tp, vocab_divisor=vocab_divisor)
    last_chunk = (vpp or 1) - 1
    for chunk in range(last_chunk + 1):
        if pp_rank == 0 and chunk == 0:
            name = param_key("embedding.word_embeddings.weight", chunk, vpp)
            builder.add(name, vocab_rows(embedding(spec), padded_vocab, tp_rank, tp))
        first = sum(stage[c] for c in range(chunk) for stage in split) + sum(stage[chunk] for stage in split[:pp_rank])
        for local in range(split[pp_rank][chunk]):
            for role, parts in layer_weights(spec, first + local):
                name, kind = _LAYER[role]
                if transformer_impl == "transformer_engine":
                    name = _TRANSFORMER_ENGINE_NAMES.get(role, name)
                key = param_key(f"decoder.layers.{local}.{name}", chunk, vpp)
                _add_split(builder, key, parts, kind, spec, tp_rank, tp)
        if pp_rank == pp - 1 and chunk == last_chunk:
            builder.add(param_key("decoder.final_layernorm.weight", chunk, vpp), [final_norm(spec)])
            name = param_key("output_layer.weight", chunk, vpp)
            if reward_model:
                builder.add(name, [head(spec, reward_model=True)])
            elif pp > 1 or not spec.tied_embeddings:
                builder.add(name, vocab_rows(head(spec, reward_model=False), padded_vocab, tp_rank, tp))
    return builder.build()


def _add_split(
    builder: ShardBuilder, key: str, parts: tuple[Rows, ...], kind: _Split, spec: ModelSpec, tp_rank: int, tp: int
) -> None:
    if kind != "query_groups":
        add_split(builder, key, parts, kind, tp_rank, tp)
    else:
        builder.add(key, even_rows(_query_groups(spec, parts), tp_rank, tp))


def _query_groups(spec: ModelSpec, parts: tuple[Rows, ...]) -> list[Rows]:
    """``[q heads of the group | k | v]`` for each KV head."""
    query_rows = spec.q_size // spec.num_kv_heads
    stack = []
    for group in range(spec.num_kv_heads):
        for part, height in zip(parts, (query_rows, spec.head_dim, spec.head_dim), strict=True):
            stack += cut_rows([part], group * height, (group + 1) * height)
    return stack


def _check_sizes(spec: ModelSpec, tp: int, pp: int, vpp: int | None) -> None:
    tp_key = f"tensor_model_parallel_size={tp}"
    if spec.num_heads % tp:
        raise UserError(f"{tp_key} does not divide num_attention_heads={spec.num_heads}: choose one of its divisors")
    if spec.num_kv_heads % tp and tp % spec.num_kv_heads:
        raise UserError(f"{tp_key} is neither a divisor nor a multiple of num_key_value_heads={spec.num_kv_heads}")
    if (spec.q_size + 2 * spec.kv_size) % tp:
        raise UserError(
            f"{tp_key} does not divide the {spec.q_size + 2 * spec.kv_size} rows of linear_qkv: choose a smaller one"
        )
    if spec.ffn_hidden_size % tp:
        raise UserError(
            f"{tp_key} does not divide intermediate_size={spec.ffn_hidden_size}: choose one of its divisors"
        )
    if vpp is not None and vpp > 1 and pp == 1:
        raise UserError(
            f"virtual_pipeline_model_parallel_size={vpp} needs pipeline_model_parallel_size above 1: leave it unset"
        )


def _check_split(spec: ModelSpec, split: tuple[tuple[int, ...], ...], pp: int, vpp: int | None) -> None:
    if len(split) != pp or any(len(stage) != (vpp or 1) for stage in split):
        raise UserError(f"layer split {split} does not have {pp} stages of {vpp or 1} chunks")
    if sum(map(sum, split)) != spec.num_layers or any(count < 0 for stage in split for count in stage):
        raise UserError(f"layer split {split} does not add up to num_hidden_layers={spec.num_layers}")
