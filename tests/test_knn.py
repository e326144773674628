"""kNN: exact over every image, the same on any number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from simsiam_jax import errors
from simsiam_jax.data.recipe import Recipe
from simsiam_jax.data.sources import ArraySource, open_source
from simsiam_jax.tasks import knn
from simsiam_jax.training import mesh as mesh_lib


def features(n: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((n, 16)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize('devices', [1, 8])
def test_vote_equals_scikit_learns(devices: int) -> None:
    # Sizes that nothing divides; scikit-learn's distances are made similarities again.
    bank, queries = features(1003, 0), features(77, 1)
    labels = np.random.default_rng(2).integers(0, 5, 1003)
    reference = KNeighborsClassifier(
        20, weights=lambda distance: np.exp((1 - distance**2 / 2) / 0.2), algorithm='brute'
    ).fit(bank, labels)
    mesh = mesh_lib.make_mesh(jax.devices()[:devices])
    votes = knn.vote(bank, labels, queries, mesh, k=20, temperature=0.2, classes=5, chunk=32)
    np.testing.assert_array_equal(votes, reference.predict(queries))


def test_k_above_the_bank_means_all() -> None:
    bank, labels = features(10, 0), np.arange(10) % 2
    mesh = mesh_lib.make_mesh()
    votes = knn.vote(bank, labels, bank, mesh, k=200, temperature=0.01, classes=2)
    np.testing.assert_array_equal(votes, labels)  # at T 0.01 each is its own nearest


def make(train: ArraySource, test: ArraySource, batch_size: int, devices: int = 8) -> knn.Knn:
    return knn.Knn(
        train,
        test,
        lambda scale, images: scale * images.mean((1, 2)),
        mesh_lib.make_mesh(jax.devices()[:devices]),
        recipe=Recipe(size=8, blur=0.0, mean=(0.0,), std=(1.0,)),
        channels=1,
        resize=0,
        batch_size=batch_size,
        k=20,
        temperature=0.2,
    )


def test_raw_pixels_of_the_digits_equal_scikit_learns_count() -> None:
    train, test = open_source('digits/train'), open_source('digits/test')

    def rows(source: ArraySource) -> np.ndarray:
        x = source.images.reshape(len(source), -1).astype(np.float64)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    reference = KNeighborsClassifier(
        20, weights=lambda distance: np.exp((1 - distance**2 / 2) / 0.2), algorithm='brute'
    ).fit(rows(train), train.labels)
    expected = reference.score(rows(test), test.labels)
    for batch_size, devices in ((64, 8), (1000, 1)):
        assert make(train, test, batch_size, devices).pixels() == pytest.approx(expected, abs=1e-9)


def test_every_image_counts_once() -> None:
    # 13 queries of which 5 can be right; fillers of the last batch must not count.
    bright = np.full((16, 8, 8, 1), 255, np.uint8)
    train = ArraySource(bright, np.zeros(16, np.int32), ('a', 'b'))
    test = ArraySource(bright[:13], np.array([0] * 5 + [1] * 8, np.int32), ('a', 'b'))
    assert make(train, test, 8)(jnp.float32(1)) == pytest.approx(5 / 13)


def test_sources_without_labels_or_with_others_are_refused() -> None:
    images, labels = np.zeros((8, 8, 8, 1), np.uint8), np.zeros(8, np.int32)
    labelled = ArraySource(images, labels, ('a', 'b'))
    with pytest.raises(errors.UserError, match=r'eval\.test has no labels'):
        make(labelled, ArraySource(images, labels, ()), 8)
    with pytest.raises(errors.UserError, match='the same in both'):
        make(labelled, ArraySource(images, labels, ('a', 'c')), 8)
    with pytest.raises(errors.UserError, match=r'eval\.batch_size is 9.*8 devices'):
        make(labelled, labelled, 9)
