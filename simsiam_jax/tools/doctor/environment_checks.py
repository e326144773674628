"""Checks this machine, its processes, and what a run needs of them."""

import datetime
import glob
import os
import pathlib
import shutil
import zlib

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import Int

from simsiam_jax import errors, lazy_tf, migration
from simsiam_jax.checkpoints import checkpoint_reader, same_run, workdirs
from simsiam_jax.data import sampler, sources
from simsiam_jax.data.reader import Reader
from simsiam_jax.runtime import lock, versions
from simsiam_jax.tasks import memory
from simsiam_jax.tools.doctor import estimates
from simsiam_jax.tools.doctor.context import Context, Finding

_GIB = 2**30
# Share of a device's memory above which the estimate does not tell whether a step fits.
TIGHT = 0.85


def check_devices(context: Context) -> list[Finding]:
    """Returns a finding on the devices; any accelerator is ok."""
    count, kind = jax.device_count(), jax.devices()[0].device_kind
    processes = jax.process_count()
    where = f' in {processes} processes' * (processes > 1)
    text = f'{count} x {kind}{where}; {os.cpu_count()} CPU cores here; jax {jax.__version__}'
    if not estimates.on_cpu():
        return [Finding('ok', text)]
    if glob.glob('/dev/nvidia[0-9]*'):
        return [
            Finding(
                'warning',
                f'{text}: JAX does not see the NVIDIA GPU of this machine; '
                "pip install 'simsiam_jax[cuda]' and check the driver",
            )
        ]
    return [Finding('warning', f'{text}: no GPU or TPU; train small networks only')]


def check_hosts(context: Context) -> list[Finding]:
    """Returns whether all processes have the same versions and images; all must call it."""
    if jax.process_count() == 1:
        return []
    facts = host_facts(context.source)
    hashes = np.array([zlib.crc32(value.encode()) for value in facts.values()])
    return compare_hosts(list(facts), multihost_utils.process_allgather(hashes))


def host_facts(source: sources.Source | sources.ArraySource | None) -> dict[str, str]:
    """Returns what must be identical on all hosts, by name; None means that images are missing."""
    installed = versions.describe_process()['versions']
    facts = {name: installed.get(name, '') for name in ('python', *versions.PACKAGES)}
    facts['number of images'] = str(len(source)) if source else 'none'
    names = []
    if source and not isinstance(source, sources.ArraySource):
        sample = sampler.evenly_spaced(len(source), 1000)
        names = [os.path.basename(source.name(int(i))) for i in sample]
    facts['names of images'] = '\n'.join(names)
    return facts


def compare_hosts(names: list[str], hashes: Int[np.ndarray, 'P N']) -> list[Finding]:
    """Returns an error for each fact that differs between processes.

    Args:
      names: Names of the facts.
      hashes: Hash of each fact by process, [processes, facts].
    """
    findings = []
    for name, values in zip(names, hashes.T, strict=True):
        different = np.flatnonzero(values != values[0]).tolist()
        if different:
            ranks = ', '.join(map(str, different))
            text = f'{name}: different in processes {ranks} than in process 0; make them identical'
            findings.append(Finding('error', text))
    return findings or [Finding('ok', f'{len(hashes)} processes agree on versions and images')]


def check_memory(context: Context) -> list[Finding]:
    """Returns whether a step fits into the memory of a device, by an estimate."""
    if context.setup is None:
        return []
    needed, available = estimates.step_memory(context.config), estimates.device_memory()
    text = f'a step needs about {needed / _GIB:.2g} GiB of {available / _GIB:.3g} per device'
    if needed > available:
        return [Finding('error', f'{text}: {memory.advice(context.config)}')]
    if needed > TIGHT * available:
        text += ' (estimated) and may not fit; --config.dry_run=True compiles it'
        return [Finding('warning', text)]
    return [Finding('ok', f'{text} (estimated from shapes)')]


def check_speed(context: Context) -> list[Finding]:
    """Returns the estimated rate of the step and duration of the run."""
    setup, config = context.setup, context.config
    if setup is None:
        return []
    images = config.epochs * setup.sampler.steps_per_epoch * config.batch_size
    seconds = images / context.step_rate
    text = (
        f'the step can consume about {_number(context.step_rate)} images/s (estimated): '
        f'{config.epochs} epochs in about {datetime.timedelta(minutes=round(seconds / 60))}'
    )
    if seconds > 14 * 24 * 3600:
        text += '; use a smaller network, smaller views or more devices'
        return [Finding('warning', text)]
    return [Finding('ok', text)]


def _number(rate: float) -> str:
    return f'{rate:,.0f}' if rate >= 10 else f'{rate:.2g}'


def check_input(context: Context) -> list[Finding]:
    """Returns whether the input pipeline keeps up with the step."""
    setup, survey = context.setup, context.survey
    if setup is None or survey is None:
        return []
    if not isinstance(setup.source, Reader):
        return [Finding('ok', 'the images stay on the device: training does not wait for input')]
    try:
        delivered = estimates.feed_rate(context.config, setup, survey.seconds)
    except errors.UserError as error:
        return [Finding('error', str(error))]
    return [_feed(context, delivered)]


def check_tensorflow(context: Context) -> list[Finding]:
    """Returns whether TensorFlow is installed and off the accelerators, if the run needs it."""
    setup, config = context.setup, context.config
    if setup is None:
        return []
    on_host = isinstance(setup.source, Reader) and config.data.on_device == 'none'
    if not on_host and not config.log.tensorboard:
        return []
    try:
        tf = lazy_tf.load()
    except errors.UserError as error:
        return [Finding('error', str(error))]
    visible = [device.device_type for device in tf.config.get_visible_devices()]
    if set(visible) - {'CPU'}:
        return [
            Finding(
                'warning',
                f'TensorFlow {tf.__version__} sees {", ".join(visible)} and may take the memory of '
                'JAX; do not use TensorFlow before this program does',
            )
        ]
    return [Finding('ok', f'TensorFlow {tf.__version__} uses the CPU and sees no accelerator')]


def _feed(context: Context, delivered: float) -> Finding:
    consumed = context.step_rate
    text = (
        f'the input pipeline delivers {_number(delivered)} images/s, the step can consume '
        f'{_number(consumed)}'
    )
    if delivered > 1.1 * consumed:
        return Finding('ok', text)
    options = ['store smaller images', 'use a host with more cores']
    if context.config.data.on_device != 'all' and not estimates.on_cpu():
        options.insert(0, 'set --config.data.on_device=all')
    return Finding('warning', f'{text}: training is input-bound; {", or ".join(options)}')


def check_workdir(context: Context) -> list[Finding]:
    """Returns findings on the disk, on other runs in the workdir, and on resuming there."""
    setup, config, workdir = context.setup, context.config, context.workdir
    if setup is None:
        return []
    state = jax.eval_shape(setup.init)
    size = memory.size_of(state) + memory.size_of(state.params['backbone'])
    count = config.checkpoint.max_to_keep + 1  # the oldest is deleted after the newest is written
    if config.checkpoint.keep_period:
        count += int(config.epochs / config.checkpoint.keep_period)
    text = f'checkpoints: {count} x {size / _GIB:.2g} GiB'
    if workdir is None:
        return [Finding('ok', f'{text}; pass --workdir to check the disk')]
    if '://' in workdir:
        return [Finding('ok', f'{text} in {workdir}')]
    folder = pathlib.Path(workdir).absolute()
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        return [Finding('error', f'{workdir} cannot be written; pass another --workdir')]
    findings, free = [], shutil.disk_usage(parent).free
    text += f', {free / _GIB:.1f} GiB free in {parent}'
    if free < size:
        text += ': no space for one; free disk space or pass another --workdir'
        findings.append(Finding('error', text))
    elif free < count * size:
        text += ': free disk space or lower config.checkpoint.max_to_keep'
        findings.append(Finding('warning', text))
    else:
        findings.append(Finding('ok', text))
    if (folder / lock.NAME).exists():
        text = f'{folder / lock.NAME} exists: another run may be active there'
        findings.append(Finding('warning', f'{text}; wait for it or pass another --workdir'))
    # Not checkpoint_reader.list_steps, which every process would have to call.
    steps = [int(p.name) for p in (folder / checkpoint_reader.FOLDER).glob('*') if p.name.isdigit()]
    if max(steps, default=0):
        findings.append(_resumes(context, folder, max(steps)))
    return findings


def _resumes(context: Context, folder: pathlib.Path, step: int) -> Finding:
    assert context.setup is not None
    try:
        stored = checkpoint_reader.read_run(folder, step)
    except Exception as error:  # damage may raise anything; the run itself then uses an older step
        return Finding('warning', f'cannot read step {step} in {folder}: {errors.reason(error)}')
    given = same_run.RunIdentity(
        migration.complete(context.config.to_dict()), sources.fingerprint(context.setup.source)
    )
    source, names = context.setup.source, ''
    if same_run.images_changed(given, stored):
        names = workdirs.differing_names(epath.Path(folder), sources.image_names(source))
    if problem := same_run.refusal(epath.Path(folder), given, stored, names=names):
        return Finding('error', problem)
    return Finding('ok', f'{folder} contains this run at step {step}: it would resume from there')
