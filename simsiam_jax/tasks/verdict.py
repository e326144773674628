"""Says whether a trained network is better than a random one, from the same test images."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from scipy import stats

from simsiam_jax.training.monitor import RepresentationMetrics

# Half width of a 95% interval, in standard errors.
_Z = float(stats.norm.ppf(0.975))
# Ratio of the largest to the smallest class from which balanced accuracy is shown.
_UNBALANCED = 1.5

_TRY = (
    'Likely causes: too few epochs; a learning rate that does not fit (tools.doctor --probe); '
    'views too small to show what differs (augment.size); an augmentation that removes what '
    'tells the classes apart (views.png)'
)


class Answers(NamedTuple):
    """Classes [N] that a classifier predicts for the test images, and their true classes [N]."""

    predicted: Int[np.ndarray, 'N']
    labels: Int[np.ndarray, 'N']

    @property
    def correct(self) -> Bool[np.ndarray, 'N']:
        return self.predicted == self.labels

    @property
    def top1(self) -> float:
        return float(self.correct.mean())

    @property
    def balanced(self) -> float:
        """Mean recall of the classes that the test images have."""
        classes = np.unique(self.labels)
        return float(np.mean([self.correct[self.labels == c].mean() for c in classes]))


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Accuracy of a trained network beside baselines.

    Attributes:
      table: Table of the accuracies, in several lines.
      sentence: Result of the comparison; '' without a baseline.
      result: The same values for a JSON file.
    """

    table: str
    sentence: str
    result: dict[str, Any]

    def __str__(self) -> str:
        return '\n'.join(filter(None, (self.table, self.sentence)))


def judge(
    answers: Mapping[str, Answers],
    classes: Sequence[str],
    *,
    title: str,
    trained: str,
    baseline: str = '',
) -> Verdict:
    """Compares the answers of several classifiers to the same test images.

    Args:
      answers: Name -> answers, in the order of the rows.
      classes: Names of the classes.
      title: What was measured, such as 'kNN'.
      trained: Name of the trained network in `answers`.
      baseline: Name of the network to compare it with; '' compares with none.
    """
    labels = answers[trained].labels
    counts = np.bincount(labels, minlength=len(classes))
    present, largest = counts[counts > 0], int(counts.argmax())
    unbalanced = bool(present.max() >= _UNBALANCED * present.min())
    constant = Answers(np.full_like(labels, largest), labels)
    most_common = f'largest class ({classes[largest]})'
    width = max(map(len, (most_common, *answers)))

    def row(name: str, a: Answers, between: str, note: str = '') -> str:
        balanced = f'  {a.balanced:.4f}' if unbalanced else ''
        return f'  {name:<{width}}  {a.top1:.4f}  {between:<16}{balanced}{note}'.rstrip()

    rows, accuracy = [row(most_common, constant, '')], {}
    for name, a in answers.items():
        low, high = interval(int(a.correct.sum()), len(labels))
        note = ''
        if len(np.unique(a.predicted)) == 1:
            note = f'  answers {classes[int(a.predicted[0])]} for every image'
        elif a.top1 == constant.top1:
            note = '  equals the largest class'
        rows.append(row(name, a, f'({low:.3f} to {high:.3f})', note))
        accuracy[name] = {'top1': a.top1, 'interval': [low, high], 'balanced': a.balanced}
    head = f'{title} top-1 of {len(labels):,} test images in {len(classes)} classes (95% interval)'
    head += ', balanced accuracy' * unbalanced
    sentence, comparison = '', None
    if baseline:
        sentence, comparison = _compare(answers[trained], answers[baseline], baseline)
        pixels = answers.get('raw pixels')
        if pixels is not None and _difference(answers[trained], pixels)[2] < 0:
            points = 100 * (pixels.top1 - answers[trained].top1)
            sentence += f'\nraw pixels are better by {points:.1f} points'
    return Verdict(
        '\n'.join([head, *rows]),
        sentence,
        {
            'title': title,
            'images': len(labels),
            'classes': len(classes),
            'largest_class': constant.top1,
            'accuracy': accuracy,
            'comparison': comparison,
            'sentence': sentence,
        },
    )


def without_labels(before: RepresentationMetrics, now: RepresentationMetrics) -> Verdict:
    """Compares a trained network with itself before training, for images without labels.

    Args:
      before: Measurement before training.
      now: Measurement at the end.
    """
    names = ('rankme', 'alignment', 'uniformity')
    values = ', '.join(
        f'{name} {getattr(now, name):.3g} ({getattr(before, name):.3g})' for name in names
    )
    # z_std^2 is half the mean squared distance between different images' z.
    distance, first = (m.alignment / max(2 * m.z_std**2, 1e-12) for m in (now, before))
    closer = distance < first
    learned = 'closer than before training, as it should be'
    sentence = (
        f'two views of an image are {distance:.2g} ({first:.2g}) times as far apart as different '
        f'images: {learned if closer else "no closer than before training. " + _TRY}\n'
        'This shows whether the training worked, not whether the features separate what matters '
        'to you: look at the neighbors in report.html, or label some images '
        '(--config.eval.train=folder:DIR --config.eval.split=0.2)'
    )
    result = {'title': 'without labels', 'sentence': sentence, 'closer': bool(closer)}
    result |= {'before': dataclasses.asdict(before), 'now': dataclasses.asdict(now)}
    return Verdict(f'without labels (before training in parentheses): {values}', sentence, result)


def _compare(trained: Answers, baseline: Answers, name: str) -> tuple[str, dict[str, Any]]:
    """Returns the sentence, and the difference in points with its interval and McNemar's p."""
    points, low, high = (100 * x for x in _difference(trained, baseline))
    gained, lost = _discordant(trained, baseline)
    p = float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0  # McNemar
    name = {'random initialization': 'a random network'}.get(name, f'the network {name}')
    around = f'{abs(points):.1f} points'
    if low > 0:
        sentence = f'better than {name} by {around} ({low:.1f} to {high:.1f})'
    elif high < 0:
        sentence = f'worse than {name} by {around} ({-high:.1f} to {-low:.1f}). {_TRY}'
    else:
        sentence = (
            f'no better than {name}: {points:+.1f} points ({low:+.1f} to {high:+.1f}). {_TRY}'
        )
    return sentence, {'points': points, 'interval': [low, high], 'p': p}


def _discordant(a: Answers, b: Answers) -> tuple[int, int]:
    """Returns how many images only `a` answers correctly, and how many only `b`."""
    return int((a.correct & ~b.correct).sum()), int((~a.correct & b.correct).sum())


def _difference(a: Answers, b: Answers) -> tuple[float, float, float]:
    """Returns the difference of the top-1 and its 95% interval, paired by image.

    The interval is that of Agresti and Min (2005): half an image is added to each of the four
    counts, so that it is not empty if both agree on all images.
    """
    gained, lost = _discordant(a, b)
    n = len(a.labels) + 2
    middle = (gained - lost) / n
    error = _Z * math.sqrt(gained + lost + 1 - (gained - lost) ** 2 / n) / n
    return (gained - lost) / len(a.labels), middle - error, middle + error


def interval(correct: int, images: int) -> tuple[float, float]:
    """Returns Wilson's 95% interval of a share."""
    low, high = stats.binomtest(correct, images).proportion_ci(0.95, method='wilson')
    return float(low), float(high)
