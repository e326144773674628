"""Features of images, and their nearest neighbors as a page shows them."""

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np

from simsiam_jax import config as config_lib
from simsiam_jax import errors
from simsiam_jax.checkpoints import encoder as encoder_lib
from simsiam_jax.data import subset
from simsiam_jax.data.sources import ArraySource
from simsiam_jax.methods.losses import l2_normalize
from simsiam_jax.pages import page
from simsiam_jax.tasks import inputs, knn
from simsiam_jax.tasks.features import CropLoader, Features, extract_features, make_encode
from simsiam_jax.training import mesh as mesh_lib


@dataclasses.dataclass(frozen=True)
class Embedded:
    """Images and what a network makes of them.

    Attributes:
      names: of the images that features holds: a path, or what else tells one from the others.
    """

    source: inputs.ImageSet
    features: Features
    names: list[str]


def embed(checkpoint: str, images: str, batch_size: int, most: int | None = None) -> Embedded:
    """Images with their features in evaluation mode; bad images are left out.

    Args:
      most: of the images so many, spread evenly; None: all.

    Raises:
      UserError: the checkpoint or the images cannot be used.
    """
    encoder = encoder_lib.open_encoder(checkpoint)
    trained = encoder.config
    data = config_lib.knn().data
    data.backend = 'host'  # files keep their names
    data.channels = trained['data']['channels']
    data.tfds_data_dir = trained['data']['tfds_data_dir']
    source = inputs.open_source(images, data)
    kept = np.linspace(0, len(source) - 1, min(most or len(source), len(source))).astype(int)
    if len(kept) < len(source):
        source = subset.take(source, kept)
    mesh = mesh_lib.make_mesh()
    loader = CropLoader(
        mesh,
        channels=data.channels,
        size=trained['augment']['size'],
        resize=trained['eval']['resize'],
        batch_size=-(-batch_size // mesh.size) * mesh.size,
    )
    mean, std = (tuple(trained['augment'][key]) for key in ('mean', 'std'))
    encode = make_encode(encoder.module, mean, std)
    variables = mesh_lib.replicate(encoder.variables, mesh)
    features = extract_features(encode, variables, source, loader)
    if isinstance(source, ArraySource):
        names = [f'{images}[{kept[i]}]' for i in features.indices]
    else:
        names = [source.source.name(int(i)) for i in features.indices]
    return Embedded(source, features, names)


def neighbors(features: Features, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(places, cosine similarities) [N, k] of every image's nearest others."""
    if not 0 < k < len(features.x):
        raise errors.UserError(
            f'--neighbors is {k}; expected from 1 to {len(features.x) - 1}, the other images'
        )
    x = np.asarray(l2_normalize(jnp.asarray(features.x)))
    similarity, places = knn.nearest(x, x, mesh_lib.make_mesh(), k=k + 1)
    # Among exact copies an image need not be its own nearest: it is left out where it stands.
    own = places == np.arange(len(x))[:, None]
    own[~own.any(1), -1] = True
    shape = (len(x), k)
    return places[~own].reshape(shape), similarity[~own].reshape(shape)


def draw(embedded: Embedded, places: np.ndarray, similarities: np.ndarray, *, queries: int) -> str:
    """Rows of images, spread evenly, each with its nearest as neighbors() gives them."""
    source, features = embedded.source, embedded.features

    def show(place: int, similarity: float | None = None) -> str:
        index = int(features.indices[place])
        if isinstance(source, ArraySource):
            image = source.images[index]
        else:
            image, _ = source.example(index)
        caption = [pathlib.PurePath(embedded.names[place]).name]
        if source.classes:
            caption.append(source.classes[features.labels[place]])
        if similarity is not None:
            caption.append(f'{similarity:.3f}')
        return page.figure(page.picture(image), caption, query=similarity is None)

    count = len(features.x)
    chosen = np.unique(np.linspace(0, count - 1, min(queries, count)).astype(int))
    return ''.join(page.row([show(i), *map(show, places[i], similarities[i])]) for i in chosen)
