"""Errors a user can mend: main prints them as one line, without a traceback."""

import difflib
import functools
import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

T = TypeVar('T')


class UserError(ValueError):
    """What was given, what was expected, what to do."""


@functools.cache
def warn_once(text: str) -> None:
    """Prints a warning, the first time."""
    print(f'warning: {text}', file=sys.stderr, flush=True)


def reason(error: Exception) -> str:
    """What it says, in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def suggestion(given: str, known: Collection[str]) -> str:
    """'; did you mean X?' where a known word is close, else the known words."""
    close = difflib.get_close_matches(given, known, n=1)
    return f'did you mean {close[0]}?' if close else f'known: {", ".join(sorted(known))}'


def check_choice(key: str, given: str, known: Collection[str]) -> None:
    """Raises UserError unless `given` is one of `known`."""
    if given not in known:
        raise UserError(f'{key} is {given!r}; {suggestion(given, known)}')


def build(section: str, make: Callable[..., T], values: Mapping[str, Any], **fixed: Any) -> T:
    """make(**values, **fixed); a key that make does not take raises UserError with its name."""
    known = set(inspect.signature(make).parameters) - set(fixed)
    for key in values:
        if key not in known:
            raise UserError(f'unknown key {section}.{key}; {suggestion(key, known)}')
    return make(**values, **fixed)
