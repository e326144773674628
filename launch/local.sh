#!/usr/bin/env bash
# Starts the processes of one run on this machine.
#   launch/local.sh -n 2 [--] --config=... --workdir=...
# If the machine has GPUs, each of several processes uses one, and a single process uses all.
# A run that dies is restarted up to MAX_RESTARTS times. DRY_RUN=1 prints the commands.
set -euo pipefail

usage() {
  echo "usage: launch/local.sh -n PROCESSES [--] [flags of simsiam_jax.main]" >&2
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
  echo "error: -n is $processes, but there are $gpus GPUs; expected at most one process per GPU" >&2
  exit 1
fi

pids=()
# The script forwards signals to one process, which notifies the others.
trap '[[ ${#pids[@]} -gt 0 ]] && kill -TERM "${pids[0]}" 2>/dev/null; stopping=1' TERM INT
stopping=0

for ((attempt = 0; ; attempt++)); do
  pids=()
  for ((process_id = 0; process_id < processes; process_id++)); do
    run=("$python" -m simsiam_jax.main "$@")
    if ((processes > 1)); then
      run+=("--coordinator=127.0.0.1:$port" "--num_processes=$processes" "--process_id=$process_id")
    fi
    variables=()
    if ((gpus > 0 && processes > 1)); then variables=("CUDA_VISIBLE_DEVICES=$process_id"); fi
    if [[ ${DRY_RUN:-0} == 1 ]]; then
      echo "${variables[*]:+${variables[*]} }${run[*]}"
    else
      env "${variables[@]}" "${run[@]}" &
      pids+=($!)
    fi
  done
  [[ ${DRY_RUN:-0} == 1 ]] && exit 0

  code=0
  for pid in "${pids[@]}"; do
    status=0
    wait "$pid" || status=$?
    # The trap interrupts `wait` before the process has ended.
    while kill -0 "$pid" 2>/dev/null; do
      status=0
      wait "$pid" || status=$?
    done
    # 1, an error that the user must fix, takes precedence over all other codes.
    if ((status == 1 || (status > code && code != 1))); then code=$status; fi
  done
  if ((code == 0 || code == 1 || stopping || attempt >= restarts)); then exit "$code"; fi
  echo "exit code $code: restarting, $((attempt + 1)) of $restarts" >&2
done
