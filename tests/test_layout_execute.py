"""Plans and exports on real gloo ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dist import run_ranks
from safetensors import safe_open
from safetensors.torch import load_file
from test_layout_checkpoint import assert_equal, expected, garbage, random_weights, write_checkpoint
from test_layout_megatron import small_spec
from torch import Tensor

from megatron_oreal.errors import UserError
from megatron_oreal.layout import (
    Layout,
    ModelSpec,
    RankGrid,
    SafetensorsSource,
    embedded_layout,
    execute_plan,
    export_hf,
    load_from_hf,
    load_model_spec,
    make_plan,
    megatron_layout,
)
from megatron_oreal.layout.blocks import rect_size
from megatron_oreal.layout.execute import _schedule, split_rect

TP2_PP2 = {"tp": 2, "pp": 2, "vocab_divisor": 16}


def gather_everything(layout: Layout, ranks: dict[int, tuple[int, ...]], mine: dict[str, Tensor]) -> dict[str, Tensor]:
    """The oracle: every rank gets every shard of everyone and puts the HF tensors together itself."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {name: tensor.detach().clone() for name, tensor in mine.items()})
    hf: dict[str, Tensor] = {}
    for index, shard in enumerate(layout.shards):
        for rank in ranks[index]:
            for name, shape in shard.tensors:
                hf.setdefault(name, torch.full(shape, float("nan"), dtype=torch.bfloat16))
            for block in shard.blocks:
                source = tuple(slice(*span) for span in block.source)
                hf[block.tensor][source] = everyone[rank][block.param][tuple(slice(*span) for span in block.dest)]
    return hf


def in_turn(cases: list[tuple[str, dict]]) -> list:
    """Run several functions of this module on the same ranks: starting processes takes longer than the tests."""
    dist.init_process_group("gloo")
    results = [globals()[function](**kwargs) for function, kwargs in cases]
    dist.destroy_process_group()
    return results


def launch(world_size: int, cases: dict[Any, tuple[str, dict]]) -> dict[Any, list]:
    """Case name to the results of all ranks."""
    results = run_ranks("test_layout_execute:in_turn", world_size, {"cases": list(cases.values())})
    return {name: [each[number] for each in results] for number, name in enumerate(cases)}


def loaded(spec: ModelSpec, model_dir: str, layout: Layout, grid: RankGrid) -> tuple[int, dict[str, Tensor]]:
    rank = dist.get_rank()
    shard = layout.shards[grid.model_index(rank)]
    live = garbage(shard)
    with SafetensorsSource(model_dir) as source:
        load_from_hf(source, shard, live)
    return rank, live


def reshard_worker(model_dir: str, spec: ModelSpec, sizes: dict, dp: int, bucket_bytes: list[int]) -> list:
    layout, grid = megatron_layout(spec, **sizes), RankGrid(sizes["tp"], sizes["pp"], dp)
    rank, live = loaded(spec, model_dir, layout, grid)
    engine = embedded_layout(spec)
    plan = make_plan(layout, grid.replicas(), engine, {0: range(grid.world_size)})
    oracle = expected(engine.shards[0], gather_everything(layout, grid.replicas(), live))
    traffic = []
    for step, size in enumerate(bucket_bytes):
        with torch.no_grad():  # two successive updates must both arrive: nothing of the first may linger
            for tensor in live.values():
                tensor.mul_(2 if step else 1)
        held = garbage(engine.shards[0])
        traffic.append(execute_plan(plan, live, held, rank, bucket_bytes=size))
        assert_equal(held, {name: value * 2**step for name, value in oracle.items()})
    stats = plan.statistics
    for each in traffic:
        assert each.received == 2 * stats.received.get(rank, 0)
        assert each.sent == 2 * stats.sent.get(rank, 0)
        assert each.local == 2 * stats.local.get(rank, 0)
        assert each.received + each.local == 2 * engine.shards[0].num_elements()
    final = {name: (tensor / 2 ** (len(bucket_bytes) - 1)).detach() for name, tensor in held.items()}
    return [plan.fingerprint(), final]


def between_layouts_worker(model_dir: str, spec: ModelSpec) -> None:
    grid = RankGrid(2, 2, 1)
    layout = megatron_layout(spec, **TP2_PP2)
    rank, live = loaded(spec, model_dir, layout, grid)
    target = megatron_layout(spec, tp=4, pp=1, transformer_impl="transformer_engine", vocab_divisor=4)
    plan = make_plan(layout, grid.replicas(), target, {i: 3 - i for i in range(4)})
    held = garbage(target.shards[3 - rank], torch.float32)
    execute_plan(plan, live, held, rank, wire_dtype=torch.bfloat16, bucket_bytes=512)
    want = expected(target.shards[3 - rank], gather_everything(layout, grid.replicas(), live))
    assert_equal(held, {name: value.float() for name, value in want.items()})
    with pytest.raises(ValueError, match="several dtypes"):
        execute_plan(plan, live, held, rank)


RESHARDS: dict[str, tuple[int, str, bool, dict, int]] = {
    "qwen2 tied TP2 PP2": (4, "qwen2", True, TP2_PP2, 1),
    "qwen3 TP2 PP2 VPP2": (4, "qwen3", False, TP2_PP2 | {"vpp": 2}, 1),
    "llama TP2 DP2": (4, "llama", False, {"tp": 2, "pp": 1}, 2),
    "qwen2 PP2": (2, "qwen2", False, {"tp": 1, "pp": 2}, 1),
}


@pytest.fixture(scope="module")
def resharded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[ModelSpec, dict[str, Tensor], list]]:
    results = {}
    for world in (2, 4):
        cases, inputs = {}, {}
        for name, (ranks, family, tied, sizes, dp) in RESHARDS.items():
            if ranks == world:
                spec = small_spec(family, tied=tied)
                folder = tmp_path_factory.mktemp("model")
                inputs[name] = spec, random_weights(spec)
                write_checkpoint(folder, spec, inputs[name][1])
                kwargs = {"model_dir": str(folder), "spec": spec, "sizes": sizes, "dp": dp}
                cases[name] = "reshard_worker", kwargs | {"bucket_bytes": [2**20, 600, 200]}
                if sizes == TP2_PP2:
                    cases["between layouts"] = "between_layouts_worker", {"model_dir": str(folder), "spec": spec}
        done = launch(world, cases)
        results |= {name: (*inputs[name], done[name]) for name in inputs}
    return results


@pytest.mark.parametrize("case", list(RESHARDS))
def test_megatron_ranks_fill_an_engine_on_every_rank_with_the_checkpoint(case: str, resharded: dict) -> None:
    """The ranks also check: against gathering everything, three successive updates, traffic against the plan."""
    spec, weights, ranks = resharded[case]
    want = expected(embedded_layout(spec).shards[0], weights)
    assert len(ranks) == RESHARDS[case][0]
    for fingerprint, held in ranks:
        assert fingerprint == ranks[0][0]
        assert_equal(held, want)


def test_one_process_without_a_group_copies_locally() -> None:
    spec = small_spec("qwen2")
    weights = random_weights(spec)
    source, engine = megatron_layout(spec, tp=1, pp=1, vocab_divisor=8), embedded_layout(spec)
    held = garbage(engine.shards[0])
    traffic = execute_plan(
        make_plan(source, {0: [0]}, engine, {0: 0}), expected(source.shards[0], weights), held, 0
    )  # fmt: skip
    assert_equal(held, expected(engine.shards[0], weights))
    assert (traffic.sent, traffic.received, traffic.local) == (0, 0, 2 * spec.num_parameters())


def test_tensors_that_do_not_fit_the_plan_are_refused_instead_of_broadcast() -> None:
    spec = small_spec("qwen2")
    source, engine = megatron_layout(spec, tp=1, pp=1), embedded_layout(spec)
    plan = make_plan(source, {0: [0]}, engine, {0: 0})
    held, live = garbage(engine.shards[0]), garbage(source.shards[0])
    live["decoder.final_layernorm.weight"] = torch.zeros(1, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"'decoder\.final_layernorm\.weight' has shape \(1,\)"):
        execute_plan(plan, live, held, 0)


def test_messages_stay_within_the_bucket_and_both_ends_cut_alike() -> None:
    spec = small_spec("qwen2")
    grid = RankGrid(2, 2, 2)
    plan = make_plan(megatron_layout(spec, **TP2_PP2), grid.replicas(), embedded_layout(spec), {0: range(8)})
    bucket = 200
    schedules = [_schedule(plan, rank, bucket) for rank in range(8)]
    for rank, schedule in enumerate(schedules):
        for number, current in enumerate(schedule.rounds):
            for messages in (current.sends, current.recvs):
                assert sum(rect_size(part.rect) for parts in messages.values() for part in parts) <= bucket
            for peer, parts in current.sends.items():
                theirs = schedules[peer].rounds[number].recvs[rank]
                assert [rect_size(part.rect) for part in parts] == [rect_size(part.rect) for part in theirs]


@pytest.mark.parametrize("limit", [1, 3, 5, 6, 12, 1000])
def test_split_rect_covers_everything_once_in_order(limit: int) -> None:
    tensor = torch.arange(6 * 5).view(6, 5)
    parts = list(split_rect((6, 5), limit))
    assert all(rect_size(part) <= limit for part in parts)
    got = torch.cat([tensor[tuple(slice(*span) for span in part)].reshape(-1) for part in parts])
    assert torch.equal(got, tensor.reshape(-1))


def export_worker(
    model_dir: str, spec: ModelSpec, sizes: dict, dp: int, out_dir: str, options: dict, fail_on: int | None = None
) -> str | None:
    layout, grid = megatron_layout(spec, **sizes), RankGrid(sizes["tp"], sizes["pp"], dp)
    rank, live = loaded(spec, model_dir, layout, grid)
    common = {"rank": rank, "model_dir": model_dir, "reward_model": sizes.get("reward_model", False)}
    with pytest.MonkeyPatch.context() as patch:
        if fail_on == rank:
            patch.setattr("megatron_oreal.layout.export.save_file", _disk_full)
        try:
            export_hf(out_dir, spec, layout, grid.replicas(), live, **common, **options)
        except (UserError, RuntimeError, OSError) as failure:
            return f"{type(failure).__name__}: {failure}"
    return None


def _disk_full(*_: object, **__: object) -> None:
    raise OSError("No space left on device")


def export_case(folder: Path, spec: ModelSpec, sizes: dict, dp: int = 1, **kwargs: Any) -> tuple[str, dict]:
    """A launch of ``export_worker`` from ``folder/in`` to ``folder/out``."""
    places = {"model_dir": str(folder / "in"), "out_dir": str(folder / "out")}
    return "export_worker", places | {"spec": spec, "sizes": sizes, "dp": dp, "options": {}} | kwargs


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


COPIED = {"tokenizer.json": "{}", "tokenizer_config.json": "{ }", "chat_template.jinja": "{{x}}", "merges.txt": "a b"}
NOT_COPIED = {"README.md": "of the original", "pytorch_model.bin": "old"}
EXPORTS: dict[str, tuple[str, bool, dict, int]] = {
    "qwen2 tied TP2 PP2": ("qwen2", True, TP2_PP2, 1),
    "qwen3 TP2 PP2 VPP2": ("qwen3", False, TP2_PP2 | {"vpp": 2}, 1),
    "llama DP4": ("llama", False, {"tp": 1, "pp": 1}, 4),
    "reward model": ("qwen2", True, TP2_PP2 | {"reward_model": True}, 1),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, ModelSpec, dict[str, Tensor], list]]:
    cases, inputs = {}, {}
    for name, (family, tied, sizes, dp) in EXPORTS.items():
        spec = small_spec(family, tied=tied)
        folder = tmp_path_factory.mktemp("export")
        weights = random_weights(spec, reward_model=name == "reward model")
        write_checkpoint(folder / "in", spec, weights, files=2)
        for file, text in (COPIED | NOT_COPIED).items():
            (folder / "in" / file).write_text(text)
        options: dict[str, Any] = {"max_shard_bytes": 3000, "bucket_bytes": 1000}
        if name == "reward model":
            options = {"dtype": torch.float32, "writers": [2]}
        cases[name] = export_case(folder, spec, sizes, dp, options=options)
        inputs[name] = folder / "out", spec, weights
    done = launch(4, cases)
    return {name: (*inputs[name], done[name]) for name in cases}


@pytest.mark.parametrize("case", [name for name in EXPORTS if name != "reward model"])
def test_export_is_the_original_bit_for_bit_and_transformers_reads_it(case: str, exported: dict) -> None:
    out, spec, weights, errors = exported[case]
    assert errors == [None] * 4
    assert_equal(stored(out), weights)
    assert all((out / name).read_text() == text for name, text in COPIED.items())
    assert not any((out / name).exists() for name in NOT_COPIED)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * spec.num_parameters()
    for tensor, file in index["weight_map"].items():
        with safe_open(out / file, "pt") as opened:
            assert tensor in opened.keys()  # noqa: SIM118
    assert load_model_spec(out) == spec
    assert not list(out.parent.glob(".*"))

    import transformers

    model, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    name = "model.layers.3.self_attn.k_proj.weight"
    assert torch.equal(model.state_dict()[name], weights[name])


def test_exported_reward_model_is_a_sequence_classifier_in_the_asked_dtype(exported: dict) -> None:
    out, spec, weights, errors = exported["reward model"]
    assert errors == [None] * 4
    assert sorted(path.name for path in out.glob("*.safetensors*")) == ["model.safetensors"]
    assert_equal(stored(out), {name: value.float() for name, value in weights.items()})
    assert load_model_spec(out) == spec

    import transformers

    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert model.dtype == torch.float32
    assert torch.equal(model.score.weight, weights["score.weight"].float())


def test_export_that_cannot_succeed_fails_on_every_rank_and_a_retry_succeeds(tmp_path: Path) -> None:
    spec, sizes = small_spec("llama"), {"tp": 2, "pp": 1}
    weights = random_weights(spec)
    for folder in ("full", "taken"):
        write_checkpoint(tmp_path / folder / "in", spec, weights)
    (tmp_path / "taken" / "out").mkdir()
    (tmp_path / "taken" / "out" / "keep").write_text("precious")
    options = {"max_shard_bytes": 3000}
    done = launch(
        2,
        {
            "taken": export_case(tmp_path / "taken", spec, sizes),
            "disk full": export_case(tmp_path / "full", spec, sizes, options=options, fail_on=1),
            "look": ("listing", {"folder": str(tmp_path / "full")}),
            "retry": export_case(tmp_path / "full", spec, sizes, options=options),
        },
    )
    assert all(error.startswith("UserError: ") and "already exists" in error for error in done["taken"])
    assert [path.name for path in (tmp_path / "taken" / "out").iterdir()] == ["keep"]
    assert done["disk full"] == [
        "RuntimeError: export failed on rank 1: No space left on device",
        "OSError: No space left on device",
    ]
    assert done["look"][0] == [".out.incomplete", "in"]
    assert done["retry"] == [None, None]
    assert_equal(stored(tmp_path / "full" / "out"), weights)


def listing(folder: str) -> list[str]:
    names = sorted(path.name for path in Path(folder).iterdir())
    dist.barrier()
    return names


def test_killed_export_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    spec = small_spec("llama", layers=8)
    weights = random_weights(spec)
    write_checkpoint(tmp_path / "in", spec, weights)
    folder = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": f"{folder}:{folder.parent}", "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, __file__, str(tmp_path)], env=env)
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(".out.incomplete/*.safetensors")):
            assert child.poll() is None, "the export ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.incomplete").exists()
    export_alone(tmp_path, spec, weights)
    assert_equal(stored(tmp_path / "out"), weights)
    assert not (tmp_path / ".out.incomplete").exists()


def export_alone(tmp_path: Path, spec: ModelSpec, weights: dict[str, Tensor]) -> None:
    layout = megatron_layout(spec, tp=1, pp=1, vocab_divisor=8)
    live = expected(layout.shards[0], weights)
    export_hf(
        tmp_path / "out", spec, layout, {0: [0]}, live, rank=0, model_dir=tmp_path / "in", max_shard_bytes=2000
    )  # fmt: skip


def _export_slowly(tmp_path: Path) -> None:
    import megatron_oreal.layout.export as room

    save = room.save_file

    def slow(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        time.sleep(0.5)

    room.save_file = slow
    spec = small_spec("llama", layers=8)
    export_alone(tmp_path, spec, random_weights(spec))


if __name__ == "__main__":
    _export_slowly(Path(sys.argv[1]))
