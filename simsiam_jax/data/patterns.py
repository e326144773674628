"""Patterns of the files to use and to leave out: data.include and data.exclude."""

import dataclasses
import fnmatch
import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from simsiam_jax import errors


@dataclasses.dataclass(frozen=True)
class Patterns:
    """Shell patterns, separated by commas.

    A pattern matches a file or a folder, anywhere in a path: ``GT``, ``*_mask.png``,
    ``*/Imgs/*.jpg``. ``*`` matches any text, folders too. Upper and lower case are the same.

    Attributes:
      include: Patterns of the files to use; '' uses all.
      exclude: Patterns of the files to leave out; '' leaves out none.
    """

    include: str = ''
    exclude: str = ''

    def __bool__(self) -> bool:
        return bool(self.include or self.exclude)

    def select(self, names: Sequence[str], where: str) -> Int[np.ndarray, 'n']:
        """Returns the positions of the names to use.

        Args:
          names: Paths, relative to the folder or list that they are in.
          where: The folder or list, for messages.

        Raises:
          UserError: None of the names is to be used.
        """
        kept = np.ones(len(names), bool)
        if self.include:
            kept &= _matches(self.include, names)
        if self.exclude:
            left_out = _matches(self.exclude, names)
            if not left_out.any():
                errors.warn_once(
                    f'config.data.exclude is {self.exclude!r}, which matches none of the '
                    f'{len(names):,} images of {where}'
                )
            kept &= ~left_out
        if not kept.any():
            raise errors.UserError(
                f'none of the {len(names):,} images of {where} is left by config.data.include='
                f'{self.include!r} and config.data.exclude={self.exclude!r} (the first is '
                f'{names[0]!r}). Change the patterns'
            )
        return np.flatnonzero(kept)


ALL = Patterns()


def _matches(patterns: str, names: Sequence[str]) -> np.ndarray:
    parts = [_normal(part.strip().strip('/')) for part in patterns.split(',')]
    # Without the \Z, in newer versions \z, at the end of each.
    either = '|'.join(fnmatch.translate(part)[:-2] for part in parts if part)
    pattern = re.compile(rf'(?:.*/)?(?:{either})(?:/.*)?', re.IGNORECASE | re.DOTALL)
    return np.array([pattern.fullmatch(_normal(name)) is not None for name in names])


def _normal(name: str) -> str:
    return name if name.isascii() else unicodedata.normalize('NFC', name)
