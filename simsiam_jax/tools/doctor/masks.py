"""Checks for masks and copies among the images, by their names."""

import collections
import dataclasses
import os
import re
from collections.abc import Sequence

from simsiam_jax.data.listed import Listed
from simsiam_jax.data.sources import ArraySource, Source
from simsiam_jax.tools.doctor.context import Finding

# Words of names of masks, beside the name of the image or as (a part of) the name of a folder.
_WORDS = 'masks?|gt|ground_?truth|segmentations?|segmented|seg|annotations?|labels?|trimaps?|depth'
_SUFFIX = re.compile(rf'(.+?)[ ._-]+(?:{_WORDS})[ ._-]?\d*', re.IGNORECASE)
_FOLDER = re.compile(rf'(?:.*[ ._-])?(?:{_WORDS})(?:[ ._-].*)?', re.IGNORECASE)


def check_masks(source: Source | ArraySource | None) -> list[Finding]:
    """Returns a warning for each kind of files that lie beside images of the same name."""
    if not isinstance(source, Listed):
        return []
    return [
        Finding(
            'warning',
            f'{count:,} of {len(source):,} files have the name of another image ({example}): masks '
            'or copies, which training would use as images. Leave them out: '
            f"--config.data.exclude='{pattern}'",
        )
        for pattern, count, example in find(source.names())
    ]


def find(names: Sequence[str]) -> list[tuple[str, int, str]]:
    """Returns a pattern, the number of files and an example for each kind of masks.

    Args:
      names: Paths of all files, relative to their root.
    """
    files = [_Name.of(name) for name in names]
    present = collections.Counter(file.kind for file in files)
    beside: dict[tuple[str, str], list[_Name]] = {}
    outside: set[str] = set()  # stems outside of folders of masks
    for file in files:
        beside.setdefault((file.folder, file.stem), []).append(file)
        if not file.mask_folder:
            outside.add(file.stem)
    found: dict[str, list[str]] = {}
    for same in beside.values():
        # Of two formats the photographs are the images, or else the more frequent format.
        same.sort(key=lambda file: (file.kind not in ('.jpg', '.jpeg'), -present[file.kind]))
        for file in same[1:]:
            found.setdefault(f'*{file.kind}', []).append(file.name)
    for kind, count in present.items():
        if len(found.get(f'*{kind}', ())) < 0.9 * count:  # others of this format are images
            found.pop(f'*{kind}', None)
    for file in files:
        suffix = _SUFFIX.fullmatch(file.stem)
        if suffix and (file.folder, suffix[1]) in beside:
            found.setdefault(f'*{file.stem[len(suffix[1]) :]}.*', []).append(file.name)
        elif file.mask_folder and file.stem in outside:
            found.setdefault(file.mask_folder, []).append(file.name)
    return [(pattern, len(masks), masks[0]) for pattern, masks in found.items()]


@dataclasses.dataclass(frozen=True)
class _Name:
    """The name of a file in parts.

    Attributes:
      name: The whole path.
      folder, stem, kind: Folder, name without extension, and extension in lower case.
      mask_folder: The folder in the path that is named after masks; '' if there is none.
    """

    name: str
    folder: str
    stem: str
    kind: str
    mask_folder: str

    @classmethod
    def of(cls, name: str) -> '_Name':
        folder, _, base = name.rpartition('/')
        stem, kind = os.path.splitext(base)
        masks = filter(_FOLDER.fullmatch, folder.split('/'))
        return cls(name, folder, stem, kind.lower(), next(masks, ''))
