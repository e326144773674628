"""Times of the parts of the step for which there is a choice of kernels, each alone on one device.

    python benchmarks/micro.py [--smoke] [--json FILE]

Times are medians; GB/s count the bytes that the operation must move, once each.
"""

import argparse
import functools
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simsiam_jax.models import kernels

BF16 = jnp.bfloat16


def normal(*shape: int, dtype: Any = BF16) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape, dtype)


def conv(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    pad = kernel.shape[0] // 2
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((pad, pad), (pad, pad)),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )


def gradient(f: Callable[..., jax.Array], *arguments: jax.Array, fixed: Any = ()) -> Any:
    """Returns (function, arguments) for the value of f and all gradients of a random cotangent.

    All inputs are arguments, because the compiler would compute on constants in advance.

    Args:
      f: Function to differentiate.
      *arguments: Arguments of f with gradients.
      fixed: First arguments of f, without gradients.
    """
    result = jax.eval_shape(f, *fixed, *arguments)
    cotangent = normal(*result.shape, dtype=result.dtype)

    def both(cotangent: jax.Array, fixed: Any, *arguments: jax.Array) -> Any:
        out, pull = jax.vjp(functools.partial(f, *fixed), *arguments)
        return out, pull(cotangent)

    return both, (cotangent, fixed, *arguments)


def cases(batch: int) -> Iterator[tuple[str, Any, tuple[jax.Array, ...], float]]:
    """Yields (name, function, arguments, bytes to move or 0)."""
    x = normal(batch * 784, 512)
    yield 'copy', lambda x: x * BF16(2), (x,), 2 * x.nbytes
    yield 'column sums and squares', lambda x: _moments(x), (x,), x.nbytes
    images = jax.nn.relu(normal(batch, 112, 112, 64))
    size = images.nbytes
    for fused in (False, True):
        name = 'fused' if fused else 'plain'
        pool = functools.partial(kernels.max_pool, fused=fused)
        # Reads x and writes y, then reads y's gradient and writes x's, with an index of one byte.
        yield f'max-pool and gradient, {name}', *gradient(pool, images), 2.5 * size + size / 4
    y, shortcut = normal(batch, 28, 28, 512), normal(batch, 28, 28, 512)
    for end in (False, True):
        for fused in (False, True):
            norm = kernels.NormReLU(use_running_average=False, dtype=BF16, fused=fused)
            variables = norm.init(jax.random.key(0), y)

            def apply(variables: Any, *inputs: jax.Array, norm: Any = norm) -> Any:
                return norm.apply(variables, *inputs, mutable='batch_stats')[0]

            name = f'BN{" + shortcut" * end} + ReLU and gradient, {"fused" if fused else "plain"}'
            inputs = (y, shortcut) if end else (y,)
            moved = (11 if end else 8) * y.nbytes
            yield name, *gradient(apply, *inputs, fixed=(variables,)), moved
    for channels in (3, 4, 8):
        views, kernel = normal(batch, 224, 224, channels), normal(7, 7, channels, 64)
        name = f'stem of {channels} channels and gradient of its kernel'
        yield name, *gradient(_stem, kernel, fixed=(views,)), 0
    views, kernel = normal(batch, 224, 224, 3), normal(7, 7, 3, 64)
    yield 'stem of 2x2 blocks, likewise', *gradient(_blocks, kernel, fixed=(views,)), 0
    weights = normal(512, 128)
    yield '1x1 convolution and gradients', *gradient(conv, y, weights[None, None]), 0
    yield '1x1 as a product, likewise', *gradient(jnp.matmul, y, weights), 0
    z = normal(batch, 2048, dtype=jnp.float32)
    yield 'l2-normalized cosine and gradients', *gradient(_cosine, z, z + 1), 0


def _moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = x.astype(jnp.float32)
    return x.sum(0), jnp.square(x).sum(0)


def _stem(views: jax.Array, kernel: jax.Array) -> jax.Array:
    return conv(views, kernel, 2)


def _blocks(views: jax.Array, kernel: jax.Array) -> jax.Array:
    numbers = jax.lax.conv_dimension_numbers(views.shape, kernel.shape, ('NHWC', 'HWIO', 'NHWC'))
    return kernels.space_to_depth_conv(
        views, kernel, (2, 2), ((3, 3), (3, 3)), dimension_numbers=numbers
    )


def _cosine(p: jax.Array, z: jax.Array) -> jax.Array:
    unit = [x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (p, z)]
    return jnp.mean(jnp.sum(unit[0] * unit[1], axis=-1))


def seconds(function: Any, arguments: tuple[jax.Array, ...], repeats: int, inner: int) -> float:
    """Returns seconds per run: the median of `repeats` times `inner` runs, after compilation."""
    run = jax.jit(function)
    jax.block_until_ready(run(*arguments))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(inner):
            out = run(*arguments)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - begin) / inner)
    return float(np.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--json', type=pathlib.Path, help='file of the results')
    parser.add_argument('--smoke', action='store_true', help='two images instead of 512')
    arguments = parser.parse_args()
    batch, repeats, inner = (2, 2, 1) if arguments.smoke else (512, 7, 5)
    rows = []
    print(f'{jax.devices()[0].device_kind}, {batch} images\n')
    print('| operation | ms | GB/s |\n|---|---|---|')
    for name, function, inputs, moved in cases(batch):
        took = seconds(function, inputs, repeats, inner)
        rate = moved / took / 1e9
        rows.append({'name': name, 'seconds': took, 'bytes': moved})
        print(f'| {name} | {took * 1e3:.3f} | {f"{rate:,.0f}" if moved else ""} |', flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + '\n')


if __name__ == '__main__':
    main()
