"""A checkpoint that stays whatever number of the latest are kept."""

import dataclasses
import json
from collections.abc import Collection, Sequence
from typing import Any

from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy


@dataclasses.dataclass
class PinnedStep(preservation_policy.PreservationPolicy):
    """Preserves the step that the file names, also when a run goes on later."""

    path: epath.Path

    @property
    def step(self) -> int | None:
        return json.loads(self.path.read_text()) if self.path.exists() else None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        held = self.step
        return [checkpoint.step == held for checkpoint in checkpoints]

    def pin(self, step: int, saved: Collection[int]) -> int | None:
        """Holds the newest of the saved steps up to this one, unless one is held already."""
        held = self.step
        if held not in saved:
            held = max((s for s in saved if s <= step), default=None)
        if held is not None:
            self.path.write_text(json.dumps(held))
        return held

    def unpin(self) -> None:
        self.path.unlink(missing_ok=True)
