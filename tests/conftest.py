"""Eight devices on the host, or TEST_PLATFORM's; compiled programs kept between runs."""

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
    """Programs of a file that compiles much and computes little are optimized less."""
    import jax  # reads the variables above

    jax.config.update('jax_disable_most_optimizations', True)
    yield
    jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture(scope='session')
def command() -> Iterator[Commands]:
    """command(module, *flags) runs `python -m module flags` on one device to its end."""
    commands = Commands()
    yield commands
    commands.close()
