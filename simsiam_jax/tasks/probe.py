"""A probe in minutes: linear classifiers on cached features of center crops.

Trains many heads by SGD in one vmapped step, and logistic regression by L-BFGS. Of each kind, the
best on a held-out part of the training set is trained again on all of it and tested once.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int
from ml_collections import ConfigDict
from sklearn.linear_model import LogisticRegression

from simsiam_jax import errors
from simsiam_jax.data import jax_augment, subset
from simsiam_jax.tasks import eval_setup, selection, verdict
from simsiam_jax.tasks.features import Encode, Features, extract_features
from simsiam_jax.tasks.selection import HeadScores
from simsiam_jax.tasks.verdict import Answers
from simsiam_jax.terminal import say
from simsiam_jax.training import classifier, optim
from simsiam_jax.training import mesh as mesh_lib


@dataclasses.dataclass(frozen=True)
class _Splits:
    """Features to train (fit) and choose (held_out) on, their union (train), and the test set."""

    fit: Features
    held_out: Features
    train: Features
    test: Features
    classes: int


def run(config: ConfigDict, workdir: str) -> None:
    """Probes a checkpoint; prints the tables and writes WORKDIR/probe.json.

    Raises:
      UserError: The configuration, the checkpoint, the data or the workdir cannot be used.
    """
    setup = eval_setup.prepare(config)
    if not 0 < config.eval.holdout < 1:
        raise errors.UserError(
            f'config.eval.holdout is {config.eval.holdout}; expected a share of the training set '
            'above 0 and below 1. Set it to 0.1 or so'
        )
    setup.announce('probe')
    loader = setup.loader()
    encoders: dict[str, tuple[Encode, Callable[[], Any]]] = {
        'raw pixels': (_pixels, dict),
        'random initialization': (setup.encode, setup.random_variables),
        'checkpoint': (setup.encode, lambda: setup.encoder.variables),
    }
    if not config.eval.baselines:
        encoders = {'checkpoint': encoders['checkpoint']}
    results = {}
    answers: dict[str, dict[str, Answers]] = {}  # by kind, and by encoder unless it was skipped
    for name, (encode, load) in encoders.items():
        variables = mesh_lib.replicate(load(), setup.mesh)
        train, test = (
            extract_features(encode, variables, source, loader)
            for source in (setup.train, setup.test)
        )
        results[name] = _probe(train, test, len(setup.train.classes), config)
        for kind, result in results[name].items():
            answers.setdefault(kind, {})[name] = result.pop('answers')
            say(
                f'{name}: {kind}, {result["chosen"]}: top-1 {result["top1"]:.4f}  '
                f'top-5 {result["top5"]:.4f} of {len(test.x)} test images'
            )
    verdicts = {}
    for kind, by_encoder in answers.items():
        if 'checkpoint' in by_encoder:
            judged = verdict.judge(
                by_encoder,
                setup.test.classes,
                title=f'linear probe by {kind}',
                trained='checkpoint',
                baseline='random initialization' if config.eval.baselines else '',
            )
            say(str(judged))
            verdicts[kind] = judged.result
    eval_setup.write(workdir, 'probe.json', results)
    eval_setup.write(workdir, 'verdict.json', verdicts)


def _pixels(_: Any, images: jax.Array) -> jax.Array:
    """Returns images [B, H, W, C] as values in [0, 1], [B, H * W * C]."""
    return jax_augment.normalize(images, (0.0,), (1.0,)).reshape(len(images), -1)


def _probe(train: Features, test: Features, classes: int, config: ConfigDict) -> dict[str, Any]:
    held, rest = subset.split(train.labels, config.eval.holdout, config.seed + 1)
    fit, held_out = (Features(*(a[i] for a in train)) for i in (rest, held))
    splits = _Splits(fit, held_out, train, test, classes)
    results = {}
    if config.optim.learning_rates:
        results['SGD'] = _sweep(splits, config)
    strengths = config.logistic.strengths
    if strengths and train.x.size <= config.logistic.limit:
        results['L-BFGS'] = _logistic(splits, strengths)
    elif strengths:
        say(
            f'skipping L-BFGS: {train.x.size} feature values exceed config.logistic.limit='
            f'{config.logistic.limit}'
        )
    return results


def _sweep(splits: _Splits, config: ConfigDict) -> dict[str, Any]:
    rates, decays = classifier.grid(config.optim.learning_rates, config.optim.weight_decays)
    common: dict[str, Any] = {
        'classes': splits.classes,
        'batch_size': config.batch_size,
        'epochs': config.epochs,
        'momentum': config.optim.momentum,
        'seed': config.seed,
    }
    held_out = score(train_heads(splits.fit, rates, decays, **common), splits.held_out)
    say(selection.table(held_out, config.optim.learning_rates, config.optim.weight_decays))
    best = [selection.choose(held_out)]
    heads = train_heads(splits.train, rates[best], decays[best], **common)
    test = score(heads, splits.test)
    return {
        'answers': Answers(_predict(heads, splits.test), splits.test.labels),
        'top1': float(test.top1[0]),
        'top5': float(test.top5[0]),
        'chosen': f'rate {rates[best][0]:g}, decay {decays[best][0]:g}',
        'heads': selection.rows(held_out, rates, decays),
    }


def train_heads(
    train: Features,
    rates: Float[np.ndarray, 'heads'],
    decays: Float[np.ndarray, 'heads'],
    *,
    classes: int,
    batch_size: int,
    epochs: int,
    momentum: float,
    seed: int,
) -> dict[str, Any]:
    """Returns heads trained by SGD with a cosine schedule to 0.

    Args:
      train: Features to train on.
      rates: Base learning rate of each head, times batch_size/256.
      decays: Weight decay of each head.
      classes: Number of classes.
      batch_size: Batch size; if larger than the data, all of it.
      epochs: Length of the training.
      momentum: Momentum of SGD.
      seed: Seed of the initial weights and of the order.
    """
    x, labels = jnp.asarray(train.x), jnp.asarray(train.labels)
    batch_size = min(batch_size, len(x))
    steps = len(x) // batch_size
    unit = optim.cosine_schedule(batch_size / 256, epochs=epochs, steps_per_epoch=steps)
    tx = classifier.each_head(
        lambda rate, decay: optim.torch_sgd(lambda step: rate * unit(step), momentum, decay),
        rates,
        decays,
    )

    @jax.jit
    def epoch(carry: Any, key: jax.Array, x: jax.Array, labels: jax.Array) -> Any:
        def step(carry: Any, batch: jax.Array) -> tuple[Any, None]:
            heads, state = carry

            def loss(heads: Any) -> jax.Array:
                return classifier.head_cross_entropy(heads, x[batch], labels[batch])[0].sum()

            updates, state = tx.update(jax.grad(loss)(heads), state, heads)
            return (optax.apply_updates(heads, updates), state), None

        order = jax.random.permutation(key, len(x))[: steps * batch_size]
        return jax.lax.scan(step, carry, order.reshape(steps, batch_size))[0]

    heads = classifier.init_heads(len(rates), x.shape[1], classes, seed)
    carry = heads, tx.init(heads)
    for key in jax.random.split(jax.random.key(seed), epochs):
        carry = epoch(carry, key, x, labels)
    return carry[0]


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


def _logistic(splits: _Splits, strengths: Sequence[float]) -> dict[str, Any]:
    def regression(strength: float, data: Features) -> LogisticRegression:
        return LogisticRegression(C=strength, max_iter=10_000).fit(data.x, data.labels)

    def score(model: LogisticRegression, data: Features) -> tuple[float, float, float]:
        # With few labels, a class may be missing.
        probabilities = np.zeros((len(data.x), splits.classes))
        probabilities[:, model.classes_] = model.predict_proba(data.x)
        ranked = np.argsort(-probabilities, axis=1)[:, :5]
        correct = ranked == data.labels[:, None]
        loss = -np.log(probabilities[np.arange(len(data.x)), data.labels] + 1e-12)
        return correct[:, 0].mean(), correct.any(1).mean(), loss.mean()

    held_out = [score(regression(c, splits.fit), splits.held_out) for c in strengths]
    top1, top5, loss = np.array(held_out).T
    best = strengths[selection.choose(HeadScores(top1, top5, loss, len(splits.held_out.x)))]
    model = regression(best, splits.train)
    test_top1, test_top5, _ = score(model, splits.test)
    return {
        'answers': Answers(model.predict(splits.test.x), splits.test.labels),
        'top1': float(test_top1),
        'top5': float(test_top5),
        'chosen': f'C {best:g}',
        'holdout_top1': dict(zip(map(str, strengths), top1.tolist(), strict=True)),
    }
