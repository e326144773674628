#!/usr/bin/env bash
# Runs one process on all GPUs of this host and restarts it when it dies.
#   launch/gpu_host.sh --config=CONFIG --workdir=DIR [flags of simsiam_jax.main]
# DRY_RUN=1 prints the commands.
set -euo pipefail

if [[ $# -eq 0 ]]; then
  echo "usage: launch/gpu_host.sh --config=CONFIG --workdir=DIR [flags of simsiam_jax.main]" >&2
  exit 1
fi
python=${PYTHON:-python}
check=("$python" -c "import jax; d = jax.devices(); print(len(d), 'x', d[0].device_kind); assert d[0].platform == 'gpu', 'JAX sees no GPU: pip install \"simsiam_jax[cuda]\"'")
# JAX allocates the memory at its start. The program keeps TensorFlow off the GPUs.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
if [[ ${DRY_RUN:-0} == 1 ]]; then
  echo "XLA_PYTHON_CLIENT_MEM_FRACTION=$XLA_PYTHON_CLIENT_MEM_FRACTION ${check[*]}"
else
  "${check[@]}"
fi
PYTHON=$python exec bash "$(dirname "$0")/local.sh" -n 1 "$@"
