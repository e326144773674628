"""What a run asks of this machine, estimated without a compiled step, and what the machine has."""

import dataclasses
import os
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from simsiam_jax.models import resnet
from simsiam_jax.tasks import inputs, memory, pretrain_setup
from simsiam_jax.tools.benchmark import cost_model, workload
from simsiam_jax.training import mesh as mesh_lib

# Batches that the pipeline has ready before it is measured.
_WARM_UP = 4


def step_memory(config: ConfigDict) -> int:
    """Bytes that a step takes on a device, as a dry run estimates it."""
    images = max(workload.IMAGENET, config.batch_size)
    work = workload.build(config, mesh_lib.make_mesh(), images=images)
    return memory.estimate(work.train_step, *work.abstract()).total


def device_memory() -> int:
    """Bytes of a device; where it does not say, those of the machine, shared by its devices."""
    whole = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    return memory.device_limit() or whole // jax.local_device_count()


def step_rate(config: ConfigDict, parts: pretrain_setup.PretrainSetup) -> float:
    """Images a second that all devices take, estimated.

    Measured on the first block of the backbone, forward and backward, and scaled by operations:
    a residual network's blocks have about the same number each.
    """
    arguments = config.model.to_dict() | {'stages': (1,)}
    block = resnet.make(**arguments)
    size, channels = parts.recipes[0].size, config.data.channels
    cost = _forward_operations(block, size, channels)
    # Enough to fill the device for a moment: 4e9 operations of a CPU, 4e11 of others.
    enough = (4e9 if on_cpu() else 4e11) / (3 * cost)
    batch = int(np.clip(enough, 2, max(2, config.batch_size // parts.mesh.size)))
    images = jnp.zeros((batch, size, size, channels))
    variables = jax.jit(block.init)(jax.random.key(0), images[:1])

    @jax.jit
    def gradients(params: Any) -> Any:
        def loss(params: Any) -> Any:
            out, _ = block.apply(
                variables | {'params': params}, images, train=True, mutable='batch_stats'
            )
            return jnp.square(out).mean()

        return jax.grad(loss)(params)

    jax.block_until_ready(gradients(variables['params']))
    times: list[float] = []
    while len(times) < 5 and sum(times) < 2:
        begin = time.perf_counter()
        jax.block_until_ready(gradients(variables['params']))
        times.append(time.perf_counter() - begin)
    speed = 3 * cost * batch / min(times)
    whole = sum(_forward_operations(parts.method.network, r.size, channels) for r in parts.recipes)
    passes = 3 if parts.method.momentum is None else 4
    return speed / (passes * whole) * (1 if on_cpu() else parts.mesh.size)


def _forward_operations(network: nn.Module, size: int, channels: int) -> int:
    """Multiplications and additions, of one image."""
    return 2 * sum(layer.macs for layer in cost_model.layers(network, size, channels))


def on_cpu() -> bool:
    return jax.default_backend() == 'cpu'


def feed_rate(config: ConfigDict, parts: pretrain_setup.PretrainSetup, seconds: float) -> float:
    """Images a second that this host makes ready of a source that is read as it is used.

    Args:
      seconds: an image takes to be decoded, which bounds the sample.
    """
    devices, most = parts.mesh.size, min(64, config.batch_size)
    batch = devices * max(1, int(min(0.5 / max(seconds, 1e-4), most)) // devices)
    order = dataclasses.replace(parts.sampler, batch_size=batch)
    make = inputs.device_batches(parts.source, order, parts.recipes, config.data, parts.mesh)
    batches = make(0, _WARM_UP + 8)
    for _ in range(_WARM_UP):
        next(batches)
    begin = time.perf_counter()
    count = sum(1 for _ in batches)
    return batch * count / (time.perf_counter() - begin)
