"""A trained encoder that takes images of any size."""

import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Num

from simsiam_jax import errors, paths
from simsiam_jax.checkpoints import encoder as encoder_lib
from simsiam_jax.checkpoints.weights import Weights
from simsiam_jax.data import jax_augment, python_sources
from simsiam_jax.data.sources import ArraySource
from simsiam_jax.models import backbones
from simsiam_jax.models.resnet import ResNet
from simsiam_jax.models.trainable import TrainableBackbone
from simsiam_jax.pages import embedding, maps
from simsiam_jax.tasks import encoding
from simsiam_jax.tasks.features import CropLoader, Encode, extract_features
from simsiam_jax.tasks.inputs import ImageSet
from simsiam_jax.tools.convert import conversion

Devices = Sequence[jax.Device] | None


class Neighbors(NamedTuple):
    """The nearest other images of each image, the nearest first.

    Attributes:
      positions: Their positions [N, K].
      similarities: Cosines [N, K] of the features.
    """

    positions: Int[np.ndarray, 'N K']
    similarities: Float[np.ndarray, 'N K']


class Encoder(encoder_lib.LoadedEncoder):
    """A trained backbone that prepares images as its training did.

    ::

        encoder = simsiam_jax.Encoder.load('runs/mine')
        features = encoder(images)  # [N, D] float32

    Images are what pretrain() takes. Their center is cropped, after a resize, and normalized.
    """

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        step: int | None = None,
        *,
        backbone: Any = None,
    ) -> 'Encoder':
        """Loads the encoder of a run or of a weight file.

        Args:
          path: Workdir of a run, or a file as load_encoder() takes it.
          step: Step of the checkpoint; None loads the latest.
          backbone: Network that was given to pretrain() as an object; None for all others.

        Raises:
          UserError: There is no such checkpoint, or the file cannot be used.
        """
        return cls(**vars(encoder_lib.open_encoder(path, step, backbone=backbone)))

    @property
    def size(self) -> int:
        """Side of the images that the backbone gets, pixels."""
        return self.config['augment']['size']

    @property
    def resize(self) -> int:
        """Shorter side of the images before the center crop, pixels; 0: they must have the size."""
        return self.config['eval']['resize']

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean by channel, of values in [0, 1]."""
        return tuple(self.config['augment']['mean'])

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation by channel, of values in [0, 1]."""
        return tuple(self.config['augment']['std'])

    @property
    def channels(self) -> int:
        """Number of channels of the images."""
        return self.config['data']['channels']

    @property
    def features(self) -> int:
        """Width D of the features."""
        return self.module.features

    def normalize(self, images: Num[Array | np.ndarray, 'B H W C']) -> Float[Array, 'B H W C']:
        """Returns uint8 images, or images in [0, 1], as `module` takes them."""
        return jax_augment.normalize(jax.numpy.asarray(images), self.mean, self.std)

    def __call__(
        self, images: Any, *, batch_size: int = 256, devices: Devices = None
    ) -> Float[np.ndarray, 'N D']:
        """Returns the features of images.

        Args:
          images: Images of any size, see pretrain().
          batch_size: Most images in a batch, over all devices.
          devices: Devices to use; None uses all.

        Raises:
          UserError: The images cannot be used.
        """
        source, loader, variables = self._prepare(images, batch_size, devices)
        features = extract_features(self._encode, variables, source, loader)
        _check_all(source, features.indices)
        return features.x

    def feature_maps(
        self, images: Any, *, batch_size: int = 256, devices: Devices = None
    ) -> dict[str, Float[np.ndarray, 'N H W C']]:
        """Returns the output of each stage, 'layer1' and so on; arguments as for the features.

        Raises:
          UserError: The network is not a ResNet, or the images cannot be used.
        """
        if not isinstance(self.module, ResNet):
            raise errors.UserError(
                f'feature_maps needs a ResNet; the network is {self.config["model"]["name"]}. Use '
                'encoder.module with capture_intermediates'
            )
        source, loader, variables = self._prepare(images, batch_size, devices)
        parts, indices = [], []
        for crops, _, index in loader.batches(source):
            maps, index = jax.device_get((self._maps(variables, crops), index))
            parts.append({name: x[index >= 0] for name, x in maps.items()})
            indices.append(index[index >= 0])
        _check_all(source, np.concatenate(indices))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def similar(self, images: Any, k: int = 8, *, batch_size: int = 256) -> Neighbors:
        """Returns the k nearest other images of each image, by cosine similarity.

        Args:
          images: Images of any size, see pretrain().
          k: Number of neighbors.
          batch_size: Most images in a batch, over all devices.

        Raises:
          UserError: The images cannot be used, or there are not more than k.
        """
        return Neighbors(*embedding.neighbors(self(images, batch_size=batch_size), k))

    def write_page(
        self,
        images: Any,
        path: str | os.PathLike[str],
        *,
        map: str = 'auto',
        max_points: int = 0,
        batch_size: int = 256,
    ) -> None:
        """Writes a page with a map of images that shows the neighbors of the selected image.

        The file needs no network.

        Args:
          images: Images of any size, see pretrain().
          path: HTML file to write.
          map: 'umap' (needs umap-learn), 'pca', 'tsne', or 'auto': umap if installed, else pca.
          max_points: Maximum number of images in the map; 0: 50,000, and 5,000 for tsne.
          batch_size: Most images in a batch, over all devices.

        Raises:
          UserError: The images cannot be used, or the map cannot be computed.
        """
        maps.choose(map)
        source, loader, variables = self._prepare(images, batch_size, None)
        features = extract_features(self._encode, variables, source, loader)
        _check_all(source, features.indices)
        embedded = embedding.Embedding(source, features, embedding.names_of(source, features))
        title = f'Images by {self.origin}'
        page = embedding.render_page(
            embedded, None, title=title, map_name=map, max_points=max_points
        )
        pathlib.Path(paths.expand(path)).write_text(page)

    def save(self, path: str | os.PathLike[str], format: str) -> str:
        """Writes the backbone for other programs; returns what was written and compared.

        Args:
          path: File or folder to write.
          format: Format of tools.convert, such as 'torchvision', 'timm', 'flax' or 'jax_export'.

        Raises:
          UserError: The format cannot represent the backbone, or the file cannot be written.
        """
        part = jax.tree.map(np.asarray, self.variables)
        weights = Weights(
            self.origin,
            {'backbone': part['params']},
            {'backbone': part['batch_stats']},
            self.config,
            assumed=self.assumed,
        )
        given = self.config['model']['name'].startswith(f'{backbones.OBJECT}:')
        network = self.module.build(None) if given else None
        with backbones.provide(network):
            return conversion.write(weights, os.fspath(path), format)

    def to_nnx(self) -> TrainableBackbone:
        """Returns the backbone as a trainable Flax NNX module; it takes normalized images."""
        return TrainableBackbone(self.module, self.variables)

    @functools.cached_property
    def _encode(self) -> Encode:
        return encoding.encode_of(self)

    @functools.cached_property
    def _maps(self) -> Callable[[Any, Array], dict[str, Array]]:
        assert isinstance(self.module, ResNet)
        names = {
            f'layer{i}_{blocks - 1}': f'layer{i}' for i, blocks in enumerate(self.module.stages, 1)
        }

        @jax.jit
        def maps(variables: Any, images: Array) -> dict[str, Array]:
            _, captured = self.module.apply(
                variables,
                self.normalize(images),
                capture_intermediates=lambda module, _: module.name in names,
                mutable=['intermediates'],
            )
            stages = captured['intermediates']
            return {
                short: stages[name]['__call__'][0].astype(np.float32)
                for name, short in names.items()
            }

        return maps

    def _prepare(
        self, images: Any, batch_size: int, devices: Devices
    ) -> tuple[ImageSet, CropLoader, Any]:
        """Returns the images, a loader of their crops, and the variables on the devices."""
        spec = images if isinstance(images, str) else f'{python_sources.KIND}:images'
        given = {} if spec is images else {'images': python_sources.open_images(images)}
        with python_sources.provide(**given):
            source = encoding.open_images(self, spec, max_bad_fraction=1.0)  # see _check_all
        # Powers of two: programs are compiled for few sizes of small batches.
        batch_size = min(batch_size, 1 << (len(source) - 1).bit_length())
        loader = encoding.make_loader(self, batch_size, list(devices) if devices else None)
        variables = jax.device_put(self.variables, NamedSharding(loader.mesh, P()))
        return source, loader, variables


def _check_all(source: ImageSet, indices: Int[np.ndarray, 'n']) -> None:
    """Raises UserError unless all images were read: features without an image have no place."""
    if len(indices) == len(source) or isinstance(source, ArraySource):
        return
    name, reason = next(iter(source.bad.items()))
    raise errors.UserError(
        f'{len(source) - len(indices)} of {len(source)} images cannot be read '
        f'(first: {name}: {reason}). Fix or remove them'
    )
