"""Lines and progress bars on the first host's terminal."""

import sys
from collections.abc import Iterable
from typing import Any

import jax
from tqdm.auto import tqdm


def say(text: str) -> None:
    """Prints a line on the first host, above any progress bars."""
    if jax.process_index() == 0:
        with tqdm.external_write_mode():
            print(text, flush=True)


def progress(items: Iterable[Any] | None = None, what: str | None = None, **options: Any) -> Any:
    """Returns a tqdm bar that disappears at its end and shows only in a terminal or notebook."""
    quiet = True if jax.process_index() else None  # None disables the bar without a terminal
    defaults = {'file': sys.stdout, 'dynamic_ncols': True, 'leave': False, 'delay': 3}
    return tqdm(items, what, disable=quiet, **(defaults | options))
