"""Tests of tasks/verdict.py and data/overlap.py."""

import dataclasses
import pathlib

import numpy as np
import pytest
from guard_table import BEFORE, HEALTHY
from PIL import Image
from sklearn.metrics import balanced_accuracy_score

from simsiam_jax.data import device_cache, overlap, sources
from simsiam_jax.data.reader import Reader
from simsiam_jax.tasks import verdict
from simsiam_jax.tasks.verdict import Answers

CLASSES = ('cat', 'dog')


def answers(right: int, first: int = 0, labels: np.ndarray | None = None) -> Answers:
    """Returns answers of which `right` are correct, from index `first` on."""
    labels = np.arange(200) % 2 if labels is None else labels
    correct = (np.arange(200) - first) % 200 < right
    return Answers(np.where(correct, labels, 1 - labels), labels)


def judge(trained: Answers, baseline: Answers, **others: Answers) -> verdict.Verdict:
    given = {'random initialization': baseline, **others, 'trained': trained}
    return verdict.judge(
        given, CLASSES, title='kNN', trained='trained', baseline='random initialization'
    )


def test_trained_network_is_better() -> None:
    result = judge(answers(180), answers(140))
    assert result.sentence.startswith('better than a random network by 20.0 points (')
    low, high = result.result['comparison']['interval']
    assert 0 < low < 20 < high
    # Of 40 images on which they differ, all are in favor: 2 * 2 ** -40.
    assert result.result['comparison']['p'] == pytest.approx(2**-39)


def test_equal_accuracy_on_other_images_is_no_better() -> None:
    result = judge(answers(140), answers(140, first=30))
    assert result.sentence.startswith('no better than a random network: +0.0 points (-')
    assert 'Likely causes: too few epochs' in result.sentence
    assert result.result['comparison']['p'] == 1


def test_worse_network_and_better_pixels_are_named() -> None:
    result = judge(answers(100), answers(140), **{'raw pixels': answers(190)})
    assert result.sentence.startswith('worse than a random network by 20.0 points')
    assert result.sentence.endswith('raw pixels are better by 45.0 points')


def test_answer_of_one_class_is_named() -> None:
    labels = (np.arange(200) < 50).astype(int)
    constant = Answers(np.zeros(200, int), labels)
    result = judge(constant, answers(120, labels=labels))
    row = next(line for line in result.table.splitlines() if line.startswith('  trained'))
    assert row.split()[1] == '0.7500'
    assert row.endswith('0.5000  answers cat for every image')
    assert '  largest class (cat)    0.7500' in result.table


def test_largest_share_reached_by_other_answers_is_named() -> None:
    labels = (np.arange(200) < 50).astype(int)
    result = judge(answers(150, labels=labels), answers(120, labels=labels))
    assert '0.7500' in result.table
    assert 'equals the largest class' in result.table.splitlines()[-1]


def test_balanced_accuracy_equals_scikit_learn_and_shows_if_unbalanced() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random(200) < 0.2).astype(int)
    given = Answers(rng.integers(0, 2, 200), labels)
    assert given.balanced == pytest.approx(balanced_accuracy_score(labels, given.predicted))
    assert f'{given.balanced:.4f}' in judge(given, given).table
    assert 'balanced' not in judge(answers(180), answers(140)).table


def test_interval_covers_the_true_difference_in_95_of_100_tests() -> None:
    """Draws pairs of answers that depend on each other, with a true difference of 10 points."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        kind = rng.choice(4, 200, p=(0.5, 0.2, 0.1, 0.2))  # both, only a, only b, none right
        labels = np.zeros(200, int)
        a, b = Answers((kind > 1).astype(int), labels), Answers(kind % 2, labels)
        low, high = judge(a, b).result['comparison']['interval']
        inside += low < 10 < high
    assert 930 <= inside <= 970


@pytest.mark.parametrize('resident', [True, False])
def test_shared_images_are_found_by_bytes_and_path(tmp_path: pathlib.Path, resident: bool) -> None:
    for part, seeds in (('train', range(6)), ('test', range(4, 10))):
        for i in seeds:
            pixels = np.random.default_rng(i).integers(0, 255, (8, 8, 3), np.uint8)
            path = tmp_path / part / CLASSES[i % 2] / f'{part}{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    (tmp_path / 'test' / 'cat' / 'linked.png').symlink_to(tmp_path / 'train' / 'cat' / 'train0.png')
    train, test = (sources.open_source(f'folder:{tmp_path}/{part}') for part in ('train', 'test'))
    pair = [Reader(source, 3) for source in (train, test)]
    if resident:
        pair = [device_cache.load(reader, 10**6) for reader in pair]
    assert len(overlap.shared_images(*pair)) == 3
    if not resident:
        names = sorted(pathlib.Path(name).name for name in overlap.shared_images(*pair))
        assert names == ['linked.png', 'test4.png', 'test5.png']


def test_different_splits_of_digits_share_nothing() -> None:
    train, test = (sources.open_source(f'digits/{split}') for split in ('train', 'test'))
    assert overlap.shared_images(train, test) == []
    assert len(overlap.shared_images(train, train)) == len(train)


def test_without_labels_compares_distances_of_views_and_of_images() -> None:
    trained = verdict.without_labels(BEFORE, HEALTHY)
    assert 'rankme 26 (40), alignment 0.2 (1.8), uniformity -2 ' in trained.table
    # 0.2 and 1.8 over twice 0.98^2
    assert trained.sentence.startswith('two views of an image are 0.1 (0.94) times as far apart')
    assert 'closer than before training, as it should be' in trained.sentence
    # In a collapse both distances vanish.
    collapsed = dataclasses.replace(BEFORE, alignment=0.02, z_std=0.1)
    worse = verdict.without_labels(BEFORE, collapsed)
    assert 'no closer than before training. Likely causes: too few epochs' in worse.sentence
    assert (trained.result['closer'], worse.result['closer']) == (True, False)
