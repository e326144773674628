"""Prints findings and recommendations: grouped in a terminal, a line each in a file or pipe."""

import sys
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from simsiam_jax import config_keys, terminal
from simsiam_jax.terminal import say
from simsiam_jax.tools.doctor.context import SEVERITIES, Finding
from simsiam_jax.tools.doctor.recommend import Advice

# Severity -> heading of its findings in a terminal, mark of each and its style.
_GROUPS = {
    'error': ('The run would stop', 'x', 'bold red'),
    'warning': ('Warnings', '!', 'bold yellow'),
    'ok': ('Checked', '+', 'green'),
}


def print_findings(findings: Sequence[Finding]) -> None:
    """Prints all findings in process 0, and the errors in the others."""
    if jax.process_index() == 0 and terminal.is_terminal(sys.stdout):
        _print_groups(findings)
        return
    for finding in findings:
        if jax.process_index() == 0:
            print(finding, flush=True)
        elif finding.severity == 'error':
            print(f'process {jax.process_index()}: {finding}', flush=True)


def _print_groups(findings: Sequence[Finding]) -> None:
    """Prints a heading for each severity, and its findings indented below."""
    from rich.table import Table
    from rich.text import Text

    console = terminal.console(sys.stdout)
    present = {finding.severity for finding in findings}
    for number, severity in enumerate(s for s in SEVERITIES if s in present):
        heading, mark, style = _GROUPS[severity]
        group = [finding.text for finding in findings if finding.severity == severity]
        if number:
            console.print()
        console.print(Text(f'{heading} ({len(group)})', style))
        table = Table.grid(padding=(0, 1))
        for text in group:
            table.add_row(Text(mark, style), Text(text))
        console.print(table)


def print_advice(advice: Sequence[Advice]) -> None:
    """Prints the keys to change with their reasons, then all of them in a line to copy."""
    if not advice:
        return
    say('\nRecommended for these images and this machine:')
    overrides = [f'--config.{a.key}={_shell(a.value)}' for a in advice]
    width = min(max(map(len, overrides)), 40)
    previous = ''
    for override, a in zip(overrides, advice, strict=True):
        say(f'  {override:{width}}  # {a.reason}' if a.reason != previous else f'  {override}')
        previous = a.reason
    say('\n' + ' '.join(overrides))


def print_kept(other: Sequence[Advice], config: ConfigDict) -> None:
    """Prints keys that the user has set, with their values and what would be recommended."""
    if other:
        say('\nGiven on the command line, and kept:')
    for a in other:
        value = config_keys.flat(config).get(a.key)
        reason = f' ({a.reason})' if a.reason else ''
        say(f'  --config.{a.key}={_shell(value)}  # recommended: {_shell(a.value)}{reason}')


def _shell(value: Any) -> str:
    """Returns a value as config_flags reads it from a shell."""
    return ','.join(map(str, value)) if isinstance(value, tuple) else str(value)
