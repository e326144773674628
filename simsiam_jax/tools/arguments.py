"""The command line of the tools."""

import sys
from collections.abc import Callable

from absl import flags


def parser(*required: str, others: bool = False) -> Callable[[list[str]], list[str]]:
    """For app.run: what is missing or not known ends the program with one line.

    Args:
      others: whether there may be arguments without --.
    """

    def parse(argv: list[str]) -> list[str]:
        flags.mark_flags_as_required(required)
        try:
            rest = flags.FLAGS(argv)
        except flags.Error as error:
            sys.exit(f'error: {" ".join(str(error).split())}')
        if len(rest) > 1 and not others:
            sys.exit(f'error: unexpected argument {rest[1]!r}; expected --NAME=VALUE')
        return rest

    return parse
