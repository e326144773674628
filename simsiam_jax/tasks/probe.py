"""A probe in seconds: linear classifiers on cached features of center crops.

Trains many heads by SGD in one vmapped step, and logistic regressions by L-BFGS. Of each kind, the
best on a held-out part of the training set is trained again on all of it and tested once.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from simsiam_jax import errors
from simsiam_jax.data import jax_augment, subset
from simsiam_jax.tasks import eval_setup, selection, verdict
from simsiam_jax.tasks.features import (
    CropLoader,
    Encode,
    Features,
    extract_features,
    extract_together,
    raw_pixels,
)
from simsiam_jax.tasks.inputs import ImageSet
from simsiam_jax.tasks.selection import HeadScores
from simsiam_jax.tasks.verdict import Answers
from simsiam_jax.terminal import say
from simsiam_jax.training import classifier, logistic, sgd_heads

_RAW_PIXELS = 'raw pixels'

_COMPONENTS = 512  # most values of an image of raw pixels
_SAMPLE = 10_000  # images whose principal components are computed


@dataclasses.dataclass(frozen=True)
class _Splits:
    """Features to choose on: those of the training set, of which some are held out, and the test.

    Attributes:
      train: Features of the training set.
      held: Positions of the held-out features in `train`, sorted.
      rest: Positions of the others, sorted.
      test: Features of the test set.
      classes: Number of classes.
    """

    train: Features
    held: Int[np.ndarray, 'H']
    rest: Int[np.ndarray, 'R']
    test: Features
    classes: int

    @property
    def held_out(self) -> Features:
        return Features(*(array[self.held] for array in self.train))


class _Probed(NamedTuple):
    """Result of one kind of classifier on the features of one encoder.

    Attributes:
      held_out: Scores of the chosen classifier on the held-out images.
      answers: Its answers to the test images, after training on the whole training set.
      result: Values for the JSON file.
    """

    held_out: HeadScores
    answers: Answers
    result: dict[str, Any]


def run(config: ConfigDict, workdir: str) -> None:
    """Probes a checkpoint; prints the tables and writes WORKDIR/probe.json.

    Raises:
      UserError: The configuration, the checkpoint, the data or the workdir cannot be used.
    """
    results, judged = evaluate(eval_setup.prepare(config))
    eval_setup.write(workdir, 'probe.json', results)
    eval_setup.write(workdir, 'verdict.json', judged.result)


def evaluate(setup: eval_setup.EvalSetup) -> tuple[dict[str, Any], verdict.Verdict]:
    """Probes an encoder; prints the tables.

    Args:
      setup: Encoder, images and the configuration of task probe.

    Returns:
      Results by encoder and kind of classifier, and the comparison with the baselines.

    Raises:
      UserError: The configuration cannot be used.
    """
    config = setup.config
    if not 0 < config.eval.holdout < 1:
        raise errors.UserError(
            f'config.eval.holdout is {config.eval.holdout}; expected a share of the training set '
            'above 0 and below 1. Set it to 0.1 or so'
        )
    setup.announce('probe')
    loader = setup.loader()
    encoders: dict[str, tuple[Encode, Any]] = {
        'checkpoint': (setup.encode, setup.encoder.variables)
    }
    if config.eval.baselines:
        random = setup.encode, setup.random_variables()
        pixels = pixel_encoder(setup.train, loader, config.seed)
        encoders = {_RAW_PIXELS: pixels, 'random initialization': random} | encoders
    train, test = (extract_together(encoders, s, loader) for s in (setup.train, setup.test))
    results, answers = {}, {}
    for name in encoders:
        probed = _probe(name, train[name], test[name], len(setup.train.classes), config)
        results[name] = {kind: p.result for kind, p in probed.items()}
        answers[name] = _best(probed).answers
    judged = verdict.judge(
        answers,
        setup.test.classes,
        title='linear probe',
        trained='checkpoint',
        baseline='random initialization' if config.eval.baselines else '',
    )
    say(str(judged), heading='Result')
    return results, judged


def _pixels(_: Any, images: jax.Array) -> jax.Array:
    """Returns images [B, H, W, C] as values in [0, 1], at most 32 by 32 pixels."""
    return raw_pixels(None, jax_augment.normalize(images, (0.0,), (1.0,)))


def pixel_encoder(source: ImageSet, loader: CropLoader, seed: int) -> tuple[Encode, Any]:
    """Returns an encoder to raw pixels of at most 512 values an image, and its variables.

    More values are projected on the first principal components of a sample, so that the pixels of a
    million images fit into memory.

    Args:
      source: Images of the sample.
      loader: Loader of the crops.
      seed: Seed of the sample.

    Raises:
      UserError: None of the images can be read.
    """
    sample = np.random.default_rng(seed).permutation(len(source))[:_SAMPLE]
    components = min(_COMPONENTS, len(sample) - 1)
    crop = jax.ShapeDtypeStruct((1, *loader.shape), np.uint8)
    values = jax.eval_shape(_pixels, {}, crop).shape[1]
    if values <= components:
        return _pixels, {}
    from sklearn.decomposition import PCA  # takes as long to import as JAX

    x = extract_features(_pixels, {}, subset.take(source, np.sort(sample)), loader).x
    pca = PCA(min(components, len(x)), svd_solver='randomized', random_state=seed).fit(x)
    say(
        f'raw pixels: {pca.n_components_} principal components of {values} values, '
        f'{pca.explained_variance_ratio_.sum():.1%} of the variance'
    )

    def project(variables: dict[str, jax.Array], images: jax.Array) -> jax.Array:
        centered = _pixels({}, images) - variables['mean']
        return jnp.matmul(centered, variables['components'], precision='highest')

    return project, {'mean': np.float32(pca.mean_), 'components': np.float32(pca.components_.T)}


def _probe(
    name: str, train: Features, test: Features, classes: int, config: ConfigDict
) -> dict[str, _Probed]:
    """Returns the results by kind of classifier; `name` is the encoder's."""
    held, rest = subset.split(train.labels, config.eval.holdout, config.seed + 1)
    splits = _Splits(train, held, rest, test, classes)
    probed = {}
    if config.optim.learning_rates:
        probed['SGD'] = _sweep(name, splits, config)
    strengths = sorted(config.logistic.strengths)
    key = 'limit' if jax.default_backend() == 'cpu' else 'accelerator_limit'
    most = config.logistic[key] // train.x.shape[1]  # images
    if strengths and most >= classes:
        if most < len(train.x):
            say(
                f'{name}: L-BFGS on a class-balanced sample of {most:,} of {len(train.x):,} '
                f'training images, because config.logistic.{key} is {config.logistic[key]}'
            )
        probed['L-BFGS'] = _regress(name, splits, most, strengths, config.seed + 2)
    elif strengths:
        say(
            f'skipping L-BFGS: config.logistic.{key} is {config.logistic[key]}, less than the '
            f'values of {classes} images'
        )
    if not probed:
        raise errors.UserError(
            'there is no classifier to train. Set config.optim.learning_rates or '
            'config.logistic.strengths, or raise config.logistic.limit'
        )
    for kind, (_, _, result) in probed.items():
        say(
            f'{name}: {kind}, {result["chosen"]}: top-1 {result["top1"]:.4f}  '
            f'top-5 {result["top5"]:.4f} of {len(test.x)} test images'
        )
    return probed


def _best(probed: dict[str, _Probed]) -> _Probed:
    """Returns the result of the kind of classifier that the held-out images prefer."""
    results = list(probed.values())
    return results[selection.choose(selection.join([p.held_out for p in results]))]


def _sweep(name: str, splits: _Splits, config: ConfigDict) -> _Probed:
    rates, decays = classifier.grid(config.optim.learning_rates, config.optim.weight_decays)
    x, labels, _ = splits.train
    common: dict[str, Any] = {
        'classes': splits.classes,
        'batch_size': config.batch_size,
        'epochs': config.epochs,
        'momentum': config.optim.momentum,
        'seed': config.seed,
        'what': f'{name}, SGD',
    }
    held_out = score(
        sgd_heads.train(x[splits.rest], labels[splits.rest], rates, decays, **common),
        splits.held_out,
    )
    say(selection.table(held_out, config.optim.learning_rates, config.optim.weight_decays))
    best = selection.choose(held_out)
    heads = sgd_heads.train(x, labels, rates[[best]], decays[[best]], **common)
    return _Probed(
        held_out.only(best),
        Answers(_predict(heads, splits.test), splits.test.labels),
        {
            **_tested(heads, splits.test),
            'chosen': f'rate {rates[best]:g}, decay {decays[best]:g}',
            'heads': selection.rows(held_out, rates, decays),
        },
    )


def _regress(
    name: str, splits: _Splits, most: int, strengths: Sequence[float], seed: int
) -> _Probed:
    """Returns the result of logistic regression on at most this number of training images."""
    x, labels, _ = splits.train
    fitted = np.isin(np.arange(len(x)), splits.rest)
    if most < len(x):
        kept, _ = subset.split(labels, most / len(x), seed)
        x, labels, fitted = x[kept], labels[kept], fitted[kept]
    common: dict[str, Any] = {'classes': splits.classes, 'what': f'{name}, L-BFGS'}
    held = splits.held_out
    scores = [score(head, held) for head in logistic.path(x, labels, fitted, strengths, **common)]
    held_out = selection.join(scores)
    best = selection.choose(held_out)
    everything = np.ones(len(x), bool)
    (head,) = logistic.path(x, labels, everything, strengths[best : best + 1], **common)
    return _Probed(
        held_out.only(best),
        Answers(_predict(head, splits.test), splits.test.labels),
        {
            **_tested(head, splits.test),
            'chosen': f'C {strengths[best]:g}',
            'holdout_top1': dict(zip(map(str, strengths), held_out.top1.tolist(), strict=True)),
        },
    )


def score(heads: dict[str, Any], data: Features) -> HeadScores:
    """Returns the scores of each head on some features."""
    measure = jax.jit(classifier.measure)
    totals = np.zeros(())
    for start in range(0, len(data.x), 4096):
        x, labels, _ = (array[start : start + 4096] for array in data)
        totals = totals + np.asarray(measure(heads, x, labels, np.ones(len(x), bool)), np.float64)
    top1, top5, loss = totals / len(data.x)
    return HeadScores(top1, top5, loss, len(data.x))


def _predict(heads: dict[str, Any], data: Features) -> Int[np.ndarray, 'N']:
    """Returns the classes that the first head predicts."""
    parts = [data.x[start : start + 4096] for start in range(0, len(data.x), 4096)]
    predict = jax.jit(lambda x: classifier.logits(heads, x)[0].argmax(-1))
    return np.concatenate([np.asarray(predict(part)) for part in parts])


def _tested(heads: dict[str, Any], test: Features) -> dict[str, float]:
    scores = score(heads, test)
    return {'top1': float(scores.top1[0]), 'top5': float(scores.top5[0])}
