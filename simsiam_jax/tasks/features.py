"""Features of a frozen network: center crops of every image of a source, in order."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from simsiam_jax import errors, terminal
from simsiam_jax.data import device_cache, host, jax_augment
from simsiam_jax.data.sources import ArraySource
from simsiam_jax.methods.losses import l2_normalize
from simsiam_jax.tasks.inputs import ImageSet
from simsiam_jax.training import mesh as mesh_lib

# (variables, images [B, S, S, C], uint8 or in [0, 1]) -> features [B, D]
Encode = Callable[[Any, Array], Any]

_PIXELS = 32  # largest side of the images whose pixels are compared


class Features(NamedTuple):
    """Features of the readable images of a source, in order.

    Attributes:
      x: Features [N, D].
      labels: Classes [N]; -1 if the source has none.
      indices: Positions [N] of the images in the source.
    """

    x: Float[np.ndarray, 'N D']
    labels: Int[np.ndarray, 'N']
    indices: Int[np.ndarray, 'N']


class CropLoader:
    """Loads center crops of images in device batches.

    Args:
      mesh: Devices that share each batch.
      channels: Channels of the images.
      size: Side of the crops.
      resize: Shorter side of the images before the crop; 0 if they have the crop's size.
      batch_size: Images per batch, a multiple of the number of devices.

    Raises:
      UserError: The batch size does not divide over the devices.
    """

    def __init__(self, mesh: Mesh, *, channels: int, size: int, resize: int, batch_size: int):
        mesh_lib.check_batch_size('eval.batch_size', batch_size, mesh)
        self.mesh, self._channels = mesh, channels
        self.shape = size, size, channels  # of a crop
        self._crops: dict[str, Any] = {
            'batch_size': batch_size,
            'local': mesh_lib.process_slice(batch_size),
            'size': size,
            'resize': resize,
        }

    def batches(self, source: ImageSet) -> Iterator[Any]:
        """Yields device batches (images [B, S, S, C], labels [B], indices [B]), with progress.

        The last batch is filled up with images of index -1; unreadable images have it, too.
        """
        if isinstance(source, ArraySource):
            batches = device_cache.eval_batches(source, channels=self._channels, **self._crops)
        else:
            batches = host.eval_batches(source, **self._crops)
        with terminal.progress(total=len(source), unit=' images') as bar:
            for batch in mesh_lib.prefetch(batches, self.mesh):
                yield batch
                bar.update(self._crops['batch_size'])


def make_encode(module: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> Encode:
    """Returns a function that normalizes images and applies the network in evaluation mode.

    Keep the function: extract_features compiles it once for all calls.
    """
    return lambda variables, images: module.apply(
        variables, jax_augment.normalize(images, mean, std)
    )


def raw_pixels(_: Any, images: Array) -> Array:
    """Returns images [B, H, W, C] as features: an encoder without variables.

    Images above 32 pixels are reduced to 32, so that the features of many images fit into memory.
    """
    b, h, w, c = images.shape
    if max(h, w) > _PIXELS:
        shape = b, min(h, _PIXELS), min(w, _PIXELS), c
        images = jax.image.resize(images.astype(jnp.float32), shape, 'linear')
    return images.reshape(b, -1)


def extract_features(
    encode: Encode,
    variables: Any,
    source: ImageSet,
    loader: CropLoader,
    *,
    l2: bool = False,
    dtype: Any = np.float32,
    batches: int | None = None,
) -> Features:
    """Returns the features [N, D] of all readable images of a source, on the host.

    Args:
      encode: Function (variables, images [B, S, S, C]) -> features [B, D].
      variables: Variables of the network, on the devices of the loader.
      source: Images, of which N are readable.
      loader: Loader of the crops.
      l2: Whether features are l2-normalized.
      dtype: Type of the returned features.
      batches: Number of batches to evaluate; None evaluates all.

    Raises:
      UserError: None of the images can be read.
    """
    features: Features | None = None
    count = 0
    evaluated = features_of(encode, variables, source, loader, l2=l2)
    for on_devices, labels, indices in itertools.islice(evaluated, batches):
        x = np.asarray(on_devices)
        if features is None:  # filled in place, since all features may need much of the memory
            n = len(source)
            features = Features(
                np.empty((n, x.shape[1]), dtype), np.empty(n, np.int64), np.empty(n, np.int64)
            )
        readable = indices >= 0
        end = count + int(readable.sum())
        for array, values in zip(features, (x, labels, indices), strict=True):
            array[count:end] = values[readable]
        count = end
    if features is None or not count:
        bad = {} if isinstance(source, ArraySource) else source.bad
        first = ''.join(f' ({name}: {reason})' for name, reason in list(bad.items())[:1])
        raise errors.UserError(f'none of the images to evaluate can be read{first}')
    return Features(*(array[:count] for array in features))


def features_of(
    encode: Encode, variables: Any, source: ImageSet, loader: CropLoader, *, l2: bool = False
) -> Iterator[tuple[Array, Int[np.ndarray, 'B'], Int[np.ndarray, 'B']]]:
    """Yields features [B, D], on every device, labels and indices of all batches of a source.

    The arguments are those of extract_features. Images that cannot be read, and the padding of the
    last batch, have index -1.
    """
    replicated = NamedSharding(loader.mesh, P())
    run = jax.jit(encode_normalized if l2 else _encode, static_argnums=0, out_shardings=replicated)
    gather = jax.jit(_identity, out_shardings=replicated)
    for images, *where in loader.batches(source):
        x = run(encode, variables, images)
        yield x, *jax.device_get(gather(where))


def check_evaluation(
    encode: Encode, variables: Any, sources: Sequence[ImageSet], loader: CropLoader
) -> None:
    """Evaluates one batch of each source, so that a mistake appears before the training.

    Args:
      encode: Function (variables, images) -> features.
      variables: Variables of the network, on the devices of the loader.
      sources: Images.
      loader: Loader of the crops.

    Raises:
      UserError: A source cannot be evaluated.
    """
    for source in sources:
        extract_features(encode, variables, source, loader, l2=True, batches=1)


def extract_together(
    encoders: Mapping[str, tuple[Encode, Any]], source: ImageSet, loader: CropLoader
) -> dict[str, Features]:
    """Returns the features of each of several encoders; the images are read once for all.

    Args:
      encoders: Name -> function and variables of an encoder.
      source: Images.
      loader: Loader of the crops.

    Raises:
      UserError: None of the images can be read.
    """

    def encode(variables: dict[str, Any], images: Array) -> Array:
        features = [each(variables[name], images) for name, (each, _) in encoders.items()]
        return jnp.concatenate(features, axis=1)

    variables = {name: own for name, (_, own) in encoders.items()}
    replicated = mesh_lib.replicate(variables, loader.mesh)
    features = extract_features(encode, replicated, source, loader)
    sample = jax.ShapeDtypeStruct((1, *loader.shape), np.uint8)
    widths = [jax.eval_shape(each, own, sample).shape[1] for each, own in encoders.values()]
    parts = np.split(features.x, np.cumsum(widths)[:-1], axis=1)
    return {name: features._replace(x=x) for name, x in zip(encoders, parts, strict=True)}


def encode_normalized(encode: Encode, variables: Any, images: Array) -> Array:
    """Returns l2-normalized features."""
    return l2_normalize(encode(variables, images))


def _encode(encode: Encode, variables: Any, images: Array) -> Array:
    return encode(variables, images)


def _identity(x: Any) -> Any:
    return x
