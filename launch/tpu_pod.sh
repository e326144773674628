#!/usr/bin/env bash
# Runs on a Cloud TPU slice: creates the slice or uses an existing one, copies this folder,
# installs, runs on all workers, shows worker 0's log, and recreates a preempted slice.
#   NAME=simsiam ZONE=us-central2-b TYPE=v4-32 launch/tpu_pod.sh \
#     --config=configs/imagenet.py --workdir=gs://BUCKET/imagenet \
#     --config.data.tfds_data_dir=gs://BUCKET/tfds
# BUCKET/tfds has imagenet2012 as array_record: tfds build imagenet2012 --file_format=array_record.
# VERSION sets the TPU's software version, SPOT=1 requests a preemptible slice, MAX_RESTARTS limits
# restarts, and PAUSE sets the seconds before each. DRY_RUN=1 prints the commands.
set -euo pipefail
cd "$(dirname "$0")/.."

: "${NAME:?name of the TPU VM}" "${ZONE:?its zone}" "${TYPE:?its type, such as v4-32}"
version=${VERSION:-tpu-ubuntu2204-base}
restarts=${MAX_RESTARTS:-100}
[[ "$*" == *--workdir=gs://* ]] || {
  echo "error: --workdir must be in a bucket (gs://...); the slice's disks die with it" >&2
  exit 1
}
[[ ${DRY_RUN:-0} == 1 ]] && echo "# the commands, if $NAME does not exist yet"

maybe() {
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    echo "$*"
  else
    "$@"
  fi
}
tpu=(gcloud compute tpus tpu-vm)
state() { "${tpu[@]}" describe "$NAME" --zone="$ZONE" --format='value(state)' 2>/dev/null || true; }
on_all() { maybe "${tpu[@]}" ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"; }

# Stops a run that is still active, such as one whose connection broke; it saves first.
stop="run='^.venv/bin/python -m simsiam_jax'; pkill -TERM -f \"\$run\"; for _ in {1..120}; do \
pgrep -f \"\$run\" >/dev/null || break; sleep 1; done; pkill -KILL -f \"\$run\""

prepare() { # called in a condition, in which set -e has no effect
  local now=''
  [[ ${DRY_RUN:-0} == 1 ]] || now=$(state)
  if [[ $now == PREEMPTED || $now == TERMINATED || $now == STOPPED ]]; then
    maybe "${tpu[@]}" delete "$NAME" --zone="$ZONE" --quiet || return
    now=''
  fi
  if [[ -z $now ]]; then
    local spot=()
    [[ ${SPOT:-0} == 1 ]] && spot=(--spot)
    maybe "${tpu[@]}" create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" \
      --version="$version" "${spot[@]}" || return
  fi
  maybe git archive --format=tar.gz --output="/tmp/$NAME.tar.gz" HEAD &&
    maybe "${tpu[@]}" scp "/tmp/$NAME.tar.gz" "$NAME:" --zone="$ZONE" --worker=all &&
    # The slices' own Python is 3.10; uv installs another.
    on_all "$stop; mkdir -p simsiam && tar xzf $NAME.tar.gz -C simsiam && cd simsiam && \
python3 -m pip install --quiet --user uv && uv=~/.local/bin/uv && \
\$uv venv --quiet --allow-existing --python=3.12 && \$uv pip install --quiet -e '.[tpu,gcs]'"
}

# Ctrl-C stops this script but not the run, which continues until the next start stops it.
trap 'echo "the slice $NAME and its run continue" >&2; exit 130' INT

flags=$(printf '%q ' "$@")
for ((attempt = 0; ; attempt++)); do
  code=0
  if prepare; then
    # Every worker logs to run.log. Worker 0, the only one that prints progress, also logs here.
    # With tee -p the run survives a broken connection.
    on_all "cd simsiam && set -o pipefail && .venv/bin/python -m simsiam_jax.main $flags 2>&1 | tee -pa run.log" ||
      code=$?
    # gcloud also exits with 1 if the slice is gone.
    if ((code == 1)) && [[ $(state) != READY ]]; then code=75; fi
  else
    # A first failure is an error that the user must fix. Later failures may be a temporary lack of
    # capacity.
    code=$((attempt == 0 ? 1 : 75))
  fi
  if [[ ${DRY_RUN:-0} == 1 ]] || ((code == 0 || code == 1 || attempt >= restarts)); then
    exit "$code"
  fi
  echo "exit code $code: restarting, $((attempt + 1)) of $restarts" >&2
  sleep "${PAUSE:-30}"
done
