"""Schedules, SGD and LARS as PyTorch's users have them, with the predictor at a constant rate."""

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
    """Linear warm-up, then cosine to the end of the last epoch.

    Args:
      base: the rate at its highest.
      warmup_start_fraction: Share of it at the start of the warm-up.
      final_lr_fraction: Share of it at the end of the cosine.
      by_epoch: the cosine changes once an epoch, as in the official code; else every step.
    """
    if not 0 <= warmup_epochs < epochs:
        raise errors.UserError(
            f'optim.warmup_epochs is {warmup_epochs}; expected from 0 to under epochs = {epochs}'
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
    """PyTorch's SGD: weight decay joins the gradient before the momentum, no Nesterov."""
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
    """LARS (You et al., 2017) as apex's LARC without clipping, which the official code uses.

    Every parameter's decayed gradient g + wd w is scaled by trust |w| / (|g| + wd |w| + 1e-8),
    before the momentum; where w or g is zero the gradient is left as it is.
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
    """SGD on all parameters, BN and biases included (SimSiam, section 3), and its rates by name.

    Args:
      name: 'sgd' or 'lars'.
      learning_rate: base rate, times batch_size/256.
      exclude_bn_bias: BN and biases are neither decayed nor scaled by LARS.
      warmup_start_fraction, final_lr_fraction, by_epoch: see cosine_schedule.
      predictor_schedule: Rate of the predictor (Table 1): 'constant' at the base rate, 'decayed'
        as all others, or 'fixed' at 0, which leaves it as it was initialized.
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
    own = {'constant': optimizer(base), 'fixed': optax.set_to_zero()}[predictor_schedule]
    tx = optax.multi_transform({'predictor': own, 'rest': optimizer(schedule)}, _labels)
    rate = base if predictor_schedule == 'constant' else 0.0
    return tx, {'lr': schedule, 'lr_predictor': optax.constant_schedule(rate)}


OPTIMIZERS = {'sgd': torch_sgd, 'lars': lars}


def _matrices(params: Any) -> Any:
    return jax.tree.map(lambda w: w.ndim > 1, params)


def _labels(params: dict[str, Any]) -> dict[str, str]:
    return {part: 'predictor' if part == 'predictor' else 'rest' for part in params}
