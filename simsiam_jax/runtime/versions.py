"""What a run runs on."""

import importlib.metadata
import platform
import socket
from typing import Any

import jax

PACKAGES = (
    'simsiam_jax',
    'jax',
    'jaxlib',
    'flax',
    'optax',
    'orbax-checkpoint',
    'numpy',
    'tensorflow',
)


def describe_process() -> dict[str, Any]:
    """Versions of Python and of the packages that are there, host, processes and devices."""
    found = {'python': platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    devices = f'{jax.device_count()} x {jax.devices()[0].device_kind}'
    return {
        'host': socket.gethostname(),
        'processes': jax.process_count(),
        'devices': devices,
        'versions': found,
    }
