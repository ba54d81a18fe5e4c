#!/usr/bin/env bash
# The judge: one or more OpenAI-compatible servers on this machine, and the line that has a run use them.
# Stays in the foreground; what it started ends with it, and nothing else does.
set -euo pipefail
# shellcheck source=examples/lib.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/lib.sh"

usage() {
    cat <<USAGE
usage: launch_verifier.sh [options] [-- arguments of the server]

  --backend NAME        sglang (default), vllm or lmdeploy
  --model MODEL         directory or Hugging Face name (default Qwen/Qwen2.5-72B-Instruct)
  --tp N                GPUs of a server (default 4)
  --replicas N          servers, each on its own GPUs (default 1)
  --gpus LIST           the GPUs to use, for example 4,5,6,7 (default: 0 to replicas x tp - 1; 'none': do not choose)
  --port PORT           of the first server, the others follow (default 10003)
  --address ADDR        under which runs reach this machine (default: the first that hostname -I names)
  --wait-s S            until a server answers (default 1800)
  --log-dir DIR         of verifier_PORT.log (default logs)
$COMMON_HELP

When all servers answer it prints verifier.hosts=[...] on standard output, an override for the run. When one ends, the
others are ended too and the exit status is 1. Ctrl-C ends them all.
USAGE
}

backend=sglang model=Qwen/Qwen2.5-72B-Instruct tp=4 replicas=1 gpus="" port=10003 address="" wait_s=1800 log_dir=logs
EXTRA_ARGS=()
while (($#)); do
    case $1 in
        --backend) backend=$(value "$@") || exit; consumed=2 ;;
        --model) model=$(value "$@") || exit; consumed=2 ;;
        --tp) tp=$(value "$@") || exit; require_number "$1" "$tp"; consumed=2 ;;
        --replicas) replicas=$(value "$@") || exit; require_number "$1" "$replicas"; consumed=2 ;;
        --gpus) gpus=$(value "$@") || exit; consumed=2 ;;
        --port) port=$(value "$@") || exit; require_number "$1" "$port"; consumed=2 ;;
        --address) address=$(value "$@") || exit; consumed=2 ;;
        --wait-s) wait_s=$(value "$@") || exit; require_number "$1" "$wait_s"; consumed=2 ;;
        --log-dir) log_dir=$(value "$@") || exit; consumed=2 ;;
        --) shift; EXTRA_ARGS=("$@"); break ;;
        -*) parse_common "$@" ;;
        *) die "unknown argument $1; arguments of the server stand behind --" ;;
    esac
    shift "$consumed"
done
((tp >= 1 && replicas >= 1)) || die "--tp and --replicas must be 1 or more"
[[ $gpus == none ]] || IFS=, read -r -a devices <<<"${gpus:-$(seq -s, 0 $((replicas * tp - 1)))}"
[[ $gpus == none ]] || ((${#devices[@]} >= replicas * tp)) ||
    die "--gpus $gpus: ${#devices[@]} GPUs for --replicas $replicas x --tp $tp"

# server_command PORT: sets COMMAND.
server_command() {
    case $backend in
        sglang)
            COMMAND=("$python" -m sglang.launch_server --model-path "$model" --tp-size "$tp" --host 0.0.0.0 --port "$1")
            ;;
        vllm) COMMAND=(vllm serve "$model" --tensor-parallel-size "$tp" --host 0.0.0.0 --port "$1") ;;
        lmdeploy)
            COMMAND=(lmdeploy serve api_server "$model" --tp "$tp" --server-name 0.0.0.0 --server-port "$1")
            ;;
        *) die "--backend $backend: sglang, vllm or lmdeploy" ;;
    esac
    COMMAND+=("${EXTRA_ARGS[@]}")
}

is_listening() {
    (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

answers() { # without the proxies of the environment
    "$python" - "http://127.0.0.1:$1/v1/models" <<'PYTHON' 2>/dev/null
import sys
import urllib.request

opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
sys.exit(opener.open(sys.argv[1], timeout=5).status != 200)
PYTHON
}

groups=() # process groups, led by the servers that were started here
# shellcheck disable=SC2329  # of a trap
end_servers() {
    local group
    trap - EXIT INT TERM HUP
    for group in "${groups[@]}"; do
        kill -TERM -- "-$group" 2>/dev/null || true
    done
    for ((tick = 0; tick < 100; tick++)); do
        local left=""
        for group in "${groups[@]}"; do
            kill -0 -- "-$group" 2>/dev/null && left=yes
        done
        [[ -n $left ]] || return 0
        sleep 0.1
    done
    for group in "${groups[@]}"; do
        kill -KILL -- "-$group" 2>/dev/null || true
    done
}

server_command "$port"
if [[ -z $dry_run ]]; then
    command -v "${COMMAND[0]}" >/dev/null || die "${COMMAND[0]}: no such program; install $backend"
    command -v "$python" >/dev/null || die "--python $python: no such program; it asks the servers whether they are up"
fi
if [[ -z $address ]]; then
    address=$(hostname -I 2>/dev/null | cut -d' ' -f1)
    [[ -n $address ]] || address=127.0.0.1
fi
hosts=""
for ((i = 0; i < replicas; i++)); do
    server_command $((port + i))
    own=()
    [[ $gpus == none ]] || own=("CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${devices[*]:i*tp:tp}")")
    hosts+="${hosts:+,}\"$address:$((port + i))\""
    log=$log_dir/verifier_$((port + i)).log
    if [[ -n $dry_run ]]; then
        show env "${own[@]}" "${COMMAND[@]}"
        continue
    fi
    ! is_listening $((port + i)) || die "port $((port + i)) is taken: choose another --port"
    ((i)) || { mkdir -p "$log_dir"; trap end_servers EXIT; trap 'exit 130' INT; trap 'exit 143' TERM HUP; }
    setsid env "${own[@]}" "${COMMAND[@]}" >"$log" 2>&1 </dev/null &
    groups+=("$!")
    echo "server $((i + 1)) of $replicas: process group $!, $log" >&2
done
if [[ -n $dry_run ]]; then
    echo "verifier.hosts=[$hosts]"
    exit 0
fi

end=$((SECONDS + wait_s))
for ((i = 0; i < replicas; i++)); do
    log=$log_dir/verifier_$((port + i)).log
    until answers $((port + i)); do
        for j in "${!groups[@]}"; do
            if ! kill -0 "${groups[j]}" 2>/dev/null; then
                log=$log_dir/verifier_$((port + j)).log
                tail -n 5 "$log" >&2
                echo "error: a server ended before all answered; see $log" >&2
                exit 1
            fi
        done
        ((SECONDS < end)) || {
            echo "error: no answer on port $((port + i)) within $wait_s s; see $log, or raise --wait-s" >&2
            exit 1
        }
        sleep 1
    done
done
echo "verifier.hosts=[$hosts]"
wait -n "${groups[@]}" || true
echo "error: a server has ended; see the logs in $log_dir" >&2
exit 1
