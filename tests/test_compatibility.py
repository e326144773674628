"""Tests of migration.py and checkpoints/same_run.py: runs and configurations of earlier versions.

tests/compatibility/v0.1.0 was made by that version: two epochs of SimSiam and of MoCo v2 and a
linear evaluation on digits, each without its last checkpoint, and a configuration written by the
doctor. metrics.jsonl of each run has all steps, to compare a resumed run with the original.
"""

import importlib.metadata
import json
import pathlib
import tarfile

import jax
import numpy as np
import pytest
from commands import Commands
from configurations import load

import simsiam_jax
from simsiam_jax import config_files, config_keys, errors, migration
from simsiam_jax.checkpoints import checkpoint_reader
from simsiam_jax.pages import runs

OLD = pathlib.Path(__file__).parent / 'compatibility' / 'v0.1.0'
# As version 0.1.0 was started, with its names of the keys.
NARROW = [
    '--config.model.width_multiplier=0.125',
    '--config.model.stages=(1,1)',
    '--config.method.dim=16',
    '--config.epochs=2',
    '--config.eval.every_epochs=1',
    '--config.checkpoint.keep=9',
    '--config.checkpoint.every_epochs=1',
    '--config.log.report=False',
    '--config.log.tensorboard=False',
    '--config.log.every_steps=1',
]
RUNS = {
    'simsiam': ('quickstart.py', ['--config.method.predictor_width=8', *NARROW]),
    'moco_v2': (
        'quickstart.py:moco_v2',
        ['--config.method.projector_width=16', '--config.method.queue=256', *NARROW],
    ),
}


def unpack(name: str, folder: pathlib.Path) -> pathlib.Path:
    with tarfile.open(OLD / f'{name}.tar.gz') as archive:
        archive.extractall(folder, filter='data')
    return folder / name


def points(workdir: pathlib.Path, key: str) -> dict[int, float]:
    """Values of a metric by step."""
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    return {line['step']: line[key] for line in lines if key in line}


@pytest.mark.parametrize('name', RUNS)
def test_run_of_earlier_version_resumes(
    name: str, command: Commands, tmp_path: pathlib.Path
) -> None:
    workdir, (config, flags) = unpack(name, tmp_path), RUNS[name]
    losses, top1 = points(workdir, 'train/loss'), points(workdir, 'eval/knn_top1')
    done = command('simsiam_jax.main', f'--config=configs/{config}', f'--workdir={workdir}', *flags)
    assert done.returncode == 0, done.stderr
    assert 'resuming from step 11' in done.stdout
    assert done.stderr.count('config.checkpoint.keep is now config.checkpoint.max_to_keep') == 1
    resumed = points(workdir, 'train/loss')
    assert losses.keys() >= set(range(12, 23))
    assert resumed.keys() >= losses.keys()
    # Rounding differs between versions of JAX, and training magnifies it: later steps differ more.
    first = range(12, 17)
    np.testing.assert_allclose([resumed[i] for i in first], [losses[i] for i in first], rtol=1e-5)
    assert abs(points(workdir, 'eval/knn_top1')[22] - top1[22]) <= 1.5 / 360  # one image


def test_linear_evaluation_of_earlier_version_resumes(
    command: Commands, tmp_path: pathlib.Path
) -> None:
    encoder, workdir = unpack('simsiam', tmp_path), unpack('linear', tmp_path)
    move_encoder(workdir / 'checkpoints' / '5', encoder)
    losses = points(workdir, 'train/loss')
    done = command(
        'simsiam_jax.main',
        '--config=configs/linear.py',
        f'--workdir={workdir}',
        f'--config.init_from={encoder}',
        '--config.batch_size=256',
        '--config.epochs=2',
        '--config.checkpoint.keep=9',
        '--config.log.every_steps=1',
        '--config.log.report=False',
        '--config.log.tensorboard=False',
    )
    assert done.returncode == 0, done.stderr
    assert 'resuming from step 5' in done.stdout
    assert 'the backbone is unchanged, bit for bit' in done.stdout
    # LARS at small rates: the loss hardly moves in ten steps, so it is compared more closely.
    np.testing.assert_allclose(points(workdir, 'train/loss')[10], losses[10], rtol=1e-5)


def move_encoder(step: pathlib.Path, encoder: pathlib.Path) -> None:
    """Rewrites the path of the encoder, which a checkpoint stores, with its checksum."""
    path = step / 'meta' / 'metadata'
    meta = json.loads(path.read_text())
    meta['config']['init_from'] = str(encoder)
    path.write_text(json.dumps(meta | {'seal': checkpoint_reader.seal(meta)}))


def test_encoder_of_earlier_version_loads_evaluates_and_converts(
    command: Commands, tmp_path: pathlib.Path
) -> None:
    workdir = unpack('simsiam', tmp_path)
    top1 = points(workdir, 'eval/knn_top1')[11]
    done = command(
        'simsiam_jax.main',
        '--config=configs/knn.py',
        f'--workdir={tmp_path / "knn"}',
        f'--config.init_from={workdir}',
        '--config.eval.k=(20,)',
        '--config.eval.temperature=(0.2,)',
    )
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / 'knn' / 'knn.json').read_text())
    assert abs(scores[0]['top1'] - top1) <= 1.5 / 360  # one image

    converted = tmp_path / 'simsiam.safetensors'
    done = command(
        'simsiam_jax.tools.convert',
        f'--source={workdir}',
        f'--target={converted}',
        '--format=state_dict',
    )
    assert done.returncode == 0, done.stderr
    _, variables = simsiam_jax.load_encoder(workdir)
    _, again = simsiam_jax.load_encoder(converted)
    jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_report_shows_earlier_version_under_current_keys(tmp_path: pathlib.Path) -> None:
    (run,) = runs.read_runs([unpack('moco_v2', tmp_path)])
    assert run.config['method.queue_size'] == 256
    assert not {'method.queue', 'format', 'version', 'small_views.number'} & set(run.config)


def test_checkpoint_of_newer_format_is_not_taken_for_damaged(tmp_path: pathlib.Path) -> None:
    workdir = unpack('simsiam', tmp_path)
    path = workdir / 'checkpoints' / '11' / 'meta' / 'metadata'
    meta = json.loads(path.read_text()) | {'format': migration.FORMAT + 1, 'version': '9.0.0'}
    meta['items'] = {}  # laid out as this version cannot know
    path.write_text(json.dumps(meta | {'seal': checkpoint_reader.seal(meta)}))
    with pytest.raises(errors.UserError, match=r'of simsiam_jax 9\.0\.0.*reads format'):
        checkpoint_reader.load(workdir, 'state')


def test_config_file_of_earlier_version_loads(capsys: pytest.CaptureFixture) -> None:
    errors.warn_once.cache_clear()  # another test may have printed one of the warnings
    config = config_files.load(str(OLD / 'config_of_doctor.py'))
    assert config.optim.gradient_accumulation_steps == 2
    assert config.optim.predictor_schedule == 'decayed'
    assert (config.optim.warmup_start_fraction, config.optim.final_lr_fraction) == (0.5, 0.01)
    assert (config.checkpoint.max_to_keep, config.checkpoint.keep_period) == (3, 1.0)
    assert config.method.projector_hidden_dim == 16
    assert (config.local_crops.number, config.local_crops.size) == (1, 8)
    assert not {'accumulate', 'final', 'warmup_start', 'predictor'} & set(config.optim)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == len(set(warnings)) == 9  # the file sets nine keys by old names
    assert 'warning: config.optim.final is now config.optim.final_lr_fraction' in warnings


def test_migrate_fills_missing_keys() -> None:
    config = load('quickstart').to_dict()
    del config['optim']['momentum'], config['method']['similarity'], config['alternate']
    migration.migrate(config)
    assert config == load('quickstart').to_dict()


def test_migrate_refuses_unknown_keys_by_name() -> None:
    config = load('quickstart:moco_v2').to_dict()
    config['method']['queue_length'] = 3
    with pytest.raises(errors.UserError, match=r'unknown key config\.method\.queue_length'):
        migration.migrate(config)


def test_migrate_refuses_newer_format() -> None:
    config = load('quickstart').to_dict() | {'format': migration.FORMAT + 1, 'version': '9.0.0'}
    with pytest.raises(errors.UserError) as caught:
        migration.migrate(config, origin='runs/new')
    message = str(caught.value)
    assert message.startswith(f'runs/new has format {migration.FORMAT + 1} of simsiam_jax 9.0.0')
    assert '\n' not in message


def test_renamed_keys_lead_to_keys_that_exist() -> None:
    names = ['quickstart', 'quickstart:moco_v2', 'quickstart:swav', 'linear', 'linear:cached']
    known = {key for name in names for key in config_keys.keys(load(name))}
    known |= {key.replace('augment', 'second_view') for key in known}
    assert set(migration.RENAMED_KEYS.values()) <= known
    assert not set(migration.RENAMED_KEYS) & known


def test_version_of_metadata_and_code_agree() -> None:
    assert importlib.metadata.version('simsiam_jax') == simsiam_jax.__version__
