"""Pre-training: build, restore, train, evaluate."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import jax
from ml_collections import ConfigDict

from simsiam_jax.checkpoints import checkpoint, weights
from simsiam_jax.data import sources
from simsiam_jax.logs import writers
from simsiam_jax.tasks import collapse_callback, loop, memory, pretrain_setup, summary
from simsiam_jax.tasks import knn as knn_lib
from simsiam_jax.tasks.pretrain_setup import PretrainSetup
from simsiam_jax.terminal import say
from simsiam_jax.training import alternation, guard, step
from simsiam_jax.training import mesh as mesh_lib


def run(config: ConfigDict, workdir: str) -> None:
    """Trains to the last epoch, resuming from the latest checkpoint in `workdir`.

    A new run starts from the weights of config.init_from, or from a checkpoint of step 0, as
    tools.convert writes it.

    Raises:
      UserError: The configuration, the data or the workdir cannot be used.
      SystemExit: With 143 after SIGTERM or Ctrl-C, when the state is saved.
    """
    parts = pretrain_setup.build(config)
    say(_description(config, parts))
    train_step = pretrain_setup.build_step(config, parts)
    if config.dry_run:
        _dry_run(config, parts, train_step)
        return
    with _open_workdir(config, parts, workdir) as (checkpoints, log):
        state, origin = _initial_state(config, parts, checkpoints, workdir)
        log.text('parameters.txt', summary.overview(state.params))
        # Both measure the network before training, so they must precede the restored state.
        baselines = _measure_baselines(config, parts, state, origin)
        callback = _collapse_callback(config, parts, state, checkpoints, log)
        if checkpoints.latest_step:
            state = checkpoints.restore(state)
            say(f'resuming from step {int(state.step)} in {workdir}')
        else:
            log.views(summary.view_grid(next(parts.batches(0, 1)), parts.to_views, parts.recipes))
            if baselines:
                log.scalars(0, {'eval/knn_top1': baselines[origin]})
        evaluate = functools.partial(_evaluate, parts.knn, log) if parts.knn else None
        state = loop.train(
            config,
            state,
            train_step,
            batches=parts.batches,
            sampler=parts.sampler,
            source=parts.source,
            rates=parts.rates,
            checkpoints=checkpoints,
            log=log,
            evaluate=evaluate,
            block=pretrain_setup.block_of(config, parts),
            callback=callback,
        )
        if evaluate:
            top1 = evaluate(state)
            if baselines:
                say(summary.table(baselines | {'after training': top1}))


def _description(config: ConfigDict, parts: PretrainSetup) -> str:
    sampler, devices = parts.sampler, f'{parts.mesh.size} x {jax.devices()[0].device_kind}'
    text = (
        f'{config.method.name} on {config.model.name}: {sampler.size} images of '
        f'{config.data.source}, {config.epochs} epochs of {sampler.steps_per_epoch} steps, '
        f'batch {config.batch_size} on {devices}'
    )
    method_state = jax.eval_shape(parts.init).method_state
    if method_state is None:
        return text
    return f'{text}\n{summary.method_state(config.method.name, method_state)}'


def _dry_run(config: ConfigDict, parts: PretrainSetup, train_step: alternation.TrainStep) -> None:
    batch, state = next(parts.batches(0, 1)), jax.eval_shape(parts.init)

    def make_step(changed: ConfigDict) -> alternation.TrainStep:
        return pretrain_setup.build_step(
            changed, dataclasses.replace(parts, method=pretrain_setup.build_method(changed))
        )

    say(memory.table(config, make_step, state, batch))
    say(summary.dry_run(train_step, parts.init, batch, parts.mesh))


@contextlib.contextmanager
def _open_workdir(
    config: ConfigDict, parts: PretrainSetup, workdir: str
) -> Iterator[tuple[checkpoint.Checkpoints, writers.MetricWriter]]:
    given = config.to_dict()
    with (
        checkpoint.open(
            workdir,
            given,
            max_to_keep=config.checkpoint.max_to_keep,
            keep_period=parts.sampler.steps(config.checkpoint.keep_period),
            images=sources.fingerprint(parts.source),
        ) as checkpoints,
        writers.open_log(workdir, given, checkpoints.latest_step or 0) as log,
    ):
        log.start(parts.sampler.size, parts.sampler.steps_per_epoch)
        yield checkpoints, log


def _initial_state(
    config: ConfigDict,
    parts: PretrainSetup,
    checkpoints: checkpoint.Checkpoints,
    workdir: str,
) -> tuple[step.TrainState, str]:
    """Returns the state before training, on the devices, and what its weights are."""
    state, origin = parts.init(), 'random initialization'
    path = config.init_from or (workdir if checkpoints.latest_step == 0 else '')
    if path and not checkpoints.latest_step:
        state, text = weights.load_into_state(state, weights.open_weights(path))
        origin = 'before training'
        say(text)
    say(summary.parameters(state.params))
    return mesh_lib.replicate(state, parts.mesh), origin


def _measure_baselines(
    config: ConfigDict, parts: PretrainSetup, state: step.TrainState, origin: str
) -> dict[str, float]:
    """Returns kNN top-1 of raw pixels and of the network before training; {} if not wanted."""
    if not parts.knn or not config.eval.baselines:
        return {}
    return {'raw pixels': parts.knn.pixels()[0].top1, origin: parts.knn(state)[0].top1}


def _collapse_callback(
    config: ConfigDict,
    parts: PretrainSetup,
    state: step.TrainState,
    checkpoints: checkpoint.Checkpoints,
    log: writers.MetricWriter,
) -> collapse_callback.CollapseCallback | None:
    if config.guard == 'off':
        return None
    monitor = guard.Guard(
        parts.method,
        parts.mesh,
        parts.to_views,
        batch_size=config.batch_size,
        last=config.epochs * parts.sampler.steps_per_epoch,
    )
    callback = collapse_callback.CollapseCallback(config, monitor, parts.source, checkpoints, log)
    callback.begin(state, parts.batches(0, monitor.batches), checkpoints.latest_step or 0)
    return callback


def _evaluate(knn: knn_lib.Knn, log: writers.MetricWriter, state: step.TrainState) -> float:
    """Logs and returns kNN top-1."""
    top1 = knn(state)[0].top1
    log.scalars(int(state.step), {'eval/knn_top1': top1})
    say(f'step {int(state.step)}  kNN top-1 {top1:.4f}')
    return top1
