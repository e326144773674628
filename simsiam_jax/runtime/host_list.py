"""SLURM's lists of hosts, such as gpu-r[1-2]-n[01-04],login."""

import itertools
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping

from simsiam_jax import errors

_TIMEOUT = 10  # seconds for scontrol, which needs no answer of the controller


def first_host(given: str, env: Mapping[str, str]) -> str:
    """Returns the first host of a list, from scontrol if it is on PATH, else from expand().

    Args:
      given: Value of a variable such as SLURM_STEP_NODELIST.
      env: Variables of this process.

    Raises:
      UserError: The list has none of SLURM's forms.
    """
    if scontrol := shutil.which('scontrol', path=env.get('PATH', '')):
        command = [scontrol, 'show', 'hostnames', given]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT)
        except (OSError, subprocess.TimeoutExpired):
            pass
        else:
            if done.returncode == 0 and (hosts := done.stdout.split()):
                return hosts[0]
    return next(expand(given))


def expand(given: str) -> Iterator[str]:
    """Yields the hosts of a list in the order of `scontrol show hostnames`.

    The list has names separated by commas or spaces. Each name has any number of brackets, which
    contain numbers, ranges (01-04 keeps the zeros), or boxes of a grid (bgl[000x133]).

    Raises:
      UserError: The list has another form.
    """
    names = re.findall(r'(?:[^\s,\[\]]|\[[\dA-Zx,-]+\])+', given)
    if not names or ','.join(names) != re.sub(r'[\s,]+', ',', given.strip(', ')):
        raise _malformed(given)
    for name in names:
        texts = re.split(r'\[(.*?)\]', name)  # text, numbers, text, numbers, ..., text
        numbers = [
            itertools.chain.from_iterable(_range(item, given) for item in text.split(','))
            for text in texts[1::2]
        ]
        for chosen in itertools.product(*numbers):
            yield ''.join(itertools.chain(*zip(texts[::2], (*chosen, ''), strict=True)))


def _range(item: str, given: str) -> Iterator[str]:
    """Yields the numbers of 7, 01-04 or 000x133."""
    if match := re.fullmatch(r'(\d+)(?:-(\d+))?', item):
        low, high = match[1], match[2] or match[1]
        return (str(n).zfill(len(low)) for n in range(int(low), int(high) + 1))
    match = re.fullmatch(r'([\dA-Z]+)x([\dA-Z]+)', item)
    if not match or len(match[1]) != len(match[2]):
        raise _malformed(given)
    sides = zip(match[1], match[2], strict=True)
    return map(''.join, itertools.product(*(_DIGITS[_at(a) : _at(b) + 1] for a, b in sides)))


_DIGITS = '0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ'
_at = _DIGITS.index


def _malformed(given: str) -> errors.UserError:
    return errors.UserError(
        f'the list of hosts is {given!r}; expected a list of SLURM, such as gpu-r[1-2]-n[01-04]. '
        'Pass --coordinator, --num_processes and --process_id=$SLURM_PROCID'
    )
