#!/usr/bin/env bash
# One process for all GPUs of this host, started again when it dies: launch/gpu_host.sh --config=...
# DRY_RUN=1 prints the commands.
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ $# -eq 0 ]]; then
  echo "usage: launch/gpu_host.sh --config=CONFIG --workdir=DIR [flags of simsiam_jax.main]" >&2
  exit 1
fi
python=${PYTHON:-python}
check=("$python" -c "import jax; d = jax.devices(); print(len(d), 'x', d[0].device_kind); assert d[0].platform == 'gpu', 'JAX sees no GPU: pip install \"simsiam_jax[cuda]\"'")
# JAX takes the memory at the start; TensorFlow is kept off the GPUs by the program itself.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
if [[ ${DRY_RUN:-0} == 1 ]]; then
  echo "XLA_PYTHON_CLIENT_MEM_FRACTION=$XLA_PYTHON_CLIENT_MEM_FRACTION ${check[*]}"
else
  "${check[@]}"
fi
PYTHON=$python exec launch/local.sh -n 1 "$@"
