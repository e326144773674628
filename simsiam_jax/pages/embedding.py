"""Features of images, and the nearest neighbors of images as HTML."""

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from simsiam_jax import errors
from simsiam_jax.checkpoints import encoder as encoder_lib
from simsiam_jax.data import subset
from simsiam_jax.data.sources import ArraySource
from simsiam_jax.methods.losses import l2_normalize
from simsiam_jax.pages import page
from simsiam_jax.tasks import encoding, inputs, nearest
from simsiam_jax.tasks.features import Features, extract_features
from simsiam_jax.training import mesh as mesh_lib

MAPS = ('pca', 'tsne')


@dataclasses.dataclass(frozen=True)
class Embedding:
    """Images with their features.

    Attributes:
      source: All images.
      features: Features of the readable images.
      names: Path, or another unique name, of each image in `features`.
    """

    source: inputs.ImageSet
    features: Features
    names: list[str]


def embed(
    checkpoint: str, images: str, batch_size: int, max_images: int | None = None
) -> Embedding:
    """Computes features in evaluation mode; skips unreadable images.

    Args:
      checkpoint: Workdir or weight file of the encoder.
      images: Source of the images, as config.data.source names it.
      batch_size: Images per batch, at least one per device.
      max_images: Number of images, evenly spaced in the source; None embeds all.

    Raises:
      UserError: The checkpoint or the images cannot be used.
    """
    encoder = encoder_lib.open_encoder(checkpoint)
    source = encoding.open_images(encoder, images)
    kept = np.linspace(0, len(source) - 1, min(max_images or len(source), len(source))).astype(int)
    if len(kept) < len(source):
        source = subset.take(source, kept)
    loader = encoding.make_loader(encoder, batch_size)
    variables = mesh_lib.replicate(encoder.variables, loader.mesh)
    features = extract_features(encoding.encode_of(encoder), variables, source, loader)
    if isinstance(source, ArraySource):
        names = [f'{images}[{kept[i]}]' for i in features.indices]
    else:
        names = [source.source.name(int(i)) for i in features.indices]
    return Embedding(source, features, names)


def neighbors(x: Float[np.ndarray, 'N D'], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns positions and cosine similarities [N, k] of every image's nearest neighbors.

    An image is not its own neighbor.

    Args:
      x: Features.
      k: Number of neighbors.

    Raises:
      UserError: k is not from 1 to N - 1.
    """
    if not 0 < k < len(x):
        raise errors.UserError(
            f'the number of neighbors is {k}; expected 1 to {len(x) - 1}, the number of '
            'other images'
        )
    x = np.asarray(l2_normalize(jnp.asarray(x)))
    similarities, positions = nearest.search(x, x, mesh_lib.make_mesh(), k=k + 1)
    # An image with exact copies is not always its own nearest, and may even be missing: then the
    # last neighbor is dropped instead.
    own = positions == np.arange(len(x))[:, None]
    own[~own.any(1), -1] = True
    shape = (len(x), k)
    return positions[~own].reshape(shape), similarities[~own].reshape(shape)


def render_neighbors(
    embedding: Embedding, positions: np.ndarray, similarities: np.ndarray, *, num_queries: int
) -> str:
    """Returns the HTML of evenly spaced images, each in a row with its nearest neighbors.

    Args:
      embedding: Images with their features.
      positions: Positions [N, k] of the neighbors, as returned by neighbors().
      similarities: Their cosine similarities [N, k].
      num_queries: Number of rows.
    """
    source, features = embedding.source, embedding.features

    def figure(position: int, similarity: float | None = None) -> str:
        index = int(features.indices[position])
        if isinstance(source, ArraySource):
            image = source.images[index]
        else:
            image, _ = source.example(index)
        caption = [pathlib.PurePath(embedding.names[position]).name]
        if source.classes:
            caption.append(source.classes[features.labels[position]])
        if similarity is not None:
            caption.append(f'{similarity:.3f}')
        return page.figure(page.picture(image), caption, query=similarity is None)

    count = len(features.x)
    queries = np.unique(np.linspace(0, count - 1, min(num_queries, count)).astype(int)).tolist()
    return ''.join(
        page.row([figure(i), *map(figure, positions[i].tolist(), similarities[i].tolist())])
        for i in queries
    )


def render_map(embedding: Embedding, map_name: str, *, max_points: int) -> str:
    """Returns the HTML of a map of evenly spaced images in two dimensions.

    Args:
      embedding: Images with their features.
      map_name: One of MAPS.
      max_points: Maximum number of images in the map.
    """
    classes, features = embedding.source.classes, embedding.features
    count = len(features.x)
    shown = np.unique(np.linspace(0, count - 1, min(max_points, count)).astype(int))
    chart = page.scatter(
        _project(features.x[shown], map_name),
        [classes[i] if classes else 'images' for i in features.labels[shown]],
        [embedding.names[i] for i in shown],
    )
    total = f'{len(shown):,} of {count:,} images' if len(shown) < count else f'{count:,} images'
    return (
        f'<p class="quiet">{map_name.upper()} of {total}: images with similar features are close. '
        'Drag to zoom, double-click to reset.</p>'
        + page.plot(chart, label=f'Map of the features of {total}')
    )


def _project(x: Float[np.ndarray, 'N D'], map_name: str) -> np.ndarray:
    """Returns the projection of l2-normalized features onto two dimensions, [N, 2]."""
    x = np.asarray(l2_normalize(jnp.asarray(x)))
    if map_name == 'pca':
        return PCA(2, random_state=0).fit_transform(x)
    # scikit-learn requires fewer neighbors than points.
    perplexity = min(30.0, (len(x) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init='pca', random_state=0).fit_transform(x)
