"""kNN evaluation of frozen features: the weighted vote of the monitor in SimSiam, section 4.

Features are l2-normalized. The k nearest images of the training set vote for their class with
weights exp(similarity / T). Each image counts once, including the last batch.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from simsiam_jax import errors
from simsiam_jax.data.recipe import Recipe
from simsiam_jax.tasks import eval_setup, inputs, nearest, verdict
from simsiam_jax.tasks.features import CropLoader, Encode, features_of, raw_pixels
from simsiam_jax.tasks.inputs import ImageSet
from simsiam_jax.tasks.verdict import Answers
from simsiam_jax.terminal import say
from simsiam_jax.training import mesh as mesh_lib


@dataclasses.dataclass(frozen=True)
class KnnScore:
    """Accuracy of one vote, as shares of the queries, and its answer to each query."""

    k: int
    temperature: float
    top1: float
    top5: float
    answers: Answers = dataclasses.field(repr=False, compare=False)


@dataclasses.dataclass(frozen=True)
class Knn:
    """kNN evaluation of any encoder on a labeled pair of image sets.

    Attributes:
      train: Images of the bank.
      test: Images that are classified.
      loader: Loader of the center crops.
      k: Numbers of neighbors.
      temperature: Temperatures; each is evaluated with each k.
      bank_dtype: Type of the bank's features; 'float16' halves its memory, with an error of 1e-3
        in the similarities.

    Raises:
      UserError: The sets do not have the same classes, or a value is impossible.
    """

    train: ImageSet
    test: ImageSet
    loader: CropLoader
    k: Sequence[int]
    temperature: Sequence[float]
    bank_dtype: str = 'float32'

    def __post_init__(self) -> None:
        eval_setup.check_classes(self.train, self.test)
        errors.check_choice('eval.bank_dtype', self.bank_dtype, ('float32', 'float16'))
        if min(self.k, default=0) < 1 or min(self.temperature, default=0) <= 0:
            raise errors.UserError(
                f'config.eval.k is {self.k} and config.eval.temperature {self.temperature}; '
                'expected k >= 1 and a temperature above 0'
            )

    def __call__(self, encode: Encode, variables: Any) -> list[KnnScore]:
        """Returns the scores of an encoder, arguments as in extract_features."""
        dtype = np.dtype(self.bank_dtype)
        bank, classes = nearest.extract(encode, variables, self.train, self.loader, dtype)
        k = min(max(self.k), int((classes >= 0).sum()))
        found: list[tuple[np.ndarray, ...]] = []
        for x, labels, indices in features_of(encode, variables, self.test, self.loader, l2=True):
            similarity, places = map(np.asarray, bank.nearest(x, k))
            readable = indices >= 0
            found.append((similarity[readable], classes[places[readable]], labels[readable]))
        similarity, votes, labels = (np.concatenate(x) for x in zip(*found, strict=True))
        if not len(labels):
            raise errors.UserError('none of the images to evaluate can be read')
        return accuracy(
            similarity,
            votes,
            labels,
            k=self.k,
            temperature=self.temperature,
            classes=len(self.train.classes),
        )


def accuracy(
    similarity: Float[np.ndarray, 'Q K'],
    votes: Int[np.ndarray, 'Q K'],
    labels: Int[np.ndarray, 'Q'],
    *,
    k: Sequence[int],
    temperature: Sequence[float],
    classes: int,
) -> list[KnnScore]:
    """Returns the accuracy of kNN classification, for each k with each temperature.

    Args:
      similarity: Similarities [Q, K] of the neighbors of each query, largest first.
      votes: Classes [Q, K] of the neighbors, from 0 to classes - 1.
      labels: True classes [Q] of the queries.
      k: Numbers of neighbors that vote.
      temperature: Temperatures T of the weights exp(similarity / T).
      classes: Number of classes.
    """
    scores = []
    for neighbors, t in itertools.product(k, temperature):
        ranked = vote(similarity[:, :neighbors], votes[:, :neighbors], t, classes=classes)
        hits = np.asarray(ranked) == labels[:, None]
        answers = Answers(np.asarray(ranked)[:, 0], labels)
        top5 = float(hits.any(1).mean())
        scores.append(KnnScore(neighbors, t, float(hits[:, 0].mean()), top5, answers))
    return scores


@functools.partial(jax.jit, static_argnames='classes')
def vote(
    similarity: Float[Array | np.ndarray, 'Q K'],
    labels: Int[Array | np.ndarray, 'Q K'],
    temperature: float | Array,
    *,
    classes: int,
) -> Int[Array, 'Q R']:
    """Returns the (at most five) classes with the most weight per query, best first.

    Args:
      similarity: Similarities [Q, K] of the neighbors, largest first.
      labels: Classes [Q, K] of the neighbors.
      temperature: T of the weights exp(similarity / T).
      classes: Number of classes.
    """
    # Relative to the nearest neighbor, so that low temperatures do not overflow.
    weights = jnp.exp((similarity - similarity[:, :1]) / temperature)
    rows = jnp.arange(len(labels))[:, None]
    counts = jnp.zeros((len(labels), classes)).at[rows, labels].add(weights)
    return jax.lax.top_k(counts, min(5, classes))[1]


def make_monitor(
    config: ConfigDict, recipe: Recipe, mesh: Mesh, opened: Mapping[str, ImageSet]
) -> Knn | None:
    """Returns the evaluation during pre-training; None if config.eval names no labeled sets.

    Args:
      config: Configuration of the pre-training.
      recipe: Augmentation, of which the size counts.
      mesh: Devices to use.
      opened: Source -> images that are open already.

    Raises:
      UserError: Only one of the two sets is named, or see Knn.
    """
    if not config.eval.train and not config.eval.test:
        return None
    if not config.eval.train or not config.eval.test:
        raise errors.UserError(
            f'kNN needs both labeled sets: config.eval.train is {config.eval.train!r}, '
            f'config.eval.test is {config.eval.test!r}. Set both, or neither'
        )
    train, test = (
        opened.get(spec) or inputs.open_source(spec, config.data)
        for spec in (config.eval.train, config.eval.test)
    )
    loader = CropLoader(
        mesh,
        channels=config.data.channels,
        size=recipe.size,
        resize=config.eval.resize,
        batch_size=config.eval.batch_size,
    )
    return Knn(
        train,
        test,
        loader,
        (config.eval.k,),
        (config.eval.temperature,),
        config.eval.bank_dtype,
    )


def run(config: ConfigDict, workdir: str) -> None:
    """Evaluates a checkpoint by kNN; prints the table and writes WORKDIR/knn.json.

    Raises:
      UserError: The checkpoint, the data or the workdir cannot be used.
    """
    rows, judged = evaluate(eval_setup.prepare(config))
    eval_setup.write(workdir, 'knn.json', rows)
    eval_setup.write(workdir, 'verdict.json', judged.result)


def evaluate(setup: eval_setup.EvalSetup) -> tuple[list[dict[str, int | float]], verdict.Verdict]:
    """Evaluates an encoder by kNN; prints the table.

    Args:
      setup: Encoder, images and the configuration of task knn.

    Returns:
      Accuracies for each k with each temperature, and the comparison with the baselines.
    """
    config = setup.config
    knn = Knn(
        setup.train,
        setup.test,
        setup.loader(),
        config.eval.k,
        config.eval.temperature,
        config.eval.bank_dtype,
    )
    setup.announce('kNN')
    networks = {'checkpoint': (setup.encode, lambda: setup.encoder.variables)}
    if config.eval.baselines:
        networks = {
            'raw pixels': (raw_pixels, dict),
            'random initialization': (setup.encode, setup.random_variables),
            **networks,
        }
    scores = {
        name: knn(encode, mesh_lib.replicate(load(), setup.mesh))
        for name, (encode, load) in networks.items()
    }
    trained = scores['checkpoint']
    say(f'{"k":>6}{"T":>8}{"top-1":>9}{"top-5":>9}   of {len(setup.test)} images')
    for score in trained:
        say(f'{score.k:>6}{score.temperature:>8}{score.top1:>9.4f}{score.top5:>9.4f}')
    # The first k and T, because choosing the best on the test set would favor every row.
    first = {name: row[0] for name, row in scores.items()}
    result = verdict.judge(
        {name: score.answers for name, score in first.items()},
        setup.test.classes,
        title=f'kNN (k {trained[0].k}, T {trained[0].temperature:g})',
        trained='checkpoint',
        baseline='random initialization' if config.eval.baselines else '',
    )
    say(str(result), heading='Result')
    names = ('k', 'temperature', 'top1', 'top5')
    return [{name: getattr(score, name) for name in names} for score in trained], result
