"""Words after the colon of --config=FILE.py:WORD,WORD, the same for all files of pre-training."""

import dataclasses
import re
from collections.abc import Sequence

from ml_collections import ConfigDict

from simsiam_jax import errors, method_defaults

METHODS = ('simsiam', *method_defaults.METHODS)


@dataclasses.dataclass(frozen=True)
class Variant:
    """What the words select.

    Attributes:
      method: Name of the method.
      epochs: Number of epochs; 0 keeps the file's.
      source: Source of images, such as folder:DIR or npz:FILE; '' keeps the file's.
    """

    method: str = 'simsiam'
    epochs: int = 0
    source: str = ''


def apply(config: ConfigDict, text: str, file: str) -> None:
    """Changes a complete configuration by its words.

    Args:
      config: Configuration, changed in place.
      text: The words; '' changes nothing.
      file: Name of the configuration, for the message.

    Raises:
      UserError: A word is unknown, or returns to simsiam, whose settings the configuration lacks.
    """
    variant = parse(text, file)
    if 'simsiam' in text.split(',') and config.method.name != 'simsiam':
        raise errors.UserError(
            f"{file} has the settings of {config.method.name}; word 'simsiam' needs a file for it"
        )
    config.epochs = variant.epochs or config.epochs
    config.data.source = variant.source or config.data.source
    method_defaults.set_method(config, variant.method)


def parse(text: str, file: str, others: Sequence[str] = ()) -> Variant:
    """Returns what words select, separated by commas: a method, 200ep, folder:DIR, npz:FILE.

    Args:
      text: The words; '' selects nothing.
      file: Name of the configuration, for the message.
      others: Words that the configuration handles itself, for the message.

    Raises:
      UserError: A word is unknown, or the number of epochs is 0.
    """
    variant = Variant()
    for word in filter(None, text.split(',')):
        if word in METHODS:
            variant = dataclasses.replace(variant, method=word)
        elif (match := re.fullmatch(r'(\d+)ep', word)) and int(match[1]):
            variant = dataclasses.replace(variant, epochs=int(match[1]))
        elif re.fullmatch('(folder|files|zip|tar|parquet|npz):.+', word):
            variant = dataclasses.replace(variant, source=word)
        else:
            raise errors.UserError(
                f'{file} has no variant {word!r}; known: 200ep (any number), folder:DIR, npz:FILE, '
                f'{", ".join((*METHODS, *others))}'
            )
    return variant
