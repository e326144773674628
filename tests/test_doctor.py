"""Tests of tools/doctor/: examine.py, environment_checks.py, image_checks.py, estimates.py."""

import dataclasses
import itertools
import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tifffile
from absl import flags
from configurations import load
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict, config_flags
from PIL import Image

from simsiam_jax import command_line, config_files, errors
from simsiam_jax.checkpoints import checkpoint_reader
from simsiam_jax.data import sources, survey
from simsiam_jax.tasks import lr_finder, memory, pretrain, pretrain_setup
from simsiam_jax.tools.doctor import environment_checks, estimates, examine, image_checks
from simsiam_jax.tools.doctor.context import SEVERITIES, Context, Finding

ROOT = pathlib.Path(__file__).parent.parent


def quickstart() -> ConfigDict:
    """Returns the quickstart on few of its images, without kNN."""
    config = load('quickstart')
    config.data.source = 'digits/test'
    config.eval.train = config.eval.test = ''
    return config


def picture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Returns a smooth random image in colors, with a little noise."""
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    large = np.asarray(small.resize((width, height))).astype(float)
    return np.clip(large + rng.normal(0, 4, large.shape), 0, 255).astype(np.uint8)


def make(kind: str, root: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    if kind == 'duplicates':
        originals = [picture(rng, 60, 80) for _ in range(3)]
    for i in range(40 if kind == 'forty' else 60):
        name = str(root / f'{i:03}')
        if kind == 'gray':
            Image.fromarray(picture(rng, 300, 300)[..., 0]).save(f'{name}.png')
        elif kind == 'deep':
            deep = picture(rng, 60, 60)[..., 0].astype(np.uint16) * 16
            Image.fromarray(deep).save(f'{name}.png')
        elif kind == 'planar':
            planes = picture(rng, 60, 60).transpose(2, 0, 1).astype(np.uint16)
            tifffile.imwrite(f'{name}.tif', planes, photometric='rgb', planarconfig='separate')
        elif kind == 'clear':
            whole = Image.fromarray(picture(rng, 60, 60))
            whole.putalpha(Image.linear_gradient('L').resize((60, 60)))
            whole.save(f'{name}.png')
        elif kind == 'turned':
            exif = Image.Exif()
            exif[0x0112] = 6
            Image.fromarray(picture(rng, 60, 80)).save(f'{name}.jpg', exif=exif)
        elif kind == 'channels':
            np.save(f'{name}.npy', np.tile(picture(rng, 64, 64), 2)[..., :5])
        elif kind == 'duplicates':  # saved at two qualities
            Image.fromarray(originals[i % 3]).save(f'{name}.jpg', quality=60 + i % 2 * 30)
        else:
            Image.fromarray(picture(rng, 60, 80)).save(f'{name}.jpg')
        if kind == 'broken' and i % 20 == 7:
            pathlib.Path(f'{name}.jpg').write_bytes(b'\xff\xd8\xff no image')


@dataclasses.dataclass(frozen=True)
class Case:
    """What the doctor finds in a folder.

    Attributes:
      starts: Whether the run as given starts.
      lines: Parts of its report.
      keys: Keys that it recommends.
    """

    starts: bool
    lines: tuple[str, ...]
    keys: dict


CASES = {
    'healthy': Case(True, ('ok       60 images (all), none damaged', 'no near-duplicates'), {}),
    'gray': Case(True, ('every image is gray',), {'data.channels': 1, 'augment.hue': 0.0}),
    'deep': Case(
        True,
        ('60 images of 16 bits: config.data.range=auto', '255 of 0,4080', '(256 levels, 0'),
        {'data.channels': 1, 'data.range': 'auto'},
    ),
    'planar': Case(True, ('60 of 3 channels; 16 bits',), {'data.channels': 3}),
    'clear': Case(True, ('60 images have transparency: over (0,)',), {'data.channels': 3}),
    'turned': Case(True, ('60 images have an EXIF orientation: applied', 'all 80x60'), {}),
    'broken': Case(
        False,
        ('error    5.0% of the images cannot be read (3 are damaged)', '007.jpg: '),
        {'data.max_bad_fraction': 0.06},
    ),
    'forty': Case(False, ('batch_size is 64', '40 distinct images'), {'batch_size': 16}),
    'channels': Case(False, ('60 have 5 channels, not 3', 'of 5 channels'), {'data.channels': 5}),
    'duplicates': Case(
        True, ('57 images (95.0% of all) are near-duplicates', '3 distinct'), {'batch_size': 16}
    ),
}


@pytest.fixture
def _no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, 'step_memory', lambda *_: 2**20)
    monkeypatch.setattr(estimates, 'step_rate', lambda *_: 100.0)
    monkeypatch.setattr(estimates, 'feed_rate', lambda *_: 100.0)


@pytest.mark.usefixtures('_no_measuring')
@pytest.mark.parametrize('kind', CASES)
def test_examine_writes_configuration_that_trains(
    kind: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    images, written, case = tmp_path / 'images', tmp_path / 'mine.py', CASES[kind]
    images.mkdir()
    make(kind, images)
    config = load('folder')
    config.data.source = f'folder:{images}'
    config.model.update(name='resnet18', width_multiplier=0.0625, stages=(1,))
    config.batch_size = 56 if kind != 'forty' else 64
    assert examine.examine(config, str(tmp_path / 'run')) == case.starts
    report = capsys.readouterr().out
    for line in case.lines:
        assert line in report
    words = [line.partition(' ')[0] for line in report.splitlines()]
    severities = [word for word in words if word in SEVERITIES]
    assert severities == sorted(severities, key=SEVERITIES.index)

    assert examine.examine(config, str(tmp_path / 'run'), write=str(written), origin='folder.py')
    assert 'the run as written would start' in capsys.readouterr().out
    mine = load(written)
    given = flatten_dict(mine.to_dict(), sep='.')
    assert {key: given[key] for key in case.keys} == case.keys
    mine.epochs = 1
    mine.data.backend = 'host'
    mine.model.update(stages=(1,), width_multiplier=0.0625)
    mine.method.update(dim=16, predictor_hidden_dim=8)
    mine.log.tensorboard = False
    if kind != 'gray':  # a batch and the shapes of the step, which is quicker
        setup = pretrain_setup.build(mine)
        batch, state = next(setup.batches(0, 1)), jax.eval_shape(setup.init)
        _, metrics = jax.eval_shape(pretrain_setup.build_step(mine, setup), state, batch)
        assert metrics['loss'].shape == ()
        return
    pretrain.run(mine, str(tmp_path / 'run'))
    lines = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
    assert -1 <= json.loads(lines[-1])['train/loss'] < 0.5


@pytest.mark.filterwarnings('ignore:the load_module')  # of ml_collections
def test_doctor_command_exits_with_1_if_run_would_not_start(tmp_path: pathlib.Path) -> None:
    make('channels', tmp_path)
    command = [sys.executable, '-m', 'simsiam_jax.tools.doctor', '--config=configs/folder.py']
    command.append(f'--config.data.source=folder:{tmp_path}')
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.startswith('error    100.0% of the images cannot be read')
    assert done.stdout.endswith('the run as given would not start\n')
    assert 'Traceback' not in done.stderr
    # The configuration reads the overrides as they are printed.
    pasted = [line for line in done.stdout.splitlines() if line.startswith('--config.')]
    values = flags.FlagValues()
    line = ['main', f'--config={ROOT}/configs/folder.py', *shlex.split(pasted[0])]
    config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=line)
    values(line)
    config = values.config
    assert (config.data.channels, config.model.stages) == (5, (1, 1, 1))
    assert config.augment.hue == 0


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'data.source': 'folder:/no/such'}, 'error    image folder /no/such does not exist'),
        ({'optim.learning_rat': 1}, r'error    unknown key config\.optim\.learning_rat'),
        ({'model.stem': 'imagnet'}, "error    model.stem is 'imagnet'"),
        ({'task': 'knn'}, 'error    '),
    ],
)
def test_examine_reports_what_main_would_refuse(
    change: dict, message: str, capsys: pytest.CaptureFixture
) -> None:
    config = quickstart()
    with config.unlocked():
        config.update_from_flattened_dict(change)
    assert not examine.examine(config)
    assert re.search(message, capsys.readouterr().out)


def test_check_workdir_needs_disk_space_and_no_other_run(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = quickstart()
    setup = pretrain_setup.build(config)

    def check(workdir: pathlib.Path) -> list[Finding]:
        return environment_checks.check_workdir(Context(config, str(workdir), setup=setup))

    def severities(workdir: pathlib.Path) -> list[str]:
        return [finding.severity for finding in check(workdir)]

    assert severities(tmp_path / 'new' / 'run') == ['ok']
    assert not (tmp_path / 'new').exists()
    (tmp_path / 'file').write_text('')
    assert severities(tmp_path / 'file') == ['error']

    meta = {'config': config.to_dict(), 'images': sources.fingerprint(setup.source)}
    metadata = tmp_path / 'checkpoints' / '50' / 'meta' / 'metadata'
    metadata.parent.mkdir(parents=True)
    metadata.write_text(json.dumps(meta | {'seal': checkpoint_reader.seal(meta)}))
    assert severities(tmp_path) == ['ok', 'ok']
    config.optim.learning_rate = 0.1
    (tmp_path / 'lock.json').write_text('{}')
    assert severities(tmp_path) == ['ok', 'warning', 'error']
    assert 'optim.learning_rate (0.8 -> 0.1)' in str(check(tmp_path)[-1])
    metadata.write_text('{}')
    assert severities(tmp_path) == ['ok', 'warning', 'warning']

    state = jax.eval_shape(setup.init)
    each = memory.size_of(state) + memory.size_of(state.params['backbone'])
    free = shutil.disk_usage(tmp_path)._replace(free=2 * each)  # three are needed
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: free)
    assert severities(tmp_path / 'new') == ['warning']
    free = free._replace(free=each - 1)
    assert severities(tmp_path / 'new') == ['error']


def test_advise_halves_batch_until_step_fits_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    config = quickstart()
    config.data.source, config.batch_size = 'digits', 128
    monkeypatch.setattr(estimates, 'step_memory', lambda planned: planned.batch_size * 2**20)
    monkeypatch.setattr(estimates, 'device_memory', lambda: 2**20 * 100)
    monkeypatch.setattr(estimates, 'step_rate', lambda *_: 100.0)
    assert examine.examine(config, write=str(tmp_path / 'mine.py'))
    assert load(tmp_path / 'mine.py').batch_size == 64
    monkeypatch.setattr(estimates, 'device_memory', lambda: 2**20)
    assert not examine.examine(config)
    assert 'does not fit in the memory' in capsys.readouterr().out


def test_step_rate_is_inverse_to_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        time, 'perf_counter', itertools.count().__next__
    )  # every block takes a second
    config = quickstart()

    def rate(*stages: int) -> float:
        config.model.stages = stages
        return estimates.step_rate(config, pretrain_setup.build(config))

    # A block has two convolutions; the first of stages two and three costs half. Their sum grows
    # from 11 to 35, by 3.2; the step grows by less, because stem, shortcuts and heads stay.
    assert rate(2, 2, 2) / rate(6, 6, 6) == pytest.approx(3.1, rel=0.05)
    # A small network is timed whole: a second for 16 images, of which a step needs two views.
    config.batch_size = 16 * jax.device_count()
    assert 7 < rate(1, 1, 1) < 8


def test_compare_hosts_names_processes_that_differ() -> None:
    facts = environment_checks.host_facts(sources.open_source('digits/test'))
    assert facts['number of images'] == '360'
    assert environment_checks.host_facts(None)['number of images'] == 'none'
    hashes = np.array([[1, 2, 3], [1, 2, 3], [1, 5, 3]])
    (finding,) = environment_checks.compare_hosts(['jax', 'numpy', 'names'], hashes)
    assert str(finding) == (
        'error    numpy: different in processes 2 than in process 0; make them identical'
    )
    (finding,) = environment_checks.compare_hosts(['jax', 'numpy', 'names'], hashes[:2])
    assert finding.severity == 'ok'


@pytest.mark.usefixtures('_no_measuring')
def test_examine_keeps_what_command_line_gives(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    config, path = quickstart(), tmp_path / 'mine.py'
    config.update(epochs=12, batch_size=32)
    config.optim.learning_rate, config.checkpoint.every_epochs = 0.1, 1.0
    assert examine.examine(
        config, write=str(path), given={'epochs', 'optim.learning_rate', 'batch_size'}
    )
    report = capsys.readouterr().out
    kept = report.partition('Given on the command line, and kept:\n')[2].splitlines()[:2]
    assert [line.partition(' (')[0] for line in kept] == [
        '  --config.optim.learning_rate=0.1  # recommended: 0.8',
        '  --config.epochs=12  # recommended: 200',
    ]
    mine = load(path)
    assert (mine.epochs, mine.batch_size, mine.optim.learning_rate) == (12, 32, 0.1)
    assert mine.checkpoint.every_epochs == 10  # of 11 steps: 360 digits in batches of 32


def test_arguments_know_what_overrides_and_words_set() -> None:
    file = 'configs/folder.py:folder:/images,byol,9ep'
    arguments = command_line.Arguments([], config_file=file, overrides=frozenset({'batch_size'}))
    given = arguments.given()
    assert {'batch_size', 'epochs', 'data.source', 'method.momentum'} <= given
    assert not {'augment.size', 'model.name'} & given


def test_examine_refuses_file_it_cannot_write_before_the_work(tmp_path: pathlib.Path) -> None:
    taken = tmp_path / 'taken.py'
    taken.touch()
    for path, problem in ((taken, 'exists'), (tmp_path / 'no' / 'x.py', 'cannot be written')):
        with pytest.raises(errors.UserError, match=problem):
            examine.examine(quickstart(), write=str(path))


@pytest.mark.usefixtures('_no_measuring')
def test_written_file_takes_words(tmp_path: pathlib.Path) -> None:
    path = tmp_path / 'mine.py'
    assert examine.examine(quickstart(), write=str(path))
    mine = config_files.load(f'{path}:byol,7ep,folder:/elsewhere')
    assert (mine.method.name, mine.epochs, mine.data.source) == ('byol', 7, 'folder:/elsewhere')
    assert mine.augment == load(path).augment
    with pytest.raises(errors.UserError, match="no variant 'nonsense'"):
        config_files.load(f'{path}:nonsense')


def test_check_images_names_odd_sizes_and_uneven_classes(tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    for name, count in (('many', 30), ('few', 2), ('one', 1)):
        (tmp_path / name).mkdir()
        for i in range(count):
            size = (500, 600) if (name, i) == ('few', 0) else (60, 80)
            Image.fromarray(picture(rng, *size)).save(tmp_path / name / f'{i}.png')
    Image.new('RGB', (80, 60), 'red').save(tmp_path / 'many' / 'mask.png')
    source = sources.open_source(f'folder:{tmp_path}')
    context = Context(load('folder'), source=source, survey=survey.survey(source))
    texts = [f.text for f in image_checks.check_images(context) if f.severity == 'warning']
    text = '\n'.join(texts)
    assert f'1 images have under 1/4 or over 4 times the median side: {tmp_path}/few/0.png' in text
    assert '(500x600)' in text
    assert '3 classes from one (1) to many (31) images' in text
    assert '1 classes have a single image (one)' in text
    assert f'nothing to learn ({tmp_path}/many/mask.png)' in text


def test_probe_sets_learning_rate_of_written_configuration(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    result = lr_finder.SearchResult(rate=0.37, reason='best of four', table='0.37\n0.74')
    monkeypatch.setattr(lr_finder, 'search', lambda config: result)
    monkeypatch.setattr(estimates, 'step_rate', lambda *_: 100.0)
    path = tmp_path / 'mine.py'
    assert examine.examine(quickstart(), write=str(path), probe=True)
    assert '# best of four\n    config.optim.learning_rate = 0.37' in path.read_text()
    assert load(path).optim.learning_rate == 0.37
    assert capsys.readouterr().out.startswith('0.37\n0.74\n')
