"""Pre-training: build, restore, loop."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simsiam_jax import config as config_lib
from simsiam_jax import errors
from simsiam_jax.data import host
from simsiam_jax.data.order import Order
from simsiam_jax.data.recipe import Recipe
from simsiam_jax.methods import METHODS
from simsiam_jax.methods.contract import Method
from simsiam_jax.models import resnet
from simsiam_jax.tasks import inputs, loop, memory, summary, collapse_callback
from simsiam_jax.tasks import knn as knn_lib
from simsiam_jax.terminal import say
from simsiam_jax.training import alternation, guard, optim, step
from simsiam_jax.checkpoints import checkpoint, weights
from simsiam_jax.logs import writers
from simsiam_jax.training import mesh as mesh_lib


@dataclasses.dataclass(frozen=True)
class Run:
    """A configuration made into its parts.

    Attributes:
      batches: (start, stop) -> device batches of these steps.
      to_views: see step.make_train_step.
      init: () -> the state at step 0.
      rates: name -> learning rate by step.
      knn: None where config.eval names no labelled sets.
    """

    mesh: Mesh
    source: inputs.Source
    order: Order
    recipes: tuple[Recipe, ...]
    method: Method
    tx: optax.GradientTransformation
    rates: dict[str, optax.Schedule]
    batches: Callable[[int, int], Iterator[Any]]
    to_views: Callable[[Any], list[jax.Array]]
    init: Callable[[], step.TrainState]
    knn: knn_lib.Knn | None


def build(config: ConfigDict, mesh: Mesh | None = None) -> Run:
    """The parts of a run on the mesh (None: all devices); opens the data, trains nothing.

    With data.normalize 'auto' config.augment's mean and std become the measured ones.

    Raises:
      UserError: a key is unknown, a value impossible, or the data cannot be used.
    """
    config_lib.check(config)
    errors.check_choice('guard', config.guard, collapse_callback.CHOICES)
    mesh = mesh or mesh_lib.make_mesh()
    mesh_lib.check_batch_size('batch_size', config.batch_size, mesh, config.optim.accumulate)
    method = build_method(config)
    errors.check_choice('data.normalize', config.data.normalize, ('given', 'auto'))
    source = inputs.open_source(config.data.source, config.data)
    if config.data.normalize == 'auto':
        config.augment.update(inputs.measure_normalisation(source))
    recipes = build_recipes(config)
    order = Order(config.seed, len(source), config.batch_size)
    tx, rates = build_optimiser(config, order.steps_per_epoch)
    batches = inputs.device_batches(source, order, recipes, config.data, mesh)
    to_views = functools.partial(host.to_views, recipes=recipes)
    shape = (recipes[0].size, recipes[0].size, config.data.channels)
    init = functools.partial(step.init_state, method, tx, config.seed, shape)
    knn = knn_lib.of_training(config, method.network.backbone, recipes[0], mesh)
    if method.by_image:
        remembered = jax.eval_shape(init).memory.shape[0]
        if remembered != len(source):
            raise errors.UserError(
                f'config.method.images is {remembered}, but {config.data.source} has '
                f'{len(source)}; set it to that'
            )
    return Run(mesh, source, order, recipes, method, tx, rates, batches, to_views, init, knn)


def build_method(config: ConfigDict) -> Method:
    """The method on its backbone, BN synchronised over the data axis."""
    backbone = errors.build('model', resnet.make, config.model.to_dict(), axis_name=mesh_lib.DATA)
    arguments = config.method.to_dict()
    name = arguments.pop('name')
    errors.check_choice('method.name', name, METHODS)
    return errors.build('method', METHODS[name], arguments, backbone=backbone)


def build_optimiser(
    config: ConfigDict, steps_per_epoch: int
) -> tuple[optax.GradientTransformation, dict[str, optax.Schedule]]:
    """The optimiser, and the learning rates by name."""
    arguments = config.optim.to_dict()
    del arguments['accumulate']  # the step's
    return errors.build(
        'optim',
        optim.make,
        arguments,
        batch_size=config.batch_size,
        epochs=config.epochs,
        steps_per_epoch=steps_per_epoch,
    )


def build_step(config: ConfigDict, parts: Run) -> alternation.TrainStep:
    """The training step, alternating where config.alternate says so."""
    last = config.epochs * parts.order.steps_per_epoch
    block = block_of(config, parts)
    train_step = step.make_train_step(
        parts.method,
        parts.tx,
        parts.mesh,
        parts.to_views,
        last,
        accumulate=config.optim.accumulate,
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


def block_of(config: ConfigDict, parts: Run) -> int:
    """Steps that are taken on targets of the same weights."""
    if config.alternate.steps < 0:
        raise errors.UserError(
            f'config.alternate.steps is {config.alternate.steps}; expected 1 or more, or 0 for an '
            'epoch'
        )
    return config.alternate.steps or parts.order.steps_per_epoch


def build_recipes(config: ConfigDict) -> tuple[Recipe, ...]:
    """Of the two large views and the small ones."""
    augment, second = config.augment.to_dict(), config.second_view.to_dict()
    small = config.small_views.to_dict()
    number = small.pop('number')
    if number < 0:
        raise errors.UserError(f'small_views.number is {number}; expected 0 or more')
    recipes = [
        errors.build('augment', Recipe, augment),
        errors.build('second_view', Recipe, augment | second),
        *[errors.build('small_views', Recipe, augment | small)] * number,
    ]
    return tuple(recipe.for_channels(config.data.channels) for recipe in recipes)


def run(config: ConfigDict, workdir: str) -> None:
    """Trains to the last epoch, going on from the latest checkpoint in `workdir`.

    A new run starts from the weights of config.init_from, or of a checkpoint of step 0, which
    tools/convert.py writes.

    Raises:
      UserError: the configuration, the data or the workdir cannot be used.
      SystemExit: with 143 after SIGTERM or Ctrl-C, when all is saved.
    """
    parts = build(config)
    say(
        f'{config.method.name} on {config.model.name}: {parts.order.size} images of '
        f'{config.data.source}, {config.epochs} epochs of {parts.order.steps_per_epoch} steps, '
        f'batch {config.batch_size} on {parts.mesh.size} x {jax.devices()[0].device_kind}'
    )
    if (kept := jax.eval_shape(parts.init).memory) is not None:
        say(summary.kept(config.method.name, kept))
    train_step = build_step(config, parts)
    if config.dry_run:
        batch = next(parts.batches(0, 1))

        def made(changed: ConfigDict) -> alternation.TrainStep:
            return build_step(changed, dataclasses.replace(parts, method=build_method(changed)))

        say(memory.table(config, made, jax.eval_shape(parts.init), batch))
        say(summary.dry_run(train_step, parts.init, batch, parts.mesh))
        return
    with contextlib.ExitStack() as stack:
        checkpoints = checkpoint.Checkpoints(
            workdir,
            config.to_dict(),
            keep=config.checkpoint.keep,
            keep_every=parts.order.steps(config.checkpoint.keep_every),
        )
        stack.callback(checkpoints.close)
        log = stack.enter_context(
            writers.open_log(workdir, config.to_dict(), checkpoints.latest_step or 0)
        )
        log.start(parts.order.size, parts.order.steps_per_epoch)
        initial, at_start = parts.init(), 'random initialisation'
        origin = config.init_from or (workdir if checkpoints.latest_step == 0 else '')
        if origin and not checkpoints.latest_step:
            initial, text = weights.take(initial, weights.open_weights(origin))
            at_start = 'before training'
            say(text)
        state = mesh_lib.replicate(initial, parts.mesh)
        say(summary.parameters(state.params))
        log.text('parameters.txt', summary.overview(state.params))
        guarding = None
        if config.guard != 'off':
            measuring = guard.Guard(
                parts.method,
                parts.mesh,
                parts.to_views,
                batch_size=config.batch_size,
                last=config.epochs * parts.order.steps_per_epoch,
            )
            guarding = collapse_callback.Watch(config, measuring, parts.source, checkpoints, log)
            batches = parts.batches(0, measuring.batches)
            guarding.begin(state, batches, checkpoints.latest_step or 0)
        baselines = {}
        if parts.knn and config.eval.baselines:
            baselines['raw pixels'] = parts.knn.pixels()[0].top1
            baselines[at_start] = parts.knn(state)[0].top1
        if checkpoints.latest_step:
            state = checkpoints.restore(state)
            say(f'resuming from step {int(state.step)} in {workdir}')
        else:
            log.views(summary.view_grid(next(parts.batches(0, 1)), parts.to_views, parts.recipes))
            if baselines:
                log.scalars(0, {'eval/knn_top1': baselines[at_start]})
        state = loop.train(
            config,
            state,
            train_step,
            batches=parts.batches,
            order=parts.order,
            source=parts.source,
            rates=parts.rates,
            checkpoints=checkpoints,
            log=log,
            evaluate=functools.partial(_evaluate, parts.knn, log) if parts.knn else None,
            block=block_of(config, parts),
            watch=guarding,
        )
        if parts.knn:
            top1 = _evaluate(parts.knn, log, state)
            if baselines:
                say(summary.table(baselines | {'after training': top1}))


def _evaluate(knn: knn_lib.Knn, log: writers.Writers, state: step.TrainState) -> float:
    top1 = knn(state)[0].top1
    log.scalars(int(state.step), {'eval/knn_top1': top1})
    say(f'step {int(state.step)}  kNN top-1 {top1:.4f}')
    return top1
