"""What devices can do: arithmetic, memory, links."""

import dataclasses

from simsiam_jax import errors


@dataclasses.dataclass(frozen=True)
class Device:
    """A chip.

    Attributes:
      flops: bfloat16 operations a second.
      bandwidth: of its memory, bytes a second.
      memory: bytes.
      link: bytes a second that it sends to the others of its host (GPUs) or slice (TPUs).
      usable: share of the memory that JAX takes; on GPUs XLA_PYTHON_CLIENT_MEM_FRACTION.
    """

    flops: float
    bandwidth: float
    memory: int
    link: float
    usable: float = 1.0


# By what jax.Device.device_kind begins with. H100 and H200: arithmetic and bandwidth that large
# matrix products and copies are known to reach; all else by the makers' data sheets.
DEVICES = {
    'NVIDIA H100': Device(798e12, 3.0e12, 80 * 2**30, 450e9, 0.75),
    'NVIDIA H200': Device(790e12, 4.3e12, 141 * 10**9, 450e9, 0.75),
    'TPU v4': Device(275e12, 1.228e12, 32 * 2**30, 270e9),
    'TPU v5 lite': Device(197e12, 0.819e12, 16 * 2**30, 180e9),
    'TPU v5': Device(459e12, 2.765e12, 95 * 2**30, 540e9),
    'TPU v6 lite': Device(918e12, 1.64e12, 32 * 2**30, 360e9),
}


def find(kind: str) -> Device | None:
    """The device of that jax.Device.device_kind; None where the table lacks it."""
    names = [name for name in DEVICES if kind.startswith(name)]
    return DEVICES[max(names, key=len)] if names else None


def all_reduce_seconds(size: int, count: int, link: float) -> float:
    """Seconds for `count` devices to sum `size` bytes each, by the bandwidth of the links alone.

    Each sends 2 (count - 1)/count of them, in a ring or in rings along the axes of a torus.
    """
    if count < 1:
        raise errors.UserError(f'{count} devices; expected 1 or more')
    return 2 * (count - 1) / count * size / link
