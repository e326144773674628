"""Whether a configuration can resume a run: what may change between two starts of it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

# Keys and sections that may change between two starts of a run: they change neither the images that
# it trains on nor its mathematics.
FREE = (
    *('dry_run', 'guard', 'eval', 'checkpoint', 'log', 'profile', 'debug_nans', 'deterministic'),
    *('merge_views', 'model.remat', 'model.kernels'),
    *('data.accept_changed', 'data.max_bad_fraction', 'data.retry_seconds'),
    *('data.on_device', 'data.canvas', 'data.backend', 'data.resident_limit'),
)

# Keys that change the rounding of views.
_ROUNDING = ('data.on_device', 'data.canvas', 'data.backend', 'data.resident_limit')

# Keys of the location of the images: they may change if the images do not.
PLACE = ('data.source', 'data.tfds_data_dir', 'data.include', 'data.exclude')


@dataclasses.dataclass(frozen=True)
class RunIdentity:
    """What identifies a run.

    Attributes:
      config: Complete configuration, with JSON's types.
      images: Number and digest of the training images; {} if unknown.
    """

    config: dict[str, Any]
    images: dict[str, Any]


def refusal(
    folder: epath.Path,
    given: RunIdentity,
    stored: RunIdentity,
    *,
    free: Sequence[str] = FREE,
    place: Sequence[str] = PLACE,
    names: str = '',
) -> str:
    """Returns why `given` cannot resume the run in the folder; '' if it can.

    Args:
      folder: Workdir of the stored run.
      given: Run to start.
      stored: Run in the workdir.
      free: Keys and sections that may differ.
      place: Keys that may differ if the images do not.
      names: Text with the names of images that differ, if known.
    """
    names = f' ({names})' if names else ''
    same_images = bool(given.images) and given.images == stored.images
    allowed = (*free, *(place if same_images else ()))
    changed = changed_keys(given.config, stored.config, allowed)
    if not changed:
        if given.config['data'].get('accept_changed') or not images_changed(given, stored):
            return ''
        return _changed_images(folder, given, stored, names)
    text = f'{folder} contains a run with a different configuration: {", ".join(changed)}'
    if changed_keys(given.config, stored.config, within=place) and not same_images:
        text += (
            f'. Its images differ{names}' if stored.images else '. It has no digest of its images'
        )
    if given.config.get('epochs') != stored.config.get('epochs'):
        text += f'. To train longer, use a new --workdir with --config.init_from={folder}'
    return f'{text}. Revert these changes or use a new --workdir'


def notes(given: RunIdentity, stored: RunIdentity, *, place: Sequence[str] = PLACE) -> list[str]:
    """Returns a message for each kind of allowed change that the user should know about.

    Args:
      given: Run to start.
      stored: Run in the workdir.
      place: Keys that may differ if the images do not.
    """
    lines = []
    if images_changed(given, stored):
        lines.append(
            f'the images have changed ({stored.images["count"]:,} -> {given.images["count"]:,}): '
            'their order and the schedule are others from here on'
        )
    elif moved := changed_keys(given.config, stored.config, within=place):
        count = given.images['count']
        lines.append(f'{", ".join(moved)}: the {count:,} images have the same names, resuming')
    if rounding := changed_keys(given.config, stored.config, within=_ROUNDING):
        lines.append(
            f'{", ".join(rounding)}: views are now rounded differently, so the run is no longer '
            'bit-exact'
        )
    return lines


def images_changed(given: RunIdentity, stored: RunIdentity) -> bool:
    """Returns whether both digests are known and differ."""
    return bool(given.images and stored.images) and given.images != stored.images


def _changed_images(folder: epath.Path, given: RunIdentity, stored: RunIdentity, names: str) -> str:
    before, now = stored.images['count'], given.images['count']
    what = f'{before:,} images, now there are {now:,}'
    if before == now:
        what = f'{before:,} images, of which some have other names now'
    return (
        f'{folder} was trained on {what}{names}: their order, the epochs and the schedule would '
        'change. Restore the images (--config.data.exclude leaves new ones out), use a new '
        '--workdir, or continue with --config.data.accept_changed=True'
    )


def changed_keys(
    given: Mapping[str, Any],
    stored: Mapping[str, Any],
    free: Sequence[str] = (),
    *,
    within: Sequence[str] = (),
    prefix: str = '',
) -> list[str]:
    """Returns the keys that differ, with their old and new values.

    If the `name` of a section differs, such as the method's, only the name is returned: its other
    keys cannot be compared.

    Args:
      given: Configuration of this start.
      stored: Configuration of the checkpoint.
      free: Keys and sections to leave out.
      within: The only keys to compare; () compares all.
      prefix: Path of the section.
    """
    differences = []
    keys = sorted(set(given) | set(stored))
    if given.get('name') != stored.get('name'):
        keys = ['name']
    for key in keys:
        new, old = given.get(key), stored.get(key)
        if new == old or prefix + key in free:
            continue
        if isinstance(new, Mapping) and isinstance(old, Mapping):
            differences += changed_keys(new, old, free, within=within, prefix=f'{prefix}{key}.')
        elif not within or prefix + key in within:
            differences.append(f'{prefix}{key} ({old!r} -> {new!r})')
    return differences
