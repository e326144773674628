"""Whether this machine is ready for a run: one line each."""

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
from ml_collections import ConfigDict

from simsiam_jax import errors, lazy_tf, migration
from simsiam_jax.checkpoints import checkpoint_reader, same_run
from simsiam_jax.data import sources
from simsiam_jax.data.reader import Reader
from simsiam_jax.runtime import lock, versions
from simsiam_jax.tasks import memory
from simsiam_jax.tasks.pretrain_setup import PretrainSetup
from simsiam_jax.tools.doctor import estimates
from simsiam_jax.tools.doctor.image_checks import Finding

_GIB = 2**30
# Share of a device's memory above which an estimate says little.
TIGHT = 0.85


def check_devices() -> list[Finding]:
    """Findings on the devices and on TensorFlow beside them."""
    count, kind = jax.device_count(), jax.devices()[0].device_kind
    processes = jax.process_count()
    where = f' in {processes} processes' * (processes > 1)
    text = f'{count} x {kind}{where}; {os.cpu_count()} CPU cores here; jax {jax.__version__}'
    if not estimates.on_cpu():
        return [Finding('fine', text)]
    if glob.glob('/dev/nvidia[0-9]*'):
        return [
            Finding(
                'warns',
                f'{text}: there is an NVIDIA GPU that JAX does not see; '
                "pip install 'simsiam_jax[cuda]' and look at the driver",
            )
        ]
    return [Finding('warns', f'{text}: no GPU and no TPU; small networks only')]


def check_hosts(source: sources.Source | sources.ArraySource | None) -> list[Finding]:
    """Whether all processes have the same versions and the same images; to be called by all."""
    if jax.process_count() == 1:
        return []
    facts = facts_of(source)
    numbers = np.array([zlib.crc32(value.encode()) for value in facts.values()])
    return compare(list(facts), multihost_utils.process_allgather(numbers))


def facts_of(source: sources.Source | sources.ArraySource | None) -> dict[str, str]:
    """What must be alike on all hosts, by name; None: the images are not there."""
    here = versions.describe_process()['versions']
    facts = {name: here.get(name, '') for name in ('python', *versions.PACKAGES)}
    facts['number of images'] = str(len(source)) if source else 'none'
    names = []
    if source and not isinstance(source, sources.ArraySource):
        some = np.linspace(0, len(source) - 1, min(1000, len(source))).astype(int)
        names = [os.path.basename(source.name(int(i))) for i in some]
    facts['names of images'] = '\n'.join(names)
    return facts


def compare(names: list[str], everyone: Int[np.ndarray, 'P N']) -> list[Finding]:
    """Findings from a number for each of `names`, [processes, names]."""
    found = []
    for name, numbers in zip(names, everyone.T, strict=True):
        others = np.flatnonzero(numbers != numbers[0]).tolist()
        if others:
            ranks = ', '.join(map(str, others))
            text = f'{name}: processes {ranks} have another than process 0; make them alike'
            found.append(Finding('stops', text))
    return found or [Finding('fine', f'{len(everyone)} processes agree on versions and images')]


def check_run(
    config: ConfigDict, parts: PretrainSetup, workdir: str | None, seconds: float
) -> list[Finding]:
    """Findings on a run that can be built: memory, speed, input, disk.

    Args:
      seconds: an image takes to be decoded.
    """
    found = [_memory(config)]
    rate = estimates.step_rate(config, parts)
    found.append(_time(config, parts, rate))
    if isinstance(parts.source, Reader):
        try:
            found.append(_tensorflow())
            found.append(_feed(config, estimates.feed_rate(config, parts, seconds), rate))
        except errors.UserError as error:
            found.append(Finding('stops', str(error)))
    else:
        found.append(Finding('fine', 'the images are kept on the device: no input to wait for'))
    found += check_workdir(config, parts, workdir)
    return found


def _memory(config: ConfigDict) -> Finding:
    need, has = estimates.step_memory(config), estimates.device_memory()
    text = f'a step takes about {need / _GIB:.2g} GiB of {has / _GIB:.3g} a device'
    if need > has:
        return Finding('stops', f'{text}: {memory.advice(config)}')
    if need > TIGHT * has:
        return Finding(
            'warns', f'{text}, estimated: it may not fit; --config.dry_run=True compiles it'
        )
    return Finding('fine', f'{text} (estimated from shapes)')


def _time(config: ConfigDict, parts: PretrainSetup, rate: float) -> Finding:
    seconds = config.epochs * parts.sampler.steps_per_epoch * config.batch_size / rate
    text = (
        f'the step takes about {_number(rate)} images/s (estimated from one block): '
        f'{config.epochs} epochs in about {datetime.timedelta(minutes=round(seconds / 60))}'
    )
    if seconds > 14 * 24 * 3600:
        return Finding('warns', f'{text}; a smaller network, smaller views or more devices')
    return Finding('fine', text)


def _number(rate: float) -> str:
    return f'{rate:,.0f}' if rate >= 10 else f'{rate:.2g}'


def _tensorflow() -> Finding:
    tf = lazy_tf.load()
    seen = [device.device_type for device in tf.config.get_visible_devices()]
    if set(seen) - {'CPU'}:
        text = f'TensorFlow {tf.__version__} sees {", ".join(seen)}: it may take the memory of JAX'
        return Finding('warns', f'{text}; do not use TensorFlow before this program does')
    return Finding('fine', f'TensorFlow {tf.__version__} reads on the CPU and sees no accelerator')


def _feed(config: ConfigDict, fed: float, eaten: float) -> Finding:
    text = f'this host makes about {_number(fed)} images/s ready, the step takes {_number(eaten)}'
    if fed > 1.1 * eaten:
        return Finding('fine', text)
    turns = []
    if config.data.on_device != 'all' and not estimates.on_cpu():
        turns.append('try --config.data.on_device=all')
    turns += ['store the images smaller', 'take a host of more cores']
    return Finding('warns', f'{text}: the input is the limit; {", or ".join(turns)}')


def check_workdir(config: ConfigDict, parts: PretrainSetup, workdir: str | None) -> list[Finding]:
    """Findings on the disk, on other runs there and on what a run there would go on from."""
    state = jax.eval_shape(parts.init)
    each = memory.size_of(state) + memory.size_of(state.params['backbone'])
    kept = config.checkpoint.max_to_keep + 1  # the oldest goes when the newest is whole
    if config.checkpoint.keep_period:
        kept += int(config.epochs / config.checkpoint.keep_period)
    text = f'checkpoints: {kept} x {each / _GIB:.2g} GiB'
    if workdir is None:
        return [Finding('fine', f'{text}; with --workdir the disk is looked at')]
    if '://' in workdir:
        return [Finding('fine', f'{text} in {workdir}')]
    folder = pathlib.Path(workdir).absolute()
    exists = next(path for path in (folder, *folder.parents) if path.exists())
    if not exists.is_dir() or not os.access(exists, os.W_OK):
        return [Finding('stops', f'{workdir} cannot be written; give another --workdir')]
    found, free = [], shutil.disk_usage(exists).free
    text += f', {free / _GIB:.1f} GiB free in {exists}'
    if free < each:
        text += ': no room for one; make room, or give another --workdir'
        found.append(Finding('stops', text))
    elif free < kept * each:
        found.append(Finding('warns', f'{text}: make room, or lower config.checkpoint.max_to_keep'))
    else:
        found.append(Finding('fine', text))
    if (folder / lock.NAME).exists():
        text = f'{folder / lock.NAME} says that a run is active there: only one can be'
        found.append(Finding('warns', f'{text}; if it lives, wait or give another --workdir'))
    # Not checkpoint_reader.list_steps, which every process would have to call.
    steps = [int(p.name) for p in (folder / checkpoint_reader.FOLDER).glob('*') if p.name.isdigit()]
    if max(steps, default=0):
        found.append(_resumes(config, parts, folder, max(steps)))
    return found


def _resumes(config: ConfigDict, parts: PretrainSetup, folder: pathlib.Path, step: int) -> Finding:
    try:
        stored = checkpoint_reader.read_run(folder, step)
    except Exception as error:  # damage may raise anything; the run itself then uses an older step
        return Finding('warns', f'step {step} in {folder} cannot be read: {errors.reason(error)}')
    given = same_run.RunIdentity(
        migration.complete(config.to_dict()), sources.fingerprint(parts.source)
    )
    if problem := same_run.refusal(epath.Path(folder), given, stored):
        return Finding('stops', problem)
    return Finding('fine', f'{folder} contains this run at step {step}: it would resume from there')
