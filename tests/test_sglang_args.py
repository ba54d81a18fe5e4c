"""Server arguments, and which ranks share a server. Where SGLang is installed, against its own ``ServerArgs``."""

import importlib.machinery
import json

import pytest
import tiny
import torch
from sglang_server import needs_sglang

from megatron_oreal.config_check import check_config
from megatron_oreal.config_load import load_config
from megatron_oreal.errors import UserError
from megatron_oreal.layout import load_model_spec
from megatron_oreal.rollout.sglang import args
from megatron_oreal.rollout.sglang.args import check_server_args, server_arg_names, server_args, write_model_dir
from megatron_oreal.rollout.sglang.build import engine_ranks, shard_ranks


@needs_sglang
def test_names_read_from_the_source_are_those_of_the_class():
    assert {"model_path", "tp_size", "mem_fraction_static", "custom_weight_loader"} <= server_arg_names()
    assert len(server_arg_names()) > 300


@needs_sglang
@pytest.mark.parametrize(
    ("user", "message"),
    [
        ({"mem_fraction_statik": 0.5}, r"rollout\.sglang\.mem_fraction_statik: .*did you mean 'mem_fraction_static'"),
        ({"port": 30000}, r"rollout\.sglang\.port=30000: this is set by the trainer itself; remove the key"),
        ({"tp_size": 2}, r"rollout\.sglang\.tp_size=2: this is set by rollout\.engine_tp"),
        ({"dp_size": 2}, r"rollout\.sglang\.dp_size=2: this is set by rollout\.engine_tp: every group .* one such"),
        ({"api_key": "k"}, r"rollout\.sglang\.api_key='k': this is set by the trainer itself, .* without a key"),
    ],
)
def test_keys_that_sglang_does_not_know_or_the_trainer_decides_are_refused_in_one_line(user, message):
    with pytest.raises(UserError, match=message) as caught:
        check_server_args(user)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_memory_that_no_server_can_map_is_refused_before_anything_is_built(name):
    with pytest.raises(UserError, match=rf"^{name}='.*' with rollout\.engine=sglang: .*remove expandable_segments"):
        args.check_allocator({name: "max_split_size_mb:512, expandable_segments: True"})
    args.check_allocator({name: "expandable_segments:False,max_split_size_mb:512"})
    args.check_allocator({})


@needs_sglang
def test_every_argument_that_is_passed_is_one_of_sglangs(tmp_path):
    for device in ("cpu", "cuda"):
        final = server_args(
            {"attention_backend": "triton"},
            model_dir=tmp_path,
            device=torch.device(device),
            dtype=torch.bfloat16,
            tp=2,
            max_running_requests=8,
            max_length=64,
        )
        assert final.keys() <= server_arg_names()
        assert final["attention_backend"] == "triton", "the user's word is above the default"
        assert json.loads(json.dumps(final)) == final


def test_names_are_found_where_sglang_puts_the_class_together(tmp_path, monkeypatch):
    """As from 0.5.20 on: one class of fields a namespace, and none in ``ServerArgs`` itself."""
    fields = tmp_path / "srt" / "arg_groups" / "fields"
    fields.mkdir(parents=True)
    (tmp_path / "srt" / "server_args.py").write_text("class ServerArgs:\n    pass\nclass PortArgs:\n    port: int\n")
    (fields / "model.py").write_text("class Model(Struct):\n    _NS_PATH = 'model'\n    model_path: A[str, 'path']\n")
    (fields / "memory.py").write_text("class Memory(Struct):\n    mem_fraction_static: A[float, 'share'] = 0.9\n")
    spec = importlib.machinery.ModuleSpec("sglang", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(args.importlib.util, "find_spec", lambda name: spec)
    server_arg_names.cache_clear()
    try:
        assert server_arg_names() == {"model_path", "mem_fraction_static"}
    finally:
        server_arg_names.cache_clear()


def test_without_sglang_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(args, "server_arg_names", lambda: None)
    with pytest.raises(UserError, match=r"pip install 'sglang.*tests/setup_sglang\.sh"):
        check_server_args({})


def test_overrides_reach_sglangs_arguments(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "{work_dir: x, model: {path: m, stop_word: s}, data: {train: t}, rollout: {sglang: {log_level: info}}}"
    )
    config = load_config(path, ["rollout.engine=sglang", "rollout.sglang.mem_fraction_static=0.7"])
    assert config.rollout.sglang == {"log_level": "info", "mem_fraction_static": 0.7}
    with pytest.raises(UserError, match=r"rollout\.server\.health_timeout'? ?.*did you mean 'health_timeout_s'"):
        load_config(path, ["rollout.server.health_timeout=3"])


def test_the_servers_model_has_no_token_of_its_own_that_ends_a_response(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5, "max_position_embeddings": 64, "x": 1}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    folder = write_model_dir(tmp_path, tmp_path / "server", max_length=64)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    written = json.loads((folder / "config.json").read_text())
    assert written == {"eos_token_id": None, "max_position_embeddings": 64 + args.SPARE_POSITIONS, "x": 1}


def test_engines_are_neighbours_on_one_node_and_every_rank_stages_one_shard():
    engines = engine_ranks(world_size=16, ranks_per_node=8, tp=4)
    assert engines == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert shard_ranks(engines) == {0: [0, 4, 8, 12], 1: [1, 5, 9, 13], 2: [2, 6, 10, 14], 3: [3, 7, 11, 15]}
    with pytest.raises(UserError, match=r"rollout\.engine_tp=16 does not divide the 8 ranks a node"):
        engine_ranks(world_size=16, ranks_per_node=8, tp=16)


def test_a_server_may_not_take_longer_than_the_other_ranks_wait(tmp_path):
    config = load_config(
        tiny.write_run(tmp_path, tiny.write_model(tmp_path / "model")),
        ["rollout.engine=sglang", "parallel.distributed_timeout_s=60"],
    )
    with pytest.raises(UserError, match=r"rollout\.server\.control_timeout_s=300 is not below .*=60"):
        check_config(config, load_model_spec(tmp_path / "model"), 1)
