"""Compiles away.c, which takes the disk of a process away, and does it for a moment."""

import pathlib
import subprocess
import time


def build(folder: pathlib.Path, disk: pathlib.Path, flag: pathlib.Path) -> dict[str, str]:
    """Returns the variables of a process whose files below `disk` fail while `flag` exists.

    Args:
      folder: Folder of the compiled library; needs gcc.
      disk: What is taken away.
      flag: File, not below `disk`.
    """
    library, source = folder / 'away.so', pathlib.Path(__file__).with_name('away.c')
    subprocess.run(['gcc', '-shared', '-fPIC', '-o', library, source, '-ldl'], check=True)
    return {'LD_PRELOAD': str(library), 'AWAY_ROOT': f'{disk}/', 'AWAY_FLAG': str(flag)}


def take(flag: pathlib.Path, after: float, seconds: float) -> None:
    """Takes the disk away for some seconds, after others."""
    time.sleep(after)
    flag.touch()
    time.sleep(seconds)
    flag.unlink()
