"""Tests of runtime/determinism.py: flags of XLA that make runs on a GPU repeat."""

import pathlib
import subprocess
import sys

import pytest
from commands import environment

import simsiam_jax
from simsiam_jax import errors
from simsiam_jax.runtime import determinism

# Adds a flag with an effect on CPUs to those that the command sets.
PROGRAM = """
import os
from simsiam_jax import main
from simsiam_jax.runtime import determinism
enable = determinism.enable
def enable_and_dump(*args):
    enable(*args)
    os.environ['XLA_FLAGS'] += ' --xla_dump_to=programs'
determinism.enable = enable_and_dump
main.main()
"""


def test_selected_kernels_are_kept_and_used_again(tmp_path: pathlib.Path) -> None:
    kept = tmp_path / 'my runs/autotune-1.textproto'

    def flags(process: int, before: str = '') -> str:
        variables = {'XLA_FLAGS': before}
        determinism.enable(str(kept.parent), process, variables)
        return variables['XLA_FLAGS']

    assert flags(1, '--xla_dump_to=a') == (
        '--xla_dump_to=a --xla_gpu_exclude_nondeterministic_ops=true '
        f"--xla_gpu_dump_autotune_results_to='{kept}'"
    )
    kept.touch()
    assert flags(1).endswith(f" --xla_gpu_load_autotune_results_from='{kept}'")
    assert 'load' not in flags(0)


def test_deterministic_run_in_bucket_is_refused() -> None:
    with pytest.raises(errors.UserError, match='gs://b/run: expected a folder on a disk'):
        determinism.enable('gs://b/run', 0, {})


def test_python_interface_needs_flag_before_jax(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('XLA_FLAGS', '')
    with pytest.raises(errors.UserError, match='before JAX is imported'):
        simsiam_jax.pretrain(tmp_path / 'run', config='quickstart', deterministic=True)
    assert not (tmp_path / 'run').exists()


def test_command_sets_flags_before_xla_reads_them(tmp_path: pathlib.Path) -> None:
    config = pathlib.Path(__file__).parent.parent / 'configs/quickstart.py'
    flags = [f'--config={config}', '--config.deterministic=True', '--config.dry_run=True']
    done = subprocess.run(
        [sys.executable, '-c', PROGRAM, '--workdir=my run', *flags],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert any((tmp_path / 'programs').iterdir())
