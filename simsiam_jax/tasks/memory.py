"""What a step takes of the devices' memory, and what to do where it does not fit."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from simsiam_jax import errors
from simsiam_jax.terminal import say
from simsiam_jax.training import peak_memory

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes on a device: the state, its share of the batch, and what a step holds besides."""

    state: int
    batch: int
    activations: int

    @property
    def total(self) -> int:
        return self.state + self.batch + self.activations

    def __str__(self) -> str:
        return (
            f'about {self.total / _GIB:.2f} GiB a device (state {self.state / _GIB:.2f}, batch '
            f'{self.batch / _GIB:.2f}, activations {self.activations / _GIB:.2f})'
        )


def size_of(tree: Any) -> int:
    """Bytes of its arrays."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def estimate(train_step: Any, state: Any, batch: Any) -> Estimate:
    """Of a compiled function (state, batch), from shapes alone: it is only traced."""
    here = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(batch)
    )
    program = train_step.trace(state, batch).jaxpr
    return Estimate(size_of(state), here, peak_memory.peak_bytes(program))


def table(config: ConfigDict, make: Callable[[ConfigDict], Any], state: Any, batch: Any) -> str:
    """The estimate as configured, and with each of the keys that make a step smaller.

    `make` gives the training step of a configuration; none is compiled.
    """
    changes: dict[str, dict[str, Any]] = {'as configured': {}}
    changes |= {
        f'{key}={value}': {key: value} for key, (value, _) in memory_options(config).items()
    }
    limit = device_limit()
    has = f'has {limit / _GIB:.2f} GiB' if limit else 'does not say what it has'
    rows = [f'memory, estimated from shapes; the device {has}']
    for name, change in changes.items():
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(change)
        found = estimate(make(changed), state, batch)
        rows.append(f'  {name:<{max(map(len, changes))}}  {found}')
    return '\n'.join(rows)


def announce(config: ConfigDict, train_step: Any, state: Any, batch: Any) -> None:
    """Says what a step will take, before it is compiled, where the device says what it has."""
    limit = device_limit()
    if not limit:
        return
    found = estimate(train_step, state, batch)
    say(f'estimated memory of a step: {found}; there are {limit / _GIB:.2f} GiB')
    if found.total > limit:
        say(f'warning: by this estimate {advice(config)}')


def device_limit() -> int:
    """Bytes that a device gives to programs; 0 where it does not say."""
    return (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit', 0)


@contextlib.contextmanager
def oom_as_user_error(config: ConfigDict) -> Iterator[None]:
    """Within it, running out of the devices' memory raises UserError with what may be turned."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error) and 'out of memory' not in str(error).lower():
            raise
        raise errors.UserError(advice(config)) from error


def memory_options(config: ConfigDict) -> dict[str, tuple[Any, str]]:
    """Keys that make a step smaller, in the order to try them: key -> (value, what it costs)."""
    optim, model = config.get('optim', {}), config.get('model', {})
    found: dict[str, tuple[Any, str]] = {}
    if model.get('dtype') == 'float32':
        found['model.dtype'] = ('bfloat16', 'now float32')
    if model.get('remat') is False:
        found['model.remat'] = (True, 'the same result, about a third more time')
    twice = 2 * optim.get('gradient_accumulation_steps', 0)
    if twice and config.batch_size % (twice * jax.device_count()) == 0:
        found['optim.gradient_accumulation_steps'] = (
            twice,
            'the same update but for BN statistics, which are of each part',
        )
    return found


def advice(config: ConfigDict) -> str:
    """A line with these keys."""
    tried = [f'{key}={value} ({cost})' for key, (value, cost) in memory_options(config).items()]
    section, prefix = (config, '') if 'batch_size' in config else (config.eval, 'eval.')
    tried.append(f'a smaller {prefix}batch_size (now {section.batch_size}), or more devices')
    limit = device_limit()
    has = f' of {limit / _GIB:.1f} GiB' if limit else ''
    return (
        f'the run does not fit into the memory{has} of {jax.local_devices()[0].device_kind}; try '
        + ', then '.join(tried)
    )
