"""Download a Hugging Face model into a directory: only what is used, only if it fits, and on from where it was cut off.

python fetch_model.py internlm/OREAL-7B-SFT models/OREAL-7B-SFT
"""

from __future__ import annotations

import argparse
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

WANTED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "*.model",
    "merges.txt",
    "vocab.txt",
    "LICENSE*",
)
SPARE = 2**30


def main() -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("repo")
    parser.add_argument("out", type=Path)
    parser.add_argument("--revision", default="main")
    arguments = parser.parse_args()
    if any(arguments.out.glob("*.safetensors")) and not (arguments.out / ".cache" / "huggingface").is_dir():
        print(f"{arguments.out} is there already, and did not come by a download: left alone")
        return 0
    try:
        info = HfApi().model_info(arguments.repo, revision=arguments.revision, files_metadata=True)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        return _refuse(f"{arguments.repo}: {_first_line(error)}")
    files = [file for file in info.siblings or [] if any(fnmatch(file.rfilename, pattern) for pattern in WANTED)]
    if not any(file.rfilename.endswith(".safetensors") for file in files):
        return _refuse(f"{arguments.repo}@{arguments.revision} has no safetensors files: choose another --revision")
    missing = sum(
        file.size or 0
        for file in files
        if not (arguments.out / file.rfilename).is_file()
        or (arguments.out / file.rfilename).stat().st_size != file.size
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(arguments.out).free
    if missing + SPARE > free:
        return _refuse(
            f"{arguments.out}: {missing / 1e9:.1f} GB are to be downloaded, {free / 1e9:.1f} GB are free: free some, "
            "or give another directory"
        )
    print(f"{arguments.repo}@{info.sha}: {len(files)} files, {missing / 1e9:.1f} GB to download to {arguments.out}")
    try:
        names = [file.rfilename for file in files]
        snapshot_download(arguments.repo, revision=info.sha, local_dir=arguments.out, allow_patterns=names)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        return _refuse(f"{arguments.repo}: {_first_line(error)}; start again to go on")
    print(f"{arguments.out}: complete")
    return 0


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
