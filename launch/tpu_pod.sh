#!/usr/bin/env bash
# A run on a Cloud TPU slice: creates it or takes the one that is there, copies this folder,
# installs, runs on all workers, shows worker 0's log, and makes the slice anew when it is
# pre-empted.
#   NAME=simsiam ZONE=us-central2-b TYPE=v4-32 launch/tpu_pod.sh \
#     --config=configs/imagenet.py --workdir=gs://BUCKET/imagenet
# VERSION: of the TPU's software; SPOT=1: a pre-emptible slice; MAX_RESTARTS, with PAUSE seconds
# before each. DRY_RUN=1 prints.
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

# Whatever of an earlier run, or of one whose connection broke, is still there saves and leaves.
stop="run='^.venv/bin/python -m simsiam_jax'; pkill -TERM -f \"\$run\"; for _ in {1..120}; do \
pgrep -f \"\$run\" >/dev/null || break; sleep 1; done; pkill -KILL -f \"\$run\""

prepare() { # called in a condition, where bash does not end at what fails
  local now=''
  [[ ${DRY_RUN:-0} == 1 ]] || now=$(state)
  if [[ $now == PREEMPTED || $now == TERMINATED || $now == STOPPED ]]; then
    do_ "${tpu[@]}" delete "$NAME" --zone="$ZONE" --quiet || return
    now=''
  fi
  if [[ -z $now ]]; then
    local spot=()
    [[ ${SPOT:-0} == 1 ]] && spot=(--spot)
    do_ "${tpu[@]}" create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" \
      --version="$version" "${spot[@]}" || return
  fi
  do_ git archive --format=tar.gz --output="/tmp/$NAME.tar.gz" HEAD &&
    do_ "${tpu[@]}" scp "/tmp/$NAME.tar.gz" "$NAME:" --zone="$ZONE" --worker=all &&
    # The slices' own Python is 3.10; uv brings another.
    on_all "$stop; mkdir -p simsiam && tar xzf $NAME.tar.gz -C simsiam && cd simsiam && \
python3 -m pip install --quiet --user uv && uv=~/.local/bin/uv && \
\$uv venv --quiet --allow-existing --python=3.12 && \$uv pip install --quiet -e '.[tpu,gcs]'"
}

# Ctrl-C ends this script, not the run, which goes on without it and ends with the next start.
trap 'echo "the slice $NAME stays, and what runs on it" >&2; exit 130' INT

flags=$(printf '%q ' "$@")
for ((attempt = 0; ; attempt++)); do
  code=0
  if prepare; then
    # Every worker logs to run.log; worker 0, the only one that says anything, to here too, while
    # there is a connection (-p).
    on_all "cd simsiam && set -o pipefail && .venv/bin/python -m simsiam_jax.main $flags 2>&1 | tee -pa run.log" ||
      code=$?
    # gcloud too ends with 1, where the slice has gone.
    if ((code == 1)) && [[ $(state) != READY ]]; then code=75; fi
  else
    # At first it is the user's to mend; later there may be no room for a slice for a while.
    code=$((attempt == 0 ? 1 : 75))
  fi
  if [[ ${DRY_RUN:-0} == 1 ]] || ((code == 0 || code == 1 || attempt >= restarts)); then
    exit "$code"
  fi
  echo "ended with $code: starting again, $((attempt + 1)) of $restarts" >&2
  sleep "${PAUSE:-30}"
done
