"""Eight devices on the host, and compiled programs kept between runs."""

import os
import pathlib

os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
)
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault(
    'JAX_COMPILATION_CACHE_DIR', str(pathlib.Path('~/.cache/simsiam_jax').expanduser())
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.5')
