"""Tests of command_line.py and config_keys.py: flags, overrides, errors in one line."""

import io
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
from commands import ROOT, Commands
from configurations import load

from simsiam_jax import command_line, config_files, config_keys, errors, paths

QUICKSTART = 'configs/quickstart.py'

# Imports all modules and prints their names, the flags that they define, and which flags of the
# commands turn ~/runs into a path in the home folder.
PROGRAM = """
import importlib, json, pkgutil, sys
from absl import flags
import simsiam_jax
from simsiam_jax import command_line
names = [m.name for m in pkgutil.walk_packages(simsiam_jax.__path__, 'simsiam_jax.')]
for name in names:
    importlib.import_module(name)
ours = [k for k in flags.FLAGS.flags_by_module_dict() if k.startswith('simsiam_jax')]
command_line.start = lambda *arguments, **options: None
paths = {}
for command in sys.argv[1:]:
    earlier = set(flags.FLAGS)
    sys.modules[f'simsiam_jax.{command}'].main()
    added = {name: flags.FLAGS[name] for name in set(flags.FLAGS) - earlier}
    texts = {name for name, flag in added.items() if flag.flag_type() in ('string', 'path')}
    parsed = {name: added[name].parser.parse('~/runs') for name in texts}
    paths[command] = {name: path for name, path in parsed.items() if path != '~/runs'}
    for name in added:
        delattr(flags.FLAGS, name)
print(json.dumps({'modules': names, 'flags': ours, 'paths': paths}))
"""


@pytest.fixture(scope='module')
def imported() -> dict[str, Any]:
    """Returns what PROGRAM prints."""
    done = subprocess.run(
        [sys.executable, '-c', PROGRAM, *PATHS],
        cwd=ROOT,
        env=os.environ | {'HOME': '/home/ada'},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def dry_run(command: Commands, *flags: str) -> subprocess.CompletedProcess:
    return command('simsiam_jax.main', '--workdir=none', '--config.dry_run=True', *flags)


@pytest.mark.parametrize(
    ('override', 'message'),
    [
        ('data.image_size=32', 'data.image_size; did you mean config.augment.size?'),
        ('lr=0.1', 'lr; did you mean config.optim.learning_rate?'),
        ('optim.learning_rat=3', 'optim.learning_rat; did you mean config.optim.learning_rate?'),
        ('epoch=3', 'epoch; did you mean config.epochs?'),
        ('method.temprature=3', 'method.temprature; did you mean config.eval.temperature?'),
        ('no_such_section.zzz=3', 'no_such_section.zzz; known: '),
    ],
)
def test_unknown_key_is_named_with_a_suggestion(
    override: str, message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(errors.UserError) as caught:
        command_line.rename_override(f'--config.{override}', load('quickstart'))
    assert str(caught.value).startswith(f'unknown key config.{message}')


def test_unknown_key_ends_the_command_in_one_line(command: Commands) -> None:
    done = dry_run(command, f'--config={QUICKSTART}', '--config.data.image_size=32')
    assert done.returncode == 1
    assert done.stderr == (
        'error: unknown key config.data.image_size; did you mean config.augment.size?\n'
    )


@pytest.mark.parametrize(
    ('given', 'renamed'),
    [
        ('--config.optim.accumulate=4', '--config.optim.gradient_accumulation_steps=4'),
        ('--config.local_crops.number=2', '--config.local_crops.number=2'),
        ('--config.small_views.number=2', '--config.local_crops.number=2'),
        ('--config.data.on_device=colour', '--config.data.on_device=color'),
        ('--noconfig.log.report', '--noconfig.log.report'),
        ('--config.optim.accumulate', '--config.optim.gradient_accumulation_steps'),
        ('input', 'input'),
    ],
)
def test_old_names_of_overrides_are_renamed(given: str, renamed: str) -> None:
    assert command_line.rename_override(given, load('quickstart')) == renamed


def test_override_wins_over_the_config_file_under_either_name(
    command: Commands, tmp_path: pathlib.Path
) -> None:
    file = tmp_path / 'mine.py'
    file.write_text(
        'from simsiam_jax import config as config_lib\n'
        'def get_config():\n'
        '    config = config_lib.default()\n'
        '    config.optim.accumulate = 2\n'
        '    return config\n'
    )
    done = dry_run(command, f'--config={file}', '--config.optim.accumulate=0')
    assert 'optim.gradient_accumulation_steps is 0; expected 1 or more' in done.stderr
    text = 'warning: config.optim.accumulate is now config.optim.gradient_accumulation_steps\n'
    assert done.stderr.count(text) == 1


def test_second_view_takes_keys_of_augment(command: Commands) -> None:
    done = dry_run(command, f'--config={QUICKSTART}', '--config.second_view.blur=2.0')
    assert 'augment.blur is 2.0' in done.stderr


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('def get_config():\n    return 1 / 0\n', 'failed in line 2: ZeroDivisionError'),
        ('def get_config(:\n', 'failed in line 1: SyntaxError'),
        ('def get_config():\n    return 3\n', 'returned int; expected a ConfigDict'),
        ('x = 3\n', 'has no get_config()'),
        ('import sys\nsys.exit(3)\n', 'failed in line 2: SystemExit: 3. Fix the file'),
        ('\nraise ValueError("a\\nb")', 'failed in line 2: ValueError: a b. Fix the file'),
    ],
)
def test_broken_config_file_is_told_in_one_line(
    text: str, message: str, tmp_path: pathlib.Path
) -> None:
    file = tmp_path / 'broken.py'
    file.write_text(text)
    with pytest.raises(errors.UserError) as caught:
        config_files.load(str(file))
    assert message in str(caught.value)
    assert '\n' not in str(caught.value)


def test_missing_config_file_is_named() -> None:
    with pytest.raises(errors.UserError, match=r'config file configs/none\.py does not exist'):
        config_files.load('configs/none.py:byol')


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--workdir=x'], '--config is missing'),
        (['--', f'--config={QUICKSTART}', '--workdir=x', 'y'], "unexpected argument 'y'"),
        ([f'--config={QUICKSTART}'], 'Flag --workdir must have a value'),
        ([f'--config={QUICKSTART}', '--workdir=x', 'y'], "unexpected argument 'y'"),
        ([f'--config={QUICKSTART}', '--workdir=x', '--nonsense'], 'Unknown command line flag'),
        (
            [f'--config={QUICKSTART}', '--workdir=x', '--config.epochs=three'],
            "--config.epochs is 'three'; expected a whole number, such as 256",
        ),
        (
            [f'--config={QUICKSTART}', '--workdir=x', '--config.augment.crop_ratio=3/4,4/3'],
            "--config.augment.crop_ratio is '3/4,4/3'; expected numbers separated by commas",
        ),
        (
            [f'--config={QUICKSTART}', '--workdir=x', '--config.dry_run=maybe'],
            "--config.dry_run is 'maybe'; expected True or False",
        ),
        (
            [f'--config={QUICKSTART}', '--workdir=x', '--config.model.stages=1,x'],
            "--config.model.stages is '1,x'; expected numbers separated by commas, such as 1,1,1",
        ),
        (
            [f'--config={QUICKSTART}', '--workdir=x', '--config.augment.mean='],
            "--config.augment.mean is ''; expected numbers separated by commas, such as 0.0, or ()",
        ),
    ],
)
def test_invalid_command_line_ends_in_one_line(
    flags: list[str], message: str, command: Commands
) -> None:
    done = command('simsiam_jax.main', *flags)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count('\n') == 1


# The flags of each command that are paths; the others are numbers, names and choices.
PATHS = {
    'main': 'workdir',
    'tools.convert.__main__': 'source target',
    'tools.doctor.__main__': 'workdir write',
    'tools.embed': 'checkpoint out html',
    'tools.ledger.__main__': 'config workdir',
    'tools.report': 'out',
}


def test_paths_on_the_command_line_begin_in_the_home_folder(imported: dict[str, Any]) -> None:
    assert imported['paths'] == {
        module: dict.fromkeys(names.split(), '/home/ada/runs') for module, names in PATHS.items()
    }


def test_path_of_an_unknown_user_is_refused() -> None:
    with pytest.raises(errors.UserError, match=r'begins with ~nobody-here; expected'):
        paths.expand('~nobody-here/a')
    assert paths.expand('./~nobody-here') == './~nobody-here'


def test_any_name_can_be_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    with io.TextIOWrapper(io.BytesIO(), encoding='ascii') as stdout:
        monkeypatch.setattr(sys, 'stdout', stdout)
        monkeypatch.setattr(command_line.app, 'run', lambda main, flags_parser: None)
        command_line.start(lambda arguments: None)
        print('\udce9 \xe9', flush=True)
        assert stdout.buffer.getvalue() == b'\\udce9 \\xe9\n'


def test_config_file_is_found_in_the_home_folder(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('HOME', str(tmp_path))
    text = (ROOT / QUICKSTART).read_text()
    (tmp_path / 'mine.py').write_text(text)
    assert config_files.load('~/mine.py').batch_size == load('quickstart').batch_size


def test_keys_of_a_section_are_listed_if_none_is_similar() -> None:
    error = config_keys.unknown_key('log.zzz', ['epochs', 'log.wandb', 'log.mlflow'])
    assert str(error) == 'unknown key config.log.zzz; known: log.mlflow, log.wandb'


def test_all_modules_are_imported_together_and_define_no_flags(imported: dict[str, Any]) -> None:
    assert 'simsiam_jax.tools.doctor.__main__' in imported['modules']
    assert len(imported['modules']) > 100
    assert imported['flags'] == []
