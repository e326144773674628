"""Classes of images, from the names of their folders or from lists."""

import os
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from simsiam_jax import errors, paths

Labels = tuple[list[int], tuple[str, ...]]

_TRAIN = {'train', 'training'}
_TEST = {'val', 'valid', 'validation', 'dev', 'test', 'testing'}


def unlabeled(count: int) -> Labels:
    """Returns the labels -1 and no classes."""
    return [-1] * count, ()


def number(names: Sequence[str], where: str) -> Labels:
    """Returns the label of each image and the names of the classes, sorted.

    The two Unicode forms of a name (NFC and NFD) are one class.

    Args:
      names: Name of the class of each image.
      where: What has these classes, for messages.
    """
    forms = {name: unicodedata.normalize('NFC', name) for name in set(names)}
    found = sorted(set(forms.values()))
    similar: dict[str, list[str]] = {}
    for name in found:
        similar.setdefault(''.join(name.casefold().split()), []).append(name)
    groups = [' and '.join(map(repr, group)) for group in similar.values() if len(group) > 1]
    if groups:
        more = f' and {len(groups) - 3} more' if len(groups) > 3 else ''
        errors.warn_once(
            paths.printable(
                f'the classes {"; ".join(groups[:3])}{more} of {where} differ only in case or '
                'blanks and count as different classes. Rename them if they are the same'
            )
        )
    position = {name: i for i, name in enumerate(found)}
    return [position[forms[name]] for name in names], tuple(map(paths.printable, found))


def by_folder(names: Sequence[str], where: str, *, descend: bool = False) -> Labels:
    """Returns labels and classes: two or more subfolders that contain all images are the classes.

    Args:
      names: Paths of the images, relative to `where`.
      where: Folder or archive, for messages.
      descend: Skip folders that all images are in; otherwise a single subfolder is no class, and
        neither are the folders in it.
    """
    folders = {name.rpartition('/')[0] for name in names}
    common = os.path.commonpath(folders)
    below = len(common) + 1 if common else 0
    tops = {folder: folder[below:].partition('/')[0] for folder in folders}
    classes = {top for top in tops.values() if top}
    inner = os.path.join(where, common) if common else where
    if '' in tops.values():
        if len(classes) > 1:
            stray = [name for name in names if name.rpartition('/')[0] == common]
            more = f' and {len(stray) - 3} more' if len(stray) > 3 else ''
            errors.warn_once(
                paths.printable(
                    f'{inner} has no classes, because {len(stray):,} of {len(names):,} images are '
                    f'beside its {len(classes)} subfolders ({", ".join(stray[:3])}{more}). To use '
                    'the subfolders as classes, move these images or set config.data.exclude'
                )
            )
        return unlabeled(len(names))
    _warn_of_splits(classes, where, common)
    if common and not descend:
        errors.warn_once(
            f'{where} has no classes, because all images are in one subfolder. To use its '
            f'{len(classes)} subfolders as classes, give {inner}'
        )
        return unlabeled(len(names))
    return number([tops[name.rpartition('/')[0]] for name in names], where)


def _warn_of_splits(classes: set[str], where: str, common: str) -> None:
    train = sorted(name for name in classes if name.lower() in _TRAIN)
    test = sorted(name for name in classes if name.lower() in _TEST)
    if train and test:
        is_archive = os.path.isfile(where)
        parts = os.path.join('DIR' if is_archive else where, common, '')
        errors.warn_once(
            f'{where} has the parts {train[0]} and {", ".join(test)} of a dataset as subfolders: '
            'training would use the images of all, and the parts would be the classes. '
            f'{"Unpack it to DIR and set" if is_archive else "Set"} config.data.source and '
            f'config.eval.train to folder:{parts}{train[0]}, and config.eval.test to '
            f'folder:{parts}{test[0]}'
        )


def unite(parts: Sequence[tuple[Sequence[int] | np.ndarray, tuple[str, ...], str]]) -> Labels:
    """Returns the labels and classes of several sets; classes of the same name are one.

    Args:
      parts: Labels, classes and name of each set.
    """
    count = sum(len(labels) for labels, _, _ in parts)
    missing = [name for _, classes, name in parts if not classes]
    if missing:
        if len(missing) < len(parts):
            errors.warn_once(
                f'the images have no classes, because {", ".join(missing)} has none. To use '
                'classes, combine sets that all have them'
            )
        return unlabeled(count)
    if len({classes for _, classes, _ in parts}) == 1:
        return [int(label) for labels, _, _ in parts for label in labels], parts[0][1]
    known = [name for _, classes, _ in parts for name in classes]
    numbers, united = number(known, ' + '.join(name for _, _, name in parts))
    position = dict(zip(known, numbers, strict=True))
    named = (classes[label] for labels, classes, _ in parts for label in labels)
    return [position[name] for name in named], united


def of_values(values: Sequence[Any], classes: Sequence[str], where: str) -> Labels:
    """Returns labels and classes of stored values: integers count from 0, text names a class.

    Args:
      values: Value of each image; None or a negative integer is no label.
      classes: Names of the classes; () uses the values.
      where: What has these values, for messages.

    Raises:
      UserError: A value is neither integer nor text, or has no class.
    """
    if any(value is None or (isinstance(value, int) and value < 0) for value in values):
        errors.warn_once(f'{where} has images without a label, so the images have no classes')
        return unlabeled(len(values))
    if all(isinstance(value, str) for value in values):
        return number(values, where)
    if other := [value for value in values if not isinstance(value, int)]:
        raise errors.UserError(
            f'{where} has a label {other[0]!r:.40}; expected integers or text. Choose another '
            'column of labels'
        )
    names = tuple(classes) or tuple(map(str, range(max(values) + 1)))
    if max(values) >= len(names):
        raise errors.UserError(
            f'{where} has a label {max(values)}; expected 0 to {len(names) - 1}, as it names '
            f'{len(names)} classes. Correct the labels'
        )
    return list(values), names
