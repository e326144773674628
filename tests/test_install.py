"""Tests of the wheel: built, installed into a fresh environment and used from an empty folder."""

import pathlib
import shutil
import site
import subprocess
import sys
import zipfile

import pytest
from commands import environment

TINY = ('--config.model.stages=(1,)', '--config.model.width_multiplier=0.125')
ROOT = pathlib.Path(__file__).parent.parent
SOURCES = (
    'simsiam_jax',
    'configs',
    'launch',
    'setup.py',
    'pyproject.toml',
    'README.md',
    'LICENSE',
)


def run(*command: object, cwd: pathlib.Path) -> str:
    """Runs a command that finds no checkout; returns its output."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment() | {'PYTHONPATH': ''},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope='module')
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp('build')
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, folder / name, ignore=shutil.ignore_patterns('__pycache__')
            )
        else:
            shutil.copy(ROOT / name, folder)
    pip = [
        sys.executable,
        '-m',
        'pip',
        'wheel',
        '--no-deps',
        '--no-build-isolation',
        '-w',
        '.',
        '.',
    ]
    run(*pip, cwd=folder)
    (built,) = folder.glob('*.whl')
    return built


@pytest.fixture(scope='module')
def programs(wheel: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Returns the folder of an environment's programs; dependencies are those of this one."""
    folder = tmp_path_factory.mktemp('environment')
    run(sys.executable, '-m', 'venv', '--without-pip', folder, cwd=folder)
    python = folder / 'bin' / 'python'
    run(
        sys.executable, '-m', 'pip', f'--python={python}', 'install', '--no-deps', wheel, cwd=folder
    )
    (packages,) = folder.glob('lib/python*/site-packages')
    (packages / 'dependencies.pth').write_text('\n'.join(site.getsitepackages()))
    return folder / 'bin'


def test_wheel_has_configurations_and_launchers(wheel: pathlib.Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f'simsiam_jax/{p.relative_to(ROOT)}' for p in (ROOT / 'configs').glob('*.py')}
    expected |= {f'simsiam_jax/launch/{p.name}' for p in (ROOT / 'launch').iterdir()}
    expected |= {'simsiam_jax/py.typed', 'simsiam_jax/tools/benchmark/h100.txtpb'}
    assert expected <= names


def test_quickstart_runs_from_an_empty_folder(
    programs: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    command = programs / 'simsiam-jax'
    module = programs / 'python', '-m', 'simsiam_jax.main'
    out = run(
        command,
        'pretrain',
        '--config=quickstart:byol,1ep',
        '--workdir=runs/quickstart',
        *TINY,
        cwd=tmp_path,
    )
    assert 'byol on resnet18' in out
    assert (tmp_path / 'runs/quickstart/report.html').exists()
    out = run(
        command,
        'evaluate',
        '--config=configs/knn.py',
        '--config.init_from=runs/quickstart',
        '--workdir=runs/knn',
        cwd=tmp_path,
    )
    assert 'random initialization' in out
    (tmp_path / 'mine.py').write_text(
        f'import runpy\nget_config = runpy.run_path({str(ROOT / "configs/quickstart.py")!r})'
        '["get_config"]\n'
    )
    out = run(
        *module, '--config=mine.py', '--workdir=runs/mine', '--config.dry_run=True', cwd=tmp_path
    )
    assert 'simsiam on resnet18' in out


def test_installed_launcher_runs_in_the_current_folder(
    programs: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    folder = run(programs / 'simsiam-jax', 'launch', cwd=tmp_path).strip()
    assert programs.parent in pathlib.Path(folder).parents
    flags = ['--config=quickstart:1ep', '--workdir=runs/a', '--config.guard=off']
    flags += ['--config.eval.train=', '--config.eval.test=', '--config.log.report=False']
    bash = ['env', f'PYTHON={programs / "python"}', 'bash', f'{folder}/local.sh', '-n', '1']
    run(*bash, *flags, *TINY, cwd=tmp_path)
    assert (tmp_path / 'runs/a/metrics.jsonl').exists()


def test_unknown_command_is_one_line(programs: pathlib.Path, tmp_path: pathlib.Path) -> None:
    done = subprocess.run(
        [programs / 'simsiam-jax', 'pretrane'], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == "error: unknown command 'pretrane'; did you mean pretrain?\n"
