#!/usr/bin/env bash
# A run on a Cloud TPU slice: creates it or takes the one that is there, copies this folder,
# installs, runs on all workers, shows worker 0's log, and makes the slice anew when it is
# pre-empted.
#   NAME=simsiam ZONE=us-central2-b TYPE=v4-32 launch/tpu_pod.sh \
#     --config=configs/imagenet.py --workdir=gs://BUCKET/imagenet
# VERSION: of the TPU's software; SPOT=1: a pre-emptible slice; MAX_RESTARTS. DRY_RUN=1 prints.
set -euo pipefail
cd "$(dirname "$0")/.."

: "${NAME:?the name of the TPU VM}" "${ZONE:?its zone}" "${TYPE:?its type, such as v4-32}"
version=${VERSION:-tpu-ubuntu2204-base}
restarts=${MAX_RESTARTS:-100}
[[ "$*" == *--workdir=gs://* ]] || {
  echo "error: --workdir must be in a bucket (gs://...): the slice's own disks die with it" >&2
  exit 1
}
[[ ${DRY_RUN:-0} == 1 ]] && echo "# the commands; the state of $NAME is not asked for"

do_() {
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    echo "$*"
  else
    "$@"
  fi
}
tpu=(gcloud compute tpus tpu-vm)
state() { "${tpu[@]}" describe "$NAME" --zone="$ZONE" --format='value(state)' 2>/dev/null || true; }
on_all() { do_ "${tpu[@]}" ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"; }

prepare() {
  local now=''
  [[ ${DRY_RUN:-0} == 1 ]] || now=$(state)
  if [[ $now == PREEMPTED || $now == TERMINATED || $now == STOPPED ]]; then
    do_ "${tpu[@]}" delete "$NAME" --zone="$ZONE" --quiet
    now=''
  fi
  if [[ -z $now ]]; then
    local spot=()
    [[ ${SPOT:-0} == 1 ]] && spot=(--spot)
    do_ "${tpu[@]}" create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" \
      --version="$version" "${spot[@]}"
  fi
  do_ git archive --format=tar.gz --output="/tmp/$NAME.tar.gz" HEAD
  do_ "${tpu[@]}" scp "/tmp/$NAME.tar.gz" "$NAME:" --zone="$ZONE" --worker=all
  on_all "mkdir -p simsiam && tar xzf $NAME.tar.gz -C simsiam && cd simsiam && \
python3 -m venv .venv && .venv/bin/pip install --quiet -e '.[tpu,gcs]'"
}

flags=$(printf '%q ' "$@")
for ((attempt = 0; ; attempt++)); do
  code=0
  if prepare; then
    # Every worker logs to run.log; worker 0, the only one that says anything, to here too.
    on_all "cd simsiam && set -o pipefail && .venv/bin/python -m simsiam_jax.main $flags 2>&1 | tee -a run.log" ||
      code=$?
  else
    code=$?
  fi
  if [[ ${DRY_RUN:-0} == 1 ]] || ((code == 0 || code == 1 || attempt >= restarts)); then
    exit "$code"
  fi
  echo "ended with $code: starting again, $((attempt + 1)) of $restarts" >&2
  sleep 30
done
