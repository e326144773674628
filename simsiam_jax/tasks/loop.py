"""The training loop: steps, logs, evaluations and checkpoints."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from simsiam_jax import errors
from simsiam_jax.checkpoints import checkpoint
from simsiam_jax.data import sources
from simsiam_jax.data.reader import Reader
from simsiam_jax.data.sampler import IndexSampler
from simsiam_jax.logs import progress, writers
from simsiam_jax.runtime import distributed, profile
from simsiam_jax.tasks import memory
from simsiam_jax.tasks.inputs import ImageSet
from simsiam_jax.terminal import say
from simsiam_jax.training import step

# (step, state, metrics of the step) -> values to log
Observe = Callable[[int, step.TrainState, dict[str, jax.Array]], dict[str, float]]
Step = Callable[[step.TrainState, Any], tuple[step.TrainState, dict[str, jax.Array]]]


@contextlib.contextmanager
def open_workdir(
    workdir: str,
    config: dict[str, Any],
    sampler: IndexSampler,
    source: ImageSet,
    **same_run: Sequence[str],
) -> Iterator[tuple[checkpoint.Checkpoints, writers.MetricWriter]]:
    """Opens the checkpoints and the logs of a run.

    Args:
      workdir: Folder of the run.
      config: Configuration of the run.
      sampler: Order of the training images.
      source: Training images.
      **same_run: Keys that may change when the run is resumed: `free`, `place` of checkpoint.open.

    Raises:
      UserError: The workdir cannot be used, see checkpoint.open.
    """
    with (
        checkpoint.open(
            workdir,
            config,
            max_to_keep=config['checkpoint']['max_to_keep'],
            keep_period=sampler.steps(config['checkpoint']['keep_period']),
            images=sources.fingerprint(source),
            names=functools.partial(sources.image_names, source),
            **same_run,
        ) as checkpoints,
        writers.open_log(workdir, config, checkpoints.start_step or 0) as log,
    ):
        log.start(sampler.size, sampler.steps_per_epoch)
        yield checkpoints, log


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
    observe: Observe | None = None,
) -> step.TrainState:
    """Trains from the state's step to the last epoch, and returns the last state.

    Args:
      config: Configuration of the run. Its log.every_steps, checkpoint.every_epochs and
        eval.every_epochs are the intervals.
      state: State on the devices; it is donated.
      train_step: Function (state, batch) -> (state, metrics).
      batches: Function (start, stop) -> device batches of these steps.
      sampler: Order of the training images.
      source: Training images.
      rates: Name -> learning rate by step, for the log.
      checkpoints: Where the state is saved.
      log: Where metrics are written.
      evaluate: Called with the state every eval.every_epochs, except after the last step.
      block: A step is saved only if it is a multiple of this number or the last.
      callback: Called after each step with its number, the state, the batch and the metrics.
      observe: Called when metrics are logged; what it returns is logged too.

    Raises:
      UserError: The loss is not finite, or the last state could not be saved.
      TemporaryError: The images cannot be read for too long; the state was saved if possible.
      SystemExit: With 143, after the state was saved on SIGTERM or Ctrl-C.
    """
    start, last = int(state.step), config.epochs * sampler.steps_per_epoch
    log_every = min(config.log.every_steps, max(1, last // 10))  # ten points make a curve

    def due(every: int) -> bool:
        return number % max(every, 1) == 0 or number == last

    def due_after(epochs: int | float) -> bool:
        return due(sampler.steps(epochs) if epochs else last)

    program = train_step
    if config.debug_nans:
        train_step = _raise_at_nan(train_step)
    throughput, waiting = progress.Throughput(start, last, config.batch_size), False
    number = start
    with (
        throughput.line(),
        distributed.PreemptionHandler() as preemption,
        profile.StepProfiler(config.profile, log.workdir) as profiler,
    ):
        try:
            for number, batch in enumerate(throughput.timed(batches(start, last)), start + 1):
                profiler.before_step(number, state)
                if number == start + 1:
                    memory.announce(config, program, state, batch)
                    state, metrics = jax.block_until_ready(train_step(state, batch))
                    throughput.start(number)  # the step is compiled from here on
                    if start and due(log_every):  # its time, with that of compiling, says nothing
                        log.scalars(number, {f'train/{k}': float(x) for k, x in metrics.items()})
                else:
                    state, metrics = train_step(state, batch)
                    if due(log_every):
                        _check_finite(config, number, metrics, rates, checkpoints)
                        now = {name: rate(number - 1) for name, rate in rates.items()}
                        log.training(number, metrics | now, throughput)
                        if observe:
                            with throughput.pause(state):
                                log.scalars(number, observe(number, state, metrics))
                        if isinstance(source, Reader):
                            log.bad_images(source.bad)
                        if failure := checkpoints.failure():
                            say(f'warning: {failure}; training continues and tries the next save')
                if callback:
                    callback(number, state, batch, metrics)
                stopping = preemption.should_stop(number)
                waiting = waiting or stopping or due_after(config.checkpoint.every_epochs)
                if waiting and (number % block == 0 or number == last):
                    waiting = False
                    with throughput.pause(state):
                        _check_finite(config, number, metrics, rates, checkpoints, state)
                        log.flush(wait=True)
                        checkpoints.save(state)
                if stopping or number == last:
                    _wait_for_save(checkpoints, number)
                if stopping:
                    saved = checkpoints.last_saved() or 0
                    say(f'stop requested: saved step {saved}; rerun the same command to resume')
                    raise SystemExit(143)
                if evaluate and number < last and due_after(config.eval.every_epochs):
                    with throughput.pause(state):
                        evaluate(state)
        except errors.TemporaryError as error:
            if number > start and number % block == 0:
                _check_finite(config, number, metrics, rates, checkpoints, state)
                checkpoints.save(state)
            if failure := checkpoints.failure(wait=True):
                say(f'warning: {failure}')
            saved = checkpoints.last_saved() or 0
            raise errors.TemporaryError(f'{error}. Step {saved} is saved') from error
    return state


def _wait_for_save(checkpoints: checkpoint.Checkpoints, number: int) -> None:
    """Raises UserError if the last save fails, TemporaryError if the storage is away."""
    if failure := checkpoints.failure(wait=True):
        if checkpoints.storage_failed:
            raise errors.TemporaryError(f'{failure}; training stopped at step {number}')
        raise errors.UserError(
            f'{failure}; training stopped at step {number}. Free disk space, then rerun the same '
            'command to resume from the last checkpoint'
        )


def _raise_at_nan(train_step: Step) -> Step:
    """Returns a step that is repeated operation by operation if its loss or encoder is not finite.

    The repetition raises FloatingPointError at the operation whose result is the first NaN.
    """

    def checked(state: step.TrainState, batch: Any) -> tuple[step.TrainState, dict[str, jax.Array]]:
        before = jax.tree.map(jnp.copy, state)
        state, metrics = train_step(state, batch)
        if not _all_finite((metrics['loss'], checkpoint.encoder_variables(state))):
            jax.clear_caches()  # JAX checks only the first call of a program
            with jax.debug_nans(True):
                train_step(before, batch)
        return state, metrics

    return checked


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
    """Raises UserError if the loss, or the encoder of a state to be saved, is not finite."""
    loss = float(metrics['loss'])
    problem = f'the loss is {loss}' if not math.isfinite(loss) else ''
    # Heads with too high a learning rate may diverge, but all heads share the encoder.
    if not problem and state and not _all_finite(checkpoint.encoder_variables(state)):
        problem = 'weights are not finite'
    if not problem:
        return
    now = ', '.join(f'{name} {float(rate(number - 1)):.4g}' for name, rate in rates.items())
    precision = config.get('model', {}).get('dtype', "the checkpoint's")
    other = ' or model.dtype=float32' if precision == 'bfloat16' else ''
    checkpoints.failure(wait=True)
    saved = checkpoints.last_saved()
    raise errors.UserError(
        f'{problem} at step {number} ({now}, precision {precision}); '
        + (f'step {saved} is the last good checkpoint. ' if saved else 'nothing is saved yet. ')
        + f'Try a lower learning rate, warm-up epochs{other}, or find the operation with '
        '--config.debug_nans=True'
    )
