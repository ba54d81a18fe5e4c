"""Names, shapes and pipeline cuts of the Megatron layout against megatron-core's own GPTModel, rank by rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from test_layout_megatron import FAMILIES, small_spec

from megatron_oreal.layout import ModelSpec, megatron_layout, padded_vocab_size, pipeline_layer_split

REAL_CASES = [
    (family, tied, 4, tp, pp, vpp, {}, rank)
    for number, family in enumerate(FAMILIES)
    for tied in (number % 2 == 0,)
    for tp, pp, vpp in ((1, 1, None), (2, 2, None), (4, 2, 2))
    for rank in sorted({0, tp * pp - 1})
]
UNEVEN_CASES = [
    ("llama", True, layers, 1, pp, vpp, cut, rank)
    for layers, pp, vpp, cut in (
        (5, 2, None, {"num_layers_in_first_pipeline_stage": 2}),
        (7, 3, None, {"num_layers_in_last_pipeline_stage": 1}),
        (10, 4, 2, {"num_layers_in_first_pipeline_stage": 2, "num_layers_in_last_pipeline_stage": 4}),
        (5, 2, None, {"pipeline_model_parallel_layout": "Ett|tttL"}),
        (7, 2, 2, {"pipeline_model_parallel_layout": "E|tt|ttt|ttL"}),
    )
    for rank in range(pp)
]
LAYOUT_SPLITS = {"Ett|tttL": [[2], [3]], "E|tt|ttt|ttL": [[0, 3], [2, 2]]}


def split_of(spec: ModelSpec, pp: int, vpp: int | None, cut: dict) -> Sequence[Sequence[int]]:
    if "pipeline_model_parallel_layout" in cut:
        return LAYOUT_SPLITS[cut["pipeline_model_parallel_layout"]]
    first, last = (cut.get(f"num_layers_in_{which}_pipeline_stage") for which in ("first", "last"))
    return pipeline_layer_split(spec, pp=pp, vpp=vpp, first=first, last=last)


def test_names_and_shapes_are_those_of_a_real_gpt_model() -> None:
    """Builds megatron-core's GPTModel for single ranks under the fake process group, on the meta device."""
    env = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parent.parent}",
    }
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    cases = REAL_CASES + UNEVEN_CASES
    assert len(found) == len(cases)
    for case, real in zip(cases, found, strict=True):
        family, tied, layers, tp, pp, vpp, cut, rank = case
        spec = small_spec(family, tied=tied, layers=layers)
        layout = megatron_layout(spec, tp=tp, pp=pp, vpp=vpp, layer_split=split_of(spec, pp, vpp, cut))
        shard = layout.shards[rank]
        assert {name: list(shape) for name, shape in shard.params} == real["shapes"], case
        first = {
            block.param.split(".layers.")[0]: int(block.tensor.split(".")[2])
            for block in reversed(shard.blocks)
            if ".layers." in block.param
        }
        assert first == real["first_layer"], case


def _real_parameters(
    family: str, tied: bool, layers: int, tp: int, pp: int, vpp: int | None, cut: dict, rank: int
) -> dict[str, dict]:
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state as mpu
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # tied embeddings are moved "to the GPU" for an all-reduce
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=tp * pp)
    mpu.initialize_model_parallel(tp, pp, vpp, create_gloo_process_groups=False)
    spec = small_spec(family, tied=tied, layers=layers)
    config = TransformerConfig(
        **cut,
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        ffn_hidden_size=spec.ffn_hidden_size,
        num_attention_heads=spec.num_heads,
        num_query_groups=spec.num_kv_heads,
        kv_channels=spec.head_dim,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=spec.qkv_bias,
        qk_layernorm=spec.qk_norm,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        perform_initialization=False,
    )
    shapes: dict[str, list[int]] = {}
    first_layer: dict[str, int] = {}
    for chunk in range(vpp or 1):
        stage = {"ignore_virtual": False, "vp_stage": chunk if vpp else None}
        with torch.device("meta"):
            model = GPTModel(
                config,
                get_gpt_layer_local_spec(qk_layernorm=spec.qk_norm, normalization="RMSNorm"),
                vocab_size=padded_vocab_size(spec.vocab_size, tp=tp),
                max_sequence_length=64,
                pre_process=mpu.is_pipeline_first_stage(**stage),
                post_process=mpu.is_pipeline_last_stage(**stage),
                share_embeddings_and_output_weights=spec.tied_embeddings,
                position_embedding_type="none",
                vp_stage=chunk if vpp else None,
            )
        prefix = f"{chunk}:" if vpp else ""
        shapes |= {prefix + name: list(param.shape) for name, param in model.named_parameters()}
        if len(model.decoder.layers):
            first_layer[prefix + "decoder"] = model.decoder.layers[0].layer_number - 1
    mpu.destroy_model_parallel()
    dist.destroy_process_group()
    return {"shapes": shapes, "first_layer": first_layer}


if __name__ == "__main__":
    print(json.dumps([_real_parameters(*case) for case in REAL_CASES + UNEVEN_CASES]))
