#!/usr/bin/env bash
# Everything that wants a GPU, in stages with a time limit each; one CUDA device, about fifty minutes for all of them.
#   benchmarks/gpu/run.sh [--out DIR] [STAGE...]
# Stages, by default all in this order (seconds at most):
#   build    200  the kernels for this GPU, warnings and spills are errors; megatron-oreal env
#   check    240  tests/test_loss_gpu.py, and tests/test_loss_fused.py on the device
#   sanitize 300  compute-sanitizer: memcheck, racecheck, initcheck, synccheck on small shapes
#   kernels  240  copy and matrix-product ceilings, every kernel at TP 1 to 8
#   tune     240  the kernels with other block sizes
#   loss     420  forward + backward against the other implementations
#   actor    300  first_run.py: policy, reward model and engine
#   sglang   300  tests/test_sglang_gpu.py
#   switch   570  benchmarks/switch.py for models of Qwen2.5's 1.5B and 7B shape
#   bench    570  bench.py: a step's parts for 1.5B- and 7B-shaped models of random weights
# PYTHON names the interpreter (default: python3). Results: DIR (default: benchmarks/gpu/results), at most five files a
# stage and no folder, summary.json last. ATTENTION: SGLang's attention_backend (default: fa3 where it is, else triton).
# The exit status is 1 when a stage failed or ran out of time. Clocks and power limits are left as they are.
# shellcheck disable=SC2329  # the stages are functions, called by name through bash -c
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
here=$root/benchmarks/gpu
out=$here/results
stages=()
while (($#)); do
    case $1 in
    --out)
        out=${2:?--out needs a directory}
        shift
        ;;
    build | check | sanitize | kernels | tune | loss | actor | sglang | switch | bench) stages+=("$1") ;;
    *)
        sed -n '2,17s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
        exit 2
        ;;
    esac
    shift
done
((${#stages[@]})) || stages=(build check sanitize kernels tune loss actor sglang switch bench)
python=${PYTHON:-python3}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: $python has no torch that sees a CUDA device; set PYTHON" >&2
    exit 2
fi
mkdir -p "$out" && out=$(cd "$out" && pwd) && cd "$root" || exit 1

build() {
    local capability
    capability=$("$python" -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}")')
    if ((capability >= 90)); then capability+=a; fi
    OREAL_CUDA_ARCHS=${OREAL_CUDA_ARCHS:-$capability} "$python" megatron_oreal/loss/nvcc.py || return
    OREAL_KERNELS=1 "$python" -c "
from megatron_oreal.accelerators import survey
found = survey()
print(found.as_text())
open('$out/env.json', 'w').write(found.as_json() + '\n')"
}

check() {
    "$python" -m pytest -q -p no:cacheprovider -o addopts= -m gpu tests/test_loss_gpu.py tests/test_loss_fused.py
}

sanitize() {
    local tool bad=0
    for tool in memcheck racecheck initcheck synccheck; do
        echo "== $tool"
        compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" "$here/sanitize.py" 2>&1 | tail -n 40
        if ((PIPESTATUS[0])); then bad=1; fi
    done
    return "$bad"
}

kernels() { "$python" "$here/kernels.py" --output "$out/kernels.json"; }
tune() { "$python" "$here/kernels.py" --output "$out/tune.json" --tune --widths 19008 152064; }
loss() { "$python" benchmarks/loss.py --device cuda --output "$out/loss.json"; }
actor() { "$python" "$here/first_run.py" --output "$out/actor.json"; }
attention() { echo "${ATTENTION:-$(cd "$here" && "$python" -c 'import machine; print(machine.attention_backend())')}"; }
sglang() {
    if ! "$python" -c 'import sglang'; then
        echo "no sglang for $python: pip install 'sglang>=0.5.11'" >&2
        return 2
    fi
    OREAL_TEST_ATTENTION=$(attention) "$python" -m pytest -q -p no:cacheprovider -o addopts= -m gpu tests/test_sglang_gpu.py
}
switch() {
    local backend shape frozen bad=0
    backend=$(attention)
    for shape in 1.5b 7b; do
        frozen=()
        # Its optimizer takes more than one device; with the policy's weights host memory would have to hold 122 GB.
        [[ $shape == 7b ]] && frozen=(--frozen --offload optimizer reference)
        timeout 280 "$python" benchmarks/switch.py --model "qwen2.5-$shape" --steps 5 "${frozen[@]}" \
            --sglang "{\"attention_backend\": \"$backend\", \"mem_fraction_static\": 0.3}" \
            --output "$out/switch_$shape.json" || bad=1
    done
    return "$bad"
}
bench() { # its limit is below the stage's, to end a case and not all
    ATTENTION=$(attention) "$python" "$here/bench.py" --out "$out" --limit 540
}

limit() {
    case $1 in
    build) echo 200 ;; # env imports every package that is there, each for 120 s at most
    loss) echo 420 ;;
    switch | bench) echo 570 ;;
    sanitize | actor | sglang) echo 300 ;;
    *) echo 240 ;;
    esac
}

export -f build check sanitize kernels tune loss actor attention sglang switch bench
export python here out
failed=0
rows=()
for stage in "${stages[@]}"; do
    echo "==== $stage"
    began=$SECONDS
    timeout --kill-after=20 "$(limit "$stage")" bash -c "set -uo pipefail; $stage" 2>&1 | tee "$out/$stage.log"
    status=${PIPESTATUS[0]}
    ((status)) && failed=1
    rows+=("{\"stage\": \"$stage\", \"exit_status\": $status, \"seconds\": $((SECONDS - began))}")
    (
        IFS=,
        printf '[%s]\n' "${rows[*]}"
    ) >"$out/summary.json"
done
echo "==== summary (exit status 124: out of time)"
printf '%s\n' "${rows[@]}"
exit "$failed"
