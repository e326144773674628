"""The guard: measures a training from time to time and tells a collapse from healthy learning."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from simsiam_jax.methods.contract import Method
from simsiam_jax.runtime import distributed
from simsiam_jax.training import monitor
from simsiam_jax.training.mesh import DATA
from simsiam_jax.training.monitor import RepresentationMetrics
from simsiam_jax.training.step import TrainState, forward_views

HEALTHY = 'healthy'
PARTIAL = 'partial collapse'  # few directions are left
COMPLETE = 'complete collapse'  # all images have about the same z
TRIVIAL = 'nothing to learn'  # an image's views are the same, or the images are

# Views whose distance is below this share of that between images are the same; and more than this
# share of the images with a duplicate are too many.
SAME_VIEWS, DUPLICATES = 0.1, 0.5

# So many measurements in a row show it before it is believed.
WINDOW = 3


def classify(history: Sequence[RepresentationMetrics]) -> str:
    """What the last of some measurements looks like; the first is from before training.

    Thresholds are shares of the widest possible spread or of what the network had before, so that
    they hold for any width. z_std^2 is one minus the mean cosine of different images' z: under
    0.5 that is above 0.75. A contrastive method without BN in its head starts there, narrows at
    first and then recovers: what spreads again is not collapsing. Ranks fall at first in healthy
    training too, by a third on digits.
    """
    first, before, now = history[0], history[-2], history[-1]
    spreads = now.z_std > min(1.2 * before.z_std, first.z_std)
    if now.view_distance < SAME_VIEWS:
        return TRIVIAL
    if now.z_std < 0.5 and not spreads:
        return COMPLETE
    if now.rank < 0.4 * first.rank or (now.uniformity > -1 and not spreads):
        return PARTIAL
    return HEALTHY


def diagnose(history: Sequence[RepresentationMetrics], duplicates: float = 0.0) -> str:
    """HEALTHY, or what the last WINDOW measurements show; of different signs the last.

    Args:
      history: the first is from before training.
      duplicates: share of the images that have a near-duplicate.
    """
    if len(history) <= WINDOW:
        return HEALTHY
    if duplicates > DUPLICATES:
        return TRIVIAL
    looks = [classify(history[: len(history) - i]) for i in range(WINDOW)]
    return HEALTHY if HEALTHY in looks else looks[0]


class Guard:
    """Measures the state of a training.

    Every measurement is of at least twice as many views as the features have channels, from the
    batches of the steps up to it. Between two of them lie a hundredth of the training or 50 times
    as many steps as it takes batches, whichever is more: forward passes of a third of a step each
    are below 1 % of the training. The first ones come sooner, at intervals that double.

    Args:
      to_views: see step.make_train_step.
      batch_size: global.
      last: step at which the training ends.

    Attributes:
      batches: that a measurement takes.
    """

    def __init__(
        self,
        method: Method,
        mesh: Mesh,
        to_views: Callable[[Any], list[Array]],
        *,
        batch_size: int,
        last: int,
    ):
        def measure(state: TrainState, batch: Any) -> dict[str, Array]:
            # In training mode, as the loss sees it: with the statistics of the batch.
            views = to_views(batch)[:2]
            outputs, _ = forward_views(
                method.network,
                state.params,
                state.batch_stats,
                views,
                method.online_forward,
                state.step,
            )
            return monitor.moments(views, outputs, DATA)

        self._measure = jax.jit(
            jax.shard_map(measure, mesh=mesh, in_specs=(P(), P(DATA)), out_specs=P())
        )
        self.batches = math.ceil(method.network.backbone.features / batch_size)
        self._every = max(50 * self.batches, last // 100)
        self._moments: Any = None
        self._count = 0

    def due(self, number: int) -> bool:
        """Whether the state is measured after so many steps."""
        if number >= self._every:
            return number % self._every == 0
        power, rest = divmod(number, 10 * self.batches)
        return rest == 0 and power > 0 and power & (power - 1) == 0

    def see(self, number: int, state: TrainState, batch: Any) -> RepresentationMetrics | None:
        """To be called after every step, with its batch: the measures where they are due."""
        if any(self.due(number + later) for later in range(self.batches)):
            self._add(state, batch)
        return self._take() if self.due(number) else None

    def measure(self, state: TrainState, batches: Iterable[Any]) -> RepresentationMetrics | None:
        """Of one state; `batches` are self.batches."""
        for batch in batches:
            self._add(state, batch)
        return self._take()

    def _add(self, state: TrainState, batch: Any) -> None:
        moments = self._measure(state, batch)
        if self._count:
            moments = jax.tree.map(jnp.add, self._moments, moments)
        self._moments, self._count = moments, self._count + 1

    def _take(self) -> RepresentationMetrics | None:
        """None where a run that was resumed has not seen enough, or what is seen is not finite."""
        moments, count = jax.device_get(self._moments), self._count
        self._moments, self._count = None, 0
        if count < self.batches:
            return None
        mean = jax.tree.map(lambda x: x / count, moments)
        # Hosts may differ in the last bit; the judgment may not.
        values = distributed.broadcast_from_process_0(
            dataclasses.asdict(monitor.summary(mean)) if monitor.is_finite(mean) else None
        )
        return RepresentationMetrics(**values) if values else None
