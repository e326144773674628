"""Arithmetic, memory and links of devices."""

import dataclasses

from simsiam_jax import errors


@dataclasses.dataclass(frozen=True)
class Device:
    """A chip.

    Attributes:
      flops: bfloat16 operations per second.
      bandwidth: Bytes per second of its memory.
      memory: Bytes of its memory.
      link: Bytes per second that it sends to the other chips of its host (GPUs) or slice (TPUs).
      usable: Share of the memory that JAX allocates; on GPUs XLA_PYTHON_CLIENT_MEM_FRACTION.
    """

    flops: float
    bandwidth: float
    memory: int
    link: float
    usable: float = 1.0


# By prefix of jax.Device.device_kind. Arithmetic and bandwidth of H100 and H200 are what large
# matrix products and copies are known to reach. All other figures are from data sheets.
DEVICES = {
    'NVIDIA H100': Device(798e12, 3.0e12, 80 * 2**30, 450e9, 0.75),
    'NVIDIA H200': Device(790e12, 4.3e12, 141 * 10**9, 450e9, 0.75),
    'TPU v4': Device(275e12, 1.228e12, 32 * 2**30, 270e9),
    'TPU v5 lite': Device(197e12, 0.819e12, 16 * 2**30, 180e9),
    'TPU v5': Device(459e12, 2.765e12, 95 * 2**30, 540e9),
    'TPU v6 lite': Device(918e12, 1.64e12, 32 * 2**30, 360e9),
}


def find(kind: str) -> Device | None:
    """Returns the device of a jax.Device.device_kind; None if the table lacks it."""
    names = [name for name in DEVICES if kind.startswith(name)]
    return DEVICES[max(names, key=len)] if names else None


def all_reduce_seconds(size: int, count: int, link: float) -> float:
    """Returns the seconds of an all-reduce, by the bandwidth of the links alone.

    Each device sends 2 (count - 1)/count of its bytes, in a ring or in rings along the axes of a
    torus.

    Args:
      size: Bytes on each device.
      count: Number of devices.
      link: Bytes per second that a device sends.

    Raises:
      UserError: The number of devices is below 1.
    """
    if count < 1:
        raise errors.UserError(f'invalid number of devices: {count}; expected 1 or more')
    return 2 * (count - 1) / count * size / link
