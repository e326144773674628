"""Configurations of calls from Python: a name or file, images, and changed keys."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from simsiam_jax import command_line, config_files, config_keys, errors
from simsiam_jax.data import python_sources


@contextlib.contextmanager
def with_images(
    config: str | os.PathLike[str] | ConfigDict,
    images: Any,
    labels: Any,
    overrides: Mapping[str, Any],
) -> Iterator[ConfigDict]:
    """Yields the configuration of a pre-training; its images can be opened within this context.

    Args:
      config: Name or file as --config takes it, or a configuration, which is not changed.
      images: Source such as 'folder:DIR', or images (see python_sources.open_images); None uses
        those of the configuration.
      labels: Class of each image; None if there are none.
      overrides: Values by key.

    Raises:
      UserError: The configuration or the images cannot be used.
    """
    loaded = load(config)
    if loaded.task != 'pretrain':
        raise errors.UserError(
            f"config is of task {loaded.task!r}; expected 'pretrain'. Pass a configuration such as "
            'folder or imagenet'
        )
    apply(loaded, overrides)
    if images is None or isinstance(images, str):
        if labels is not None:
            raise errors.UserError('labels are given without images in Python. Give both')
        loaded.data.source = images or loaded.data.source
        yield loaded
        return
    with python_sources.provide(images=python_sources.open_images(images, labels)):
        loaded.data.source = f'{python_sources.KIND}:images'
        yield loaded


def load(config: str | os.PathLike[str] | ConfigDict) -> ConfigDict:
    """Returns a configuration that may be changed.

    Raises:
      UserError: There is no such configuration.
    """
    if isinstance(config, ConfigDict):
        return config.copy_and_resolve_references()
    return config_files.load(os.fspath(config))


def apply(config: ConfigDict, overrides: Mapping[str, Any]) -> None:
    """Changes keys, which may have names of earlier versions.

    Raises:
      UserError: A key is unknown, or a value has another type.
    """
    flag = '--config.'
    for given, value in overrides.items():
        if given.startswith(config_keys.FREE_SECTIONS):
            config_keys.set_argument(config, given, value)
            continue
        key = command_line.rename_override(f'{flag}{given}', config).removeprefix(flag)
        try:
            config.update_from_flattened_dict({key: value})
        except (TypeError, ValueError) as error:
            now = config_keys.flat(config)[key]
            raise errors.UserError(
                f'{given} is {value!r}; expected a value such as {now!r}'
            ) from error
