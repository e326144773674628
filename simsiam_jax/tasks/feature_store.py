"""Features of many images in files: little memory, and a stopped computation resumes."""

import datetime
import hashlib
import json
import os
import pathlib
import shutil
import sys
import time
from typing import Any

import jax
import numpy as np

from simsiam_jax import errors, terminal
from simsiam_jax.data import subset
from simsiam_jax.tasks.features import CropLoader, Encode, Features, features_of
from simsiam_jax.tasks.inputs import ImageSet

_SAVE_SECONDS = 10  # between two states that a stopped computation resumes from
_SAY_SECONDS = 60  # between two lines of progress in a file or pipe


class FeatureStore:
    """A folder with the features that are computed so far.

    Args:
      folder: Folder, created with the first features.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = pathlib.Path(folder)

    def extract(
        self, encode: Encode, variables: Any, source: ImageSet, loader: CropLoader
    ) -> Features:
        """Returns the features of all readable images, as memory maps of the folder's files.

        It continues what an earlier call with the same images and encoder has computed.

        Args:
          encode: Function (variables, images [B, S, S, C]) -> features [B, D].
          variables: Variables of the network, on the devices of the loader.
          source: Images, of which N are readable.
          loader: Loader of the crops.

        Raises:
          UserError: None of the images can be read, or the disk is full.
        """
        key = _key(variables, source, loader)
        state = self._state(key)
        seen, count = state['seen'], state['count']
        if seen:
            terminal.say(f'resuming at image {seen:,} of {len(source):,}')
        files = self._open() if seen else None
        if files is not None and seen == len(source):
            return Features(*(file[:count] for file in files))
        rest = subset.take(source, np.arange(seen, len(source))) if seen else source
        first, began = seen, time.monotonic()
        saved = said = began
        for on_devices, labels, indices in features_of(encode, variables, rest, loader):
            x = np.asarray(on_devices)
            if files is None:
                files = self._create(len(source), x.shape[1])
            readable = indices >= 0
            end = count + int(readable.sum())
            values = x[readable], labels[readable], indices[readable] + first
            for file, value in zip(files, values, strict=True):
                file[count:end] = value
            count, seen = end, min(seen + len(x), len(source))
            now = time.monotonic()
            if now - saved > _SAVE_SECONDS or seen == len(source):
                self._save(files, {'key': key, 'seen': seen, 'count': count})
                files, saved = self._open(), now  # frees the memory of written pages
            if now - said > _SAY_SECONDS and not terminal.is_terminal(sys.stdout):
                left = (now - began) / (seen - first) * (len(source) - seen)
                left_text = datetime.timedelta(seconds=round(left))
                terminal.say(f'{seen:,} of {len(source):,} images, {left_text} left')
                said = now
        if files is None or not count:
            raise errors.UserError('none of the images to evaluate can be read')
        return Features(*(file[:count] for file in files))

    def remove(self) -> None:
        """Removes the folder; call it when the features are written elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _paths(self) -> list[pathlib.Path]:
        return [self.folder / f'{name}.npy' for name in Features._fields]

    def _state(self, key: str) -> dict[str, Any]:
        """Returns how far an earlier call with this key came; all else is computed again."""
        path = self.folder / 'progress'
        if path.exists() and all(file.exists() for file in self._paths()):
            state = json.loads(path.read_text())
            if state['key'] == key:
                return state
        path.unlink(missing_ok=True)
        return {'seen': 0, 'count': 0}

    def _create(self, count: int, width: int) -> list[np.memmap]:
        shapes = (count, width), (count,), (count,)
        kinds = np.float32, np.int64, np.int64
        try:
            self.folder.mkdir(exist_ok=True)
            return [
                np.lib.format.open_memmap(path, mode='w+', dtype=kind, shape=shape)
                for path, shape, kind in zip(self._paths(), shapes, kinds, strict=True)
            ]
        except OSError as error:
            size = count * (4 * width + 16) / 2**30
            raise errors.UserError(
                f'{self.folder} cannot be written: {error.strerror}; the features need '
                f'{size:.1f} GiB. Free disk space, or choose another output'
            ) from error

    def _open(self) -> list[np.memmap]:
        return [np.load(path, mmap_mode='r+') for path in self._paths()]

    def _save(self, files: list[np.memmap], state: dict[str, Any]) -> None:
        for file in files:
            file.flush()
        written = self.folder / 'progress.new'
        written.write_text(json.dumps(state))
        os.replace(written, self.folder / 'progress')


def _key(variables: Any, source: ImageSet, loader: CropLoader) -> str:
    """Returns a digest of the images and the encoder."""
    digest = hashlib.sha256(f'{source.identity} {len(source)} {loader.shape}'.encode())
    for leaf in jax.tree.leaves(variables):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
