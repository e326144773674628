"""What will go wrong with a run, and what fits it, in under a minute before it starts.

python -m simsiam_jax.tools.doctor --config=configs/folder.py --config.data.source=folder:DIR \
    [--workdir=DIR] [--write=configs/mine.py] [--probe]

looks at the images, at the configuration and at this machine, trains nothing, and prints a line
for each thing it found, the worst first, then what to change in the configuration and why.
--write makes a configuration of that. --probe takes some hundred steps at several learning rates
and the best of them, in minutes. Ends with 0 where the run would start (with --write: the one
written), else 1.
"""

import copy
import sys
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from simsiam_jax import config as config_lib
from simsiam_jax import errors, main
from simsiam_jax.data import sources, tfds_source
from simsiam_jax.data.survey import Survey, survey
from simsiam_jax.tasks import pretrain, lr_finder
from simsiam_jax.terminal import say
from simsiam_jax.tools.doctor import (
    image_checks,
    estimates,
    environment_checks,
    recommend,
    config_writer,
)
from simsiam_jax.tools.doctor.image_checks import Finding
from simsiam_jax.tools.doctor.recommend import Advice
from simsiam_jax.runtime import distributed
from simsiam_jax.training import mesh

_WRITE: Any = flags.DEFINE_string('write', '', 'A file for the configuration that fits.')
_PROBE: Any = flags.DEFINE_boolean('probe', False, 'Train shortly, for the learning rate.')


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
    found, advice = environment_checks.of_machine(), []
    source = looked = None
    try:
        config_lib.check(config)
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
    found += environment_checks.of_hosts(source)
    if source is not None:
        looked = survey(source)
        copies, pairs = looked.copies()
        if looked.looks:
            advice = _advise(looked, image_checks.distinct(looked, copies), config)
        if probe and looked.looks:
            advice = _probed(config, advice)
        judged = recommend.apply(config, advice) if write else config
        found += image_checks.of_images(looked, copies, pairs, judged)
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
    return distributed.all_agree(all(finding.level != 'stops' for finding in found))


def _advise(looked: Survey, distinct: int, config: ConfigDict) -> list[Advice]:
    """What fits the images, and then the devices' memory."""
    unit = jax.device_count() * max(1, config.optim.accumulate)  # every device's part the same
    advice = recommend.recommend(
        looked, distinct, config, devices=unit, accelerator=not estimates.on_cpu()
    )
    planned = _normalised(recommend.apply(config, advice))
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


def _normalised(config: ConfigDict) -> ConfigDict:
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


def _judge(config: ConfigDict, looked: Survey, workdir: str | None) -> list[Finding]:
    """Findings on the run that `config` is, which is built but not started."""
    if found := image_checks.unreadable(looked, config):
        return found
    config = _normalised(config)
    try:
        parts = pretrain.build(config)
    except errors.UserError as error:
        return [Finding('stops', str(error))]
    return environment_checks.of_run(config, parts, workdir, looked.seconds)


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


def run(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f'unexpected argument {argv[1]!r}; overrides are --config.KEY=VALUE')
    logging.set_verbosity(logging.FATAL)
    mesh.use_compilation_cache()
    workdir = flags.FLAGS.workdir
    origin = config_flags.get_config_filename(flags.FLAGS['config'])
    try:
        distributed.start(main.peers())
        with distributed.ending(main.AGAIN):
            would = examine(
                main.CONFIG.value,
                workdir,
                write=_WRITE.value,
                probe=_PROBE.value,
                origin=origin,
            )
    except errors.UserError as error:
        sys.exit(f'error: {error}')
    sys.exit(0 if would else 1)


if __name__ == '__main__':
    app.run(run, flags_parser=lambda argv: main.parse(argv, required=['config']))
