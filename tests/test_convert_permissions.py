"""Files and directories that may not be read: one line that names the one, and status 2, before anything is written.

Root may read everything, so the tools run without its capabilities, as ``setpriv`` starts them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from convert_cases import convert, without_progress
from test_layout_checkpoint import random_weights, write_checkpoint
from test_layout_megatron import small_spec

SPEC = small_spec("llama")
DROP = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
if DROP and shutil.which("setpriv") is None:
    pytest.skip("root reads everything, and there is no setpriv", allow_module_level=True)

RUNNER = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import contextlib, importlib, io
cases = json.loads(sys.argv[2])
results = []
for locked, tool, arguments in cases:
    mode = os.stat(locked).st_mode
    os.chmod(locked, 0)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = importlib.import_module(tool).main(arguments)
    finally:
        os.chmod(locked, mode)
    results.append([code, said.getvalue()])
print(json.dumps(results))
"""
"""Locks a path, runs a tool, unlocks it: one process for all cases, since importing torch takes seconds."""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    hf = tmp_path / "hf"
    write_checkpoint(hf, SPEC, random_weights(SPEC), files=3)
    (hf / "tokenizer.json").write_text("{}")
    (hf / "additional_chat_templates").mkdir()
    assert convert("hf_to_megatron", "--hf", hf, "--out", tmp_path / "m", "--tp", 2) == 0
    (tmp_path / "locked" / "inside").mkdir(parents=True)
    yield tmp_path
    for path in tmp_path.iterdir():  # what a failed run left locked could not be removed
        path.chmod(0o755)


def run_locked(cases: list[tuple[Path, str, list[object]]]) -> list[tuple[int, str]]:
    import json

    given = json.dumps([(str(path), tool, list(map(str, arguments))) for path, tool, arguments in cases])
    tools = str(tiny.REPOSITORY / "tools" / "checkpoint_convert")
    done = subprocess.run(
        [*DROP, sys.executable, "-c", RUNNER, tools, given],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(tiny.REPOSITORY), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return [(code, said) for code, said in json.loads(done.stdout)]


def test_what_may_not_be_read_or_written_is_named_and_nothing_is_written(folder: Path) -> None:
    hf, m, locked, out = folder / "hf", folder / "m", folder / "locked", folder / "out"
    to_megatron = ("hf_to_megatron", ["--hf", hf, "--out", out])
    to_hf = ("megatron_to_hf", ["--megatron", m, "--out", out])
    again = ("megatron_to_megatron", ["--megatron", m, "--out", out])
    cases = [
        (hf / "config.json", *to_megatron),
        (hf / "model-00002-of-00003.safetensors", *to_megatron),
        (hf / "model.safetensors.index.json", *to_megatron),
        (hf / "tokenizer.json", *to_megatron),
        (hf / "additional_chat_templates", *to_megatron),
        (hf, *to_megatron),
        (m / ".metadata", *to_hf),
        (m / "__1_0.distcp", *to_hf),
        (m / "hf", *to_hf),
        (m / "hf" / "config.json", *to_hf),
        (m / "hf" / "tokenizer.json", *to_hf),
        (m / "common.pt", *again),
        (m, *to_hf),
        (locked, "hf_to_megatron", ["--hf", locked / "inside", "--out", out]),
        (locked / "inside", "hf_to_megatron", ["--hf", hf, "--out", locked / "inside"]),
        (locked, "hf_to_megatron", ["--hf", hf, "--out", locked / "new"]),
        (locked, "compare", [hf, locked]),
        (locked, "compare", [hf, locked / "inside"]),
        (m / "__0_0.distcp", "compare", [hf, m]),
    ]
    for (path, tool, _), (code, said) in zip(cases, run_locked(cases), strict=True):
        assert code == 2, (path, said)
        lines = without_progress(said)
        assert len(lines) == 1 and lines[0].startswith(f"error: {path}"), (path, tool, said)
        assert "Permission denied" in said and "again" not in said and "damaged" not in said, said
        assert not out.exists() and not (folder / ".out.incomplete").exists()
