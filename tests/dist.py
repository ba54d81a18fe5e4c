"""Run a function on real ``torchrun`` gloo ranks and bring back what each rank returned.

``results = run_ranks("test_loss_parallel:worker", 2, {"seed": 0})`` starts two processes, calls
``worker(seed=0)`` in each after ``torchrun`` has set RANK and WORLD_SIZE, and returns the two results in rank order.
The function joins the process group itself (or lets the code under test do it), and returns something picklable.
"""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from megatron_oreal.platform import shutdown_distributed

TESTS = Path(__file__).parent


def run_ranks(
    target: str, world_size: int, kwargs: dict[str, Any] | None = None, *, timeout_s: float = 500, check: bool = True
) -> list[Any]:
    """Call ``module:function`` on ``world_size`` ranks; fails with the ranks' output when one of them fails."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kwargs.pkl").write_bytes(pickle.dumps(kwargs or {}))
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS}:{TESTS.parent}", "CUDA_VISIBLE_DEVICES": ""}
        # without the address it asks the name service for the host's
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=localhost"]
        command += [f"--nproc-per-node={world_size}", str(Path(__file__)), target, folder]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s, check=False)
        if done.returncode and check:
            raise AssertionError(
                f"{target} on {world_size} ranks failed:\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
            )
        return [pickle.loads((Path(folder) / f"result{rank}.pkl").read_bytes()) for rank in range(world_size)]


def _main() -> None:
    target, folder = sys.argv[1:]
    module, function = target.split(":")
    kwargs = pickle.loads((Path(folder) / "kwargs.pkl").read_bytes())
    result = getattr(importlib.import_module(module), function)(**kwargs)
    (Path(folder) / f"result{os.environ['RANK']}.pkl").write_bytes(pickle.dumps(result))
    # gloo's threads let go of a collective's tensors after its end is known, which must not be after Python's end
    shutdown_distributed()


if __name__ == "__main__":
    _main()
