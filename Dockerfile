# simsiam_jax for NVIDIA GPUs. CUDA's libraries come with pip, the driver from the host.
#   docker build -t simsiam_jax .
#   docker run --gpus all -v /data:/data simsiam_jax pretrain --config=quickstart --workdir=/data/runs/a
# EXTRAS selects other hardware: --build-arg EXTRAS=tpu,gcs
FROM python:3.12-slim

ARG EXTRAS=cuda12,gcs,loggers

WORKDIR /opt/simsiam_jax
COPY setup.py pyproject.toml README.md LICENSE ./
COPY simsiam_jax ./simsiam_jax
COPY configs ./configs
COPY launch ./launch
# The package in this folder, with the newest versions of what it needs.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[${EXTRAS}]"

WORKDIR /data
ENTRYPOINT ["simsiam-jax"]
