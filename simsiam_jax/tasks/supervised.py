"""Linear evaluation and fine-tuning: classifiers trained on augmented images, in one loop.

Task linear freezes the backbone (SimSiam, section 4 and appendix A); task finetune trains it, too.
Several heads (each learning rate with each weight decay) are trained at once. The best is chosen
on held-out training images; the test set is used once, at the end.
"""

import functools
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from simsiam_jax import errors
from simsiam_jax.checkpoints import checkpoint, same_run
from simsiam_jax.checkpoints import encoder as encoder_lib
from simsiam_jax.data import host, subset
from simsiam_jax.data.recipe import Recipe
from simsiam_jax.data.sampler import IndexSampler
from simsiam_jax.models import backbones
from simsiam_jax.tasks import eval_setup, inputs, loop, selection, verdict
from simsiam_jax.tasks.features import make_encode
from simsiam_jax.tasks.inputs import ImageSet
from simsiam_jax.tasks.selection import HeadScores
from simsiam_jax.tasks.verdict import Answers
from simsiam_jax.terminal import say
from simsiam_jax.training import classifier, optim
from simsiam_jax.training import mesh as mesh_lib
from simsiam_jax.training.step import TrainState

# What may change when a run is resumed; its training data may not.
_FREE = (
    *(key for key in same_run.FREE if key != 'eval'),
    *('eval.test', 'eval.batch_size', 'eval.every_epochs'),
)
_FEW_STEPS = 500  # steps of a fine-tuning, below which there is a warning


def run(config: ConfigDict, workdir: str) -> None:
    """Trains the classifiers, resuming from the latest checkpoint in `workdir`, and tests the best.

    Writes WORKDIR/result.json and WORKDIR/verdict.json.

    Raises:
      UserError: The configuration, the checkpoint, the data or the workdir cannot be used.
      SystemExit: With 143, after the state was saved on SIGTERM or Ctrl-C.
      RuntimeError: A frozen backbone has changed.
    """
    setup = eval_setup.prepare(config)
    mesh_lib.check_batch_size(
        'batch_size', config.batch_size, setup.mesh, config.optim.gradient_accumulation_steps
    )
    recipe = errors.build('augment', Recipe, config.augment.to_dict()).for_channels(
        config.data.channels
    )
    rates, decays = classifier.grid(config.optim.learning_rates, config.optim.weight_decays)
    train, holdout = _hold_out(setup.train, config, len(rates))
    sampler = IndexSampler(config.seed, len(train), config.batch_size)
    backbone = setup.encoder.module.clone(axis_name=mesh_lib.DATA)
    tx, schedules = _optimizer(config, sampler, rates, decays)
    train_step = classifier.make_train_step(
        backbone,
        tx,
        setup.mesh,
        functools.partial(host.to_views, recipes=(recipe,)),
        frozen=_is_frozen(config),
        accumulation_steps=config.optim.gradient_accumulation_steps,
    )
    variables = _initial_variables(config, setup.encoder, recipe)
    heads = classifier.init_heads(len(rates), backbone.features, len(train.classes), config.seed)
    score = _Scorer(setup, backbone, recipe)
    score.check(setup.test)
    if len(holdout):
        score.check(holdout)
    if not _is_frozen(config):
        _warn_of_few_steps(config, sampler)
    setup.announce(f'{config.task}{" from scratch" if config.from_scratch else ""}')

    def evaluate(state: TrainState) -> None:
        top1 = score(state, holdout)[0].top1.max()
        log.scalars(int(state.step), {'eval/holdout_top1': float(top1)})
        say(f'step {int(state.step)}  held-out top-1 {top1:.4f}')

    given = config.to_dict() | {'model': setup.encoder.config['model']}
    same = {'free': _FREE, 'place': ('eval.train', 'data.tfds_data_dir')}
    with loop.open_workdir(workdir, given, sampler, train, **same) as (checkpoints, log):
        state = mesh_lib.replicate(_initial_state(config, tx, variables, heads), setup.mesh)
        if checkpoints.start_step:
            state = checkpoints.restore(state)
            say(f'resuming from step {int(state.step)} in {workdir}')
        state = loop.train(
            config,
            state,
            train_step,
            batches=inputs.device_batches(train, sampler, (recipe,), config.data, setup.mesh),
            sampler=sampler,
            source=train,
            rates=schedules,
            checkpoints=checkpoints,
            log=log,
            evaluate=evaluate if len(holdout) else None,
        )
        if _is_frozen(config):
            _check_unchanged(variables, state)
        best, rows = 0, []
        if len(holdout):
            held_out, _ = score(state, holdout)
            best = selection.choose(held_out)
            say(selection.table(held_out, config.optim.learning_rates, config.optim.weight_decays))
            rows = selection.rows(held_out, rates, decays)
        test, answers = score(state, setup.test)
        top1, top5 = float(test.top1[best]), float(test.top5[best])
        log.scalars(int(state.step), {'eval/test_top1': top1, 'eval/test_top5': top5})
    say(f'test top-1 {top1:.4f}  top-5 {top5:.4f}  of {test.images} images')
    name = 'from scratch' if config.from_scratch else 'checkpoint'
    judged = verdict.judge(
        {name: answers[best]}, setup.test.classes, title=config.task, trained=name
    )
    say(str(judged), heading='Result')
    chosen = {'learning_rate': float(rates[best]), 'weight_decay': float(decays[best])}
    result = {'top1': top1, 'top5': top5, 'images': test.images} | chosen | {'heads': rows}
    eval_setup.write(workdir, 'result.json', result)
    eval_setup.write(workdir, 'verdict.json', judged.result)


def _warn_of_few_steps(config: ConfigDict, sampler: IndexSampler) -> None:
    """Prints what to set if a fine-tuning ends before rates made for ImageNet show an effect."""
    steps = config.epochs * sampler.steps_per_epoch
    if steps >= _FEW_STEPS or config.optim.name not in optim.OPTIMIZERS:
        return
    batch = min(config.batch_size, 64)
    epochs = -(-_FEW_STEPS // max(1, sampler.size // batch))
    errors.warn_once(
        f'{sampler.size} images give {steps} steps of fine-tuning, too few for the rates of '
        f'ImageNet. If they are not raised yet, set --config.batch_size={batch} '
        f'--config.epochs={epochs} '
        '--config.optim.backbone_learning_rate=0.1 --config.optim.learning_rates=1.0, as measured '
        'on few labels (benchmarks/OWN_IMAGES.md)'
    )


def _is_frozen(config: ConfigDict) -> bool:
    return config.task == 'linear'


def _hold_out(train: ImageSet, config: ConfigDict, heads: int) -> tuple[ImageSet, ImageSet]:
    """Returns the images to train on, and the images to choose the best head on (may be empty)."""
    share = config.eval.holdout
    if not share and heads > 1:
        raise errors.UserError(
            f'{heads} heads need held-out training images to choose the best, but '
            'config.eval.holdout is 0. Set it to 0.1 or so'
        )
    if not share:
        return train, subset.take(train, np.arange(0))
    held, rest = subset.split(subset.labels(train), share, config.seed + 1)
    return subset.take(train, rest), subset.take(train, held)


def _initial_variables(
    config: ConfigDict, encoder: encoder_lib.LoadedEncoder, recipe: Recipe
) -> dict[str, Any]:
    if not config.from_scratch:
        return encoder.variables
    image = np.zeros((1, recipe.size, recipe.size, config.data.channels), np.float32)
    return jax.jit(functools.partial(backbones.init, encoder.module))(
        jax.random.key(config.seed), image
    )


def _optimizer(
    config: ConfigDict,
    sampler: IndexSampler,
    rates: np.ndarray,
    decays: np.ndarray,
) -> tuple[optax.GradientTransformation, dict[str, optax.Schedule]]:
    """Returns the optimizer of the heads and of a trained backbone, and the rates for the log."""
    kind = optim.from_name(config.optim.name, config.optim.arguments.to_dict())
    momentum = config.optim.momentum
    unit = optim.cosine_schedule(
        config.batch_size / 256,
        epochs=config.epochs,
        steps_per_epoch=sampler.steps_per_epoch,
        warmup_epochs=config.optim.warmup_epochs,
        by_epoch=config.optim.by_epoch,
    )

    def optimizer(rate: Any, decay: Any) -> optax.GradientTransformation:
        return kind(lambda step: rate * unit(step), momentum, decay)

    def schedule(rate: float) -> optax.Schedule:
        return lambda step: rate * unit(step)

    heads = classifier.each_head(optimizer, rates, decays)
    schedules = {'lr': schedule(max(rates))}
    if _is_frozen(config):
        return heads, schedules
    rate, decay = config.optim.backbone_learning_rate, config.optim.backbone_weight_decay
    labels = {'backbone': 'backbone', 'head': 'head'}
    tx = optax.multi_transform({'backbone': optimizer(rate, decay), 'head': heads}, labels)
    return tx, schedules | {'lr_backbone': schedule(rate)}


def _initial_state(
    config: ConfigDict,
    tx: optax.GradientTransformation,
    variables: dict[str, Any],
    heads: dict[str, Any],
) -> TrainState:
    backbone = variables['params']
    return TrainState(
        step=np.zeros((), np.int32),
        params={'backbone': backbone, 'head': heads},
        batch_stats={'backbone': variables['batch_stats']},
        opt_state=tx.init({'head': heads} | ({} if _is_frozen(config) else {'backbone': backbone})),
        target=None,
        method_state=None,
    )


class _Scorer:
    """Scores the heads of a state on exactly the readable images of a source."""

    def __init__(
        self, setup: eval_setup.EvalSetup, backbone: backbones.AnyBackbone, recipe: Recipe
    ):
        self._loader = setup.loader()
        encode = make_encode(backbone, recipe.mean, recipe.std)

        def measure(state: TrainState, images: Any, labels: Any, indices: Any) -> Any:
            features, readable = encode(checkpoint.encoder_variables(state), images), indices >= 0
            head = state.params['head']
            sums = classifier.measure(head, features, labels, readable)
            return sums, classifier.logits(head, features).argmax(-1), labels, readable

        replicated = jax.sharding.NamedSharding(setup.mesh, jax.sharding.PartitionSpec())
        self._measure = jax.jit(measure, out_shardings=replicated)

    def check(self, source: ImageSet) -> None:
        """Loads a batch, so that an unusable source raises UserError before the training."""
        next(self._loader.batches(source))

    def __call__(self, state: TrainState, source: ImageSet) -> tuple[HeadScores, list[Answers]]:
        """Returns the scores, and the answers of each head."""
        totals, predicted, labels = np.zeros(()), [], []
        for batch in self._loader.batches(source):
            sums, ranked, given, readable = jax.device_get(self._measure(state, *batch))
            totals = totals + sums.astype(np.float64)
            predicted.append(ranked[:, readable])
            labels.append(given[readable])
        truth = np.concatenate(labels)
        top1, top5, loss = totals / len(truth)
        answers = [Answers(head, truth) for head in np.concatenate(predicted, 1)]
        return HeadScores(top1, top5, loss, len(truth)), answers


def _check_unchanged(before: dict[str, Any], state: TrainState) -> None:
    after = checkpoint.encoder_variables(state)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True
    ):
        if np.asarray(a).tobytes() != np.asarray(b).tobytes():
            name = jax.tree_util.keystr(path)
            raise RuntimeError(f'the frozen backbone has changed in {name}; expected no change')
    say('the backbone is unchanged, bit for bit')
