"""Which checkpoints are kept: Orbax's manager, and a checkpoint pinned beyond the latest ones."""

import dataclasses
import json
from collections.abc import Collection, Sequence
from typing import Any

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from simsiam_jax.checkpoints import checkpoint_reader
from simsiam_jax.runtime import storage

FILE = 'pinned.json'  # in the workdir


def open_manager(folder: epath.Path, max_to_keep: int, keep_period: int) -> ocp.CheckpointManager:
    """Returns Orbax's manager, which saves checkpoints and deletes those that are not kept.

    Args:
      folder: Workdir of the run.
      max_to_keep: Number of latest checkpoints to keep.
      keep_period: Also keeps checkpoints at multiples of this number of steps; 0 disables it.
    """
    for partial in (folder / checkpoint_reader.FOLDER).glob('*.orbax-checkpoint-tmp*'):
        partial.rmtree()  # left by a save that was killed
    if (old := folder / 'held.json').exists():  # written by version 0.1.0
        old.replace(folder / FILE)
    policies = [preservation_policy.LatestN(max_to_keep), PinnedStep(folder / FILE)]
    if keep_period:
        policies.append(preservation_policy.EveryNSteps(keep_period))
    # Only process 0 saves: all processes have the same state, so none needs to wait for another.
    process_0 = ocp.options.MultiprocessingOptions(
        primary_host=0, active_processes={0}, barrier_sync_key_prefix='checkpoints'
    )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
        create=False,
        enable_async_checkpointing=False,  # Checkpoints.save uses its own thread
        multiprocessing_options=process_0,
    )
    return ocp.CheckpointManager(folder / checkpoint_reader.FOLDER, options=options)


@dataclasses.dataclass
class PinnedStep(preservation_policy.PreservationPolicy):
    """Keeps the checkpoint whose step is in a file, also after the run is resumed.

    Attributes:
      path: File of the pinned step; missing if no checkpoint is pinned.
    """

    path: epath.Path

    @property
    def step(self) -> int | None:
        """The pinned step; None if there is none."""
        return json.loads(storage.read_text(self.path) or 'null')

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns whether each checkpoint is the pinned one; called by Orbax."""
        pinned = self.step
        return [checkpoint.step == pinned for checkpoint in checkpoints]

    def pin(self, step: int, saved: Collection[int]) -> int | None:
        """Pins the newest saved step up to `step`, unless a saved step is pinned already.

        Args:
          step: Last step that may be pinned.
          saved: Steps that have a checkpoint.

        Returns:
          The pinned step; None if there is none to pin.
        """
        pinned = self.step
        if pinned not in saved:
            pinned = max((s for s in saved if s <= step), default=None)
        if pinned is not None:
            self.path.write_text(json.dumps(pinned))
        return pinned

    def unpin(self) -> None:
        """Unpins the checkpoint."""
        self.path.unlink(missing_ok=True)
