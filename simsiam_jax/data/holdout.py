"""Holds out a share of the images of a set by their names."""

import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from simsiam_jax import errors


def choose(
    names: Sequence[str], labels: Int[np.ndarray, 'N'], classes: Sequence[str], share: float
) -> Bool[np.ndarray, 'N']:
    """Returns which images are held out: about `share` of each class, and at least one.

    Each image is chosen by a hash of its name alone, so that it stays in its part when others are
    added or removed. A class with a single image keeps it for training, which is printed.

    Args:
      names: Names of the images, without the folder that they are all in.
      labels: Class of each image; -1 without labels.
      classes: Names of the classes.
      share: Share to hold out, above 0 and below 1.

    Raises:
      UserError: The share is impossible.
    """
    if not 0 < share < 1:
        raise errors.UserError(
            f'the share of images to hold out is {share}; expected above 0 and below 1, such as 0.2'
        )
    digests = (hashlib.sha256(name.encode('utf-8', 'surrogateescape')) for name in names)
    place = np.array([int.from_bytes(digest.digest()[:6]) / 2**48 for digest in digests])
    held = place < share
    single = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) == 1:
            held[members] = False
            single += [classes[label]] if label >= 0 else []
            continue
        # A small class may have all its images on one side.
        held[members[place[members].argmin()]] = True
        held[members[place[members].argmax()]] = False
    if single:
        more = f' and {len(single) - 5} more' if len(single) > 5 else ''
        errors.warn_once(
            f'{len(single)} classes have a single image ({", ".join(single[:5])}{more}): it is '
            'trained on, not tested'
        )
    return held
