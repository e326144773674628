"""Checks a run before it starts, and recommends what fits its images and this machine."""

import dataclasses
from collections.abc import Callable, Collection

import jax
from ml_collections import ConfigDict

from simsiam_jax import config_keys, errors
from simsiam_jax.data import tfds_source
from simsiam_jax.data.survey import survey
from simsiam_jax.runtime import distributed
from simsiam_jax.tasks import inputs, lr_finder, pretrain_setup
from simsiam_jax.terminal import say
from simsiam_jax.tools.doctor import (
    config_writer,
    environment_checks,
    estimates,
    image_checks,
    printing,
    recommend,
)
from simsiam_jax.tools.doctor.context import Context, Finding, by_severity
from simsiam_jax.tools.doctor.recommend import Advice


def check_problems(context: Context) -> list[Finding]:
    """Returns the problems of opening the images and building the run."""
    return list(context.problems)


# In this order; every process runs all of them, because check_hosts communicates.
CHECKS: tuple[Callable[[Context], list[Finding]], ...] = (
    environment_checks.check_devices,
    check_problems,
    environment_checks.check_hosts,
    image_checks.check_readable,
    image_checks.check_images,
    environment_checks.check_memory,
    environment_checks.check_speed,
    environment_checks.check_tensorflow,
    environment_checks.check_input,
    environment_checks.check_workdir,
)


@dataclasses.dataclass(frozen=True)
class Examination:
    """What is known about a run before it starts.

    Attributes:
      findings: Problems and facts, errors first.
      advice: Keys of the configuration to change, with reasons.
      kept: Keys that would be changed if they were not given.
      images: Number of images that were read.
    """

    findings: list[Finding]
    advice: list[Advice]
    kept: list[Advice]
    images: int

    @property
    def starts(self) -> bool:
        """Returns whether the run would start, as far as this process knows."""
        return all(finding.severity != 'error' for finding in self.findings)

    def __str__(self) -> str:
        return '\n'.join(map(str, self.findings))


def examine(
    config: ConfigDict,
    workdir: str | None = None,
    *,
    write: str = '',
    probe: bool = False,
    origin: str = 'the configuration given',
    given: Collection[str] = (),
) -> bool:
    """Prints findings and recommendations; returns whether the run would start.

    Args:
      config: Configuration of a pre-training.
      workdir: Workdir of the run; None skips the check of its disk.
      write: File to write the recommended configuration to, which is then the one checked; ''
        writes none.
      probe: Search for the learning rate too.
      origin: Name of the configuration in the written file.
      given: Keys that the user has set and that are therefore kept.

    Raises:
      UserError: The file cannot be written.
    """
    if write and jax.process_index() == 0:
        config_writer.check(write)
    examined = inspect(config, workdir, advised=bool(write), probe=probe, given=given)
    printing.print_findings(examined.findings)
    starts = distributed.all_processes(examined.starts)
    printing.print_advice(examined.advice)
    printing.print_kept(examined.kept, config)
    if write and examined.images and jax.process_index() == 0:
        config_writer.write(write, config, examined.advice, origin)
        say(f'\nwrote {write}: python -m simsiam_jax.main --config={write} --workdir=DIR')
    checked = 'the run as written' if write else 'the run as given'
    say(f'\n{checked} would {"" if starts else "not "}start')
    return starts


def inspect(
    config: ConfigDict,
    workdir: str | None = None,
    *,
    advised: bool = False,
    probe: bool = False,
    given: Collection[str] = (),
) -> Examination:
    """Checks a run and recommends what fits its images.

    Args:
      config: Configuration of a pre-training.
      workdir: Workdir of the run; None skips the check of its disk.
      advised: Check the configuration that follows the advice, instead of the one given.
      probe: Search for the learning rate too, and print its table.
      given: Keys that the user has set and that are therefore kept.
    """
    context = _open(Context(config, workdir))
    advice: list[Advice] = []
    kept: list[Advice] = []
    if context.survey is not None and context.survey.images:
        advice = _advise(context, given)
        if probe:
            advice = _probe(config, advice)
        kept = [a for a in advice if a.key in given]
        advice = [a for a in advice if a.key not in given]
        if advised:
            context = dataclasses.replace(context, config=recommend.apply(config, advice))
        context = _build(context)
    findings = [finding for check in CHECKS for finding in check(context)]
    images = len(context.survey.images) if context.survey else 0
    return Examination(by_severity(findings), advice, kept, images)


def _open(context: Context) -> Context:
    """Returns the context with its images and their survey, or with the problem."""
    config = context.config
    try:
        config_keys.check(config)
        if config.task != 'pretrain':
            raise errors.UserError(
                f"cannot check config.task={config.task!r}; expected 'pretrain'. "
                'Pass a pre-training configuration'
            )
        inputs.resolve(config, config.data.source)
        kind, _, name = config.data.source.partition(':')
        data_dir = config.data.tfds_data_dir
        if kind == 'tfds' and '/' in name and not tfds_source.is_prepared(name, data_dir):
            text = f'{config.data.source} is not prepared here: the run would download it first'
            return dataclasses.replace(context, problems=(Finding('warning', text),))
        source = inputs.open_images(config.data.source, config.data)
    except errors.UserError as error:
        return dataclasses.replace(context, problems=(Finding('error', str(error)),))
    seen = survey(source)
    copies, pairs = seen.near_duplicates()
    return dataclasses.replace(
        context, source=source, survey=seen, copies=copies, pairs=tuple(pairs)
    )


def _build(context: Context) -> Context:
    """Returns the context with the run built, or with the problem; trains nothing."""
    if image_checks.check_readable(context):
        return context
    config = pretrain_setup.without_measuring(context.config)
    try:
        setup = pretrain_setup.build(config)
    except errors.UserError as error:
        problem = Finding('error', str(error))
        return dataclasses.replace(context, problems=(*context.problems, problem))
    config.data.range = context.config.data.range
    return dataclasses.replace(context, config=config, setup=setup)


def _advise(context: Context, given: Collection[str]) -> list[Advice]:
    """Returns what fits the images, with a batch that fits the memory of the devices."""
    assert context.survey is not None
    config = context.config
    # Every device gets an equal share of every accumulated part.
    unit = jax.device_count() * max(1, config.optim.gradient_accumulation_steps)
    advice = recommend.recommend(
        context.survey,
        context.distinct,
        config,
        devices=unit,
        accelerator=not estimates.on_cpu(),
        given=given,
    )
    if 'batch_size' in given:
        return advice
    planned = pretrain_setup.without_measuring(recommend.apply(config, advice))
    batch, available = planned.batch_size, estimates.device_memory()
    limit = environment_checks.TIGHT * available
    try:
        while estimates.step_memory(planned) > limit and planned.batch_size >= 2 * max(64, unit):
            planned.batch_size = planned.batch_size // 2 // unit * unit
    except errors.UserError:
        return advice  # the run cannot be built, which check_problems reports
    if planned.batch_size == batch:
        return advice
    reason = (
        f'fits into {available / 2**30:.0f} GiB; against 256, a batch of 64 costs 2 points and '
        '128 costs 0.8 (Table 2)'
    )
    advice = [a for a in advice if a.key != 'batch_size']
    return [*advice, Advice('batch_size', planned.batch_size, reason)]


def _probe(config: ConfigDict, advice: list[Advice]) -> list[Advice]:
    """Returns the advice with the learning rate that a search with it selects."""
    best = lr_finder.search(recommend.apply(config, advice))
    kept = [a for a in advice if a.key != 'optim.learning_rate']
    say(f'{best.table}\n')
    return [*kept, Advice('optim.learning_rate', best.rate, best.reason)]
