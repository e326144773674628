"""Errors that a user can fix; main prints them in one line, without a traceback."""

import difflib
import functools
import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar('T')


class UserError(ValueError):
    """An error that states what was given, what was expected and what to do."""


class TemporaryError(UserError):
    """A failure of storage or of another process; the same command may succeed later."""


@functools.cache
def warn_once(text: str) -> None:
    """Prints a warning unless it has been printed before."""
    from simsiam_jax import terminal  # imports JAX, which commands such as --help do not need

    terminal.show(f'warning: {text}', sys.stderr)


def reason(error: Exception) -> str:
    """Returns the first line of an error's message, at most 200 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def suggestion(given: str, known: Collection[str]) -> str:
    """Returns 'did you mean X?' if a known word is similar, else the known words."""
    close = difflib.get_close_matches(given, known, n=1)
    return f'did you mean {close[0]}?' if close else f'known: {", ".join(sorted(known))}'


def first(names: Iterable[str], count: int = 3) -> str:
    """Returns the first few names, sorted, and the number of the rest."""
    names = sorted(names)
    rest = f' and {len(names) - count:,} more' if len(names) > count else ''
    return ', '.join(names[:count]) + rest


def check_choice(key: str, given: str, known: Collection[str]) -> None:
    """Raises UserError unless `given` is one of `known`."""
    if given not in known:
        raise UserError(f'{key} is {given!r}; {suggestion(given, known)}')


def build(section: str, make: Callable[..., T], values: Mapping[str, Any], **fixed: Any) -> T:
    """Returns ``make(**values, **fixed)``.

    Args:
      section: Section of the configuration that `values` come from, for the message.
      make: Function to call.
      values: Arguments from the configuration.
      fixed: Arguments that the configuration cannot set.

    Raises:
      UserError: `make` has no parameter of a key's name.
    """
    known = set(inspect.signature(make).parameters) - set(fixed)
    for key in values:
        if key not in known:
            raise UserError(f'unknown key {section}.{key}; {suggestion(key, known)}')
    return make(**values, **fixed)
