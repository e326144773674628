"""Features of images, and the nearest neighbors of images as HTML."""

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from simsiam_jax import errors, terminal
from simsiam_jax.checkpoints import encoder as encoder_lib
from simsiam_jax.data import sampler, subset
from simsiam_jax.data.sources import ArraySource
from simsiam_jax.methods.losses import l2_normalize
from simsiam_jax.pages import explorer, maps, page, thumbnails
from simsiam_jax.tasks import encoding, inputs, nearest
from simsiam_jax.tasks.feature_store import FeatureStore
from simsiam_jax.tasks.features import Features, extract_features
from simsiam_jax.training import mesh as mesh_lib

_BLOCK = 65536  # images that are compared with as many others at once
_QUERIES = 24  # most images in rows with their neighbors


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
    checkpoint: str,
    images: str,
    batch_size: int,
    max_images: int | None = None,
    store: FeatureStore | None = None,
) -> Embedding:
    """Computes features in evaluation mode; skips unreadable images.

    Args:
      checkpoint: Workdir or weight file of the encoder.
      images: Source of the images, as config.data.source names it.
      batch_size: Images per batch, at least one per device.
      max_images: Number of images, evenly spaced in the source; None embeds all.
      store: Store that keeps the features on disk and resumes; None keeps them in memory.

    Raises:
      UserError: The checkpoint or the images cannot be used.
    """
    encoder = encoder_lib.open_encoder(checkpoint)
    source = encoding.open_images(encoder, images)
    kept = sampler.evenly_spaced(len(source), max_images or len(source))
    if len(kept) < len(source):
        source = subset.take(source, kept)
    loader = encoding.make_loader(encoder, batch_size)
    variables = mesh_lib.replicate(encoder.variables, loader.mesh)
    extract = store.extract if store else extract_features
    features = extract(encoding.encode_of(encoder), variables, source, loader)
    if isinstance(source, ArraySource):
        names = [f'{images}[{kept[i]}]' for i in features.indices]
        return Embedding(source, features, names)
    return Embedding(source, features, names_of(source, features))


def names_of(source: inputs.ImageSet, features: Features, what: str = 'image') -> list[str]:
    """Returns the name of each image with features; arrays in memory are `what` and a number."""
    if isinstance(source, ArraySource):
        return [f'{what} {i}' for i in features.indices]
    return [source.source.name(int(i)) for i in features.indices]


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
    similarities, positions = _search(x, k + 1)
    # An image with exact copies is not always its own nearest, and may even be missing: then the
    # last neighbor is dropped instead.
    own = positions == np.arange(len(x))[:, None]
    own[~own.any(1), -1] = True
    shape = (len(x), k)
    return positions[~own].reshape(shape), similarities[~own].reshape(shape)


def _search(x: Float[np.ndarray, 'N D'], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the k largest cosines [N, k] among all images, and their positions.

    Blocks of images are compared with each other, so that x may be a memory map.
    """
    mesh = mesh_lib.make_mesh()
    starts = range(0, len(x), _BLOCK)
    similarities = np.full((len(x), k), -np.inf, np.float32)
    positions = np.zeros((len(x), k), int)
    pairs = [(bank, queries) for bank in starts for queries in starts]
    for first, start in terminal.progress(pairs, 'searching neighbors', unit=' blocks'):
        bank, queries = (_normalized(x[i : i + _BLOCK]) for i in (first, start))
        rows = slice(start, start + len(queries))
        found, places = nearest.search(bank, queries, mesh, k=k)
        found = np.concatenate([similarities[rows], found], 1)
        places = np.concatenate([positions[rows], places + first], 1)
        order = np.argsort(-found, axis=1, kind='stable')[:, :k]
        similarities[rows] = np.take_along_axis(found, order, 1)
        positions[rows] = np.take_along_axis(places, order, 1)
    return similarities, positions


def _normalized(x: Float[np.ndarray, 'N D']) -> np.ndarray:
    return np.asarray(l2_normalize(jnp.asarray(x)))


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
        caption = [pathlib.PurePath(embedding.names[position]).name]
        if source.classes:
            caption.append(source.classes[features.labels[position]])
        if similarity is not None:
            caption.append(f'{similarity:.3f}')
        picture = page.picture(_image(embedding, position))
        return page.figure(picture, caption, query=similarity is None)

    count = len(features.x)
    queries = sampler.evenly_spaced(count, num_queries).tolist()
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
    shown = sampler.evenly_spaced(count, max_points)
    map_of = maps.compute(features.x[shown], map_name)
    chart = page.scatter(
        map_of.points,
        [classes[i] if classes else 'images' for i in features.labels[shown]],
        [embedding.names[i] for i in shown],
    )
    total = f'{len(shown):,} of {count:,} images' if len(shown) < count else f'{count:,} images'
    return (
        f'<p class="quiet">Map of {total}: images with similar features are close. {map_of.name}. '
        'Drag to zoom, double-click to reset.</p>'
        + page.plot(chart, label=f'Map of the features of {total}')
    )


def render_page(
    embedding: Embedding,
    found: tuple[np.ndarray, np.ndarray] | None,
    *,
    title: str,
    map_name: str = 'auto',
    max_points: int = 0,
) -> str:
    """Returns a page: an interactive map of the images, and some of them with their neighbors.

    Args:
      embedding: Images with their features.
      found: Positions and similarities of neighbors, as returned by neighbors(); None searches
        those of the map, and shows no other.
      title: Title of the page.
      map_name: One of maps.MAPS.
      max_points: Maximum number of images in the map, evenly spaced; 0 uses that of maps.MAPS.

    Raises:
      UserError: See maps.choose().
    """
    content, scripts = _explorer(embedding, found, map_name, max_points or maps.MAPS[map_name])
    sections = {'Map of the images': content}
    if found:
        sections['Images, left, and their nearest neighbors by cosine similarity'] = (
            render_neighbors(embedding, *found, num_queries=_QUERIES)
        )
    return page.page(title, sections, scripts=scripts, webgl=True)


def _explorer(
    embedding: Embedding,
    found: tuple[np.ndarray, np.ndarray] | None,
    map_name: str,
    max_points: int,
) -> tuple[str, str]:
    """Returns the HTML of the map, and its scripts and data.

    If only some images are shown, their neighbors are searched among them.
    """
    features = embedding.features
    total = len(features.x)
    shown = sampler.evenly_spaced(total, max_points)
    x = features.x[shown]
    k = min(explorer.NEIGHBORS, len(x) - 1)
    if found is None or len(shown) < total:
        empty = np.zeros((len(x), 0), int), np.zeros((len(x), 0), np.float32)
        found = neighbors(x, k) if k else empty
    positions, similarities = found
    return explorer.render(
        explorer.Explorer(
            maps.compute(x, map_name),
            [embedding.names[i] for i in shown],
            features.labels[shown],
            embedding.source.classes,
            positions[:, :k],
            similarities[:, :k],
            thumbnails.make(
                lambda i: _image(embedding, int(shown[i])),
                len(shown),
                limit=explorer.THUMBNAIL_BYTES,
            ),
            total,
        )
    )


def _image(embedding: Embedding, position: int) -> np.ndarray:
    """Returns an image [H, W, C], uint8."""
    index = int(embedding.features.indices[position])
    if isinstance(embedding.source, ArraySource):
        return embedding.source.images[index]
    return embedding.source.example(index)[0]
