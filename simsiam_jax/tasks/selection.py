"""Chooses the best of several classifiers by their scores on held-out images."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class HeadScores:
    """Scores of several classifiers on the same images.

    Attributes:
      top1: Shares of the images whose class is ranked first.
      top5: Shares of the images whose class is among the first five.
      loss: Mean cross-entropies.
      images: Number of images.
    """

    top1: Float[np.ndarray, 'heads']
    top5: Float[np.ndarray, 'heads']
    loss: Float[np.ndarray, 'heads']
    images: int

    def only(self, i: int) -> 'HeadScores':
        """Returns the scores of one of the classifiers."""
        return HeadScores(self.top1[[i]], self.top5[[i]], self.loss[[i]], self.images)


def join(scores: Sequence[HeadScores]) -> HeadScores:
    """Returns the scores of all the classifiers; all are of the same images."""
    top1, top5, loss = (
        np.concatenate([getattr(s, name) for s in scores]) for name in ('top1', 'top5', 'loss')
    )
    return HeadScores(top1, top5, loss, scores[0].images)


def choose(scores: HeadScores) -> int:
    """Returns the classifier with the lowest loss within a standard error of the best top-1.

    This is the rule of Breiman et al., Classification and Regression Trees, 1984: smaller
    differences are chance, so the better calibrated classifier is the safer choice.
    """
    best = scores.top1.max()
    error = np.sqrt(best * (1 - best) / scores.images)
    loss = np.nan_to_num(scores.loss, nan=np.inf)  # NaN if a classifier diverged
    return int(np.where(scores.top1 >= best - error, loss, np.inf).argmin())


def table(scores: HeadScores, rates: Sequence[float], decays: Sequence[float]) -> str:
    """Returns a table of top-1 by learning rate (rows) and weight decay (columns), * chosen."""
    best = choose(scores)
    cells = [f'{top1:>10.4f}{"*" if i == best else " "}' for i, top1 in enumerate(scores.top1)]
    width = len(decays)
    rows = [cells[i : i + width] for i in range(0, len(cells), width)]
    return '\n'.join(
        [
            f'top-1 of {scores.images} held-out images by learning rate and weight decay',
            '        ' + ''.join(f'{decay:>10.1e} ' for decay in decays),
            *(f'{rate:>8.4g}' + ''.join(row) for rate, row in zip(rates, rows, strict=True)),
            '* chosen: the lowest loss of those within one standard error of the best top-1',
        ]
    )


def rows(
    scores: HeadScores, rates: Float[np.ndarray, 'heads'], decays: Float[np.ndarray, 'heads']
) -> list[dict[str, float]]:
    """Returns the scores for a JSON file: one row per classifier."""
    columns = {
        'learning_rate': rates,
        'weight_decay': decays,
        'holdout_top1': scores.top1,
        'holdout_top5': scores.top5,
        'holdout_loss': scores.loss,
    }
    return [
        dict(zip(columns, map(float, row), strict=True))
        for row in zip(*columns.values(), strict=True)
    ]
