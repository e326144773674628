"""Builds the parts of a pre-training run from its configuration."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simsiam_jax import config as config_lib
from simsiam_jax import config_keys, errors, method_defaults
from simsiam_jax.data import host
from simsiam_jax.data.recipe import Recipe
from simsiam_jax.data.sampler import IndexSampler
from simsiam_jax.methods import METHODS
from simsiam_jax.methods.contract import Method
from simsiam_jax.models import backbones, resnet
from simsiam_jax.tasks import collapse_callback, inputs
from simsiam_jax.tasks.features import Encode, make_encode
from simsiam_jax.tasks.knn import Knn, make_monitor
from simsiam_jax.terminal import say
from simsiam_jax.training import alternation, optim, step
from simsiam_jax.training import mesh as mesh_lib

_ADAMW_RATE = 0.01  # base rate above which AdamW gets a warning


@dataclasses.dataclass(frozen=True)
class PretrainSetup:
    """The parts of a pre-training run.

    Attributes:
      mesh: Devices of the run.
      source: Training images.
      sampler: Order of the images.
      recipes: Augmentation of each view, the two large views first.
      method: What is trained.
      tx: Optimizer.
      rates: Name -> learning rate by step.
      batches: Function (start, stop) -> device batches of these steps.
      to_views: Function, a device's share of a batch -> normalized views [B, H, W, C].
      init: Function () -> state at step 0.
      encode: Backbone with its normalization, for extract_features.
      knn: Evaluation during training; None if config.eval names no labeled sets.
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
    encode: Encode
    knn: Knn | None


def build(
    config: ConfigDict, mesh: Mesh | None = None, *, measured: dict[str, Any] | None = None
) -> PretrainSetup:
    """Opens the data and builds the parts of a run; trains nothing.

    Args:
      config: Configuration of the run. Keys that depend on others or on the images get their
        values: data.range, augment.mean and augment.std if they are measured, and those of
        inputs.resolve.
      mesh: Devices to use; None uses all.
      measured: augment.mean and augment.std if data.normalize is 'auto'; None measures them.

    Raises:
      UserError: A key is unknown, a value is impossible, or the data cannot be used.
    """
    config_keys.check(config)
    default = config_lib.default().model.to_dict()
    ignored = backbones.ignored_keys(config.model.to_dict(), default)
    for warning in filter(None, (method_defaults.other_schedule(config), ignored)):
        say(f'warning: {warning}')
    if config.optim.name == 'adamw' and config.optim.learning_rate > _ADAMW_RATE:
        say(
            f'warning: optim.learning_rate is {config.optim.learning_rate:g}, high for adamw. Set '
            '--config.optim.learning_rate=1e-3 or less'
        )
    inputs.resolve(config, config.data.source)
    errors.check_choice('guard', config.guard, collapse_callback.CHOICES)
    mesh = mesh or mesh_lib.make_mesh()
    mesh_lib.check_batch_size(
        'batch_size', config.batch_size, mesh, config.optim.gradient_accumulation_steps
    )
    method = build_method(config)
    errors.check_choice('data.normalize', config.data.normalize, ('given', 'auto'))
    source = inputs.open_source(config.data.source, config.data)
    if config.data.normalize == 'auto':
        config.augment.update(measured or inputs.measure_normalization(source))
    recipes = build_recipes(config)
    sampler = IndexSampler(config.seed, len(source), config.batch_size)
    tx, rates = build_optimizer(config, sampler.steps_per_epoch)
    batches = inputs.device_batches(source, sampler, recipes, config.data, mesh)
    to_views = functools.partial(host.to_views, recipes=recipes)
    shape = (recipes[0].size, recipes[0].size, config.data.channels)
    init = functools.partial(step.init_state, method, tx, config.seed, shape)
    if method.uses_indices:
        images = jax.eval_shape(init).method_state.shape[0]
        if images != len(source):
            raise errors.UserError(
                f'config.method.images is {images}, but {config.data.source} has {len(source)} '
                f'images. Set --config.method.images={len(source)}'
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
        encode=make_encode(method.network.backbone, recipes[0].mean, recipes[0].std),
        knn=make_monitor(config, recipes[0], mesh, {config.data.source: source}),
    )


def resume_input(config: ConfigDict, stored: Mapping[str, Any]) -> dict[str, Any] | None:
    """Sets how images are decoded as when a run began, and returns the mean and std it measured.

    Args:
      config: Configuration of this start, changed in place.
      stored: Configuration of the run.

    Returns:
      The `measured` of `build`; None if the run measured none.
    """
    data, before = config.data, stored['data']
    if data.range == 'auto':
        data.range = before['range']
    for key in ('orientation', 'background'):
        value = tuple(before[key]) if key == 'background' else before[key]
        if data[key] != value:
            say(f'config.data.{key} is {value}, as when the run in the workdir began')
            data[key] = value
    if before['normalize'] != 'auto':
        return None
    return {key: tuple(stored['augment'][key]) for key in ('mean', 'std')}


def without_measuring(config: ConfigDict) -> ConfigDict:
    """Returns a copy with placeholders for what would be measured on the images."""
    config = config.copy_and_resolve_references()
    if config.data.range == 'auto':
        config.data.range = 'dtype'
    if config.data.normalize == 'auto':
        config.data.normalize = 'given'
        config.augment.update(mean=(0.5,), std=(0.25,))
    return config


def build_method(config: ConfigDict) -> Method:
    """Returns the method on its backbone, with BN synchronized over the data axis.

    Raises:
      UserError: A key is unknown or a value is impossible.
    """
    if config.merge_views and not backbones.is_portable(config.model.name):
        raise errors.UserError(
            f'config.merge_views is True, but {config.model.name} may have a momentum of BN other '
            f'than {resnet.BN_MOMENTUM}. Set config.merge_views=False'
        )
    backbone = backbones.from_config(config.to_dict(), axis_name=mesh_lib.DATA)
    arguments = config.method.to_dict()
    name = arguments.pop('name')
    errors.check_choice('method.name', name, METHODS)
    return errors.build('method', METHODS[name], arguments, backbone=backbone)


def build_optimizer(
    config: ConfigDict, steps_per_epoch: int
) -> tuple[optax.GradientTransformation, dict[str, optax.Schedule]]:
    """Returns the optimizer and the learning rates by name."""
    arguments = config.optim.to_dict()
    del arguments['gradient_accumulation_steps']  # used by the training step
    return errors.build(
        'optim',
        optim.make,
        arguments,
        batch_size=config.batch_size,
        epochs=config.epochs,
        steps_per_epoch=steps_per_epoch,
    )


def build_step(config: ConfigDict, setup: PretrainSetup) -> alternation.TrainStep:
    """Returns the training step; it alternates if config.alternate.steps is not 1.

    Raises:
      UserError: The configuration does not allow alternation.
    """
    last = config.epochs * setup.sampler.steps_per_epoch
    block = block_of(config, setup)
    train_step = step.make_train_step(
        setup.method,
        setup.tx,
        setup.mesh,
        setup.to_views,
        last,
        accumulation_steps=config.optim.gradient_accumulation_steps,
        merge_views=config.merge_views,
        cached_targets=block > 1,
    )
    if block == 1:
        return train_step
    if config.method.name != 'simsiam' or setup.method.momentum:
        raise errors.UserError(
            f'config.alternate.steps is {config.alternate.steps}; expected 1, unless the method is '
            'simsiam without momentum. Set it to 1'
        )
    if config.debug_nans:
        raise errors.UserError(
            f'config.debug_nans repeats a step, but config.alternate.steps='
            f'{config.alternate.steps} keeps its targets for one call only. Set '
            'config.alternate.steps=1'
        )
    errors.check_choice('alternate.dtype', config.alternate.dtype, ('float32', 'bfloat16'))
    dtype = jnp.dtype(config.alternate.dtype)
    size = alternation.cache_bytes(block, config.batch_size, config.method.dim, dtype)
    say(f'caching the targets of {block} steps: {size / 2**20:,.0f} MiB of host memory')
    return alternation.Alternating(
        setup.method,
        train_step,
        setup.mesh,
        setup.to_views,
        setup.batches,
        k=block,
        last=last,
        dtype=dtype,
    )


def block_of(config: ConfigDict, setup: PretrainSetup) -> int:
    """Returns the number of steps that use targets of the same weights.

    Raises:
      UserError: config.alternate.steps is negative.
    """
    if config.alternate.steps < 0:
        raise errors.UserError(
            f'config.alternate.steps is {config.alternate.steps}; expected 1 or more, or 0 for one '
            'epoch'
        )
    return config.alternate.steps or setup.sampler.steps_per_epoch


def build_recipes(config: ConfigDict) -> tuple[Recipe, ...]:
    """Returns the augmentation of the two large views and of the local crops.

    Raises:
      UserError: A key is unknown or a value is impossible.
    """
    augment, second = config.augment.to_dict(), config.second_view.to_dict()
    local = config.local_crops.to_dict()
    number = local.pop('number')
    if number < 0:
        raise errors.UserError(f'config.local_crops.number is {number}; expected 0 or more')
    recipes = [
        errors.build('augment', Recipe, augment),
        errors.build('second_view', Recipe, augment | second),
        *[errors.build('local_crops', Recipe, augment | local)] * number,
    ]
    return tuple(recipe.for_channels(config.data.channels) for recipe in recipes)
