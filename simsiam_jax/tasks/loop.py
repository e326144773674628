"""The loop of every training: steps, measurements, checkpoints."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from simsiam_jax.data.order import Order
from simsiam_jax.data.reader import Reader
from simsiam_jax.tasks.inputs import Source
from simsiam_jax.training import checkpoint, step, writers
from simsiam_jax.training.writers import say


def train(
    config: ConfigDict,
    state: step.TrainState,
    train_step: Callable[[step.TrainState, Any], tuple[step.TrainState, dict[str, jax.Array]]],
    *,
    batches: Callable[[int, int], Iterator[Any]],
    order: Order,
    source: Source,
    rates: dict[str, optax.Schedule],
    checkpoints: checkpoint.Checkpoints,
    log: writers.Writers,
    evaluate: Callable[[step.TrainState], object] | None,
    block: int = 1,
) -> step.TrainState:
    """Trains from the state's step to the last epoch.

    Args:
      config: gives the intervals: log.every_steps, checkpoint.every_epochs, eval.every_epochs.
      batches: (start, stop) -> device batches of these steps.
      rates: name -> learning rate by step, for the log.
      evaluate: called every eval.every_epochs, the end left out.
      block: checkpoints are of its multiples only, the next one after their interval.

    Raises:
      SystemExit: with 143 after SIGTERM, when all is saved.
    """
    start, last = int(state.step), config.epochs * order.steps_per_epoch

    def due(every: int) -> bool:
        return number % max(every, 1) == 0 or number == last

    clock, save = writers.Clock(last), False
    with checkpoint.Sigterm() as sigterm:
        for number, batch in enumerate(clock.timed(batches(start, last)), start + 1):
            state, metrics = train_step(state, batch)
            if number == start + 1:
                jax.block_until_ready(metrics)
                clock.start(number)  # compiled by now
            elif due(config.log.every_steps):
                now = {name: rate(number - 1) for name, rate in rates.items()}
                log.training(number, metrics | now, clock, config.batch_size)
                if isinstance(source, Reader):
                    log.bad_images(source.bad)
            leaving = sigterm.received or checkpoints.preempted(number)
            save = save or leaving or due(order.steps(config.checkpoint.every_epochs))
            if save and (number % block == 0 or number == last):
                save = False
                with clock.pause(state):
                    checkpoints.save(state)
            if leaving:
                saved = checkpoints.latest_step or 0
                say(f'asked to end: step {saved} is saved; the same command goes on from it')
                raise SystemExit(143)
            if evaluate and number < last and due(order.steps(config.eval.every_epochs)):
                with clock.pause(state):
                    evaluate(state)
    return state
