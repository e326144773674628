"""Estimates what a run needs of this machine, without compiling its step."""

import dataclasses
import functools
import os
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from simsiam_jax.models import backbones, resnet
from simsiam_jax.tasks import inputs, memory, pretrain_setup
from simsiam_jax.tools.benchmark import cost_model, workload
from simsiam_jax.training import mesh as mesh_lib

# Batches that the pipeline prefetches before it is measured.
_WARM_UP = 4


def step_memory(config: ConfigDict) -> int:
    """Returns the bytes that a step needs on a device, as a dry run estimates them."""
    images = max(workload.IMAGENET, config.batch_size)
    work = workload.build(config, mesh_lib.make_mesh(), images=images)
    return memory.estimate(work.train_step, *work.abstract()).total


def device_memory() -> int:
    """Returns the bytes of a device, or its share of the machine's if it does not report them."""
    whole = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    return memory.device_limit() or whole // jax.local_device_count()


def step_rate(config: ConfigDict, setup: pretrain_setup.PretrainSetup) -> float:
    """Returns the estimated images per second of the training step on all devices.

    Times the first block of a deep ResNet, forward and backward, and scales by operations. The
    blocks of a residual network have about the same number of operations. Other networks are timed
    whole, because they compile in seconds.
    """
    block = backbones.from_config(config.to_dict())
    if isinstance(block, resnet.ResNet) and sum(block.stages) > 3:
        block = block.clone(stages=(1,))
    size, channels = setup.recipes[0].size, config.data.channels
    cost = _forward_operations(block, size, channels)
    # Operations that keep a device busy for a moment: 4e9 on a CPU, 4e11 on an accelerator.
    busy = (4e9 if on_cpu() else 4e11) / (3 * cost)
    batch = int(np.clip(busy, 2, max(2, config.batch_size // setup.mesh.size)))
    images = jnp.zeros((batch, size, size, channels))
    variables = jax.jit(functools.partial(backbones.init, block))(jax.random.key(0), images[:1])

    @jax.jit
    def gradients(params: Any) -> Any:
        def loss(params: Any) -> Any:
            out, _ = block.apply(
                variables | {'params': params},
                images,
                train=True,
                mutable='batch_stats',
                rngs={'dropout': jax.random.key(0)},
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
    whole = sum(_forward_operations(setup.method.network, r.size, channels) for r in setup.recipes)
    passes = 3 if setup.method.momentum is None else 4
    return speed / (passes * whole) * (1 if on_cpu() else setup.mesh.size)


def _forward_operations(network: nn.Module, size: int, channels: int) -> int:
    """Returns the multiplications and additions for one image."""
    if isinstance(getattr(network, 'backbone', network), resnet.ResNet):
        return 2 * sum(layer.macs for layer in cost_model.layers(network, size, channels))
    # Any network: the operations of the program, before the compiler changes it.
    image = jnp.zeros((1, size, size, channels))
    variables = jax.eval_shape(lambda: network.init(jax.random.key(0), image, False))
    program = jax.jit(lambda variables, image: network.apply(variables, image, False))
    cost: Any = program.lower(variables, image).cost_analysis()
    return int(cost['flops'])


def on_cpu() -> bool:
    """Returns whether JAX has no accelerator."""
    return jax.default_backend() == 'cpu'


def feed_rate(config: ConfigDict, setup: pretrain_setup.PretrainSetup, seconds: float) -> float:
    """Returns the images per second that the input pipeline of this host delivers.

    Args:
      config: Configuration of the run.
      setup: Parts of the run, with a source that is read during training.
      seconds: Seconds to decode an image, which bound the number of images measured.
    """
    devices, limit = setup.mesh.size, min(64, config.batch_size)
    batch = devices * max(1, int(min(0.5 / max(seconds, 1e-4), limit)) // devices)
    order = dataclasses.replace(setup.sampler, batch_size=batch)
    make = inputs.device_batches(setup.source, order, setup.recipes, config.data, setup.mesh)
    batches = make(0, _WARM_UP + 8)
    for _ in range(_WARM_UP):
        next(batches)
    begin = time.perf_counter()
    count = sum(1 for _ in batches)
    return batch * count / (time.perf_counter() - begin)
