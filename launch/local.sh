#!/usr/bin/env bash
# Several processes of one run on this machine: launch/local.sh -n 2 --config=... --workdir=...
# Of several processes each has one GPU, where there are any; a single one has all. A run that dies
# is started again, MAX_RESTARTS times; DRY_RUN=1 prints the commands.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  echo "usage: launch/local.sh -n PROCESSES [flags of simsiam_jax.main]" >&2
  exit 1
}

[[ ${1:-} == -n && ${2:-} =~ ^[1-9][0-9]*$ ]] || usage
processes=$2
shift 2
python=${PYTHON:-python}
port=${PORT:-$((20000 + $$ % 20000))}
restarts=${MAX_RESTARTS:-10}
gpus=0
if command -v nvidia-smi >/dev/null; then gpus=$(nvidia-smi --list-gpus | wc -l); fi
if ((gpus > 0 && processes > gpus)); then
  echo "error: $processes processes want a GPU each, there are $gpus" >&2
  exit 1
fi

pids=()
# A signal to this script goes to one process; that one tells the others.
trap '[[ ${#pids[@]} -gt 0 ]] && kill -TERM "${pids[0]}" 2>/dev/null; stopping=1' TERM INT
stopping=0

for ((attempt = 0; ; attempt++)); do
  pids=()
  for ((rank = 0; rank < processes; rank++)); do
    run=("$python" -m simsiam_jax.main "$@")
    if ((processes > 1)); then
      run+=("--coordinator=127.0.0.1:$port" "--num_processes=$processes" "--process_id=$rank")
    fi
    own=()
    if ((gpus > 0 && processes > 1)); then own=("CUDA_VISIBLE_DEVICES=$rank"); fi
    if [[ ${DRY_RUN:-0} == 1 ]]; then
      echo "${own[*]:+${own[*]} }${run[*]}"
    else
      env "${own[@]}" "${run[@]}" &
      pids+=($!)
    fi
  done
  [[ ${DRY_RUN:-0} == 1 ]] && exit 0

  code=0
  for pid in "${pids[@]}"; do
    one=0
    wait "$pid" || one=$?
    # A wait that the trap has cut short has not seen the end of the process.
    while kill -0 "$pid" 2>/dev/null; do
      one=0
      wait "$pid" || one=$?
    done
    # 1, what the user must mend, outweighs all.
    if ((one == 1 || (one > code && code != 1))); then code=$one; fi
  done
  if ((code == 0 || code == 1 || stopping || attempt >= restarts)); then exit "$code"; fi
  echo "ended with $code: starting again, $((attempt + 1)) of $restarts" >&2
done
