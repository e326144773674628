"""Pre-training: builds the run, restores or initializes it, trains and evaluates."""

import dataclasses
import functools
import json

import jax
from ml_collections import ConfigDict

from simsiam_jax import errors
from simsiam_jax.checkpoints import checkpoint, checkpoint_reader, weights
from simsiam_jax.logs import writers
from simsiam_jax.tasks import (
    collapse_callback,
    knn,
    loop,
    memory,
    pretrain_setup,
    summary,
    verdict,
)
from simsiam_jax.tasks.features import Encode, check_evaluation, raw_pixels
from simsiam_jax.tasks.pretrain_setup import PretrainSetup
from simsiam_jax.terminal import say
from simsiam_jax.training import alternation, guard, step
from simsiam_jax.training import mesh as mesh_lib


def run(config: ConfigDict, workdir: str, observe: loop.Observe | None = None) -> None:
    """Trains to the last epoch, and resumes from the latest checkpoint in `workdir`.

    A new run starts from the weights in config.init_from, from a checkpoint of step 0 as
    tools.convert writes it, or from a random initialization.

    Args:
      config: Configuration of the run, as config.default() has it.
      workdir: Folder for checkpoints and logs.
      observe: Called when metrics are logged; what it returns is logged too.

    Raises:
      UserError: The configuration, the data or the workdir cannot be used.
      SystemExit: With 143, after the state was saved on SIGTERM or Ctrl-C.
    """
    resumed = checkpoint_reader.newest_run(workdir)
    measured = pretrain_setup.resume_input(config, resumed.config) if resumed else None
    setup = pretrain_setup.build(config, measured=measured)
    say(_description(config, setup))
    train_step = pretrain_setup.build_step(config, setup)
    if config.dry_run:
        _dry_run(config, setup, train_step)
        return
    with loop.open_workdir(workdir, config.to_dict(), setup.sampler, setup.source) as opened:
        checkpoints, log = opened
        state, origin = _initial_state(config, setup, checkpoints, workdir)
        log.text('parameters.txt', summary.overview(state.params))
        # Baselines and callback measure the network before training, so restoring comes later.
        baselines = _measure_baselines(config, setup, state, origin)
        callback = _collapse_callback(config, setup, state, checkpoints, log)
        if checkpoints.start_step:
            state = checkpoints.restore(state)
            say(f'resuming from step {int(state.step)} in {workdir}')
        else:
            log.views(summary.view_grid(next(setup.batches(0, 1)), setup.to_views, setup.recipes))
            if baselines:
                log.scalars(0, {'eval/knn_top1': baselines[origin].top1})
        evaluate = None
        if setup.knn:
            evaluate = functools.partial(_evaluate, setup.knn, setup.encode, log)
        state = loop.train(
            config,
            state,
            train_step,
            batches=setup.batches,
            sampler=setup.sampler,
            source=setup.source,
            rates=setup.rates,
            checkpoints=checkpoints,
            log=log,
            evaluate=evaluate,
            block=pretrain_setup.block_of(config, setup),
            callback=callback,
            observe=observe,
        )
        result = None
        if setup.knn and evaluate:
            result = verdict.judge(
                baselines | {'after training': evaluate(state)},
                setup.knn.test.classes,
                title='kNN',
                trained='after training',
                baseline=origin if baselines else '',
            )
        elif callback and callback.first_and_last:
            result = verdict.without_labels(*callback.first_and_last)
        if result:
            say(str(result), heading='Result')
            log.text('verdict.txt', str(result))
            log.text('verdict.json', json.dumps(result.result, indent=2))


def _description(config: ConfigDict, setup: PretrainSetup) -> str:
    sampler, devices = setup.sampler, f'{setup.mesh.size} x {jax.devices()[0].device_kind}'
    text = (
        f'{config.method.name} on {config.model.name}: {sampler.size} images of '
        f'{config.data.source}, {config.epochs} epochs of {sampler.steps_per_epoch} steps, '
        f'batch {config.batch_size} on {devices}'
    )
    method_state = jax.eval_shape(setup.init).method_state
    if method_state is None:
        return text
    return f'{text}\n{summary.method_state(config.method.name, method_state)}'


def _dry_run(config: ConfigDict, setup: PretrainSetup, train_step: alternation.TrainStep) -> None:
    batch, state = next(setup.batches(0, 1)), jax.eval_shape(setup.init)

    def make_step(changed: ConfigDict) -> alternation.TrainStep:
        return pretrain_setup.build_step(
            changed, dataclasses.replace(setup, method=pretrain_setup.build_method(changed))
        )

    say(memory.table(config, make_step, state, batch))
    say(summary.dry_run(train_step, setup.init, batch, setup.mesh))


def _initial_state(
    config: ConfigDict,
    setup: PretrainSetup,
    checkpoints: checkpoint.Checkpoints,
    workdir: str,
) -> tuple[step.TrainState, str]:
    """Returns the state before training, on the devices, and the name of its weights.

    A resumed run needs it only to compare with, so it may lack its first weights.
    """
    state, origin = setup.init(), 'random initialization'
    path = config.init_from or (workdir if checkpoints.start_step == 0 else '')
    if path:
        try:
            state, report = weights.load_into_state(state, weights.open_weights(path))
            origin = 'before training'
            say(report if not checkpoints.start_step else f'comparing with the weights of {path}')
        except errors.UserError as error:
            if not checkpoints.start_step:
                raise
            say(f'warning: {error}; comparing with a random initialization instead')
    say(summary.parameters(state.params))
    return mesh_lib.replicate(state, setup.mesh), origin


def _measure_baselines(
    config: ConfigDict, setup: PretrainSetup, state: step.TrainState, origin: str
) -> dict[str, verdict.Answers]:
    """Returns kNN's answers from raw pixels and the network before training; {} if disabled.

    If disabled, evaluates one batch of each set all the same.
    """
    if not setup.knn:
        return {}
    evaluator, variables = setup.knn, checkpoint.encoder_variables(state)
    if not config.eval.baselines:
        sets = evaluator.train, evaluator.test
        check_evaluation(setup.encode, variables, sets, evaluator.loader)
        return {}
    (pixels,) = evaluator(raw_pixels, {})
    (network,) = evaluator(setup.encode, variables)
    return {'raw pixels': pixels.answers, origin: network.answers}


def _collapse_callback(
    config: ConfigDict,
    setup: PretrainSetup,
    state: step.TrainState,
    checkpoints: checkpoint.Checkpoints,
    log: writers.MetricWriter,
) -> collapse_callback.CollapseCallback | None:
    if config.guard == 'off':
        return None
    monitor = guard.Guard(
        setup.method,
        setup.mesh,
        setup.to_views,
        batch_size=config.batch_size,
        last=config.epochs * setup.sampler.steps_per_epoch,
    )
    callback = collapse_callback.CollapseCallback(config, monitor, setup.source, checkpoints, log)
    callback.on_train_begin(state, setup.batches(0, monitor.batches), checkpoints.start_step or 0)
    return callback


def _evaluate(
    evaluator: knn.Knn, encode: Encode, log: writers.MetricWriter, state: step.TrainState
) -> verdict.Answers:
    """Logs kNN top-1 and returns the answers."""
    (score,) = evaluator(encode, checkpoint.encoder_variables(state))
    log.scalars(int(state.step), {'eval/knn_top1': score.top1})
    say(f'step {int(state.step)}  kNN top-1 {score.top1:.4f}')
    return score.answers
