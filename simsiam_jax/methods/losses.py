"""Losses over embeddings, in float32."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# PyTorch's cosine similarity has the same floor under the norms.
_EPS = 1e-8


def l2_normalize(x: Float[Array, 'B D']) -> Float[Array, 'B D']:
    """x/|x| by row."""
    x = x.astype(jnp.float32)
    # The floor stands inside the root: the gradient at zero stays finite.
    return x / jnp.sqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), _EPS**2))


def negative_cosine(p: Float[Array, 'B D'], z: Float[Array, 'B D']) -> Float[Array, '']:
    """D(p, z), mean over the batch, in [-1, 1] (SimSiam, equation 1)."""
    return -jnp.mean(jnp.sum(l2_normalize(p) * l2_normalize(z), axis=-1))


def softmax_cross_entropy(p: Float[Array, 'B D'], z: Float[Array, 'B D']) -> Float[Array, '']:
    """-softmax(z) . log softmax(p) over channels, mean over the batch (SimSiam, section 4.5)."""
    return -jnp.mean(jnp.sum(jax.nn.softmax(z) * jax.nn.log_softmax(p), axis=-1))


def mean_over_view_pairs(
    loss: Callable[[int, int], Float[Array, '']], views: int, targets: int
) -> Float[Array, '']:
    """Mean of loss(i, j) over every view i and every target view j that is not i's own."""
    pairs = [(i, j) for j in range(targets) for i in range(views) if i != j]
    return sum((loss(i, j) for i, j in pairs), start=jnp.zeros(())) / len(pairs)


def inner_products(x: Float[Array, 'B D'], y: Float[Array, 'K D']) -> Float[Array, 'B K']:
    """Of every row with every row, in full float32 also on matrix units that round."""
    return jnp.matmul(x, y.T, precision='highest')


def nt_xent(
    p: Float[Array, 'b D'],
    own: Float[Array, 'B D'],
    other: Float[Array, 'B D'],
    *,
    temperature: float,
    first_row: Array | int = 0,
) -> Float[Array, '']:
    """Cross-entropy of finding each image's other view among all 2B - 1 others (SimCLR).

    Args:
      p: of one view, this device's images.
      own: z of the same view, unit rows, images of all devices.
      other: z of the other view, likewise.
      first_row: where this device's images begin among all.
    """
    p = l2_normalize(p)
    row = first_row + jnp.arange(len(p))
    itself = jnp.arange(len(own)) == row[:, None]
    positives = inner_products(p, other) / temperature
    negatives = jnp.where(itself, -jnp.inf, inner_products(p, own) / temperature)
    log_share = jax.nn.log_softmax(jnp.concatenate([positives, negatives], axis=1))
    return -jnp.mean(jnp.take_along_axis(log_share, row[:, None], axis=1))


def info_nce(
    q: Float[Array, 'B D'],
    k: Float[Array, 'B D'],
    queue: Float[Array, 'K D'],
    *,
    temperature: float,
) -> Float[Array, '']:
    """Cross-entropy of finding each query's key among the queue's unit rows (MoCo, equation 1)."""
    q, k = l2_normalize(q), l2_normalize(k)
    positive = jnp.sum(q * k, axis=-1, keepdims=True)
    logits = jnp.concatenate([positive, inner_products(q, queue)], axis=1) / temperature
    return -jnp.mean(jax.nn.log_softmax(logits)[:, 0])


def sinkhorn(
    scores: Float[Array, 'B K'], *, epsilon: float, iterations: int
) -> Float[Array, 'B K']:
    """Soft assignments of B images to K prototypes, used equally often (SwAV, section 3.1).

    Rows sum to 1, columns to about B/K. In logarithms: exp(scores/epsilon) may overflow.
    """
    log_q = scores / epsilon
    for _ in range(iterations):
        log_q = jax.nn.log_softmax(log_q, axis=0)
        log_q = jax.nn.log_softmax(log_q, axis=1)
    return jnp.exp(log_q)


def swapped_prediction(
    q: Float[Array, 'B K'], scores: Float[Array, 'B K'], *, temperature: float
) -> Float[Array, '']:
    """-q . log softmax(scores/temperature), mean over the batch (SwAV, equation 2)."""
    return -jnp.mean(jnp.sum(q * jax.nn.log_softmax(scores / temperature), axis=-1))
