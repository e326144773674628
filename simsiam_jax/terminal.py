"""What the first host's terminal shows: lines, and bars of progress below them."""

import sys
from collections.abc import Iterable
from typing import Any

import jax
from tqdm import tqdm


def say(text: str) -> None:
    """A line, above the bars."""
    if jax.process_index() == 0:
        with tqdm.external_write_mode():
            print(text, flush=True)


def progress(items: Iterable[Any] | None = None, what: str | None = None, **options: Any) -> Any:
    """A tqdm bar, gone when it has ended; where the output is no terminal it shows nothing."""
    quiet = True if jax.process_index() else None  # None: where sys.stdout is no terminal
    defaults = {'file': sys.stdout, 'dynamic_ncols': True, 'leave': False, 'delay': 3}
    return tqdm(items, what, disable=quiet, **(defaults | options))
