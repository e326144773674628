"""Runs the tests on eight CPU devices, or on TEST_PLATFORM, and caches compiled programs."""

import os
import pathlib
from collections.abc import Iterator

import pytest
from commands import Commands

os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
)
os.environ['JAX_PLATFORMS'] = os.environ.get('TEST_PLATFORM', 'cpu')
os.environ.setdefault(
    'JAX_COMPILATION_CACHE_DIR', str(pathlib.Path('~/.cache/simsiam_jax').expanduser())
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')


@pytest.fixture(scope='module')
def _compiled_quickly() -> Iterator[None]:
    """Disables most optimizations, for files that compile much and compute little."""
    import jax  # must be imported after the variables above are set

    jax.config.update('jax_disable_most_optimizations', True)
    yield
    jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture(scope='session')
def command() -> Iterator[Commands]:
    """Runs `python -m MODULE FLAGS` on one device: command(module, *flags)."""
    commands = Commands()
    yield commands
    commands.close()
