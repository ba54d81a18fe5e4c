"""The engine contract on SGLang, against a real server."""

from pathlib import Path

import pytest

pytest.register_assert_rewrite("engine_contract")

from engine_contract import EngineContract, model_dirs  # noqa: E402, F401
from sglang_server import SharedServer, needs_sglang  # noqa: E402

from megatron_oreal.rollout.sglang.engine import SglangEngine  # noqa: E402

pytestmark = needs_sglang


@pytest.fixture(scope="class")
def shared(request):
    request.cls.shared = SharedServer()
    yield
    request.cls.shared.close()


@pytest.mark.usefixtures("shared")
class TestSglangEngine(EngineContract):
    families = ("qwen2_tied",)
    draws = 0.25
    shared: SharedServer

    def make_engine(self, model_dir: Path, *, slots: int, max_length: int) -> SglangEngine:
        return self.shared.engine(model_dir, slots=slots)


@pytest.mark.slow
@pytest.mark.usefixtures("shared")
class TestSglangEngineOfOtherFamilies(TestSglangEngine):
    families = ("qwen3_untied", "llama3_rope", "qwen2_untied_mha", "qwen3_tied_mqa", "llama_untied")
