#!/usr/bin/env bash
# GPU measurements in calls of at most nine minutes: benchmarks/gpu.sh PART [--smoke], of these parts:
#   micro            the parts of the step alone
#   step             the step against the same with merged views, and with plain kernels
#   torch            the step against PyTorch's, eager and compiled in every mode
#   flags            the step with each of several flags of XLA
#   data             augmentation on the device, a resident dataset
#   learn            parity and step tests on the GPU, then training on digits
#   run              whether runs repeat and resume bit for bit, move to the CPU and back, and report out of memory
#   cifar            SimSiam on CIFAR-10: EPOCHS (200), kNN every 20 epochs, probe
#   cifar-steps      1,067 steps of batch 512 on CIFAR-10 from start to end, cold and cached
#   cifar-ablations  the paper's collapses on CIFAR-10, EPOCHS (30) each
#   cifar-methods    SimCLR, MoCo v2, BYOL and SwAV on CIFAR-10, EPOCHS (100) each
# Writes tables to the terminal and, with a JSON file of each part, to $OUT (default: runs/gpu). A second
# call of torch reuses the compilers' caches; a second call of a cifar part resumes in $RUNS (default:
# $OUT). CIFAR-10 is in the file $CIFAR10 (default: runs/cifar10.npz), see benchmarks/cifar10.py.
# SMOKE=1 or --smoke runs small networks, on a CPU too.
# Needs jax, flax, optax, jaxtyping, numpy; torch and torchvision for torch; for learn and run orbax,
# ml_collections, pytest, clu, scikit-learn, safetensors, tqdm and pillow; for cifar* the same without
# pytest and clu. TensorFlow is not needed.
set -euo pipefail
cd "$(dirname "$0")/.."

parts='micro|step|torch|flags|data|learn|run|cifar|cifar-steps|cifar-ablations|cifar-methods'
part=${1:-}
if [[ ! $part =~ ^($parts)$ ]]; then
  echo "usage: benchmarks/gpu.sh $parts [--smoke]" >&2
  exit 1
fi
[[ ${2:-} == --smoke ]] && SMOKE=1
python=${PYTHON:-python3}
out=${OUT:-runs/gpu}
small=()
if [[ ${SMOKE:-0} == 1 ]]; then small=(--smoke); fi
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

# CIFAR-10 with the word of its size; the smoke test has 200 images and a small network.
cifar10=${CIFAR10:-runs/cifar10.npz} size='' stored=${RUNS:-$out}
if [[ ${SMOKE:-0} == 1 ]]; then
  cifar10=tests/figures/cifar10.npz size=small, EPOCHS=${EPOCHS:-3}
fi
if [[ $part == cifar* && ! -f $cifar10 ]]; then
  echo "there is no $cifar10; set CIFAR10=FILE.npz with train_images, train_labels, test_images, test_labels" >&2
  exit 1
fi

# Runs a command of this part, stops it after nine minutes in all, and keeps its output.
limited() {
  timeout "$((540 - SECONDS))" "$@" 2>&1 | tee -a "$out/$part.txt"
}

: >"$out/$part.txt"
case $part in
  micro)
    limited "$python" benchmarks/micro.py --json "$out/micro.json" "${small[@]}"
    ;;
  step)
    limited "$python" benchmarks/step_vs_pytorch.py --against merged plain --seconds 400 \
      --json "$out/step.json" "${small[@]}"
    ;;
  torch)
    limited "$python" benchmarks/step_vs_pytorch.py --seconds 300 --start-seconds 120 \
      --json "$out/torch.json" "${small[@]}"
    ;;
  flags)
    limited "$python" benchmarks/step_vs_pytorch.py --against flags --seconds 400 \
      --start-seconds 120 --json "$out/flags.json" "${small[@]}"
    ;;
  data)
    limited "$python" benchmarks/augmentation.py --json "$out/data.json" "${small[@]}"
    ;;
  learn)
    # Tests of 8 devices need the CPU. Parity needs full float32: TF32 rounds products to ten bits.
    platform=cuda
    if [[ ${SMOKE:-0} == 1 ]]; then platform=cpu; fi
    TEST_PLATFORM=$platform JAX_DEFAULT_MATMUL_PRECISION=highest limited "$python" -m pytest -q -o addopts= \
      tests/test_parity.py tests/test_kernels.py tests/test_step.py tests/test_device.py -k 'not 8'
    digits=(--config=configs/quickstart.py --config.log.tensorboard=False)
    if [[ ${SMOKE:-0} == 1 ]]; then digits+=(--config.epochs=2); fi
    rm -rf "$out/digits"
    limited "$python" -m simsiam_jax.main --workdir="$out/digits" "${digits[@]}"
    mv "$out/digits/metrics.jsonl" "$out/learn.json"
    rm -r "$out/digits"
    ;;
  run)
    platform=cuda
    if [[ ${SMOKE:-0} == 1 ]]; then platform=cpu; fi
    limited "$python" tests/faults/gpu.py "$platform"
    ;;
  cifar-steps)
    rm -rf "$out/cache"
    for start in cold cached; do
      rm -rf "$out/steps"
      begin=$SECONDS
      JAX_COMPILATION_CACHE_DIR=$out/cache limited "$python" -m simsiam_jax.main --workdir="$out/steps" \
        --config="configs/cifar10.py:$size${EPOCHS:-11}ep,npz:$cifar10" --config.eval.train= \
        --config.eval.test= --config.log.tensorboard=False --config.log.report=False
      echo "$start: $((SECONDS - begin)) s from start to end" | tee -a "$out/$part.txt"
      mv "$out/steps/metrics.jsonl" "$out/steps-$start.json"
    done
    rm -r "$out/steps" "$out/cache"
    ;;
  cifar)
    limited "$python" benchmarks/cifar10.py --words="$size${EPOCHS:-200}ep,npz:$cifar10" \
      --workdir="$stored/cifar"
    cp "$stored/cifar/result.json" "$out/cifar.json"
    ;;
  cifar-ablations)
    limited "$python" -m simsiam_jax.tools.ledger --data="cifar10${size:+_small},npz:$cifar10" \
      --rows=core --epochs="${EPOCHS:-30}" --seeds=1 --workdir="$stored/ablations"
    cp "$stored"/ablations/*.{md,png} "$out"
    ;;
  cifar-methods)
    for method in simclr moco_v2 byol swav; do
      limited "$python" benchmarks/cifar10.py --words="$size$method,${EPOCHS:-100}ep,npz:$cifar10" \
        --workdir="$stored/$method"
      cp "$stored/$method/result.json" "$out/$method.json"
    done
    ;;
esac
