"""The engine contract, on the embedded engine."""

from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite("engine_contract")

from engine_contract import EngineContract, model_dirs  # noqa: E402, F401

from megatron_oreal.layout.model_spec import load_model_spec  # noqa: E402
from megatron_oreal.rollout.embedded import EmbeddedEngine  # noqa: E402


class TestEmbeddedEngine(EngineContract):
    device = "cpu"

    def make_engine(self, model_dir: Path, *, slots: int, max_length: int) -> EmbeddedEngine:
        return EmbeddedEngine(
            load_model_spec(model_dir),
            dtype=torch.float32,
            device=self.device,
            max_running_requests=slots,
            max_length=max_length,
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestEmbeddedEngineOnCuda(TestEmbeddedEngine):
    device = "cuda"
