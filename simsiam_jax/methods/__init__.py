"""Self-supervised methods: constructors that take a backbone and the arguments of the method."""

from collections.abc import Callable

from simsiam_jax.methods import byol, moco, moving_average, simclr, simsiam, swav
from simsiam_jax.methods.contract import Method

METHODS: dict[str, Callable[..., Method]] = {
    'simsiam': simsiam.make,
    'simclr': simclr.make,
    'moco_v2': moco.make,
    'byol': byol.make,
    'swav': swav.make,
    'moving_average': moving_average.make,
}
