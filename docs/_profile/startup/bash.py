"""Replaces the magic %%bash, which sends lines in pieces, by one that prints the output at once."""

import subprocess

from IPython import get_ipython


def bash(line: str, cell: str) -> None:
    done = subprocess.run(
        ['bash', '-euo', 'pipefail', '-c', cell],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout, end='')
    done.check_returncode()


get_ipython().register_magic_function(bash, 'cell')
