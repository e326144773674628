"""Learning-rate schedules, and SGD and LARS with PyTorch's semantics."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from simsiam_jax import errors


def cosine_schedule(
    base: float | Array,
    *,
    epochs: int,
    steps_per_epoch: int,
    warmup_epochs: int = 0,
    warmup_start_fraction: float = 0.0,
    final_lr_fraction: float = 0.0,
    by_epoch: bool = False,
) -> optax.Schedule:
    """Returns a linear warm-up followed by a cosine decay to the end of the last epoch.

    Args:
      base: Highest learning rate.
      epochs: Number of epochs, warm-up included.
      steps_per_epoch: Number of steps in an epoch.
      warmup_epochs: Number of warm-up epochs.
      warmup_start_fraction: Share of `base` at the start of the warm-up.
      final_lr_fraction: Share of `base` at the end of the cosine.
      by_epoch: Changes the cosine once per epoch, as the official code does, not every step.

    Raises:
      UserError: The warm-up takes all epochs.
    """
    if not 0 <= warmup_epochs < epochs:
        raise errors.UserError(
            f'optim.warmup_epochs is {warmup_epochs}; expected 0 or more, below epochs={epochs}'
        )
    unit = steps_per_epoch if by_epoch else 1
    cosine = optax.cosine_decay_schedule(
        base, (epochs - warmup_epochs) * steps_per_epoch // unit, final_lr_fraction
    )
    warmup = warmup_epochs * steps_per_epoch
    return optax.join_schedules(
        [
            optax.linear_schedule(warmup_start_fraction * base, base, max(warmup, 1)),
            lambda step: cosine(step // unit),
        ],
        [warmup],
    )


def torch_sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float,
    weight_decay: Any,
    *,
    exclude_bn_bias: bool = False,
) -> optax.GradientTransformation:
    """Returns PyTorch's SGD: adds weight decay to the gradient before momentum; no Nesterov."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay, _matrices if exclude_bn_bias else None),
        optax.sgd(learning_rate, momentum=momentum),
    )


def lars(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float,
    weight_decay: Any,
    *,
    trust_coefficient: float = 1e-3,
    exclude_bn_bias: bool = False,
) -> optax.GradientTransformation:
    """Returns LARS (You et al., 2017) as apex's LARC without clipping, as in the official code.

    It scales the decayed gradient g + wd w of every parameter by
    ``trust_coefficient |w| / (|g| + wd |w| + 1e-8)``, before momentum. If w or g is zero, the
    gradient is unchanged.
    """

    def scale(w: Array, g: Array) -> Array:
        w_norm, g_norm = jnp.linalg.norm(w.ravel()), jnp.linalg.norm(g.ravel())
        ratio = trust_coefficient * w_norm / (g_norm + weight_decay * w_norm + 1e-8)
        return jnp.where((w_norm > 0) & (g_norm > 0), ratio * (g + weight_decay * w), g)

    def update(grads: Any, params: Any) -> Any:
        return jax.tree.map(scale, params, grads)

    larc = optax.stateless(update)
    return optax.chain(
        optax.masked(larc, _matrices) if exclude_bn_bias else larc,
        optax.sgd(learning_rate, momentum=momentum),
    )


def make(
    *,
    batch_size: int,
    epochs: int,
    steps_per_epoch: int,
    name: str = 'sgd',
    learning_rate: float | Array = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    exclude_bn_bias: bool = False,
    warmup_epochs: int = 0,
    warmup_start_fraction: float = 0.0,
    final_lr_fraction: float = 0.0,
    by_epoch: bool = True,
    predictor_schedule: str = 'constant',
) -> tuple[optax.GradientTransformation, dict[str, optax.Schedule]]:
    """Returns the optimizer and its learning-rate schedules by name.

    By default it is SGD on all parameters, BN and biases included (SimSiam, section 3).

    Args:
      batch_size: Global batch size.
      epochs: Number of epochs, warm-up included.
      steps_per_epoch: Number of steps in an epoch.
      name: 'sgd' or 'lars'.
      learning_rate: Base learning rate; the highest is base * batch_size/256.
      momentum: Momentum of the gradients.
      weight_decay: Weight decay.
      exclude_bn_bias: Excludes BN parameters and biases from weight decay and LARS scaling.
      warmup_epochs: Number of warm-up epochs.
      warmup_start_fraction: Share of the highest rate at the start of the warm-up.
      final_lr_fraction: Share of the highest rate at the end.
      by_epoch: Changes the cosine once per epoch, not every step.
      predictor_schedule: Learning rate of the predictor (Table 1): 'constant' stays at the highest
        rate, 'decayed' follows the other parameters, 'fixed' is 0, so the predictor keeps its
        initial weights.

    Raises:
      UserError: A choice is unknown, or the warm-up takes all epochs.
    """
    errors.check_choice('optim.name', name, OPTIMIZERS)
    base = learning_rate * batch_size / 256
    schedule = cosine_schedule(
        base,
        epochs=epochs,
        steps_per_epoch=steps_per_epoch,
        warmup_epochs=warmup_epochs,
        warmup_start_fraction=warmup_start_fraction,
        final_lr_fraction=final_lr_fraction,
        by_epoch=by_epoch,
    )

    def optimizer(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
        return OPTIMIZERS[name](rate, momentum, weight_decay, exclude_bn_bias=exclude_bn_bias)

    errors.check_choice(
        'optim.predictor_schedule', predictor_schedule, ('constant', 'decayed', 'fixed')
    )
    if predictor_schedule == 'decayed':
        return optimizer(schedule), {'lr': schedule}
    predictor = {'constant': optimizer(base), 'fixed': optax.set_to_zero()}[predictor_schedule]
    tx = optax.multi_transform({'predictor': predictor, 'rest': optimizer(schedule)}, _labels)
    rate = base if predictor_schedule == 'constant' else 0.0
    return tx, {'lr': schedule, 'lr_predictor': optax.constant_schedule(rate)}


OPTIMIZERS = {'sgd': torch_sgd, 'lars': lars}


def _matrices(params: Any) -> Any:
    return jax.tree.map(lambda w: w.ndim > 1, params)


def _labels(params: dict[str, Any]) -> dict[str, str]:
    return {part: 'predictor' if part == 'predictor' else 'rest' for part in params}
