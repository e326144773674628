"""Choosing among classifiers by what they do on held-out images."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class HeadScores:
    """Of some classifiers over the same images.

    Attributes:
      top1, top5: shares of the images.
      loss: mean cross-entropy.
      images: their number.
    """

    top1: Float[np.ndarray, 'heads']
    top5: Float[np.ndarray, 'heads']
    loss: Float[np.ndarray, 'heads']
    images: int


def choose(score: HeadScores) -> int:
    """The classifier with the lowest loss of those within a standard error of the best top-1.

    (The rule of Breiman et al., Classification and Regression Trees, 1984: differences below
    that are chance, and then the better calibrated one is the safer choice.)
    """
    best = score.top1.max()
    error = np.sqrt(best * (1 - best) / score.images)
    loss = np.nan_to_num(score.loss, nan=np.inf)  # of one that diverged
    return int(np.where(score.top1 >= best - error, loss, np.inf).argmin())


def table(score: HeadScores, rates: Sequence[float], decays: Sequence[float]) -> str:
    """Top-1 by learning rate (rows) and weight decay (columns), the chosen one marked."""
    best = choose(score)
    cells = [f'{top1:>10.4f}{"*" if i == best else " "}' for i, top1 in enumerate(score.top1)]
    width = len(decays)
    rows = [cells[i : i + width] for i in range(0, len(cells), width)]
    return '\n'.join(
        [
            f'top-1 of {score.images} held-out images by rate and weight decay, * chosen',
            '        ' + ''.join(f'{decay:>10.1e} ' for decay in decays),
            *(f'{rate:>8.4g}' + ''.join(row) for rate, row in zip(rates, rows, strict=True)),
        ]
    )


def rows(
    score: HeadScores, rates: Float[np.ndarray, 'heads'], decays: Float[np.ndarray, 'heads']
) -> list[dict[str, float]]:
    """The same for a file: one row a classifier."""
    columns = {
        'learning_rate': rates,
        'weight_decay': decays,
        'holdout_top1': score.top1,
        'holdout_top5': score.top5,
        'holdout_loss': score.loss,
    }
    return [
        dict(zip(columns, map(float, row), strict=True))
        for row in zip(*columns.values(), strict=True)
    ]
