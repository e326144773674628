"""Linear classifiers on features, many trained by SGD at once."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int

from simsiam_jax import terminal
from simsiam_jax.training import classifier, optim


def train(
    x: Float[np.ndarray, 'N D'],
    labels: Int[np.ndarray, 'N'],
    rates: Float[np.ndarray, 'heads'],
    decays: Float[np.ndarray, 'heads'],
    *,
    classes: int,
    batch_size: int,
    epochs: int,
    momentum: float,
    seed: int,
    what: str | None = None,
) -> dict[str, Any]:
    """Returns heads trained by SGD with a cosine schedule to 0.

    Args:
      x: Features to train on.
      labels: Classes of the features.
      rates: Base learning rate of each head, times batch_size/256.
      decays: Weight decay of each head.
      classes: Number of classes.
      batch_size: Batch size; if larger than the data, all of it.
      epochs: Length of the training.
      momentum: Momentum of SGD.
      seed: Seed of the initial weights and of the order.
      what: Name in the progress bar.
    """
    data = jnp.asarray(x), jnp.asarray(labels)
    static: dict[str, Any] = {
        'batch_size': min(batch_size, len(x)),
        'epochs': epochs,
        'momentum': momentum,
    }
    heads = classifier.init_heads(len(rates), x.shape[1], classes, seed)
    carry = heads, _optimizer(rates, decays, len(x), **static).init(heads)
    keys = jax.random.split(jax.random.key(seed), epochs)
    for key in terminal.progress(keys, what, unit=' epochs'):
        carry = _epoch(carry, key, *data, rates, decays, **static)
    return carry[0]


def _optimizer(
    rates: Any, decays: Any, images: int, *, batch_size: int, epochs: int, momentum: float
) -> optax.GradientTransformation:
    unit = optim.cosine_schedule(
        batch_size / 256, epochs=epochs, steps_per_epoch=images // batch_size
    )
    return classifier.each_head(
        lambda rate, decay: optim.torch_sgd(lambda step: rate * unit(step), momentum, decay),
        rates,
        decays,
    )


@partial(jax.jit, static_argnames=('batch_size', 'epochs', 'momentum'))
def _epoch(
    carry: Any,
    key: jax.Array,
    x: jax.Array,
    labels: jax.Array,
    rates: jax.Array | np.ndarray,
    decays: jax.Array | np.ndarray,
    **static: Any,
) -> Any:
    tx = _optimizer(rates, decays, len(x), **static)

    def step(carry: Any, batch: jax.Array) -> tuple[Any, None]:
        heads, state = carry

        def loss(heads: Any) -> jax.Array:
            return classifier.head_cross_entropy(heads, x[batch], labels[batch])[0].sum()

        updates, state = tx.update(jax.grad(loss)(heads), state, heads)
        return (optax.apply_updates(heads, updates), state), None

    size = static['batch_size']
    steps = len(x) // size
    order = jax.random.permutation(key, len(x))[: steps * size]
    return jax.lax.scan(step, carry, order.reshape(steps, size))[0]
