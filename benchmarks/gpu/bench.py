"""``megatron-oreal bench`` on one GPU, for models of real shapes with random weights.

    python benchmarks/gpu/bench.py --out DIR [CASE ...] [--limit S] [--dry-run]

* ``1.5b``: Qwen2.5-1.5B, every part of a step.
* ``7b``: OREAL-7B-SFT without a reward model: generation, loss and reshard. Its optimizer's state does not fit in one
  GPU of 140 GB beside the rest, so it takes no step.
* ``7b_half``: the same widths with 14 of the 28 layers, and the reward model: update, reshard and switch. One half of
  the layers has half of the work, so its utilisation is that of the whole model, but for the vocabulary head.

Lengths are short: the stage has minutes. SGLang draws where it is installed, else the embedded engine, which is made
for small models; the result says which (``ATTENTION`` names SGLang's attention_backend, else it chooses). Writes
``bench_CASE.json`` and nothing else; of a case that failed, the ends of its logs are printed. It exits with 1 when
a case failed or was ended: each has an equal part of the seconds that the cases before it have left of ``--limit``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "examples" / "configs" / "oreal_1.5b_one_gpu.yaml"
MODELS = ROOT / "examples" / "models"
SHORT = ["rollout.gen_max_new=1024", "rollout.gen_max_length=2048", "rollout.max_running_requests=128"]


@dataclass(frozen=True)
class Case:
    """``layers`` None: all of the model's. ``overrides``: of ``oreal_1.5b_one_gpu.yaml``."""

    model: str
    parts: str
    overrides: tuple[str, ...]
    layers: int | None = None


CASES = {
    "1.5b": Case("Qwen2.5-1.5B-Instruct", "rollout,update,loss,reshard,switch,step", ("rollout.prompts_per_step=8",)),
    "7b": Case(
        "OREAL-7B-SFT",
        "rollout,loss,reshard",
        ("rollout.prompts_per_step=4", "model.reward_model=false", "algorithm.actor_freeze_steps=0"),
    ),
    "7b_half": Case(
        "OREAL-7B-SFT",
        "update,reshard,switch",
        # Long sequences, as OREAL trains on: 32 of up to 8,192 tokens.
        ("rollout.prompts_per_step=16", "rollout.gen_max_new=7680", "rollout.gen_max_length=8192"),
        layers=14,
    ),
}


def model_dir(case: Case, folder: Path) -> Path:
    """The committed ``config.json``, or one in ``folder`` with fewer layers."""
    if case.layers is None:
        return MODELS / case.model
    tree = json.loads((MODELS / case.model / "config.json").read_text())
    tree["num_hidden_layers"] = case.layers
    if isinstance(tree.get("layer_types"), list):
        tree["layer_types"] = tree["layer_types"][: case.layers]
    path = folder / f"{case.model}_{case.layers}_layers"
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(tree, indent=1) + "\n")
    return path


def overrides(name: str, folder: Path, engine: str) -> list[str]:
    """Of a case, with everything that the run writes in ``folder``."""
    case = CASES[name]
    given = [f"work_dir={folder / name}", f"model.path={model_dir(case, folder)}", f"rollout.engine={engine}"]
    if engine == "embedded":
        given.append("rollout.sglang={}")
    elif os.environ.get("ATTENTION"):
        given.append(f"rollout.sglang.attention_backend={os.environ['ATTENTION']}")
    return [*given, *SHORT, *case.overrides]


def command(name: str, out: Path, engine: str, work: Path) -> list[str]:
    """What is run for a case; its result goes to ``out``, all else to ``work``."""
    arguments = [str(CONFIG), *overrides(name, work, engine), "--parts", CASES[name].parts]
    arguments += ["--prompt-tokens", "256", "--repeats", "2", "--output", str(out / f"bench_{name}.json")]
    return [sys.executable, "-m", "megatron_oreal", "bench", *arguments]


def run(line: Sequence[str], limit_s: float) -> int | None:
    """Exit status of a command, None when it had to be ended: by SIGTERM, and 10 s later by SIGKILL.

    Its servers end with it (they ask the kernel for that), so the next case finds the GPU free.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(line, env=environment, cwd=ROOT) as process:
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
            return None


def print_logs(folder: Path, lines: int = 30) -> None:
    """The ends of the servers' logs, which nobody finds later."""
    for path in sorted(folder.rglob("*.log")):
        end = path.read_text(errors="replace").splitlines()[-lines:]
        print(f"-- {path.name}", *end, sep="\n", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"some of {', '.join(CASES)} (default: all)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--engine", choices=("embedded", "sglang"), help="default: sglang where it is installed")
    parser.add_argument("--limit", type=float, default=1200.0, metavar="S", help="seconds for all cases [%(default)g]")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    arguments = parser.parse_args()
    for name in arguments.cases:
        if name not in CASES:
            parser.error(f"{name!r} is not one of {', '.join(CASES)}")
    engine = arguments.engine or ("sglang" if importlib.util.find_spec("sglang") else "embedded")
    arguments.out.mkdir(parents=True, exist_ok=True)
    cases, end = list(arguments.cases or CASES), time.monotonic() + arguments.limit
    failed = []
    with tempfile.TemporaryDirectory(prefix="oreal_bench_", ignore_cleanup_errors=True) as folder:
        for i, name in enumerate(cases):
            work = Path(folder)
            line = command(name, arguments.out.resolve(), engine, work)
            print(f"== {name}: {shlex.join(line)}", flush=True)
            if arguments.dry_run:
                continue
            limit_s = (end - time.monotonic()) / (len(cases) - i)
            status = run(line, limit_s)
            if status is None:
                print(f"{name}: ended after {limit_s:.0f} s", file=sys.stderr, flush=True)
            if status != 0:
                failed.append(name)
                print_logs(work / name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
