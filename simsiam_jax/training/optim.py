"""Learning-rate schedules, and optimizers: SGD and LARS as PyTorch's, AdamW, and optax's."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from simsiam_jax import errors, import_path
from simsiam_jax.training.masks import decayed, keep_frozen


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
        optax.add_decayed_weights(weight_decay, decayed if exclude_bn_bias else None),
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
        optax.masked(larc, decayed) if exclude_bn_bias else larc,
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
    arguments: Mapping[str, Any] | None = None,
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
      name: 'sgd', 'lars', 'adamw', or the import path of an optax optimizer.
      learning_rate: Base learning rate; the highest is base * batch_size/256.
      momentum: Momentum of the gradients.
      weight_decay: Weight decay.
      exclude_bn_bias: Excludes BN parameters and biases from weight decay and LARS scaling.
      arguments: Arguments of other optimizers than SGD and LARS; see from_name.
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
    create = from_name(name, arguments or {})
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
        return create(rate, momentum, weight_decay, exclude_bn_bias=exclude_bn_bias)

    errors.check_choice(
        'optim.predictor_schedule', predictor_schedule, ('constant', 'decayed', 'fixed')
    )
    if predictor_schedule == 'decayed':
        return keep_frozen(optimizer(schedule)), {'lr': schedule}
    predictor = {'constant': optimizer(base), 'fixed': optax.set_to_zero()}[predictor_schedule]
    tx = optax.multi_transform({'predictor': predictor, 'rest': optimizer(schedule)}, _labels)
    rate = base if predictor_schedule == 'constant' else 0.0
    return keep_frozen(tx), {'lr': schedule, 'lr_predictor': optax.constant_schedule(rate)}


OPTIMIZERS = {'sgd': torch_sgd, 'lars': lars}


def from_name(name: str, arguments: Mapping[str, Any]) -> Callable[..., Any]:
    """Returns a function (learning_rate, momentum, weight_decay, exclude_bn_bias) -> optimizer.

    All optimizers but SGD and LARS decay only the weights that `decayed` names, unless
    ``arguments['decay_all']`` is True.

    Args:
      name: 'sgd', 'lars', 'adamw', or the import path of a function with the argument
        learning_rate, such as 'optax:lion'. It gets momentum, weight_decay and mask if it takes
        them.
      arguments: More arguments of the function; SGD and LARS take none.

    Raises:
      UserError: The name or an argument is unknown.
    """
    if name in OPTIMIZERS:
        if arguments:
            raise errors.UserError(
                f'optim.arguments is {dict(arguments)}, but {name} takes none. Remove them'
            )
        return OPTIMIZERS[name]
    if ':' in name:
        function = import_path.load('optim.name', name)
    else:
        errors.check_choice('optim.name', name, (*OPTIMIZERS, 'adamw'))
        function = optax.adamw
    own = dict(arguments)
    decay_all = own.pop('decay_all', False)
    fixed = ('learning_rate', 'weight_decay', 'mask', 'momentum')
    import_path.check_arguments('optim.arguments', function, own, fixed)
    if not import_path.takes(function, 'learning_rate'):
        raise errors.UserError(
            f'optim.name is {name!r}, which takes no learning_rate; expected an optimizer such as '
            'optax:lion'
        )

    def create(
        learning_rate: optax.ScalarOrSchedule,
        momentum: float,
        weight_decay: Any,
        *,
        exclude_bn_bias: bool = False,
    ) -> optax.GradientTransformation:
        given = {'weight_decay': weight_decay, 'mask': None if decay_all else decayed}
        given['momentum'] = momentum
        taken = {key: x for key, x in given.items() if import_path.takes(function, key)}
        if function is optax.adamw:
            taken['b1'] = momentum
        if 'weight_decay' not in taken and not _is_zero(weight_decay):
            errors.warn_once(f'{name} takes no weight_decay; optim.weight_decay is not used')
        return function(learning_rate=learning_rate, **taken | own)

    return create


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and not value


def _labels(params: dict[str, Any]) -> dict[str, str]:
    return {part: 'predictor' if part == 'predictor' else 'rest' for part in params}
