"""The guard: measures a run at intervals and detects representation collapse."""

import concurrent.futures
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
PARTIAL = 'partial collapse'  # the features span few directions
COMPLETE = 'complete collapse'  # all images have nearly the same z
TRIVIAL = 'nothing to learn'  # the views of an image, or all images, are nearly identical

# Limits of healthy measurements, see classify(); that of RankMe is a share of the first RankMe.
MIN_Z_STD, MIN_RANKME, MAX_UNIFORMITY = 0.5, 0.4, -1.0

# Views count as identical if their distance is below this share of the distance between images.
SAME_VIEWS = 0.1

# There is nothing to learn if more than this share of the images has a near-duplicate.
DUPLICATES = 0.5

# Number of consecutive measurements that must show a collapse.
WINDOW = 3


# Waits for the metrics of a measurement; None if they are not finite. All processes must call it.
Result = Callable[[], RepresentationMetrics | None]


def classify(history: Sequence[RepresentationMetrics]) -> str:
    """Returns the verdict on the last measurement alone; see diagnose().

    Thresholds are shares of the widest possible spread or of the value before training, so they
    apply to any width. z_std^2 is one minus the mean cosine of different images' z: a z_std below
    0.5 is a mean cosine above 0.75. A contrastive method without BN in its head starts there,
    narrows at first and then recovers, so an embedding that spreads again is not collapsing.
    RankMe falls at first in healthy training too, by a third on digits.

    Args:
      history: Measurements; the first is from before training.
    """
    first, before, now = history[0], history[-2], history[-1]
    spreads = now.z_std > min(1.2 * before.z_std, first.z_std)
    if now.view_distance < SAME_VIEWS:
        return TRIVIAL
    if now.z_std < MIN_Z_STD and not spreads:
        return COMPLETE
    if now.rankme < MIN_RANKME * first.rankme or (now.uniformity > MAX_UNIFORMITY and not spreads):
        return PARTIAL
    return HEALTHY


def diagnose(history: Sequence[RepresentationMetrics], duplicates: float = 0.0) -> str:
    """Returns the latest verdict if the last WINDOW measurements are all unhealthy, else HEALTHY.

    Args:
      history: Measurements; the first is from before training.
      duplicates: Share of the images that have a near-duplicate.
    """
    if len(history) <= WINDOW:
        return HEALTHY
    if duplicates > DUPLICATES:
        return TRIVIAL
    verdicts = [classify(history[: len(history) - i]) for i in range(WINDOW)]
    return HEALTHY if HEALTHY in verdicts else verdicts[0]


class Guard:
    """Measures the representation during training.

    A measurement uses at least twice as many views as the features have channels, from the
    batches of the last steps. The interval is a hundredth of the training, but at least 50 steps
    per batch of a measurement. A forward pass takes a third of a step, so measuring takes below
    1% of the training time. The first measurements come sooner, at intervals that double.

    Args:
      method: The method that is trained.
      mesh: Mesh of the devices.
      to_views: Makes the views of a device's share of a batch; see step.make_train_step.
      batch_size: Global batch size.
      last: Total number of training steps.

    Attributes:
      batches: Number of batches in a measurement.
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
            # In training mode, with batch statistics: the loss is computed on the same outputs.
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
        self._interval, self._last = max(50 * self.batches, last // 100), last
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._moments: Any = None
        self._count = 0

    def due(self, step: int) -> bool:
        """Returns whether a measurement ends after this step."""
        if step >= self._interval:
            return step % self._interval == 0
        multiple, rest = divmod(step, 10 * self.batches)
        return rest == 0 and multiple > 0 and multiple & (multiple - 1) == 0  # a power of 2

    def update(self, step: int, state: TrainState, batch: Any) -> Result | None:
        """Adds a step's batch if a measurement needs it; returns the result if one is due.

        Call it after every step. The result is a function that waits for the metrics, which a
        thread computes: RankMe of 2,048 channels takes seconds. It returns None if they are not
        finite. Returns no result if the run was resumed too few steps ago.
        """
        if any(self.due(step + ahead) for ahead in range(self.batches)):
            self._accumulate(state, batch)
        return self._finish() if self.due(step) else None

    def ready(self, step: int) -> int:
        """Returns the step after which to ask for the result of a step's measurement."""
        return min(step + min(step, self._interval) // 2, self._last)

    def measure(self, state: TrainState, batches: Iterable[Any]) -> RepresentationMetrics | None:
        """Returns the metrics of a state on self.batches batches; None if not finite."""
        for batch in batches:
            self._accumulate(state, batch)
        result = self._finish()
        return result() if result else None

    def _accumulate(self, state: TrainState, batch: Any) -> None:
        moments = self._measure(state, batch)
        if self._count:
            moments = jax.tree.map(jnp.add, self._moments, moments)
        self._moments, self._count = moments, self._count + 1

    def _finish(self) -> Result | None:
        """Ends a measurement: returns its result and starts the next one."""
        moments, count = self._moments, self._count
        self._moments, self._count = None, 0
        if count < self.batches:
            return None

        def summarize() -> dict[str, float] | None:
            mean = jax.tree.map(lambda x: x / count, jax.device_get(moments))
            return dataclasses.asdict(monitor.summary(mean)) if monitor.is_finite(mean) else None

        # All processes must reach the same verdict, but their metrics may differ in the last bit.
        first = jax.process_index() == 0
        values = self._thread.submit(summarize) if first else None

        def result() -> RepresentationMetrics | None:
            agreed = distributed.broadcast_from_process_0(values.result() if values else None)
            return RepresentationMetrics(**agreed) if agreed else None

        return result
