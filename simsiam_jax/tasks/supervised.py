"""Linear evaluation and fine-tuning: classifiers trained on augmented images, in one loop.

Task linear leaves the backbone alone (SimSiam, section 4 and appendix A), finetune trains it
too. Of several heads (every learning rate with every weight decay) one is chosen on held-out
training images; the test set is used once, at the end.
"""

import contextlib
import functools
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from simsiam_jax import errors
from simsiam_jax.checkpoints import checkpoint, same_run
from simsiam_jax.checkpoints import encoder as encoder_lib
from simsiam_jax.data import host, jax_augment, sources, subset
from simsiam_jax.data.recipe import Recipe
from simsiam_jax.data.sampler import IndexSampler
from simsiam_jax.logs import writers
from simsiam_jax.models import resnet
from simsiam_jax.tasks import eval_setup, inputs, loop, selection
from simsiam_jax.tasks.inputs import ImageSet
from simsiam_jax.tasks.selection import HeadScores
from simsiam_jax.terminal import say
from simsiam_jax.training import classifier, optim
from simsiam_jax.training import mesh as mesh_lib
from simsiam_jax.training.step import TrainState

# What may change when a run goes on; the data it learns from may not.
_FREE = (
    *(key for key in same_run.FREE if key != 'eval'),
    *('eval.test', 'eval.batch_size', 'eval.every_epochs'),
)


def run(config: ConfigDict, workdir: str) -> None:
    """Trains the classifier, going on from the latest checkpoint in `workdir`, and tests it.

    Writes WORKDIR/result.json.

    Raises:
      UserError: the configuration, the checkpoint, the data or the workdir cannot be used.
      RuntimeError: a frozen backbone has changed.
    """
    setting = eval_setup.prepare(config)
    mesh_lib.check_batch_size(
        'batch_size', config.batch_size, setting.mesh, config.optim.gradient_accumulation_steps
    )
    frozen = config.task == 'linear'
    recipe = errors.build('augment', Recipe, config.augment.to_dict()).for_channels(
        config.data.channels
    )
    rates, decays = classifier.grid(config.optim.learning_rates, config.optim.weight_decays)
    train, holdout = _hold_out(setting.train, config, len(rates))
    sampler = IndexSampler(config.seed, len(train), config.batch_size)
    backbone = setting.encoder.module.clone(axis_name=mesh_lib.DATA)
    tx, schedules = _optimizer(config, sampler, rates, decays, frozen=frozen)
    train_step = classifier.make_train_step(
        backbone,
        tx,
        setting.mesh,
        functools.partial(host.to_views, recipes=(recipe,)),
        frozen=frozen,
        accumulation_steps=config.optim.gradient_accumulation_steps,
    )
    variables = _variables(config, setting.encoder, recipe)
    heads = classifier.init_heads(len(rates), backbone.features, len(train.classes), config.seed)
    initial = TrainState(
        step=np.zeros((), np.int32),
        params={'backbone': variables['params'], 'head': heads},
        batch_stats={'backbone': variables['batch_stats']},
        opt_state=tx.init({'head': heads} | ({} if frozen else {'backbone': variables['params']})),
        target=None,
        method_state=None,
    )
    score = _Scorer(setting, backbone, recipe)
    score.check(setting.test)
    setting.announce(f'{config.task}{" from scratch" if config.from_scratch else ""}')

    def watch(state: TrainState) -> None:
        top1 = score(state, holdout).top1.max()
        log.scalars(int(state.step), {'eval/holdout_top1': float(top1)})
        say(f'step {int(state.step)}  held-out top-1 {top1:.4f}')

    with contextlib.ExitStack() as stack:
        kept = config.to_dict() | {'model': setting.encoder.config['model']}
        checkpoints = stack.enter_context(
            checkpoint.open(
                workdir,
                kept,
                max_to_keep=config.checkpoint.max_to_keep,
                keep_period=sampler.steps(config.checkpoint.keep_period),
                images=sources.fingerprint(train),
                free=_FREE,
                place=('eval.train', 'data.tfds_data_dir'),
            )
        )
        log = stack.enter_context(writers.open_log(workdir, kept, checkpoints.latest_step or 0))
        log.start(sampler.size, sampler.steps_per_epoch)
        state = mesh_lib.replicate(initial, setting.mesh)
        if checkpoints.latest_step:
            state = checkpoints.restore(state)
            say(f'resuming from step {int(state.step)} in {workdir}')
        state = loop.train(
            config,
            state,
            train_step,
            batches=inputs.device_batches(train, sampler, (recipe,), config.data, setting.mesh),
            sampler=sampler,
            source=train,
            rates=schedules,
            checkpoints=checkpoints,
            log=log,
            evaluate=watch if len(holdout) else None,
        )
        if frozen:
            _check_unchanged(variables, state)
        best, rows = 0, []
        if len(holdout):
            held_out = score(state, holdout)
            best = selection.choose(held_out)
            say(selection.table(held_out, config.optim.learning_rates, config.optim.weight_decays))
            rows = selection.rows(held_out, rates, decays)
        test = score(state, setting.test)
        top1, top5 = float(test.top1[best]), float(test.top5[best])
        log.scalars(int(state.step), {'eval/test_top1': top1, 'eval/test_top5': top5})
    say(f'test top-1 {top1:.4f}  top-5 {top5:.4f}  of {test.images} images')
    chosen = {'learning_rate': float(rates[best]), 'weight_decay': float(decays[best])}
    result = {'top1': top1, 'top5': top5, 'images': test.images} | chosen | {'heads': rows}
    eval_setup.write(workdir, 'result.json', result)


def _hold_out(train: ImageSet, config: ConfigDict, heads: int) -> tuple[ImageSet, ImageSet]:
    """What is learnt from, and what the best head is chosen by (may be empty)."""
    share = config.eval.holdout
    if not share and heads > 1:
        raise errors.UserError(
            f'{heads} heads are to be trained, but config.eval.holdout is 0: the best can only be '
            'chosen on held-out training images; set it to 0.1 or so'
        )
    if not share:
        return train, subset.take(train, np.arange(0))
    held, rest = subset.split(subset.labels(train), share, config.seed + 1)
    return subset.take(train, rest), subset.take(train, held)


def _variables(config: ConfigDict, encoder: encoder_lib.Encoder, recipe: Recipe) -> dict[str, Any]:
    if not config.from_scratch:
        return encoder.variables
    image = np.zeros((1, recipe.size, recipe.size, config.data.channels), np.float32)
    return jax.jit(encoder.module.init)(jax.random.key(config.seed), image)


def _optimizer(
    config: ConfigDict,
    sampler: IndexSampler,
    rates: np.ndarray,
    decays: np.ndarray,
    *,
    frozen: bool,
) -> tuple[optax.GradientTransformation, dict[str, optax.Schedule]]:
    """Of the heads, and of the backbone where it is trained; with the rates for the log."""
    errors.check_choice('optim.name', config.optim.name, optim.OPTIMIZERS)
    kind, momentum = optim.OPTIMIZERS[config.optim.name], config.optim.momentum
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
    if frozen:
        return heads, schedules
    rate, decay = config.optim.backbone_learning_rate, config.optim.backbone_weight_decay
    labels = {'backbone': 'backbone', 'head': 'head'}
    tx = optax.multi_transform({'backbone': optimizer(rate, decay), 'head': heads}, labels)
    return tx, schedules | {'lr_backbone': schedule(rate)}


class _Scorer:
    """(state, source) -> the Score of every head, over exactly the source's good images."""

    def __init__(self, setting: eval_setup.EvalSetup, backbone: resnet.ResNet, recipe: Recipe):
        self._extract = setting.extractor(setting.config.eval.batch_size)

        def measure(state: TrainState, images: Any, labels: Any, indices: Any) -> Any:
            variables, here = checkpoint.encoder_variables(state), indices >= 0
            images = jax_augment.normalize(images, recipe.mean, recipe.std)
            features: Any = backbone.apply(variables, images)
            return classifier.measure(state.params['head'], features, labels, here), here.sum()

        replicated = jax.sharding.NamedSharding(setting.mesh, jax.sharding.PartitionSpec())
        self._measure = jax.jit(measure, out_shardings=replicated)

    def check(self, source: ImageSet) -> None:
        """Raises now, not after the training, what a UserError is at the first images."""
        next(self._extract.batches(source))

    def __call__(self, state: TrainState, source: ImageSet) -> HeadScores:
        totals, images = np.zeros(()), 0
        for batch in self._extract.batches(source):
            sums, counted = jax.device_get(self._measure(state, *batch))
            totals, images = totals + sums.astype(np.float64), images + int(counted)
        top1, top5, loss = totals / images
        return HeadScores(top1, top5, loss, images)


def _check_unchanged(before: dict[str, Any], state: TrainState) -> None:
    after = checkpoint.encoder_variables(state)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True
    ):
        if np.asarray(a).tobytes() != np.asarray(b).tobytes():
            name = jax.tree_util.keystr(path)
            raise RuntimeError(f'the frozen backbone has changed in {name}: not a linear probe')
    say('the backbone is unchanged to the bit')
