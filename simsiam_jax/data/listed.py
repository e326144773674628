"""Sources whose names and labels are known without reading images, and combinations of them."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from simsiam_jax.data import class_names


@runtime_checkable
class Listed(Protocol):
    """A source of encoded images (see sources.Source) that knows all names and labels.

    Attributes:
      classes: Names of the classes; empty without labels.
      labels: Label of each image, -1 without labels.
    """

    classes: tuple[str, ...]
    labels: Any

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[bytes, int]: ...

    def name(self, index: int) -> str: ...

    def names(self) -> list[str]:
        """Returns the names of the images, independent of where they are."""

    def take(self, indices: Int[np.ndarray, 'n']) -> Any:
        """Returns a source of the images at some indices, with all classes."""


class JoinedSource:
    """The images of several sources; classes of the same name are one.

    Args:
      parts: The sources.
      specs: Names of the sources, for messages.
    """

    def __init__(self, parts: Sequence[Any], specs: Sequence[str]):
        self.parts, self._specs = tuple(parts), tuple(specs)
        self._starts = np.cumsum([0, *map(len, parts)])
        united = [
            (part.labels, part.classes, spec) for part, spec in zip(parts, specs, strict=True)
        ]
        self.labels, self.classes = class_names.unite(united)

    @property
    def identity(self) -> str:
        return '\0+\0'.join(part.identity for part in self.parts)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _part(self, index: int) -> tuple[Any, int]:
        """Returns the part that has the image, and the image's index there."""
        number = int(np.searchsorted(self._starts, index, 'right')) - 1
        return self.parts[number], int(index - self._starts[number])

    def read(self, index: int) -> tuple[bytes, int]:
        part, inner = self._part(index)
        return part.read(inner)[0], self.labels[index]

    def name(self, index: int) -> str:
        part, inner = self._part(index)
        return part.name(inner)

    def names(self) -> list[str]:
        return [name for part in self.parts for name in part.names()]

    def take(self, indices: Int[np.ndarray, 'n']) -> 'JoinedSource':
        """Returns the images at some ascending indices, with all classes."""
        inner = (indices - start for start in self._starts[:-1])
        taken = [
            part.take(some[(some >= 0) & (some < len(part))])
            for part, some in zip(self.parts, inner, strict=True)
        ]
        return JoinedSource(taken, self._specs)
