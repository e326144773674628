"""The parts of a pre-training, built from its configuration."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simsiam_jax import config_keys, errors
from simsiam_jax.data import host
from simsiam_jax.data.recipe import Recipe
from simsiam_jax.data.sampler import IndexSampler
from simsiam_jax.methods import METHODS
from simsiam_jax.methods.contract import Method
from simsiam_jax.models import resnet
from simsiam_jax.tasks import collapse_callback, inputs
from simsiam_jax.tasks import knn as knn_lib
from simsiam_jax.terminal import say
from simsiam_jax.training import alternation, optim, step
from simsiam_jax.training import mesh as mesh_lib


@dataclasses.dataclass(frozen=True)
class PretrainSetup:
    """A configuration made into its parts.

    Attributes:
      batches: (start, stop) -> device batches of these steps.
      to_views: see step.make_train_step.
      init: () -> the state at step 0.
      rates: name -> learning rate by step.
      knn: None where config.eval names no labeled sets.
    """

    mesh: Mesh
    source: inputs.ImageSet
    sampler: IndexSampler
    recipes: tuple[Recipe, ...]
    method: Method
    tx: optax.GradientTransformation
    rates: dict[str, optax.Schedule]
    batches: Callable[[int, int], Iterator[Any]]
    to_views: Callable[[Any], list[jax.Array]]
    init: Callable[[], step.TrainState]
    knn: knn_lib.Knn | None


def build(config: ConfigDict, mesh: Mesh | None = None) -> PretrainSetup:
    """The parts of a run on the mesh (None: all devices); opens the data, trains nothing.

    With data.normalize 'auto' config.augment's mean and std become the measured ones.

    Raises:
      UserError: a key is unknown, a value impossible, or the data cannot be used.
    """
    config_keys.check(config)
    errors.check_choice('guard', config.guard, collapse_callback.CHOICES)
    mesh = mesh or mesh_lib.make_mesh()
    mesh_lib.check_batch_size(
        'batch_size', config.batch_size, mesh, config.optim.gradient_accumulation_steps
    )
    method = build_method(config)
    errors.check_choice('data.normalize', config.data.normalize, ('given', 'auto'))
    source = inputs.open_source(config.data.source, config.data)
    if config.data.normalize == 'auto':
        config.augment.update(inputs.measure_normalization(source))
    recipes = build_recipes(config)
    sampler = IndexSampler(config.seed, len(source), config.batch_size)
    tx, rates = build_optimizer(config, sampler.steps_per_epoch)
    batches = inputs.device_batches(source, sampler, recipes, config.data, mesh)
    to_views = functools.partial(host.to_views, recipes=recipes)
    shape = (recipes[0].size, recipes[0].size, config.data.channels)
    init = functools.partial(step.init_state, method, tx, config.seed, shape)
    knn = knn_lib.make_monitor(config, method.network.backbone, recipes[0], mesh)
    if method.uses_indices:
        remembered = jax.eval_shape(init).method_state.shape[0]
        if remembered != len(source):
            raise errors.UserError(
                f'config.method.images is {remembered}, but {config.data.source} has '
                f'{len(source)}; set it to that'
            )
    return PretrainSetup(
        mesh=mesh,
        source=source,
        sampler=sampler,
        recipes=recipes,
        method=method,
        tx=tx,
        rates=rates,
        batches=batches,
        to_views=to_views,
        init=init,
        knn=knn,
    )


def build_method(config: ConfigDict) -> Method:
    """The method on its backbone, BN synchronized over the data axis."""
    backbone = errors.build('model', resnet.make, config.model.to_dict(), axis_name=mesh_lib.DATA)
    arguments = config.method.to_dict()
    name = arguments.pop('name')
    errors.check_choice('method.name', name, METHODS)
    return errors.build('method', METHODS[name], arguments, backbone=backbone)


def build_optimizer(
    config: ConfigDict, steps_per_epoch: int
) -> tuple[optax.GradientTransformation, dict[str, optax.Schedule]]:
    """The optimizer, and the learning rates by name."""
    arguments = config.optim.to_dict()
    del arguments['gradient_accumulation_steps']  # the step's
    return errors.build(
        'optim',
        optim.make,
        arguments,
        batch_size=config.batch_size,
        epochs=config.epochs,
        steps_per_epoch=steps_per_epoch,
    )


def build_step(config: ConfigDict, parts: PretrainSetup) -> alternation.TrainStep:
    """The training step, alternating where config.alternate says so."""
    last = config.epochs * parts.sampler.steps_per_epoch
    block = block_of(config, parts)
    train_step = step.make_train_step(
        parts.method,
        parts.tx,
        parts.mesh,
        parts.to_views,
        last,
        accumulation_steps=config.optim.gradient_accumulation_steps,
        cached_targets=block > 1,
    )
    if block == 1:
        return train_step
    if config.method.name != 'simsiam' or parts.method.momentum:
        raise errors.UserError(
            f'config.alternate.steps is {config.alternate.steps}, which only method simsiam '
            'without momentum takes; set it to 1'
        )
    if config.debug_nans:
        raise errors.UserError(
            f'config.debug_nans makes a step twice, but config.alternate.steps='
            f'{config.alternate.steps} keeps targets for one time; set alternate.steps to 1'
        )
    errors.check_choice('alternate.dtype', config.alternate.dtype, ('float32', 'bfloat16'))
    dtype = jnp.dtype(config.alternate.dtype)
    size = alternation.cache_bytes(block, config.batch_size, config.method.dim, dtype)
    say(f'targets of {block} steps at once: {size / 2**20:,.0f} MiB on the hosts')
    return alternation.Alternating(
        parts.method,
        train_step,
        parts.mesh,
        parts.to_views,
        parts.batches,
        k=block,
        last=last,
        dtype=dtype,
    )


def block_of(config: ConfigDict, parts: PretrainSetup) -> int:
    """Steps that are taken on targets of the same weights."""
    if config.alternate.steps < 0:
        raise errors.UserError(
            f'config.alternate.steps is {config.alternate.steps}; expected 1 or more, or 0 for an '
            'epoch'
        )
    return config.alternate.steps or parts.sampler.steps_per_epoch


def build_recipes(config: ConfigDict) -> tuple[Recipe, ...]:
    """Of the two large views and the small ones."""
    augment, second = config.augment.to_dict(), config.second_view.to_dict()
    small = config.local_crops.to_dict()
    number = small.pop('number')
    if number < 0:
        raise errors.UserError(f'local_crops.number is {number}; expected 0 or more')
    recipes = [
        errors.build('augment', Recipe, augment),
        errors.build('second_view', Recipe, augment | second),
        *[errors.build('local_crops', Recipe, augment | small)] * number,
    ]
    return tuple(recipe.for_channels(config.data.channels) for recipe in recipes)
