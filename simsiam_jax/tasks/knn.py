"""kNN evaluation of frozen features: the weighted vote of section 4's monitor.

Features are l2-normalized; the k nearest of the training set vote for their class with
weights exp(similarity / T); every image counts once, the last batch included.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from simsiam_jax import errors
from simsiam_jax.checkpoints import checkpoint
from simsiam_jax.data import jax_augment
from simsiam_jax.data.recipe import Recipe
from simsiam_jax.methods.losses import l2_normalize
from simsiam_jax.models.resnet import ResNet
from simsiam_jax.tasks import eval_setup, inputs
from simsiam_jax.tasks.features import Encode, Extractor
from simsiam_jax.tasks.inputs import ImageSet
from simsiam_jax.terminal import say
from simsiam_jax.training import mesh as mesh_lib

DATA = mesh_lib.DATA


@dataclasses.dataclass(frozen=True)
class KnnScore:
    """Accuracy of one vote, shares of the queries."""

    k: int
    temperature: float
    top1: float
    top5: float


class Knn:
    """kNN accuracy on a labeled pair of sources, of several votes in one pass.

    Args:
      train, test: the bank and the queries.
      extractor: makes the crops.
      apply: (variables, normalized images) -> features, in evaluation mode.
      mean, std: the network's normalization.
      k, temperature: of the votes, every k with every temperature.
      bank_dtype: 'float16' halves the memory of the bank, at a similarity's error of 1e-3.

    Raises:
      UserError: a source has no labels, or the two have other classes.
    """

    def __init__(
        self,
        train: ImageSet,
        test: ImageSet,
        extractor: Extractor,
        apply: Encode,
        *,
        mesh: Mesh,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        k: Sequence[int],
        temperature: Sequence[float],
        bank_dtype: str = 'float32',
    ):
        eval_setup.check_classes(train, test)
        errors.check_choice('eval.bank_dtype', bank_dtype, ('float32', 'float16'))
        if min(k, default=0) < 1 or min(temperature, default=0) <= 0:
            raise errors.UserError(
                f'config.eval.k is {k} and temperature {temperature}; expected k >= 1 and a '
                'temperature above 0'
            )
        self.train, self.test, self._mesh, self._extract = train, test, mesh, extractor
        self._k, self._temperature = tuple(k), tuple(temperature)
        self._dtype = np.dtype(bank_dtype)
        self._encode = extractor.jit(
            lambda variables, images: l2_normalize(
                apply(variables, jax_augment.normalize(images, mean, std))
            )
        )
        self._flatten = extractor.jit(
            lambda _, images: l2_normalize(images.reshape(len(images), -1))
        )

    def __call__(self, variables: Any) -> list[KnnScore]:
        """Scores of the network's features."""
        return self._scores(self._encode, variables)

    def pixels(self) -> list[KnnScore]:
        """Scores of the raw pixels as features."""
        return self._scores(self._flatten, None)

    def _scores(self, encode: Encode, variables: Any) -> list[KnnScore]:
        bank = self._extract(encode, variables, self.train, self._dtype)
        queries = self._extract(encode, variables, self.test)
        similarity, where = nearest(bank.x, queries.x, self._mesh, k=max(self._k))
        votes = bank.labels[where]
        scores = []
        for k in self._k:
            for temperature in self._temperature:
                classes = len(self.train.classes)
                ranked = vote(similarity[:, :k], votes[:, :k], temperature, classes=classes)
                hits = np.asarray(ranked) == queries.labels[:, None]
                scores.append(
                    KnnScore(k, temperature, float(hits[:, 0].mean()), float(hits.any(1).mean()))
                )
        return scores


@functools.partial(jax.jit, static_argnames='classes')
def vote(
    similarity: Float[Array | np.ndarray, 'Q K'],
    labels: Int[Array | np.ndarray, 'Q K'],
    temperature: float | Array,
    *,
    classes: int,
) -> Int[Array, 'Q R']:
    """The (at most five) classes with the most weight of every query's neighbors, best first."""
    # Relative to the nearest: no low temperature overflows.
    weights = jnp.exp((similarity - similarity[:, :1]) / temperature)
    rows = jnp.arange(len(labels))[:, None]
    counts = jnp.zeros((len(labels), classes)).at[rows, labels].add(weights)
    return jax.lax.top_k(counts, min(5, classes))[1]


def nearest(
    bank: Float[np.ndarray, 'N D'],
    queries: Float[np.ndarray, 'Q D'],
    mesh: Mesh,
    *,
    k: int,
    chunk: int = 1024,
    block: int = 65536,
) -> tuple[Float[np.ndarray, 'Q K'], Int[np.ndarray, 'Q K']]:
    """Inner products with the k nearest of the bank, largest first, and their places in it.

    The bank lies sharded over the devices, in its own dtype; each goes through its share block
    by block with the k nearest so far, and the nearest of all devices' are the nearest of all.
    A k above N means all.

    Args:
      chunk: queries at a time.
      block: of the bank at a time.
    """
    n, k = len(bank), min(k, len(bank))
    share = -(-n // mesh.size)  # of a device
    block = min(block, share)
    rows = np.arange(-(-share // block) * block * mesh.size)
    shards = mesh_lib.shard_global(
        (np.pad(bank, ((0, len(rows) - n), (0, 0))), np.where(rows < n, rows, -1)), mesh
    )
    search = _search(mesh, k, block)
    found = []
    chunk = min(chunk, len(queries))
    for start in range(0, len(queries), chunk):
        part = queries[start : start + chunk]
        padded = np.pad(part, ((0, chunk - len(part)), (0, 0)))
        found.append([np.asarray(x)[: len(part)] for x in search(padded, *shards)])
    similarity, places = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return similarity, places


@functools.lru_cache(maxsize=8)  # compiled once, not once an evaluation
def _search(mesh: Mesh, k: int, block: int) -> Callable[..., tuple[Array, Array]]:
    """(queries, bank, its places, -1 for fillers) -> the k nearest, as `nearest` gives them."""

    def on_device(queries: Array, bank: Array, rows: Array) -> tuple[Array, Array]:
        def look(best: tuple[Array, Array], start: Array) -> tuple[tuple[Array, Array], None]:
            part = jax.lax.dynamic_slice_in_dim(bank, start, block).astype(jnp.float32)
            places = jax.lax.dynamic_slice_in_dim(rows, start, block)
            similarity = jnp.matmul(queries, part.T, precision='highest')
            similarity = jnp.where(places >= 0, similarity, -jnp.inf)
            similarity, where = jax.lax.top_k(similarity, min(k, block))
            similarity = jnp.concatenate([best[0], similarity], 1)
            places = jnp.concatenate([best[1], places[where]], 1)
            similarity, where = jax.lax.top_k(similarity, k)
            return (similarity, jnp.take_along_axis(places, where, 1)), None

        none = jnp.full((len(queries), k), -jnp.inf), jnp.full((len(queries), k), -1)
        none = jax.lax.pcast(none, (DATA,), to='varying')
        return jax.lax.scan(look, none, jnp.arange(0, len(bank), block))[0]

    on_devices = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(P(), P(DATA), P(DATA)),
        out_specs=(P(None, DATA), P(None, DATA)),
    )

    @jax.jit
    def search(queries: Array, bank: Array, rows: Array) -> tuple[Array, Array]:
        similarity, places = on_devices(queries, bank, rows)
        similarity, where = jax.lax.top_k(similarity, k)
        return similarity, jnp.take_along_axis(places, where, 1)

    return search


def make_monitor(config: ConfigDict, backbone: ResNet, recipe: Recipe, mesh: Mesh) -> Knn | None:
    """The evaluation within a pre-training, None where config.eval names no labeled sets.

    Raises:
      UserError: only one of the two is named, or see Knn.
    """
    if not config.eval.train and not config.eval.test:
        return None
    if not config.eval.train or not config.eval.test:
        raise errors.UserError(
            f'config.eval.train is {config.eval.train!r} and config.eval.test '
            f'{config.eval.test!r}; give both for kNN, or neither'
        )
    train, test = (
        inputs.open_source(spec, config.data) for spec in (config.eval.train, config.eval.test)
    )
    extractor = Extractor(
        mesh,
        channels=config.data.channels,
        size=recipe.size,
        resize=config.eval.resize,
        batch_size=config.eval.batch_size,
    )
    return Knn(
        train,
        test,
        extractor,
        lambda state, images: backbone.apply(checkpoint.encoder_variables(state), images),
        mesh=mesh,
        mean=recipe.mean,
        std=recipe.std,
        k=(config.eval.k,),
        temperature=(config.eval.temperature,),
    )


def run(config: ConfigDict, workdir: str) -> None:
    """Scores a checkpoint's features; the table goes to the terminal and to WORKDIR/knn.json.

    Raises:
      UserError: the checkpoint, the data or the workdir cannot be used.
    """
    setting = eval_setup.prepare(config)
    module = setting.encoder.module
    knn = Knn(
        setting.train,
        setting.test,
        setting.extractor(config.eval.batch_size),
        module.apply,
        mesh=setting.mesh,
        mean=config.augment.mean,
        std=config.augment.std,
        k=config.eval.k,
        temperature=config.eval.temperature,
        bank_dtype=config.eval.bank_dtype,
    )
    setting.announce('kNN')
    scores = knn(mesh_lib.replicate(setting.encoder.variables, setting.mesh))
    say(f'{"k":>6}{"T":>8}{"top-1":>9}{"top-5":>9}   of {len(setting.test)} images')
    for s in scores:
        say(f'{s.k:>6}{s.temperature:>8}{s.top1:>9.4f}{s.top5:>9.4f}')
    eval_setup.write(workdir, 'knn.json', [dataclasses.asdict(s) for s in scores])
