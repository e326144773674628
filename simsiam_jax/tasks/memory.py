"""What to do where a step does not fit on the devices."""

import contextlib
from collections.abc import Iterator

import jax
from ml_collections import ConfigDict

from simsiam_jax import errors


@contextlib.contextmanager
def explained(config: ConfigDict) -> Iterator[None]:
    """Within it, running out of the devices' memory raises UserError with what may be turned."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error) and 'out of memory' not in str(error).lower():
            raise
        raise errors.UserError(advice(config)) from error


def advice(config: ConfigDict) -> str:
    """The keys that make a step smaller, in the order to try them, with what they are now."""
    optim, model = config.get('optim', {}), config.get('model', {})
    turns = []
    if model.get('dtype') == 'float32':
        turns.append('model.dtype=bfloat16 (now float32)')
    if model.get('remat') is False:
        turns.append('model.remat=True (the same result, about a third more time)')
    if 'accumulate' in optim:
        twice = 2 * optim.accumulate
        turns.append(
            f'optim.accumulate={twice} (the same update but for BN statistics, which are of '
            'each part)'
        )
    turns.append(f'a smaller batch_size (now {config.batch_size}), or more devices')
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get('bytes_limit', 0)
    size = f' of {limit / 2**30:.1f} GiB' if limit else ''
    return (
        f'a step does not fit into the memory{size} of {device.device_kind}; try '
        + ', then '.join(turns)
    )
