"""Features of a frozen network: center crops of every image of a source, in order."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from simsiam_jax import errors, terminal
from simsiam_jax.data import device_cache, host
from simsiam_jax.data.sources import ArraySource
from simsiam_jax.tasks.inputs import ImageSet
from simsiam_jax.training import mesh as mesh_lib

# (variables, images [B, S, S, C], uint8 or in [0, 1]) -> features [B, D]
Encode = Callable[[Any, Array], Any]


class Features(NamedTuple):
    """What was extracted; bad images are left out.

    Attributes:
      x: the features.
      labels: -1 where there is none.
      indices: of the images in their source.
    """

    x: Float[np.ndarray, 'N D']
    labels: Int[np.ndarray, 'N']
    indices: Int[np.ndarray, 'N']


class Extractor:
    """Brings center crops before a network.

    Args:
      mesh: its devices share every batch.
      channels: of the images.
      size: side of the crops.
      resize: the images' shorter side before the crop; 0: they have the crop's size.
      batch_size: images at a time, a multiple of the devices.
    """

    def __init__(self, mesh: Mesh, *, channels: int, size: int, resize: int, batch_size: int):
        mesh_lib.check_batch_size('eval.batch_size', batch_size, mesh)
        self._mesh, self._channels = mesh, channels
        self._crops: dict[str, Any] = {
            'batch_size': batch_size,
            'local': mesh_lib.process_slice(batch_size),
            'size': size,
            'resize': resize,
        }
        self._replicated = NamedSharding(mesh, P())
        self._gather = jax.jit(lambda x: x, out_shardings=self._replicated)

    def batches(self, source: ImageSet) -> Any:
        """Device batches (images, labels, indices), with progress; fillers have index -1."""
        if isinstance(source, ArraySource):
            batches = device_cache.eval_batches(source, channels=self._channels, **self._crops)
        else:
            batches = host.eval_batches(source, **self._crops)
        with terminal.progress(total=len(source), unit=' images') as bar:
            for batch in mesh_lib.prefetch(batches, self._mesh):
                yield batch
                bar.update(self._crops['batch_size'])

    def jit(self, encode: Encode) -> Encode:
        """The network, compiled for __call__."""
        return jax.jit(encode, out_shardings=self._replicated)

    def __call__(
        self, encode: Encode, variables: Any, source: ImageSet, dtype: Any = np.float32
    ) -> Features:
        """The features of all good images, on the host; `encode` comes from jit().

        Raises:
          UserError: none of the images can be read.
        """
        found: Features | None = None
        count = 0
        for images, labels, indices in self.batches(source):
            x = np.asarray(encode(variables, images))
            labels, indices = jax.device_get(self._gather((labels, indices)))
            if found is None:  # filled in place: a bank may be half of the memory
                n = len(source)
                found = Features(
                    np.empty((n, x.shape[1]), dtype), np.empty(n, np.int64), np.empty(n, np.int64)
                )
            good = indices >= 0
            end = count + int(good.sum())
            for array, values in zip(found, (x, labels, indices), strict=True):
                array[count:end] = values[good]
            count = end
        if found is None or not count:
            raise errors.UserError('none of the images to evaluate can be read')
        return Features(*(array[:count] for array in found))
