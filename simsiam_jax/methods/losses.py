"""Losses on embeddings, in float32."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Lower bound of the norms, as in PyTorch's cosine similarity.
_EPS = 1e-8


def l2_normalize(x: Float[Array, 'B D']) -> Float[Array, 'B D']:
    """Returns the rows of x divided by their norms."""
    x = x.astype(jnp.float32)
    # The bound is inside the root, so that the gradient at zero is finite.
    return x / jnp.sqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), _EPS**2))


def negative_cosine(p: Float[Array, 'B D'], z: Float[Array, 'B D']) -> Float[Array, '']:
    """Returns D(p, z), the mean over the batch, in [-1, 1] (SimSiam, equation 1)."""
    return -jnp.mean(jnp.sum(l2_normalize(p) * l2_normalize(z), axis=-1))


def softmax_cross_entropy(p: Float[Array, 'B D'], z: Float[Array, 'B D']) -> Float[Array, '']:
    """Returns the batch mean of -softmax(z) . log softmax(p) over channels (SimSiam, 4.5)."""
    return -jnp.mean(jnp.sum(jax.nn.softmax(z) * jax.nn.log_softmax(p), axis=-1))


def mean_over_view_pairs(
    loss: Callable[[int, int], Float[Array, '']], views: int, targets: int
) -> Float[Array, '']:
    """Returns the mean of loss(i, j) over all pairs of a view i and a target view j != i."""
    pairs = [(i, j) for j in range(targets) for i in range(views) if i != j]
    return sum((loss(i, j) for i, j in pairs), start=jnp.zeros(())) / len(pairs)


def inner_products(x: Float[Array, 'B D'], y: Float[Array, 'K D']) -> Float[Array, 'B K']:
    """Returns x y^T in full float32, even on matrix units that round."""
    return jnp.matmul(x, y.T, precision='highest')


def nt_xent(
    p: Float[Array, 'b D'],
    own: Float[Array, 'B D'],
    other: Float[Array, 'B D'],
    *,
    temperature: float,
    first_row: Array | int = 0,
) -> Float[Array, '']:
    """Returns the cross-entropy of finding each image's other view among 2B - 1 views (SimCLR).

    Args:
      p: Predictions (or z) of one view, for this device's images.
      own: z of the same view as unit rows, for the images of all devices.
      other: z of the other view as unit rows, for the images of all devices.
      temperature: Temperature of the softmax.
      first_row: Index of this device's first image among the images of all devices.
    """
    p = l2_normalize(p)
    row = first_row + jnp.arange(len(p))
    is_same_view = jnp.arange(len(own)) == row[:, None]
    positives = inner_products(p, other) / temperature
    negatives = jnp.where(is_same_view, -jnp.inf, inner_products(p, own) / temperature)
    log_p = jax.nn.log_softmax(jnp.concatenate([positives, negatives], axis=1))
    return -jnp.mean(jnp.take_along_axis(log_p, row[:, None], axis=1))


def info_nce(
    q: Float[Array, 'B D'],
    k: Float[Array, 'B D'],
    queue: Float[Array, 'K D'],
    *,
    temperature: float,
) -> Float[Array, '']:
    """Returns the cross-entropy of finding q's key k among the queue's unit rows (MoCo, eq. 1)."""
    q, k = l2_normalize(q), l2_normalize(k)
    positive = jnp.sum(q * k, axis=-1, keepdims=True)
    logits = jnp.concatenate([positive, inner_products(q, queue)], axis=1) / temperature
    return -jnp.mean(jax.nn.log_softmax(logits)[:, 0])


def sinkhorn(
    scores: Float[Array, 'B K'], *, epsilon: float, iterations: int
) -> Float[Array, 'B K']:
    """Returns soft assignments of B images to K equally used prototypes (SwAV, section 3.1).

    Rows sum to 1, columns to about B/K. In logarithms, as exp(scores/epsilon) may overflow.
    """
    log_q = scores / epsilon
    for _ in range(iterations):
        log_q = jax.nn.log_softmax(log_q, axis=0)
        log_q = jax.nn.log_softmax(log_q, axis=1)
    return jnp.exp(log_q)


def swapped_prediction(
    q: Float[Array, 'B K'], scores: Float[Array, 'B K'], *, temperature: float
) -> Float[Array, '']:
    """Returns the batch mean of -q . log softmax(scores/temperature) (SwAV, equation 2)."""
    return -jnp.mean(jnp.sum(q * jax.nn.log_softmax(scores / temperature), axis=-1))
