"""What the launchers would do, and one that does it."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from simsiam_jax.training import saved

ROOT = pathlib.Path(__file__).parent.parent
RUN = ['--config=configs/quickstart.py', '--workdir=gs://bucket/run']


def launch(script: str, *args: str, timeout: int = 60, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ['bash', f'launch/{script}', *args],
        cwd=ROOT,
        env=os.environ | {'XLA_FLAGS': '', 'PYTHON': sys.executable} | env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.mark.parametrize(
    ('script', 'args', 'env', 'expected'),
    [
        ('local.sh', ['-n', '2'], {'PORT': '5000'}, '--coordinator=127.0.0.1:5000'),
        ('gpu_host.sh', [], {}, 'JAX sees no GPU'),
        ('slurm.sbatch', [], {}, 'srun --kill-on-bad-exit=1'),
        (
            'tpu_pod.sh',
            [],
            {'NAME': 'n', 'ZONE': 'z', 'TYPE': 'v4-32', 'SPOT': '1'},
            'tpu-vm create n --zone=z --accelerator-type=v4-32',
        ),
    ],
)
def test_a_dry_run_prints_the_command_of_the_run(script, args, env, expected) -> None:
    done = launch(script, *args, *RUN, DRY_RUN='1', **env)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
    runs = [line for line in done.stdout.splitlines() if 'simsiam_jax.main' in line]
    assert all(flag in line for line in runs for flag in RUN)
    assert len(runs) == (2 if script == 'local.sh' else 1)


def test_launchers_without_what_they_need_say_so() -> None:
    assert 'usage' in launch('local.sh', *RUN).stderr
    assert 'usage' in launch('slurm.sbatch').stderr
    pod = launch('tpu_pod.sh', '--workdir=/tmp/x', NAME='n', ZONE='z', TYPE='t', DRY_RUN='1')
    assert pod.returncode == 1
    assert 'must be in a bucket' in pod.stderr


def test_local_runs_two_processes(tmp_path: pathlib.Path) -> None:
    flags = ['--config.epochs=1', '--config.model.width_multiplier=0.125']
    flags += ['--config.log.tensorboard=False', '--config.eval.train=', '--config.eval.test=']
    done = launch(
        'local.sh',
        '-n',
        '2',
        RUN[0],
        f'--workdir={tmp_path}',
        *flags,
        timeout=300,
        MAX_RESTARTS='0',
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('batch 128 on 2 x cpu') == 1  # the first process alone speaks
    assert saved.load(tmp_path, 'state').step == 11


def test_local_starts_a_dying_run_again_but_not_a_mistaken_one(tmp_path: pathlib.Path) -> None:
    program = tmp_path / 'program'
    count = tmp_path / 'count'
    for code, starts in ((75, 3), (1, 1), (0, 1)):
        program.write_text(f'#!/bin/sh\necho >> {count}\nexit {code}\n')
        program.chmod(0o755)
        count.write_text('')
        done = launch('local.sh', '-n', '1', *RUN, PYTHON=str(program), MAX_RESTARTS='2')
        assert done.returncode == code
        assert len(count.read_text()) == starts


@pytest.mark.skipif(not shutil.which('shellcheck'), reason='shellcheck is not installed')
def test_launchers_are_clean_shell() -> None:
    scripts = [str(p) for p in (ROOT / 'launch').iterdir() if p.suffix in ('.sh', '.sbatch')]
    assert len(scripts) == 4
    subprocess.run(['shellcheck', *scripts], check=True)
