"""Schedules and SGD as PyTorch does them, with the predictor at a constant rate."""

from typing import Any

import optax

from simsiam_jax import errors


def cosine_schedule(
    base: float,
    *,
    epochs: int,
    steps_per_epoch: int,
    warmup_epochs: int = 0,
    by_epoch: bool = False,
) -> optax.Schedule:
    """Linear warm-up from 0, then cosine to 0 at the end of the last epoch.

    Args:
      base: the rate at its highest.
      by_epoch: the cosine changes once an epoch, as in the official code; else every step.
    """
    if not 0 <= warmup_epochs < epochs:
        raise errors.UserError(
            f'optim.warmup_epochs is {warmup_epochs}; expected from 0 to under epochs = {epochs}'
        )
    unit = steps_per_epoch if by_epoch else 1
    cosine = optax.cosine_decay_schedule(base, (epochs - warmup_epochs) * steps_per_epoch // unit)
    warmup = warmup_epochs * steps_per_epoch
    return optax.join_schedules(
        [optax.linear_schedule(0.0, base, max(warmup, 1)), lambda step: cosine(step // unit)],
        [warmup],
    )


def torch_sgd(
    learning_rate: optax.ScalarOrSchedule, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
    """PyTorch's SGD: weight decay joins the gradient before the momentum, no Nesterov."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate, momentum=momentum)
    )


def make(
    *,
    batch_size: int,
    epochs: int,
    steps_per_epoch: int,
    learning_rate: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    warmup_epochs: int = 0,
    by_epoch: bool = True,
    constant_predictor: bool = True,
) -> tuple[optax.GradientTransformation, dict[str, optax.Schedule]]:
    """SGD on all parameters, BN and biases included (SimSiam, section 3), and its rates by name.

    Args:
      learning_rate: base rate, times batch_size/256.
      by_epoch: see cosine_schedule.
      constant_predictor: the predictor's rate stays at its start (Table 1).
    """
    base = learning_rate * batch_size / 256
    schedule = cosine_schedule(
        base,
        epochs=epochs,
        steps_per_epoch=steps_per_epoch,
        warmup_epochs=warmup_epochs,
        by_epoch=by_epoch,
    )
    decayed = torch_sgd(schedule, momentum, weight_decay)
    if not constant_predictor:
        return decayed, {'lr': schedule}
    constant = torch_sgd(base, momentum, weight_decay)
    tx = optax.multi_transform({'decayed': decayed, 'constant': constant}, _labels)
    return tx, {'lr': schedule, 'lr_predictor': optax.constant_schedule(base)}


def _labels(params: dict[str, Any]) -> dict[str, str]:
    return {part: 'constant' if part == 'predictor' else 'decayed' for part in params}
