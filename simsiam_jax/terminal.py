"""Lines and progress bars on the first host's terminal, in color unless NO_COLOR is set."""

import sys
import warnings
from collections.abc import Iterable
from typing import Any

import jax

with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # in a notebook without ipywidgets; bars are text there
    from tqdm.auto import tqdm

# Parts of lines -> their style in a terminal.
_STYLES = (
    (r'(?m)^error\b', 'bold red'),
    (r'(?m)^warning\b', 'bold yellow'),
    (r'(?m)^ok\b', 'green'),
    (r'(?m)^better than .*', 'green'),
    (r'(?m)^(no better|worse) than .*', 'yellow'),
    (r'(?m)^the run as \w+ would start$', 'bold green'),
    (r'(?m)^the run as \w+ would not start$', 'bold red'),
    (r'(?m)^step \d+(?=  )', 'bold'),
    (r'--[\w.]+(?==)', 'cyan'),
    (r'(?m)  # .*', 'dim'),
)


def say(text: str, *, heading: str = '') -> None:
    """Prints a line on the first host, above any progress bars.

    Args:
      text: Line, or several lines.
      heading: Heading above the text in a terminal; a file or pipe gets the text alone.
    """
    if jax.process_index() == 0:
        with tqdm.external_write_mode():
            if heading and is_terminal(sys.stdout):
                console(sys.stdout).print(f'\n{heading}', style='bold underline')
            show(text, sys.stdout)


def show(text: str, file: Any) -> None:
    """Prints text, in color if the file is a terminal; unchanged otherwise."""
    if not is_terminal(file):
        print(text, file=file, flush=True)
        return
    from rich.text import Text

    colored = Text(text)
    for pattern, style in _STYLES:
        colored.highlight_regex(pattern, style)
    console(file).print(colored, soft_wrap=True)


def is_terminal(file: Any) -> bool:
    """Returns whether a person sees the file in a terminal; a notebook is none."""
    return file is not None and file.isatty()


def console(file: Any) -> Any:
    """Returns rich's console for a terminal; it has no colors if NO_COLOR is set."""
    from rich.console import Console

    return Console(file=file, markup=False, highlight=False, emoji=False)


def progress(items: Iterable[Any] | None = None, what: str | None = None, **options: Any) -> Any:
    """Returns a tqdm bar that disappears at its end and shows only in a terminal or notebook."""
    quiet = True if jax.process_index() else None  # None disables the bar without a terminal
    defaults = {'file': sys.stdout, 'dynamic_ncols': True, 'leave': False, 'delay': 3}
    return tqdm(items, what, disable=quiet, **(defaults | options))
