"""Logistic regression on features by L-BFGS, along a path of strengths of regularization.

The features are on one device. All that is computed from them is a sum over blocks, so that they
need no further memory. A fit takes at most _STEPS steps.
"""

from collections.abc import Callable, Iterator, Sequence
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
_BLOCK = 2**16  # features whose logits are in memory at a time


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
    mean = _mean(features, counted)
    x, y, weights = map(jnp.asarray, (features, labels, counted / counted.sum()))
    norms = 2 if classes == 2 else 1  # two opposite kernels have half their difference's norm
    head = {'kernel': jnp.zeros((x.shape[1], classes)), 'bias': jnp.zeros(classes)}
    for strength in terminal.progress(strengths, what, unit=' strengths'):
        with jax.default_matmul_precision('highest'):  # float32 on TPUs and GPUs too
            head = _fit(x, y, weights, mean, norms / (strength * counted.sum()), head)
            bias = head['bias'] - mean @ head['kernel']
        yield {'kernel': head['kernel'][None], 'bias': bias[None]}


def _mean(features: Float[np.ndarray, 'N D'], counted: Bool[np.ndarray, 'N']) -> np.ndarray:
    """Returns the mean of the features that count, which is no reason to copy them all."""
    total = np.zeros(features.shape[1])
    for start in range(0, len(features), _BLOCK):
        stop = start + _BLOCK
        total += features[start:stop][counted[start:stop]].sum(0, dtype=np.float64)
    return (total / counted.sum()).astype(np.float32)


def _sum_over_blocks(function: Callable[..., Any], *arrays: Array) -> Any:
    """Returns the sum of function(*blocks, is_new) over the blocks of some arrays.

    Args:
      function: Function of blocks of the arrays, and of whether a row is not in the block before:
        all blocks have the same size, so that the last begins in the one before.
      *arrays: Arrays of the same length.
    """
    count = len(arrays[0])
    size = min(_BLOCK, count)

    def part(i: Array) -> Any:
        start = jnp.minimum(i * size, count - size)
        blocks = (jax.lax.dynamic_slice_in_dim(array, start, size) for array in arrays)
        return function(*blocks, start + jnp.arange(size) >= i * size)

    def add(total: Any, i: Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, part(i)), None

    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(part, jnp.int32(0)))
    return jax.lax.scan(add, zero, jnp.arange(-(-count // size)))[0]


@jax.custom_vjp
def _cross_entropy(
    head: dict[str, Array], x: Array, labels: Array, weights: Array, mean: Array
) -> Array:
    """Returns the weighted sum of the cross-entropies."""

    def of_block(x: Array, labels: Array, weights: Array, is_new: Array) -> Array:
        return _weighted_loss(head, x - mean, labels, weights * is_new)

    return _sum_over_blocks(of_block, x, labels, weights)


def _weighted_loss(head: dict[str, Array], x: Array, labels: Array, weights: Array) -> Array:
    logits = x @ head['kernel'] + head['bias']
    return weights @ optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def _cross_entropy_forward(
    head: dict[str, Array], x: Array, labels: Array, weights: Array, mean: Array
) -> tuple[Array, Any]:
    """Returns the loss and its gradient, which a derivative of the scan would compute twice."""

    def of_block(x: Array, labels: Array, weights: Array, is_new: Array) -> Any:
        return jax.value_and_grad(_weighted_loss)(head, x - mean, labels, weights * is_new)

    return _sum_over_blocks(of_block, x, labels, weights)


def _cross_entropy_backward(gradient: Any, scale: Array) -> tuple[Any, ...]:
    return jax.tree.map(lambda x: x * scale, gradient), None, None, None, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


@jax.jit
def _fit(
    x: Float[Array, 'N D'],
    labels: Int[Array, 'N'],
    weights: Float[Array, 'N'],
    mean: Float[Array, 'D'] | Float[np.ndarray, 'D'],
    penalty: float | Array,
    head: dict[str, Array],
) -> dict[str, Array]:
    # The loss's second derivative is at most that of the penalty plus half the features'
    # covariance. In coordinates where this bound is 1 in all directions, L-BFGS takes some 20
    # steps; in the features' own it takes hundreds.
    def second_moment(x: Array, weights: Array, is_new: Array) -> Array:
        x = x - mean
        return x.T @ ((weights * is_new)[:, None] * x)

    covariance = _sum_over_blocks(second_moment, x, weights)
    diagonal = penalty + 1e-6 * jnp.trace(covariance)  # the trace against rounding in float32
    factor = jnp.linalg.cholesky(covariance / 2 + diagonal * jnp.eye(x.shape[1]))
    to_kernel = partial(jax.scipy.linalg.solve_triangular, factor, trans=1, lower=True)

    def loss(head: dict[str, Array]) -> Array:
        kernel = to_kernel(head['kernel'])
        own = {'kernel': kernel, 'bias': head['bias']}
        losses = _cross_entropy(own, x, labels, weights, mean)
        return losses + penalty / 2 * (kernel**2).sum()

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
