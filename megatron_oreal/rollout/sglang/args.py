"""The arguments of an SGLang server: what this trainer decides, what it proposes, and what the user says."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from megatron_oreal.errors import UserError, nearest
from megatron_oreal.layout import ModelSpec

MISSING = (
    "rollout.engine=sglang: sglang is not installed for this Python: pip install 'sglang>=0.5.11' on a GPU machine, or "
    "'bash tests/setup_sglang.sh PYTHON' on one without; or set rollout.engine=embedded"
)
WEIGHT_LOADER = "megatron_oreal.rollout.sglang.loader.load"
"""The custom weight loader, spelled as SGLang imports it."""

SPARE_POSITIONS = 16
"""SGLang keeps a few positions of its context for itself; a request of full length must still fit."""

_OURS = {
    "model_path": "model.path",
    "tp_size": "rollout.engine_tp",
    "device": "device",
    "dtype": "model.dtype",
    "max_running_requests": "rollout.max_running_requests",
    "host": "rollout.server.host",
    "context_length": "rollout.gen_max_length",
    **dict.fromkeys(
        ("dp_size", "pp_size", "nnodes", "node_rank", "dist_init_addr"),
        "rollout.engine_tp: every group of so many ranks has a server of one such replica",
    ),
    **dict.fromkeys(
        ("tokenizer_worker_num", "api_key", "admin_api_key"),
        "the trainer itself, which talks to one process of the server without a key",
    ),
    **dict.fromkeys(
        ("port", "nccl_port", "load_format", "skip_tokenizer_init", "custom_weight_loader", "weight_version"),
        "the trainer itself",
    ),
}
"""Arguments that ``rollout.sglang`` may not set, and what decides them."""


@lru_cache(maxsize=1)
def server_arg_names() -> frozenset[str] | None:
    """Names of the installed SGLang's ``ServerArgs`` fields, read from its source; None without SGLang.

    Importing SGLang for them would cost the trainer seconds, and on a machine without a GPU needs its environment.
    """
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        return None
    package = Path(next(iter(spec.submodule_search_locations))) / "srt"
    source = package / "server_args.py"
    if not source.is_file():
        return None
    names = set(_fields_of(source, "ServerArgs"))
    for group in sorted((package / "arg_groups" / "fields").glob("*.py")):  # from 0.5.20 on the class is put together
        names |= _fields_of(group)
    return frozenset(names)


def _fields_of(source: Path, class_name: str | None = None) -> set[str]:
    """Annotated fields of a module's class, or of all its classes."""
    found = set()
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and class_name in (None, node.name):
            annotated = [item.target for item in node.body if isinstance(item, ast.AnnAssign)]
            found |= {target.id for target in annotated if isinstance(target, ast.Name)}
    return {name for name in found if not name.startswith("_")}


def check_server_args(user: Mapping[str, Any]) -> None:
    """Raise ``UserError`` when SGLang is missing, or for a key of ``rollout.sglang`` that it does not know or may not
    have from there.
    """
    known = server_arg_names()
    if known is None:
        raise UserError(MISSING)
    for name, value in user.items():
        if name in _OURS:
            raise UserError(f"rollout.sglang.{name}={value!r}: this is set by {_OURS[name]}; remove the key")
        if name not in known:
            raise UserError(f"rollout.sglang.{name}: SGLang has no such server argument{nearest(name, known)}")


def server_args(
    user: Mapping[str, Any],
    *,
    model_dir: Path,
    device: torch.device,
    dtype: torch.dtype,
    tp: int,
    max_running_requests: int,
    max_length: int,
) -> dict[str, Any]:
    """Return every argument but host and ports: defaults for the device, under the user's, under the trainer's own."""
    arguments: dict[str, Any] = {
        "log_level": "warning",
        "skip_server_warmup": True,
        "grammar_backend": "none",
        "enable_memory_saver": device.type == "cuda",
    }
    if device.type == "cpu":
        tokens = max_running_requests * (max_length + SPARE_POSITIONS)
        arguments |= {
            "attention_backend": "torch_native",
            "disable_cuda_graph": True,
            "disable_overlap_schedule": True,
            "mem_fraction_static": 0.3,
            "max_total_tokens": max(8192, min(tokens, 65536)),
        }
    arguments |= user
    return arguments | {
        "model_path": str(model_dir),
        "device": device.type,
        "dtype": {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}[dtype],
        "tp_size": tp,
        "context_length": max_length + SPARE_POSITIONS,
        "max_running_requests": max_running_requests,
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "custom_weight_loader": [WEIGHT_LOADER],
        "weight_version": "none",
        "sampling_backend": arguments.get("sampling_backend", "pytorch"),
    }


def check_model(spec: ModelSpec, device: torch.device, tp: int) -> None:
    """Raise ``UserError`` for a shape that SGLang's CPU engine would pad to another one."""
    unit = 32 * tp
    if device.type == "cpu" and spec.ffn_hidden_size % unit:
        raise UserError(
            f"rollout.engine=sglang on a CPU with rollout.engine_tp={tp}: SGLang pads the model's intermediate_size="
            f"{spec.ffn_hidden_size} to a multiple of {unit} there; set rollout.engine=embedded"
        )


def check_allocator(environment: Mapping[str, str]) -> None:
    """Raise ``UserError`` for a setting of PyTorch's CUDA allocator whose memory no server can map."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        value = environment.get(name, "")
        if "expandable_segments:true" in value.lower().replace(" ", ""):
            raise UserError(
                f"{name}={value!r} with rollout.engine=sglang: weights reach the servers by CUDA IPC, which needs "
                "ordinary segments; remove expandable_segments from it"
            )


def write_model_dir(model_path: str | Path, folder: Path, max_length: int) -> Path:
    """Write the directory that the server reads: the model's config.json, without end-of-sequence tokens.

    Weights come from the trainer and tokens travel as ids, so nothing else is needed; requests name their stop token,
    and no token of the checkpoint's own choice may end a response beside it.
    """
    config = json.loads((Path(model_path) / "config.json").read_text(encoding="utf-8"))
    config["eos_token_id"] = None
    longest = config.get("max_position_embeddings", 0)
    config["max_position_embeddings"] = max(longest, max_length + SPARE_POSITIONS)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return folder


def server_environment(device: torch.device, devices: list[str], tp: int) -> dict[str, str]:
    """Return the server's environment: this process's, without torchrun's variables, seeing ``devices`` only."""
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in drop and not name.startswith(("TORCHELASTIC_", "TORCH_NCCL_", "ROLE_"))
    }
    package = str(Path(__file__).resolve().parents[3])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package, environment.get("PYTHONPATH"))))
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    if device.type == "cuda":
        # The memory saver and CUDA IPC both need ordinary segments.
        environment.pop("PYTORCH_CUDA_ALLOC_CONF", None)
        environment.pop("PYTORCH_ALLOC_CONF", None)
    else:
        cores = sorted(os.sched_getaffinity(0))
        share = max(1, len(cores) // tp)
        parts = [cores[i * share % len(cores) :][:share] for i in range(tp)]
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
        environment.setdefault(
            "SGLANG_CPU_OMP_THREADS_BIND", "|".join(",".join(map(str, part)) for part in parts) if tp > 1 else "all"
        )
    return environment
