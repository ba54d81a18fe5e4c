"""What is handed on is whole: the source distribution holds every tracked file, and the check says what tests said."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_a_source_distribution_holds_every_tracked_file(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = {name for name in listed.split("\0") if name and (ROOT / name).is_file()}
    tree = tmp_path / "tree"
    for name in tracked | {"MANIFEST.in"}:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tree / name)
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path / "dist")]
    subprocess.run(command, cwd=tree, check=True, capture_output=True, text=True)
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as files:
        inside = {name.partition("/")[2] for name in files.getnames()}
    assert sorted(tracked - inside - {".gitignore", ".ci/run"}) == []


@pytest.mark.parametrize("status", [0, 3])
def test_the_check_ends_as_its_tests_do_when_its_environment_cannot_be_removed(tmp_path: Path, status: int) -> None:
    """A process that is still ending may write there while ``rm`` runs, which then finds a folder that is not empty."""
    if not (ROOT / ".ci" / "run").exists():
        pytest.skip("not a checkout")
    for folder in ("tests", ".ci", "bin", "tmp"):
        (tmp_path / folder).mkdir()
    shutil.copyfile(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    (tmp_path / "tests" / "run.sh").write_text(f'test "$1" = --venv && test -d "$2" && exit {status}\n')
    (tmp_path / "bin" / "rm").write_text("#!/bin/sh\necho Directory not empty >&2\nexit 1\n")
    (tmp_path / "bin" / "rm").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "TMPDIR": str(tmp_path / "tmp")}
    command = ["bash", str(tmp_path / ".ci" / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (status, "Directory not empty\n")
