"""kNN evaluation of frozen features: the weighted vote of section 4's monitor.

Features are l2-normalised; the k nearest of the training set vote for their class with
weights exp(similarity / T); every image counts once, the last batch included.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from simsiam_jax import errors
from simsiam_jax.data import device, host, resident
from simsiam_jax.data.reader import Reader
from simsiam_jax.data.recipe import Recipe
from simsiam_jax.data.sources import ArraySource
from simsiam_jax.methods.losses import l2_normalise
from simsiam_jax.training import mesh as mesh_lib

DATA = mesh_lib.DATA
Features = tuple[Float[np.ndarray, 'N D'], Int[np.ndarray, 'N']]


class Knn:
    """kNN top-1 on a labelled pair of sources.

    Args:
      train, test: the bank and the queries.
      apply: (variables, normalised images) -> features, in evaluation mode.
      mesh: features and similarities are computed over its devices.
      recipe: gives the size of the network's input and its normalisation.
      channels: of the images.
      resize: their shorter side before the centre crop; 0: they have the recipe's size.
      batch_size: images at a time, a multiple of the devices.
      k, temperature: of the vote.

    Raises:
      UserError: a source has no labels, or the two have other classes.
    """

    def __init__(
        self,
        train: Reader | ArraySource,
        test: Reader | ArraySource,
        apply: Callable[[Any, Array], Array],
        mesh: Mesh,
        *,
        recipe: Recipe,
        channels: int,
        resize: int,
        batch_size: int,
        k: int,
        temperature: float,
    ):
        for key, source in (('train', train), ('test', test)):
            if not source.classes:
                raise errors.UserError(
                    f'config.eval.{key} has no labels, which kNN needs; give a folder with one '
                    "subfolder a class, or '' for no evaluation"
                )
        if k < 1 or temperature <= 0:
            raise errors.UserError(
                f'config.eval.k is {k} and temperature {temperature}; expected k >= 1 and a '
                'temperature above 0'
            )
        if train.classes != test.classes:
            raise errors.UserError(
                f'config.eval.train has {len(train.classes)} classes and config.eval.test '
                f'{len(test.classes)}, or others; kNN needs the same in both'
            )
        mesh_lib.check_batch_size('eval.batch_size', batch_size, mesh)
        self.train, self.test, self.mesh = train, test, mesh
        self.k, self.temperature = k, temperature
        self._channels = channels
        self._images: dict[str, Any] = {
            'batch_size': batch_size,
            'local': mesh_lib.process_slice(batch_size),
            'size': recipe.size,
            'resize': resize,
        }
        replicated = jax.sharding.NamedSharding(mesh, P())

        def encode(variables: Any, images: Array) -> Array:
            images = device.normalise(images, recipe.mean, recipe.std)
            return l2_normalise(apply(variables, images))

        def pixels(variables: Any, images: Array) -> Array:
            return l2_normalise(images.reshape(len(images), -1))

        self._encode = jax.jit(encode, out_shardings=replicated)
        self._pixels = jax.jit(pixels, out_shardings=replicated)

    def __call__(self, variables: Any) -> float:
        """Top-1 accuracy of the network's features."""
        return self._top1(self._encode, variables)

    def pixels(self) -> float:
        """Top-1 accuracy of the raw pixels as features."""
        return self._top1(self._pixels, None)

    def _top1(self, encode: Callable[..., Array], variables: Any) -> float:
        bank, labels = self._extract(self.train, encode, variables)
        queries, truth = self._extract(self.test, encode, variables)
        predictions = vote(
            bank,
            labels,
            queries,
            self.mesh,
            k=self.k,
            temperature=self.temperature,
            classes=len(self.train.classes),
        )
        return float(np.mean(predictions == truth))

    def _extract(
        self, source: Reader | ArraySource, encode: Callable[..., Array], variables: Any
    ) -> Features:
        features, labels = [], []
        for images, batch_labels in self._batches(source):
            features.append(np.asarray(encode(variables, images)))
            labels.append(np.asarray(batch_labels))
        x, y = np.concatenate(features), np.concatenate(labels)
        return x[y >= 0], y[y >= 0]  # what fills up batches is labelled -1

    def _batches(self, source: Reader | ArraySource) -> Iterator[tuple[Array, Array]]:
        if isinstance(source, ArraySource):
            batches = resident.eval_batches(source, channels=self._channels, **self._images)
        else:
            batches = host.eval_batches(source, **self._images)
        gather = jax.jit(lambda x: x, out_shardings=jax.sharding.NamedSharding(self.mesh, P()))
        for images, labels in mesh_lib.prefetch(batches, self.mesh):
            yield images, gather(labels)


def vote(
    bank: Float[np.ndarray, 'N D'],
    labels: Int[np.ndarray, 'N'],
    queries: Float[np.ndarray, 'Q D'],
    mesh: Mesh,
    *,
    k: int,
    temperature: float,
    classes: int,
    chunk: int = 1024,
) -> Int[np.ndarray, 'Q']:
    """The class that the k nearest of the bank vote for, of every query.

    The bank lies sharded over the devices; each finds its own k nearest, and the nearest of
    these are the nearest of all. A k above N means all.
    """
    k = min(k, len(bank))
    padding = -len(bank) % mesh.size
    shards = mesh_lib.shard_global(
        (np.pad(bank, ((0, padding), (0, 0))), np.pad(labels, (0, padding), constant_values=-1)),
        mesh,
    )

    def nearest(queries: Array, bank: Array, labels: Array) -> tuple[Array, Array]:
        similarity = jnp.matmul(queries, bank.T, precision='highest')
        similarity = jnp.where(labels >= 0, similarity, -jnp.inf)
        top, where = jax.lax.top_k(similarity, min(k, len(labels)))
        return top, labels[where]

    nearest = jax.shard_map(
        nearest,
        mesh=mesh,
        in_specs=(P(), P(DATA), P(DATA)),
        out_specs=(P(None, DATA), P(None, DATA)),
    )

    @jax.jit
    def predict(queries: Array, bank: Array, labels: Array) -> Array:
        similarity, votes = nearest(queries, bank, labels)
        similarity, where = jax.lax.top_k(similarity, k)
        votes = jnp.take_along_axis(votes, where, axis=1)
        weights = jnp.exp(similarity / temperature)
        rows = jnp.arange(len(queries))[:, None]
        counts = jnp.zeros((len(queries), classes)).at[rows, votes].add(weights)
        return jnp.argmax(counts, axis=1)

    predictions = []
    for start in range(0, len(queries), chunk):
        part = queries[start : start + chunk]
        padded = np.pad(part, ((0, chunk - len(part)), (0, 0)))
        predictions.append(np.asarray(predict(padded, *shards))[: len(part)])
    return np.concatenate(predictions)
