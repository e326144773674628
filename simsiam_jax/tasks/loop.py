"""The loop of every training: steps, measurements, checkpoints."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from simsiam_jax import errors
from simsiam_jax.checkpoints import checkpoint
from simsiam_jax.data.reader import Reader
from simsiam_jax.data.sampler import IndexSampler
from simsiam_jax.logs import progress, writers
from simsiam_jax.runtime import distributed, profile
from simsiam_jax.tasks import memory
from simsiam_jax.tasks.inputs import ImageSet
from simsiam_jax.terminal import say
from simsiam_jax.training import step

Step = Callable[[step.TrainState, Any], tuple[step.TrainState, dict[str, jax.Array]]]


def train(
    config: ConfigDict,
    state: step.TrainState,
    train_step: Step,
    *,
    batches: Callable[[int, int], Iterator[Any]],
    sampler: IndexSampler,
    source: ImageSet,
    rates: dict[str, optax.Schedule],
    checkpoints: checkpoint.Checkpoints,
    log: writers.MetricWriter,
    evaluate: Callable[[step.TrainState], object] | None,
    block: int = 1,
    callback: Callable[[int, step.TrainState, Any, dict[str, jax.Array]], object] | None = None,
) -> step.TrainState:
    """Trains from the state's step to the last epoch.

    Args:
      config: gives the intervals: log.every_steps, checkpoint.every_epochs, eval.every_epochs.
      batches: (start, stop) -> device batches of these steps.
      rates: name -> learning rate by step, for the log.
      evaluate: called every eval.every_epochs, the end left out.
      callback: called after every step with its number, the state, its batch and its metrics.
      block: checkpoints are of its multiples only, the next one after their interval.

    Raises:
      UserError: the loss is no longer finite, or the end could not be saved.
      SystemExit: with 143 after SIGTERM or Ctrl-C, when all is saved.
    """
    start, last = int(state.step), config.epochs * sampler.steps_per_epoch

    def due(every: int) -> bool:
        return number % max(every, 1) == 0 or number == last

    def save() -> None:
        _check_finite(config, number, metrics, rates, checkpoints, state)
        checkpoints.save(state)

    program = train_step
    if config.debug_nans:
        train_step = _watched(train_step)
    clock, waiting = progress.Throughput(start, last, config.batch_size), False
    with (
        clock.line(),
        distributed.PreemptionHandler() as sigterm,
        profile.StepProfiler(config.profile, log.workdir) as window,
    ):
        for number, batch in enumerate(clock.timed(batches(start, last)), start + 1):
            window.at(number, state)
            if number == start + 1:
                memory.announce(config, program, state, batch)
                state, metrics = jax.block_until_ready(train_step(state, batch))
                clock.start(number)  # compiled by now
            else:
                state, metrics = train_step(state, batch)
                if due(config.log.every_steps):
                    _check_finite(config, number, metrics, rates, checkpoints)
                    now = {name: rate(number - 1) for name, rate in rates.items()}
                    log.training(number, metrics | now, clock)
                    if isinstance(source, Reader):
                        log.bad_images(source.bad)
                    if failure := checkpoints.failure():
                        say(f'warning: {failure}; training goes on, the next is tried when due')
            if callback:
                callback(number, state, batch, metrics)
            leaving = sigterm.should_stop(number)
            waiting = waiting or leaving or due(sampler.steps(config.checkpoint.every_epochs))
            if waiting and (number % block == 0 or number == last):
                waiting = False
                with clock.pause(state):
                    save()
            if leaving or number == last:
                failure = checkpoints.failure(wait=True)
                if failure:
                    raise errors.UserError(
                        f'{failure}; training has ended at step {number}: make room, and the same '
                        'command goes on from the last of them'
                    )
            if leaving:
                saved = checkpoints.last_saved() or 0
                say(f'asked to end: step {saved} is saved; the same command goes on from it')
                raise SystemExit(143)
            if evaluate and number < last and due(sampler.steps(config.eval.every_epochs)):
                with clock.pause(state):
                    evaluate(state)
    return state


def _watched(train_step: Step) -> Step:
    """The step; one that gives no finite loss or encoder is made again operation by operation.

    That raises FloatingPointError in the line whose result is the first NaN.
    """

    def watched(state: step.TrainState, batch: Any) -> tuple[step.TrainState, dict[str, jax.Array]]:
        before = jax.tree.map(jnp.copy, state)
        state, metrics = train_step(state, batch)
        if not _all_finite((metrics['loss'], checkpoint.encoder_variables(state))):
            jax.clear_caches()  # JAX looks into the first call of a program only
            with jax.debug_nans(True):
                train_step(before, batch)
        return state, metrics

    return watched


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]))


def _check_finite(
    config: ConfigDict,
    number: int,
    metrics: dict[str, jax.Array],
    rates: dict[str, optax.Schedule],
    checkpoints: checkpoint.Checkpoints,
    state: step.TrainState | None = None,
) -> None:
    """Raises UserError where the loss, or the encoder that is about to be saved, is not finite."""
    loss = float(metrics['loss'])
    what = f'the loss is {loss}' if not math.isfinite(loss) else ''
    # Of several heads those of too high a rate may diverge: the encoder is what all share.
    if not what and state and not _all_finite(checkpoint.encoder_variables(state)):
        what = 'weights are no longer finite'
    if not what:
        return
    now = ', '.join(f'{name} {float(rate(number - 1)):.4g}' for name, rate in rates.items())
    precision = config.get('model', {}).get('dtype', "the checkpoint's")
    other = ' or model.dtype=float32' if precision == 'bfloat16' else ''
    checkpoints.failure(wait=True)
    kept = checkpoints.last_saved()
    raise errors.UserError(
        f'{what} at step {number} ({now}, precision {precision}); '
        + (f'step {kept} is the last good checkpoint; ' if kept else 'nothing is saved yet; ')
        + f'try a lower learning rate, warm-up epochs{other}, and --config.debug_nans=True for '
        'where it comes from'
    )
