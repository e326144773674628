"""Estimates the device memory of a step, and advises what to change if it does not fit."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from simsiam_jax import errors
from simsiam_jax.models import backbones
from simsiam_jax.terminal import say
from simsiam_jax.training import peak_memory

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes per device: the state, its share of the batch, and the activations of a step."""

    state: int
    batch: int
    activations: int

    @property
    def total(self) -> int:
        return self.state + self.batch + self.activations

    def __str__(self) -> str:
        return (
            f'about {self.total / _GIB:.2f} GiB per device (state {self.state / _GIB:.2f}, batch '
            f'{self.batch / _GIB:.2f}, activations {self.activations / _GIB:.2f})'
        )


def size_of(tree: Any) -> int:
    """Returns the bytes of a tree's arrays."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def estimate(train_step: Any, state: Any, batch: Any) -> Estimate:
    """Estimates the memory of a step from shapes alone, without compiling it.

    Args:
      train_step: Compiled function of (state, batch).
      state: State, or its shapes.
      batch: Device batch.
    """
    local_batch = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(batch)
    )
    program = train_step.trace(state, batch).jaxpr
    return Estimate(size_of(state), local_batch, peak_memory.peak_bytes(program))


def table(
    config: ConfigDict, make_step: Callable[[ConfigDict], Any], state: Any, batch: Any
) -> str:
    """Returns the estimate as configured, and with each key that reduces memory changed.

    Args:
      config: Configuration of the run.
      make_step: Function, configuration -> training step; no step is compiled.
      state: State, or its shapes.
      batch: Device batch.
    """
    changes: dict[str, dict[str, Any]] = {'as configured': {}}
    changes |= {
        f'{key}={value}': {key: value} for key, (value, _) in memory_options(config).items()
    }
    limit = device_limit()
    capacity = f'has {limit / _GIB:.2f} GiB' if limit else 'does not report its size'
    rows = [f'memory, estimated from shapes; the device {capacity}']
    for name, change in changes.items():
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(change)
        row = estimate(make_step(changed), state, batch)
        rows.append(f'  {name:<{max(map(len, changes))}}  {row}')
    return '\n'.join(rows)


def announce(config: ConfigDict, train_step: Any, state: Any, batch: Any) -> None:
    """Prints the estimate before the step is compiled, if the device reports its memory."""
    limit = device_limit()
    if not limit:
        return
    estimated = estimate(train_step, state, batch)
    say(f'estimated memory of a step: {estimated}; the device has {limit / _GIB:.2f} GiB')
    if estimated.total > limit:
        say(f'warning: by this estimate, {advice(config)}')


def device_limit() -> int:
    """Returns the bytes that a device gives to programs; 0 if it does not report them."""
    return (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit', 0)


@contextlib.contextmanager
def oom_as_user_error(config: ConfigDict) -> Iterator[None]:
    """Turns running out of device memory, within the context, into UserError with advice."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error) and 'out of memory' not in str(error).lower():
            raise
        raise errors.UserError(advice(config)) from error


def memory_options(config: ConfigDict) -> dict[str, tuple[Any, str]]:
    """Returns keys that reduce memory, in the order to try them: key -> (value, its cost)."""
    optim, model = config.get('optim', {}), config.get('model', {})
    options: dict[str, tuple[Any, str]] = {}
    if model.get('dtype') == 'float32':
        options['model.dtype'] = ('bfloat16', 'now float32')
    if model.get('remat') is False and backbones.can_remat(model['name']):
        options['model.remat'] = (True, 'same result, about a third slower')
    twice = 2 * optim.get('gradient_accumulation_steps', 0)
    if twice and config.batch_size % (twice * jax.device_count()) == 0:
        options['optim.gradient_accumulation_steps'] = (
            twice,
            'same update, except that BN statistics are of each part',
        )
    return options


def advice(config: ConfigDict) -> str:
    """Returns a line that lists these options."""
    options = [f'{key}={value} ({cost})' for key, (value, cost) in memory_options(config).items()]
    section, prefix = (config, '') if 'batch_size' in config else (config.eval, 'eval.')
    options.append(f'a smaller {prefix}batch_size (now {section.batch_size}) or more devices')
    limit = device_limit()
    capacity = f' of {limit / _GIB:.1f} GiB' if limit else ''
    return (
        f'the run does not fit in the memory{capacity} of {jax.local_devices()[0].device_kind}. '
        f'Try {", then ".join(options)}'
    )
