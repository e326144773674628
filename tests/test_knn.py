"""Tests of tasks/knn.py and tasks/features.py: exact kNN on any number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from simsiam_jax import errors
from simsiam_jax.data.sources import ArraySource, open_source
from simsiam_jax.tasks import knn, nearest
from simsiam_jax.tasks.features import CropLoader, extract_features, raw_pixels
from simsiam_jax.training import mesh as mesh_lib


def features(n: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((n, 16)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def predict(bank, labels, queries, devices: int, *, k: int, temperature: float, **chunks):
    mesh = mesh_lib.make_mesh(jax.devices()[:devices])
    similarity, places = nearest.search(bank, queries, mesh, k=k, **chunks)
    return np.asarray(knn.vote(similarity, labels[places], temperature, classes=5))


@pytest.mark.parametrize('devices', [1, 8])
@pytest.mark.parametrize('block', [50, 65536])
def test_vote_equals_scikit_learn(devices: int, block: int) -> None:
    # Sizes that nothing divides; the weights convert scikit-learn's distances to similarities.
    bank, queries = features(1003, 0), features(77, 1)
    labels = np.random.default_rng(2).integers(0, 5, 1003)
    reference = KNeighborsClassifier(
        20, weights=lambda distance: np.exp((1 - distance**2 / 2) / 0.2), algorithm='brute'
    ).fit(bank, labels)
    ranked = predict(bank, labels, queries, devices, k=20, temperature=0.2, chunk=32, block=block)
    np.testing.assert_array_equal(ranked[:, 0], reference.predict(queries))
    order = np.argsort(-reference.predict_proba(queries), axis=1)
    np.testing.assert_array_equal(ranked, order)


def test_nearest_returns_neighbors_in_order() -> None:
    bank, queries = features(300, 0), features(9, 1)
    similarity, places = nearest.search(bank, queries, mesh_lib.make_mesh(), k=50, block=7)
    expected = np.argsort(-queries @ bank.T, axis=1)[:, :50]
    np.testing.assert_array_equal(places, expected)
    np.testing.assert_allclose(
        similarity, np.take_along_axis(queries @ bank.T, expected, 1), rtol=1e-5, atol=1e-6
    )


def test_nearest_searches_float16_bank_exactly() -> None:
    bank, queries = features(300, 0).astype(np.float16), features(9, 1)
    _, places = nearest.search(bank, queries, mesh_lib.make_mesh(), k=3)
    # The reference uses the rounded bank, since nothing else is rounded.
    expected = np.argsort(-queries @ bank.astype(np.float32).T, axis=1)[:, :3]
    np.testing.assert_array_equal(places, expected)


def test_nearest_with_k_above_bank_returns_all() -> None:
    bank, labels = features(10, 0), np.arange(10) % 2
    ranked = predict(bank, labels, bank, 8, k=200, temperature=0.01)
    np.testing.assert_array_equal(ranked[:, 0], labels)  # at T 0.01, each is its own nearest


def make(train: ArraySource, test: ArraySource, batch_size: int, devices: int = 8) -> knn.Knn:
    mesh = mesh_lib.make_mesh(jax.devices()[:devices])
    loader = CropLoader(mesh, channels=1, size=8, resize=0, batch_size=batch_size)
    return knn.Knn(train, test, loader, k=(1, 20), temperature=(0.2,))


def test_knn_of_raw_pixels_equals_scikit_learn() -> None:
    train, test = open_source('digits/train'), open_source('digits/test')

    def rows(source: ArraySource) -> np.ndarray:
        x = source.images.reshape(len(source), -1).astype(np.float64)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    reference = KNeighborsClassifier(
        20, weights=lambda distance: np.exp((1 - distance**2 / 2) / 0.2), algorithm='brute'
    ).fit(rows(train), train.labels)
    expected = reference.score(rows(test), test.labels)
    for batch_size, devices in ((64, 8), (1000, 1)):
        one, twenty = make(train, test, batch_size, devices)(raw_pixels, {})
        assert (one.k, twenty.k) == (1, 20)
        assert twenty.top1 == pytest.approx(expected, abs=1e-9)
        assert one.top5 <= twenty.top5 <= 1  # one neighbor has one class


def test_bank_stays_on_the_devices_that_computed_it() -> None:
    train = open_source('digits/train')
    loader = make(train, train, 64).loader
    bank, labels = nearest.extract(raw_pixels, {}, train, loader, np.float16)
    (share,) = {shard.data.shape for shard in bank.features.addressable_shards}
    assert share == (-(-len(train) // 64) * 8, 64)
    assert bank.features.dtype == np.float16
    np.testing.assert_array_equal(labels, train.labels)
    rows = np.asarray(bank.rows)
    np.testing.assert_array_equal(np.sort(rows[rows >= 0]), np.arange(len(train)))
    pixels = train.images.reshape(len(train), -1)[rows]
    cosine = (pixels * np.asarray(bank.features, np.float32)).sum(1) / np.linalg.norm(
        pixels, axis=1
    )
    np.testing.assert_allclose(cosine[rows >= 0], 1, atol=1e-3)


def brightness(scale, images):
    return scale * images.mean((1, 2))


def test_knn_counts_each_image_once() -> None:
    # 5 of 13 queries can be correct; the padding of the last batch must not count.
    bright = np.full((16, 8, 8, 1), 255, np.uint8)
    train = ArraySource(bright, np.zeros(16, np.int32), ('a', 'b'))
    test = ArraySource(bright[:13], np.array([0] * 5 + [1] * 8, np.int32), ('a', 'b'))
    _, score = make(train, test, 8)(brightness, jnp.float32(1))
    assert score.top1 == pytest.approx(5 / 13)
    assert score.top5 == 1  # of two classes


def test_raw_pixels_of_large_images_are_reduced_to_32_pixels() -> None:
    images = np.random.default_rng(0).integers(0, 255, (2, 4, 4, 3), np.uint8)
    large = jnp.asarray(images.repeat(32, 1).repeat(32, 2))
    reduced = np.asarray(raw_pixels({}, large)).reshape(2, 32, 32, 3)
    np.testing.assert_allclose(reduced[:, 3::8, 3::8], images, atol=1e-3)
    np.testing.assert_array_equal(raw_pixels({}, jnp.asarray(images)), images.reshape(2, -1))


def test_extract_features_keeps_order_and_traces_once() -> None:
    test = open_source('digits/test')
    loader = make(test, test, 64).loader
    traces = []

    def encode(scale, images):
        traces.append(images.shape)
        return brightness(scale, images)

    for scale in (1.0, 2.0):
        features = extract_features(encode, jnp.float32(scale), test, loader)
        expected = scale * test.images.mean((1, 2)) / 255
        np.testing.assert_allclose(features.x, expected, rtol=1e-5)
        np.testing.assert_array_equal(features.labels, test.labels)
        np.testing.assert_array_equal(features.indices, np.arange(360))
    assert traces == [(64, 8, 8, 1)]  # an evaluation during training does not compile again
    normalized = extract_features(encode, jnp.float32(1), test, loader, l2=True, dtype=np.float16)
    assert normalized.x.dtype == np.float16
    np.testing.assert_array_equal(normalized.x, 1)


def test_knn_rejects_missing_or_different_labels() -> None:
    images, labels = np.zeros((8, 8, 8, 1), np.uint8), np.zeros(8, np.int32)
    labeled = ArraySource(images, labels, ('a', 'b'))
    with pytest.raises(errors.UserError, match=r'eval\.test has no labels'):
        make(labeled, ArraySource(images, labels, ()), 8)
    with pytest.raises(errors.UserError, match=r'the same classes, but b, c are only in one'):
        make(labeled, ArraySource(images, labels, ('a', 'c')), 8)
    with pytest.raises(errors.UserError, match=r'eval\.batch_size is 9.*8 devices'):
        make(labeled, labeled, 9)
