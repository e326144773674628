"""Tests of main.py, tasks/pretrain.py and tasks/loop.py: complete, resumed and failing runs."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from commands import Commands, environment
from ml_collections import ConfigDict
from PIL import Image

import simsiam_jax
from simsiam_jax import errors
from simsiam_jax.checkpoints import checkpoint
from simsiam_jax.data import sources
from simsiam_jax.tasks import pretrain_setup
from simsiam_jax.training import mesh as mesh_lib

ROOT = pathlib.Path(__file__).parent.parent
KEYS = {'loss', 'z_std', 'lr', 'lr_predictor', 'images_per_second', 'data_wait'}
TINY = ('--config.model.stages=(1,)', '--config.model.width_multiplier=0.125')
SHORT = [
    '--config.epochs=4',
    '--config.model.width_multiplier=0.125',
    '--config.log.tensorboard=False',
    '--config.log.report=False',
    '--config.log.every_steps=1',
    '--config.eval.every_epochs=2',
    '--config.checkpoint.every_epochs=1',
]


def start(workdir: pathlib.Path, *flags: str, config: str = 'quickstart') -> subprocess.Popen:
    command = [sys.executable, '-m', 'simsiam_jax.main', f'--config=configs/{config}.py']
    return subprocess.Popen(
        [*command, f'--workdir={workdir}', *flags],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope='module')
def finish(command: Commands) -> Callable[..., tuple[int, str]]:
    """Returns a function (workdir, *flags, config='quickstart') -> (exit code, output)."""

    def finish(workdir: pathlib.Path, *flags: str, config: str = 'quickstart') -> tuple[int, str]:
        given = (f'--config=configs/{config}.py', f'--workdir={workdir}', *flags)
        done = command('simsiam_jax.main', *given)
        return done.returncode, done.stdout + done.stderr

    return finish


def lines(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def stored(workdir: pathlib.Path, step: int) -> list[np.ndarray]:
    tree = ocp.StandardCheckpointer().restore(workdir / 'checkpoints' / str(step) / 'state')
    return jax.tree.leaves(tree)


@pytest.fixture(scope='module')
def finished_run(finish, tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, str]:
    """Runs a short training; returns its workdir and output."""
    workdir = tmp_path_factory.mktemp('finished')
    code, output = finish(workdir, *SHORT)
    assert code == 0, output
    return workdir, output


def test_run_prints_and_writes_its_results(finished_run: tuple[pathlib.Path, str]) -> None:
    workdir, output = finished_run
    assert 'step 44/44  loss -0.' in output
    assert len(re.findall(r'^step \d+/44  loss', output, re.MULTILINE)) == 43
    assert '\r' not in output
    assert 'images/s' in output
    assert 'eta 0:00:00' in output
    for row in ('raw pixels', 'random initialization', 'after training'):
        assert row in output.split('kNN top-1 of 360 test images')[-1]
    measured = lines(workdir)
    training = [line for line in measured if 'train/loss' in line]
    assert [line['step'] for line in training] == list(range(2, 45))
    assert {key.removeprefix('train/') for key in training[0]} == KEYS | {'step', 'time'}
    assert training[0]['train/lr'] == pytest.approx(0.4)
    evaluated = {
        line['step']: line['eval/knn_top1'] for line in measured if 'eval/knn_top1' in line
    }
    assert set(evaluated) == {0, 22, 44}
    assert f'after training         {evaluated[44]:.4f}' in output
    verdict = json.loads((workdir / 'verdict.json').read_text())
    assert verdict['accuracy']['after training']['top1'] == pytest.approx(evaluated[44], abs=1e-6)
    assert verdict['sentence'] in output
    assert verdict['sentence'] in (workdir / 'verdict.txt').read_text()
    with Image.open(workdir / 'views.png') as views:
        assert views.size[0] > 100
    assert np.std(np.asarray(Image.open(workdir / 'views.png'))) > 30
    assert json.loads((workdir / 'config.json').read_text())['epochs'] == 4


def test_interrupted_run_resumes_bit_for_bit(
    finish, finished_run: tuple[pathlib.Path, str], tmp_path: pathlib.Path
) -> None:
    process = start(tmp_path, *SHORT)
    deadline = time.time() + 200
    metrics = tmp_path / 'metrics.jsonl'
    while time.time() < deadline and process.poll() is None:
        if metrics.exists() and '"step": 15' in metrics.read_text():
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)  # like Ctrl-C; the run turns it into SIGTERM
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 143, output
    reached = max(map(int, os.listdir(tmp_path / 'checkpoints')))
    assert 15 <= reached < 44
    assert f'stop requested: saved step {reached}; rerun the same command to resume' in output

    code, output = finish(tmp_path, *SHORT)
    assert code == 0, output
    assert f'resuming from step {reached}' in output
    for resumed, whole in zip(stored(tmp_path, 44), stored(finished_run[0], 44), strict=True):
        assert np.asarray(resumed).tobytes() == np.asarray(whole).tobytes()
    losses = [
        [(line['step'], line['train/loss']) for line in lines(run) if 'train/loss' in line]
        for run in (tmp_path, finished_run[0])
    ]
    assert losses[0] == losses[1]

    code, output = finish(tmp_path, *SHORT, '--config.optim.momentum=0.8', '--config.seed=1')
    assert code == 1
    assert 'optim.momentum (0.9 -> 0.8), seed (0 -> 1)' in output.splitlines()[-1]
    assert 'Traceback' not in output


def test_load_encoder_returns_backbone_only(finished_run: tuple[pathlib.Path, str]) -> None:
    workdir, _ = finished_run
    module, variables = simsiam_jax.load_encoder(workdir)
    images = sources.open_source('digits/test').images[:4].astype(np.float32) / 255
    features = module.apply(variables, images)
    assert features.shape == (4, module.features) == (4, 32)
    assert set(variables) == {'params', 'batch_stats'}
    assert np.std(np.asarray(features)) > 1e-3
    module, older = simsiam_jax.load_encoder(str(workdir), step=33)
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(older), jax.tree.leaves(variables), strict=True)
    )
    with pytest.raises(errors.UserError, match=r'no checkpoint for step 7.*found: steps 33, 44'):
        simsiam_jax.load_encoder(workdir, step=7)
    with pytest.raises(errors.UserError, match='workdir of a pre-training run'):
        simsiam_jax.load_encoder(workdir / 'nothing')


def test_checkpoint_restores_on_more_devices(
    finished_run: tuple[pathlib.Path, str], tmp_path: pathlib.Path
) -> None:
    workdir, _ = finished_run
    copy = shutil.copytree(workdir, tmp_path / 'copy')
    config = json.loads((copy / 'config.json').read_text())
    del config['format'], config['version']
    for key in ('crop_scale', 'crop_ratio', 'blur_sigma', 'mean', 'std'):
        config['augment'][key] = tuple(config['augment'][key])
    config['local_crops']['crop_scale'] = tuple(config['local_crops']['crop_scale'])
    setup = pretrain_setup.build(ConfigDict(config))
    assert setup.mesh.size == 8  # one device saved it
    with checkpoint.open(str(copy), config, max_to_keep=2) as checkpoints:
        state = checkpoints.restore(mesh_lib.replicate(setup.init(), setup.mesh))
    assert state.step == 44
    _, saved = simsiam_jax.load_encoder(workdir)
    restored = checkpoint.encoder_variables(state)
    for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(saved), strict=True):
        assert len(ours.sharding.device_set) == 8
        np.testing.assert_array_equal(ours, theirs)


def test_dry_run_prints_shapes_parameters_and_memory(finish, tmp_path: pathlib.Path) -> None:
    flags = ('--config.dry_run=True', *TINY)
    code, output = finish(tmp_path / 'dry', *flags)
    assert code == 0, output
    assert 'add --verbosity=1' in output
    assert 'kernel' not in output
    code, output = finish(tmp_path / 'dry', *flags, '--verbosity=1')
    assert code == 0, output
    assert 'projector/fc1/kernel' in output
    assert "batch['image']: uint8 [128, 8, 8, 1]" in output
    estimated, compiled = output.index('  as configured'), output.index('(as compiled for cpu)')
    for change in ('model.dtype=bfloat16', 'model.remat=True', 'gradient_accumulation_steps=2'):
        row = re.search(rf'^  \S*{change} +about 0\.0', output, re.MULTILINE)
        assert estimated < row.start() < compiled
    assert not (tmp_path / 'dry').exists()


def test_folder_of_images_trains_without_labels(finish, tmp_path: pathlib.Path) -> None:
    images = sources.open_source('digits').images[:40]
    folder = tmp_path / 'images' / 'deep'
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(np.repeat(image, 5, axis=0).repeat(4, axis=1)[..., 0]).save(
            folder / f'{i}.png'
        )
    (folder / 'broken.png').write_bytes(b'\x89PNG\r\n\x1a\n and no more')
    code, output = finish(
        tmp_path / 'run',
        f'--config.data.source=folder:{tmp_path / "images"}',
        '--config.data.backend=host',
        '--config.data.max_bad_fraction=0.1',
        '--config.data.channels=1',
        '--config.batch_size=20',
        '--config.epochs=1',
        '--config.augment.size=16',
        '--config.log.every_steps=1',
        '--config.log.report=False',
        '--config.model.name=resnet18',
        '--config.model.stages=(1, 1)',
        '--config.model.width_multiplier=0.125',
        '--config.method.dim=16',
        config='folder',
    )
    assert code == 0, output
    assert 'step 2/2  loss -' in output
    assert (tmp_path / 'run' / 'checkpoints' / '2' / 'encoder').is_dir()
    assert list((tmp_path / 'run').glob('events.out.tfevents.*'))
    assert str(folder / 'broken.png') in (tmp_path / 'run' / 'bad_images.txt').read_text()
    assert '1 unreadable images' in output


def test_run_without_labels_ends_with_comparison(finish, tmp_path: pathlib.Path) -> None:
    flags = ('--config.eval.train=', '--config.eval.test=', '--config.epochs=2', *TINY)
    code, output = finish(tmp_path, *flags, '--config.checkpoint.every_epochs=0')
    assert code == 0, output
    steps = [path.name for path in (tmp_path / 'checkpoints').iterdir() if path.name.isdigit()]
    assert steps == ['22']
    assert 'without labels (before training in parentheses): rankme' in output
    verdict = json.loads((tmp_path / 'verdict.json').read_text())
    assert verdict['title'] == 'without labels'
    assert verdict['now'] != verdict['before']
    assert verdict['sentence'] in (tmp_path / 'verdict.txt').read_text()


@pytest.mark.long
def test_input_benchmark_prints_its_table(tmp_path: pathlib.Path) -> None:
    for i in range(8):
        Image.new('RGB', (40, 30), (i, 0, 0)).save(tmp_path / f'{i}.jpg')
    command = [sys.executable, '-m', 'simsiam_jax.tools.benchmark', 'input', '--nostep']
    command += ['--config=configs/folder.py', f'--config.data.source=folder:{tmp_path}']
    command += ['--config.batch_size=4', '--config.augment.size=16', '--config.data.canvas=48']
    result = subprocess.run(
        [*command, '--batches=2'],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    rows = {line.split()[0]: line.split() for line in result.stdout.splitlines()}
    assert {'decode', 'none', 'color', 'all'} <= set(rows)
    assert rows['none'][-1] == f'{2 * 16 * 16 * 3 + 8:,}'  # two uint8 views, index and label


@pytest.mark.parametrize(
    ('reason', 'code', 'last'),
    [
        (
            'INTERNAL: the device is lost',
            75,
            'error: JaxRuntimeError: INTERNAL: the device is lost; rerun the same command to '
            'resume from the last checkpoint',
        ),
        # A retry would fail in the same way.
        (
            'RESOURCE_EXHAUSTED: Out of memory while trying to allocate 38.79GiB',
            1,
            'error: the run does not fit in the memory of cpu. Try model.dtype=bfloat16 (now '
            'float32), then model.remat=True (same result, about a third slower), then '
            'optim.gradient_accumulation_steps=2 (same update, except that BN statistics are of '
            'each part), then a smaller batch_size (now 128) or more devices',
        ),
    ],
)
def test_crash_exits_with_code_that_launchers_expect(
    reason: str, code: int, last: str, command: Commands, tmp_path: pathlib.Path
) -> None:
    config = tmp_path / 'config.py'
    config.write_text(
        'import runpy\n'
        'import jax\n'
        'from simsiam_jax.training import step\n'
        'def make_train_step(*args, **kwargs):\n'
        f'    raise jax.errors.JaxRuntimeError({reason!r})\n'
        'step.make_train_step = make_train_step\n'
        f'get_config = runpy.run_path({str(ROOT / "configs" / "quickstart.py")!r})["get_config"]\n'
    )
    done = command('simsiam_jax.main', f'--config={config}', f'--workdir={tmp_path}')
    assert done.returncode == code
    assert ('Traceback' in done.stderr) == (code == 75)
    assert done.stderr.splitlines()[-1] == last


def test_resident_run_needs_no_reader_or_plot_packages() -> None:
    absent = 'tensorflow tensorflow_datasets array_record numba simplejpeg tifffile pyarrow plotly'
    program = (
        f'import sys; sys.modules.update(dict.fromkeys({absent!r}.split()))\n'
        f'sys.path.append({str(ROOT / "tests")!r})\n'
        'from configurations import load\n'
        'from simsiam_jax import main\n'
        "setup = main.pretrain.pretrain_setup.build(load('quickstart'))\n"
        "print(len(next(setup.batches(0, 1))['views']))\n"
    )
    done = subprocess.run(
        [sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout == '2\n', done.stderr


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--config.data.source=folder:/no/such/place'], '/no/such/place does not exist'),
        (['--config.epoch=3'], 'epoch'),
        (['--config.optim.learning_rat=3'], 'learning_rat'),
        (['--config.batch_size=5000'], 'batch_size is 5000'),
        (['--config.task=pretrian'], "'pretrian'; did you mean pretrain?"),
        (['--workdir=/dev/null/x'], 'workdir /dev/null/x cannot be written'),
    ],
)
def test_bad_input_exits_with_one_line(
    flags: list[str], message: str, finish, tmp_path: pathlib.Path
) -> None:
    code, output = finish(tmp_path, *flags)
    assert code == 1
    assert 'Traceback' not in output
    assert message in output.strip().splitlines()[-1]
