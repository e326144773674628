"""Finds functions by import path, PACKAGE.MODULE:FUNCTION, and checks their arguments."""

import importlib
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from simsiam_jax import errors


def load(key: str, path: str) -> Callable[..., Any]:
    """Returns the function of an import path.

    Args:
      key: Key of the configuration that has the path, for messages.
      path: Import path, PACKAGE.MODULE:FUNCTION.

    Raises:
      UserError: The module cannot be imported or has no such function.
    """
    module_name, _, name = path.partition(':')
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # any type: the module is a program of the user
        reason = f'{type(error).__name__}: {errors.reason(error)}'
        raise errors.UserError(
            f'{key} is {path!r}, but {module_name!r} cannot be imported ({reason}). Write '
            'PACKAGE.MODULE:FUNCTION, and set PYTHONPATH to the folder of PACKAGE if it is not '
            'installed'
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [other for other, x in vars(module).items() if callable(x) and other[0] != '_']
        raise errors.UserError(
            f'{key} is {path!r}, but {module_name} has no function {name!r}; '
            f'{errors.suggestion(name, known)}'
        )
    return function


def takes(function: Callable[..., Any], name: str) -> bool:
    """Returns whether a function has a parameter of this name."""
    return name in _parameters(function)


def check_arguments(
    key: str, function: Callable[..., Any], arguments: Mapping[str, Any], fixed: Collection[str]
) -> None:
    """Checks that a function takes the arguments of a configuration.

    Args:
      key: Section of the configuration, for messages.
      function: Function to call.
      arguments: Arguments from the configuration.
      fixed: Parameters that the configuration sets by other keys.

    Raises:
      UserError: The function has no parameter of a name, or other keys set it.
    """
    parameters = _parameters(function)
    if any(x.kind is inspect.Parameter.VAR_KEYWORD for x in parameters.values()):
        return
    known = [
        name
        for name, x in parameters.items()
        if name not in fixed and x.kind is not inspect.Parameter.POSITIONAL_ONLY
    ]
    for name in arguments:
        if name not in known:
            raise errors.UserError(f'unknown key {key}.{name}; {errors.suggestion(name, known)}')


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # written in C
        return {}
