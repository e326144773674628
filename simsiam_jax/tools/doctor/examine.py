"""Checks a run before it starts: images, configuration, machine; and what fits them."""

import copy
from typing import Any

import jax
from ml_collections import ConfigDict

from simsiam_jax import config_keys, errors
from simsiam_jax.data import sources, tfds_source
from simsiam_jax.data.survey import DatasetSurvey, survey
from simsiam_jax.runtime import distributed
from simsiam_jax.tasks import lr_finder, pretrain_setup
from simsiam_jax.terminal import say
from simsiam_jax.tools.doctor import (
    config_writer,
    environment_checks,
    estimates,
    image_checks,
    recommend,
)
from simsiam_jax.tools.doctor.image_checks import Finding
from simsiam_jax.tools.doctor.recommend import Advice


def examine(
    config: ConfigDict,
    workdir: str | None = None,
    *,
    write: str = '',
    probe: bool = False,
    origin: str = 'the configuration given',
) -> bool:
    """Prints what was found and what fits; whether the run would start.

    Args:
      config: of a pre-training.
      workdir: where it would go.
      write: a file for the configuration with what is advised, which is then what is judged.
      probe: search for the learning rate, too.
      origin: what to call the configuration in the file.

    Raises:
      UserError: the file cannot be written.
    """
    found, advice = environment_checks.check_devices(), []
    source = looked = None
    try:
        config_keys.check(config)
        if config.task != 'pretrain':
            raise errors.UserError(
                f'config.task is {config.task!r}; the doctor looks at pre-training only'
            )
        source = _open(config)
        if source is None:
            text = f'{config.data.source} is not prepared here: the run would download it first'
            found.append(Finding('warns', text))
    except errors.UserError as error:
        found.append(Finding('stops', str(error)))
    found += environment_checks.check_hosts(source)
    if source is not None:
        looked = survey(source)
        copies, pairs = looked.copies()
        if looked.looks:
            advice = _advise(looked, image_checks.distinct(looked, copies), config)
        if probe and looked.looks:
            advice = _probed(config, advice)
        judged = recommend.apply(config, advice) if write else config
        found += image_checks.check_images(looked, copies, pairs, judged)
        if looked.looks:
            found += _judge(judged, looked, workdir)
    would = _tell(image_checks.by_severity(found))
    _show(advice)
    if write and looked and looked.looks and jax.process_index() == 0:
        config_writer.write(write, config, advice, origin)
        say(f'\n{write} is written: python -m simsiam_jax.main --config={write} --workdir=DIR')
    what = 'the run as written' if write else 'the run as given'
    say(f'\n{what} would {"" if would else "not "}start')
    return would


def _tell(found: list[Finding]) -> bool:
    """Prints the findings; whether none of any process stops the run."""
    for finding in found:
        if jax.process_index() == 0:
            print(finding, flush=True)
        elif finding.level == 'stops':
            print(f'process {jax.process_index()}: {finding}', flush=True)
    return distributed.all_processes(all(finding.level != 'stops' for finding in found))


def _advise(looked: DatasetSurvey, distinct: int, config: ConfigDict) -> list[Advice]:
    """What fits the images, and then the devices' memory."""
    unit = jax.device_count() * max(
        1, config.optim.gradient_accumulation_steps
    )  # every device's part the same
    advice = recommend.recommend(
        looked, distinct, config, devices=unit, accelerator=not estimates.on_cpu()
    )
    planned = _normalized(recommend.apply(config, advice))
    batch, has = planned.batch_size, estimates.device_memory()
    try:
        while estimates.step_memory(
            planned
        ) > environment_checks.TIGHT * has and planned.batch_size >= 2 * max(64, unit):
            planned.batch_size = planned.batch_size // 2 // unit * unit
    except errors.UserError:
        return advice  # the run cannot be built, which will be said
    if planned.batch_size == batch:
        return advice
    reason = (
        f'what fits into {has / 2**30:.0f} GiB; 64 instead of 256 cost 2 points, 128 0.8 (Table 2)'
    )
    advice = [a for a in advice if a.key != 'batch_size']
    return [*advice, Advice('batch_size', planned.batch_size, reason)]


def _normalized(config: ConfigDict) -> ConfigDict:
    """A copy with some mean and std where they would be measured, which takes its time."""
    config = copy.deepcopy(config)
    if config.data.normalize == 'auto':
        config.data.normalize = 'given'
        config.augment.update(mean=(0.5,), std=(0.25,))
    return config


def _open(config: ConfigDict) -> sources.Source | sources.ArraySource | None:
    """The images; None where TFDS would have to download them."""
    kind, _, name = config.data.source.partition(':')
    data_dir = config.data.tfds_data_dir
    if kind == 'tfds' and '/' in name and not tfds_source.is_prepared(name, data_dir):
        return None
    return sources.open_source(config.data.source, data_dir)


def _probed(config: ConfigDict, advice: list[Advice]) -> list[Advice]:
    """The advice with the learning rate that a search found for it."""
    best = lr_finder.search(recommend.apply(config, advice))
    kept = [a for a in advice if a.key != 'optim.learning_rate']
    say(f'{best.table}\n')
    return [*kept, Advice('optim.learning_rate', best.rate, best.reason)]


def _judge(config: ConfigDict, looked: DatasetSurvey, workdir: str | None) -> list[Finding]:
    """Findings on the run that `config` is, which is built but not started."""
    if found := image_checks.unreadable(looked, config):
        return found
    config = _normalized(config)
    try:
        parts = pretrain_setup.build(config)
    except errors.UserError as error:
        return [Finding('stops', str(error))]
    return environment_checks.check_run(config, parts, workdir, looked.seconds)


def _show(advice: list[Advice]) -> None:
    if not advice:
        return
    say('\nWhat fits these images and this machine:')
    overrides = [f'--config.{a.key}={_shell(a.value)}' for a in advice]
    width = min(max(map(len, overrides)), 40)
    before = ''
    for override, a in zip(overrides, advice, strict=True):
        say(f'  {override:{width}}  # {a.reason}' if a.reason != before else f'  {override}')
        before = a.reason
    say('\n' + ' '.join(overrides))


def _shell(value: Any) -> str:
    """As config_flags reads it from a shell."""
    return ','.join(map(str, value)) if isinstance(value, tuple) else str(value)
