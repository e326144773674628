"""The command `simsiam-jax`, or `python -m simsiam_jax`: runs a command of the package.

    simsiam-jax pretrain --config=quickstart --workdir=runs/quickstart

`simsiam-jax COMMAND --help` describes a command. `simsiam-jax configs` and `simsiam-jax launch`
print the folders of the installed configurations and launchers.
"""

import runpy
import sys

from simsiam_jax import errors, paths

COMMANDS = {
    'pretrain': 'simsiam_jax.main',
    'evaluate': 'simsiam_jax.main',
    'doctor': 'simsiam_jax.tools.doctor',
    'embed': 'simsiam_jax.tools.embed',
    'convert': 'simsiam_jax.tools.convert',
    'benchmark': 'simsiam_jax.tools.benchmark',
    'report': 'simsiam_jax.tools.report',
    'ledger': 'simsiam_jax.tools.ledger',
}
FOLDERS = ('configs', 'launch')


def main() -> None:
    command, *rest = sys.argv[1:] or ['--help']
    if command in COMMANDS:
        sys.argv = [f'simsiam-jax {command}', *rest]
        runpy.run_module(COMMANDS[command], run_name='__main__', alter_sys=True)
    elif command in FOLDERS:
        print(paths.installed(command))
    elif command in ('--help', '-h', 'help'):
        print(f'{__doc__}\ncommands: {", ".join((*COMMANDS, *FOLDERS))}')
    else:
        hint = errors.suggestion(command, (*COMMANDS, *FOLDERS))
        sys.exit(f'error: unknown command {command!r}; {hint}')


if __name__ == '__main__':
    main()
