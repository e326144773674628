"""What an encoder needs to read images: their source, and a loader of its crops."""

import jax

from simsiam_jax import config as config_lib
from simsiam_jax.checkpoints.encoder import LoadedEncoder
from simsiam_jax.tasks import inputs
from simsiam_jax.tasks.features import CropLoader, Encode, make_encode
from simsiam_jax.training import mesh as mesh_lib


def open_images(
    encoder: LoadedEncoder, images: str, max_bad_fraction: float = 0.01
) -> inputs.ImageSet:
    """Opens images of the encoder's channels.

    Args:
      encoder: Encoder.
      images: Source of the images, as config.data.source names it.
      max_bad_fraction: Largest share of the images that may be unreadable.

    Raises:
      UserError: The images cannot be used.
    """
    trained = encoder.config['data']
    data = config_lib.knn().data
    data.backend = 'host'  # this backend keeps the files' names
    data.max_bad_fraction = max_bad_fraction
    for key in ('channels', 'range', 'orientation', 'background', 'tfds_data_dir'):
        data[key] = trained[key]
    data.include = data.exclude = ''  # of the training images
    return inputs.open_source(images, data)


def make_loader(
    encoder: LoadedEncoder, batch_size: int, devices: list[jax.Device] | None = None
) -> CropLoader:
    """Returns a loader of center crops of the encoder's size.

    Args:
      encoder: Encoder.
      batch_size: Images per batch, rounded up so that the devices have equal shares.
      devices: Devices to use; None uses all.
    """
    mesh = mesh_lib.make_mesh(devices)
    return CropLoader(
        mesh,
        channels=encoder.config['data']['channels'],
        size=encoder.config['augment']['size'],
        resize=encoder.config['eval']['resize'],
        batch_size=-(-batch_size // mesh.size) * mesh.size,
    )


def encode_of(encoder: LoadedEncoder) -> Encode:
    """Returns the encoder with its normalization, for extract_features."""
    mean, std = (tuple(encoder.config['augment'][key]) for key in ('mean', 'std'))
    return make_encode(encoder.module, mean, std)
