"""A probe in minutes: classifiers on features of center crops, which are computed once.

Many heads by SGD in one vmapped step, and logistic regression by L-BFGS; each kind is chosen
on a held-out part of the training set, trained again on all of it, and tested once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float
from ml_collections import ConfigDict
from sklearn.linear_model import LogisticRegression

from simsiam_jax import errors
from simsiam_jax.data import jax_augment, subset
from simsiam_jax.tasks import eval_setup, selection
from simsiam_jax.tasks.features import Encode, Features
from simsiam_jax.tasks.selection import HeadScores
from simsiam_jax.terminal import say
from simsiam_jax.training import classifier, optim
from simsiam_jax.training import mesh as mesh_lib


def run(config: ConfigDict, workdir: str) -> None:
    """Probes a checkpoint; the tables go to the terminal and to WORKDIR/probe.json.

    Raises:
      UserError: the configuration, the checkpoint, the data or the workdir cannot be used.
    """
    setting = eval_setup.prepare(config)
    if not 0 < config.eval.holdout < 1:
        raise errors.UserError(
            f'config.eval.holdout is {config.eval.holdout}; expected a share of the training set, '
            'above 0 and below 1, to choose by'
        )
    setting.announce('probe')
    encoder = setting.encoder
    extract = setting.extractor(config.eval.batch_size)

    def network(variables: Any, images: jax.Array) -> Any:
        images = jax_augment.normalize(images, config.augment.mean, config.augment.std)
        return encoder.module.apply(variables, images)

    def pixels(_: Any, images: jax.Array) -> jax.Array:
        return jax_augment.normalize(images, (0.0,), (1.0,)).reshape(len(images), -1)

    size = (1, config.augment.size, config.augment.size, config.data.channels)
    inits: dict[str, tuple[Encode, Any]] = {'checkpoint': (network, lambda: encoder.variables)}
    if config.eval.baselines:
        fresh = functools.partial(
            jax.jit(encoder.module.init), jax.random.key(config.seed), jnp.zeros(size)
        )
        inits = {'raw pixels': (pixels, dict), 'random initialization': (network, fresh)} | inits
    results = {}
    for name, (encode, init) in inits.items():
        variables = mesh_lib.replicate(init(), setting.mesh)
        compiled = extract.jit(encode)
        train, test = (
            extract(compiled, variables, source) for source in (setting.train, setting.test)
        )
        results[name] = _probe(train, test, len(setting.train.classes), config)
        for kind, result in results[name].items():
            say(
                f'{name}: {kind}, {result["chosen"]}: top-1 {result["top1"]:.4f}  '
                f'top-5 {result["top5"]:.4f} of {len(test.x)} test images'
            )
    eval_setup.write(workdir, 'probe.json', results)


def _probe(train: Features, test: Features, classes: int, config: ConfigDict) -> dict[str, Any]:
    held, rest = subset.split(train.labels, config.eval.holdout, config.seed + 1)
    fit, held_out = (Features(*(a[i] for a in train)) for i in (rest, held))
    results = {}
    if config.optim.learning_rates:
        results['SGD'] = _sweep(fit, held_out, train, test, classes, config)
    strengths = config.logistic.strengths
    if strengths and train.x.size <= config.logistic.limit:
        results['L-BFGS'] = _logistic(fit, held_out, train, test, classes, strengths)
    elif strengths:
        say(f'no L-BFGS: {train.x.size} features are above config.logistic.limit')
    return results


def _sweep(
    fit: Features, held_out: Features, train: Features, test: Features, classes: int, config: Any
) -> dict[str, Any]:
    rates, decays = classifier.grid(config.optim.learning_rates, config.optim.weight_decays)
    common: dict[str, Any] = {
        'classes': classes,
        'batch_size': config.batch_size,
        'epochs': config.epochs,
        'momentum': config.optim.momentum,
        'seed': config.seed,
    }
    scores = score(train_heads(fit, rates, decays, **common), held_out)
    say(selection.table(scores, config.optim.learning_rates, config.optim.weight_decays))
    best = [selection.choose(scores)]
    tested = score(train_heads(train, rates[best], decays[best], **common), test)
    return {
        'top1': float(tested.top1[0]),
        'top5': float(tested.top5[0]),
        'chosen': f'rate {rates[best][0]:g}, decay {decays[best][0]:g}',
        'heads': selection.rows(scores, rates, decays),
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
    """Heads by SGD with cosine to 0, each with its base rate (times batch_size/256) and decay."""
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
    """Of every head."""
    measure = jax.jit(classifier.measure)
    totals = np.zeros(())
    for start in range(0, len(data.x), 4096):
        x, labels, _ = (array[start : start + 4096] for array in data)
        totals = totals + np.asarray(measure(heads, x, labels, np.ones(len(x), bool)), np.float64)
    top1, top5, loss = totals / len(data.x)
    return HeadScores(top1, top5, loss, len(data.x))


def _logistic(
    fit: Features,
    held_out: Features,
    train: Features,
    test: Features,
    classes: int,
    strengths: tuple[float, ...],
) -> dict[str, Any]:
    def regression(strength: float, data: Features) -> LogisticRegression:
        return LogisticRegression(C=strength, max_iter=10_000).fit(data.x, data.labels)

    def score(model: LogisticRegression, data: Features) -> tuple[float, float, float]:
        probabilities = np.zeros((len(data.x), classes))  # a class may be missing in few labels
        probabilities[:, model.classes_] = model.predict_proba(data.x)
        ranked = np.argsort(-probabilities, axis=1)[:, :5]
        right = ranked == data.labels[:, None]
        loss = -np.log(probabilities[np.arange(len(data.x)), data.labels] + 1e-12)
        return right[:, 0].mean(), right.any(1).mean(), loss.mean()

    top1, top5, loss = np.array([score(regression(c, fit), held_out) for c in strengths]).T
    best = strengths[selection.choose(HeadScores(top1, top5, loss, len(held_out.x)))]
    test_top1, test_top5, _ = score(regression(best, train), test)
    return {
        'top1': float(test_top1),
        'top5': float(test_top5),
        'chosen': f'C {best:g}',
        'holdout_top1': dict(zip(map(str, strengths), top1.tolist(), strict=True)),
    }
