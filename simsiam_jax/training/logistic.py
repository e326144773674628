"""Logistic regression on features by L-BFGS, along a path of strengths of regularization."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from simsiam_jax import terminal

_TOLERANCE = 1e-4  # largest entry of the gradient of the mean loss, as in scikit-learn
_STEPS = 1000


def path(
    features: Float[np.ndarray, 'N D'],
    labels: Int[np.ndarray, 'N'],
    counted: Bool[np.ndarray, 'N'],
    strengths: Sequence[float],
    *,
    classes: int,
    what: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields heads {'kernel' [1, D, classes], 'bias' [1, classes]}, one for each strength.

    A head minimizes strength * (sum of the cross-entropies) + (squared norm of the kernel) / 2, as
    scikit-learn's LogisticRegression does, and starts from the head before. With two classes, the
    norm is that of the difference of their kernels, as there.

    Args:
      features: Features to train on.
      labels: Classes of the features.
      counted: Features that count. The others only save a compilation: the held-out part and all
        of a training set are fitted by the same program.
      strengths: Inverse strengths of regularization, scikit-learn's C; best in rising order.
      classes: Number of classes.
      what: Name in the progress bar.
    """
    mean = features[counted].mean(0)
    x, y, weights = map(jnp.asarray, (features - mean, labels, counted / counted.sum()))
    norms = 2 if classes == 2 else 1  # two opposite kernels have half their difference's norm
    head = {'kernel': jnp.zeros((x.shape[1], classes)), 'bias': jnp.zeros(classes)}
    for strength in terminal.progress(strengths, what, unit=' strengths'):
        with jax.default_matmul_precision('highest'):  # float32 on TPUs and GPUs too
            head = _fit(x, y, weights, norms / (strength * counted.sum()), head)
            bias = head['bias'] - mean @ head['kernel']
        yield {'kernel': head['kernel'][None], 'bias': bias[None]}


@jax.jit
def _fit(
    x: Float[Array, 'N D'],
    labels: Int[Array, 'N'],
    weights: Float[Array, 'N'],
    penalty: float | Array,
    head: dict[str, Array],
) -> dict[str, Array]:
    # The loss's second derivative is at most that of the penalty plus half the features'
    # covariance. In coordinates where this bound is 1 in all directions, L-BFGS takes some 20
    # steps; in the features' own it takes hundreds.
    covariance = x.T @ (weights[:, None] * x)
    diagonal = penalty + 1e-6 * jnp.trace(covariance)  # the trace against rounding in float32
    factor = jnp.linalg.cholesky(covariance / 2 + diagonal * jnp.eye(x.shape[1]))
    to_kernel = partial(jax.scipy.linalg.solve_triangular, factor, trans=1, lower=True)

    def loss(head: dict[str, Array]) -> Array:
        kernel = to_kernel(head['kernel'])
        losses = optax.softmax_cross_entropy_with_integer_labels(x @ kernel + head['bias'], labels)
        return weights @ losses + penalty / 2 * (kernel**2).sum()

    tx = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def unfinished(carry: Any) -> Array:
        _, _, step, gradient = carry
        # gradient is with regard to the kernel in the new coordinates
        own = factor @ gradient['kernel']
        largest = jnp.maximum(jnp.abs(own).max(), jnp.abs(gradient['bias']).max())
        return (step < _STEPS) & (largest > _TOLERANCE)

    def advance(carry: Any) -> Any:
        head, state, step, _ = carry
        value, gradient = value_and_grad(head, state=state)
        updates, state = tx.update(gradient, state, head, value=value, grad=gradient, value_fn=loss)
        return optax.apply_updates(head, updates), state, step + 1, gradient

    start = {'kernel': factor.T @ head['kernel'], 'bias': head['bias']}
    carry = start, tx.init(start), 0, jax.tree.map(jnp.ones_like, start)
    head, *_ = jax.lax.while_loop(unfinished, advance, carry)
    return {'kernel': to_kernel(head['kernel']), 'bias': head['bias']}
