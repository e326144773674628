"""Writes the pages of the reference that follow from the code: configuration, commands, modules.

    python -m docs.generate

tests/test_docs.py compares docs/reference/config.md and cli.md with it.
"""

import ast
import importlib
import inspect
import io
import pathlib
import re
import tokenize
from collections.abc import Sequence
from types import ModuleType
from typing import Any
from unittest import mock

from absl import flags
from ml_collections import ConfigDict

from simsiam_jax import _MODULES as PUBLIC
from simsiam_jax import __main__ as command
from simsiam_jax import command_line, method_defaults
from simsiam_jax import config as config_lib

DOCS = pathlib.Path(__file__).parent
PACKAGE = DOCS.parent / 'simsiam_jax'
CONFIG_HEAD = """<!-- Written by docs/generate.py from simsiam_jax/config.py. Edit config.py. -->

# Configuration keys

Set any key on the command line as `--config.SECTION.KEY=VALUE`:

    --config.optim.learning_rate=0.1
    --config.augment.crop_scale=0.5,1.0

An unknown key is an error that names the most similar key. Learning rates are base rates, times
batch size/256.

The tables show the defaults of `simsiam_jax/config.py`. The [files of `configs/`](config_files.md)
change some of them; each task names its files in parentheses. None inherits the value from the
checkpoint.
"""
CONFIG_METHODS = """
## Methods

A word such as `byol` in `--config=imagenet:byol` replaces the section `method` by these keys. The
page of the [methods](modules/methods.rst) explains them.
"""
CLI_HEAD = """<!-- Written by docs/generate.py from the programs. Edit their docstrings. -->

# Commands

`simsiam-jax COMMAND` and `python -m MODULE` run the same program. `--help` prints the text below.
Flags are written as `--NAME=VALUE`. In paths, `~` is the home folder.

"""
CLI_FLAGS = """
A command with `--config` also accepts `--config.KEY=VALUE` for every [key](config.md). The file is
a path, or the name of an installed [configuration](config_files.md). `--helpfull` lists the flags
of the logging library too, such as `--verbosity`. See also the [exit codes](exit_codes.md).
"""

# Task -> functions of config.py whose comments describe its keys, the most specific first.
TASKS = {
    'pretrain': ('default',),
    'linear': ('supervised', '_evaluation', 'default'),
    'probe': ('probe', '_evaluation', 'default'),
    'knn': ('knn', '_evaluation', 'default'),
}
TITLES = {
    'pretrain': 'Pre-training',
    'linear': 'Linear evaluation and fine-tuning',
    'probe': 'Probe on cached features',
    'knn': 'kNN',
}
ABOUT = {
    'pretrain': (
        '`config.task = pretrain` (`imagenet`, `cifar10`, `folder`, `quickstart`, `ablations`).'
    ),
    'linear': '`config.task = linear` (`linear`) or `finetune` (`finetune`).',
    'probe': '`config.task = probe` (`linear:cached`).',
    'knn': '`config.task = knn` (`knn`).',
}


def config_page() -> str:
    """Returns the page of all keys: a table for each section of each task."""
    comments = _comments((PACKAGE / 'config.py').read_text())
    text = CONFIG_HEAD
    for task, functions in TASKS.items():
        config = config_lib.DEFAULTS[task]()
        known = {}
        for function in reversed(functions):
            known |= comments[function]
        text += f'\n## {TITLES[task]}\n\n{ABOUT[task]}\n'
        order = list(known)
        names = sorted(config, key=lambda name: _place(name, order))
        sections = {'': [key for key in names if not _is_section(config[key])]}
        sections |= {
            key: sorted(config[key], key=lambda name: order.index(f'{key}.{name}'))
            for key in names
            if _is_section(config[key])
        }
        for section, keys in sections.items():
            text += f'\n### {section or "Run"} ({task})\n\n'
            if about := known.get(section):
                text += f'{_sentence(about)}\n\n'
            where = config[section] if section else config
            prefix = f'{section}.' if section else ''
            rows = [
                (f'`{prefix}{key}`', _kind(where, key), _value(where[key]), known[prefix + key])
                for key in keys
            ]
            text += _table(('Name', 'Type', 'Default', 'Description'), rows)
    text += CONFIG_METHODS
    for name, values in method_defaults.METHODS.items():
        rows = [(f'`method.{key}`', type(v).__name__, _value(v)) for key, v in values.items()]
        text += f'\n### {name}\n\n' + _table(('Name', 'Type', 'Default'), rows)
    return text


def _place(name: str, order: Sequence[str]) -> int:
    """Returns the place of a key or section among all keys, as config.py orders them."""
    return next(i for i, key in enumerate(order) if key == name or key.startswith(f'{name}.'))


def _is_section(value: Any) -> bool:
    return isinstance(value, ConfigDict)


def _sentence(text: str) -> str:
    """Returns the comment of a section as sentences; files of the package are named in full."""
    text, _, file = text.rpartition('; ') if '.py' in text else (text, '', '')
    sentence = f'{text[0].upper()}{text[1:]}.' if text else ''
    return f'{sentence} See `simsiam_jax/{file}`.'.strip() if file else sentence


def _kind(section: ConfigDict, key: str) -> str:
    return 'dict' if _is_section(section[key]) else section.get_type(key).__name__


def _value(value: Any) -> str:
    if _is_section(value):
        value = value.to_dict()
    if isinstance(value, tuple):
        value = tuple(round(x, 4) if isinstance(x, float) else x for x in value)
    return f'`{value!r}`'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ''
    lines = [head, ['---'] * len(head), *rows]
    cells = [[cell.replace('|', r'\|').replace('*', r'\*') for cell in line] for line in lines]
    return ''.join(f'| {" | ".join(line)} |\n' for line in cells)


def _comments(source: str) -> dict[str, dict[str, str]]:
    """Returns function -> key -> comment, for lines `config.KEY = VALUE  # comment`.

    A line with only a comment continues the comment before it.
    """
    starts = {
        node.lineno: node.name
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef)
    }
    found: dict[str, dict[str, str]] = {name: {} for name in starts.values()}
    function, keys = '', list[str]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        row, column = token.start
        function = starts.get(row, function)
        if token.type != tokenize.COMMENT:
            continue
        text = token.string.lstrip('# ')
        if token.line[:column].strip():
            keys = re.findall(r'config\.([\w.]+) = ', token.line[:column])
            found.get(function, {}).update(dict.fromkeys(keys, text))
        else:
            for key in keys:
                found[function][key] += f' {text}'
    return found


def cli_page() -> str:
    """Returns the page of all commands with their flags."""
    text = CLI_HEAD
    modules: dict[str, list[str]] = {}
    for name, module in command.COMMANDS.items():
        modules.setdefault(module, []).append(name)
    rows = [
        (', '.join(f'`{name}`' for name in names), f'`python -m {module}`', _about(module))
        for module, names in modules.items()
    ]
    rows += [
        (f'`{name}`', '', f'Prints the folder of the installed `{name}`.')
        for name in command.FOLDERS
    ]
    text += _table(('Command', 'Module', 'What it does'), rows)
    text += CLI_FLAGS
    for module, names in modules.items():
        body = inspect.cleandoc(_load(module).__doc__ or '').partition('\n')[2].strip()
        text += f'\n## {" and ".join(names)}\n\n{_about(module)}\n\n'
        text += f'{_markdown(body)}\n\n' if body else ''
        text += _table(('Flag', 'Default', 'Description'), _flags(_load(module)))
    return text


def _load(module: str) -> ModuleType:
    found = importlib.import_module(module)
    return importlib.import_module(f'{module}.__main__') if hasattr(found, '__path__') else found


def _about(module: str) -> str:
    line = inspect.cleandoc(_load(module).__doc__ or '').partition('\n')[0]
    return line.rstrip(':.') + '.'


def _markdown(docstring: str) -> str:
    """Returns a docstring as Markdown, in which indented blocks are code without ::."""
    return re.sub(r'::$', ':', docstring, flags=re.MULTILINE)


def _flags(module: ModuleType) -> list[tuple[str, str, str]]:
    """Returns the flags that a program defines: name, default and help."""
    values = flags.FLAGS
    before = set(values)
    with mock.patch.object(command_line, 'start') as start:
        module.main()
    required, options = start.call_args.args[1:], start.call_args.kwargs
    rows = []
    if options.get('config'):
        rows = [('`--config`', 'required', 'FILE[:VARIANT]; `--config.KEY=VALUE` sets a key.')]
    for name in [name for name in values if name not in before]:
        default = 'required' if name in required else f'`{values[name].default!r}`'
        rows.append((f'`--{name}`', default, values[name].help))
        delattr(values, name)
    return rows


def module_pages() -> dict[str, str]:
    """Returns name -> page in reStructuredText, for each room of the package."""
    rooms: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob('*.py')):
        room, *rest = path.relative_to(PACKAGE).with_suffix('').parts
        names = ['simsiam_jax', room, *(part for part in rest if part != '__init__')]
        if room != '__init__':
            rooms.setdefault(room if rest else 'base', []).append('.'.join(names))
    return {
        room: f'{room}\n{"=" * len(room)}\n' + ''.join(map(_automodule, modules))
        for room, modules in rooms.items()
    }


def _automodule(module: str) -> str:
    """Returns the part of a module; names of the Python interface have their own page."""
    public = [name for name, part in PUBLIC.items() if module == f'simsiam_jax.{part}']
    exclude = f'   :exclude-members: {", ".join(public)}\n' if public else ''
    line = '-' * len(module)
    return f'\n{module}\n{line}\n\n.. automodule:: {module}\n   :members:\n{exclude}'


def main() -> None:
    (DOCS / 'reference' / 'config.md').write_text(config_page())
    (DOCS / 'reference' / 'cli.md').write_text(cli_page())


if __name__ == '__main__':
    main()
