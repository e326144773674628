"""Host, processes, devices and package versions of a run."""

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
    """Returns host, processes, devices, and versions of Python and of the installed packages."""
    installed = {'python': platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    devices = f'{jax.device_count()} x {jax.devices()[0].device_kind}'
    return {
        'host': socket.gethostname(),
        'processes': jax.process_count(),
        'devices': devices,
        'versions': installed,
    }
