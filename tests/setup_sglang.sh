#!/usr/bin/env bash
# Put SGLang for a machine without a GPU into an interpreter's environment, beside the torch that is there.
#   setup_sglang.sh [PYTHON]      default: .venv/bin/python of this repository
# Nothing of it is for production: see sglang_cpu/ for the stand-ins. Quick when everything is there already.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${1:-$root/.venv/bin/python}
"$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' 2>/dev/null || {
    echo "error: $python has no torch: make its environment with examples/setup_env.sh DIR dev" >&2
    exit 2
}

# Without their dependencies, which would pull CUDA packages of gigabytes and another torch.
engine=(sglang==0.5.17 torchvision==0.28.0 triton==3.7.1 compressed-tensors==0.17.0 xgrammar==0.2.1 apache-tvm-ffi==0.1.11)
# What SGLang's server imports; torch and transformers stay as they are.
imports=(psutil pillow requests pybase64==1.5.1 orjson==3.13.0 pyzmq==27.3.0 fastapi==0.165.0 starlette==1.10.0
    uvicorn==0.54.0 uvloop==0.23.0 msgspec==0.22.0 dill==0.4.1 loguru==0.7.3 einops==0.8.2 setproctitle==1.3.8
    ipython==9.18.1 openai==3.54.0 partial-json-parser==0.2.1.1.post7 sentencepiece==0.2.3 gguf==0.19.0
    jsonschema==4.26.0 soundfile==0.14.0 python-multipart==0.0.34)

site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
stamp=$site/oreal_sglang_cpu.stamp
wanted=$(cat "${BASH_SOURCE[0]}" "$root/constraints.txt" | cksum)
if [[ ! -f $stamp || $(cat "$stamp") != "$wanted" ]]; then
    echo "adding sglang to $site (about a minute)" >&2
    rm -f "$stamp"
    "$python" -m pip install --quiet --no-deps "${engine[@]}" >&2
    "$python" -m pip install --quiet --no-warn-conflicts -c "$root/constraints.txt" "${imports[@]}" >&2
fi
rm -rf "$site/oreal_sglang_cpu_standins"
cp -r "$root/tests/sglang_cpu/standins" "$site/oreal_sglang_cpu_standins"
cp "$root/tests/sglang_cpu/oreal_sglang_cpu.py" "$site/oreal_sglang_cpu.py"
echo 'import oreal_sglang_cpu; oreal_sglang_cpu.install()' >"$site/oreal_sglang_cpu.pth"
if [[ ! -f $stamp ]]; then
    SGLANG_USE_CPU_ENGINE=1 "$python" -W ignore -c 'import torchvision, sgl_kernel, sglang.srt.server_args' >&2
    echo "$wanted" >"$stamp"
fi
