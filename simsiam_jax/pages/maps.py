"""Maps of features in two dimensions, and groups of similar features."""

import contextlib
import dataclasses
import importlib.util
import warnings

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.manifold import TSNE

from simsiam_jax import errors, lazy_tf
from simsiam_jax.methods.losses import l2_normalize

# Name of each map -> most points of a page with it, by default; t-SNE is slow for more.
MAPS = {'auto': 50_000, 'umap': 50_000, 'pca': 50_000, 'tsne': 5000}
_WIDTH = 50  # principal components that maps and groups are computed from
_CLUSTERS = 10
_MIN_UMAP = 20  # points; UMAP compares each with 15 others


@dataclasses.dataclass(frozen=True)
class Map:
    """Positions of images in two dimensions, and their groups.

    Attributes:
      points: Positions [N, 2].
      clusters: Group of each image by k-means, the largest group first.
      name: What the map is, and how it was computed.
    """

    points: Float[np.ndarray, 'N 2']
    clusters: Int[np.ndarray, 'N']
    name: str


def choose(kind: str) -> str:
    """Returns the kind of map: for 'auto' umap if umap-learn is installed, else pca.

    Raises:
      UserError: The kind is unknown, or it is umap, which is not installed.
    """
    errors.check_choice('--map', kind, MAPS)
    installed = bool(importlib.util.find_spec('umap'))
    if kind == 'umap' and not installed:
        raise errors.UserError(
            '--map is umap, but umap-learn is not installed. Run pip install umap-learn, or use '
            '--map=pca'
        )
    if kind == 'auto':
        return 'umap' if installed else 'pca'
    return kind


def compute(x: Float[np.ndarray, 'N D'], kind: str) -> Map:
    """Returns the map of features, by cosine similarity, and their groups.

    Args:
      x: Features.
      kind: One of MAPS.

    Raises:
      UserError: See `choose`.
    """
    asked, kind = kind, choose(kind)
    x = np.asarray(l2_normalize(jnp.asarray(x)))
    pca = PCA(min(_WIDTH, *x.shape), random_state=0)
    with np.errstate(invalid='ignore'):  # the variances of one image, or of identical ones
        reduced = pca.fit_transform(x)
    clusters = _clusters(reduced)
    if kind == 'umap' and len(x) >= _MIN_UMAP:
        return Map(_umap(reduced), clusters, 'UMAP')
    if kind == 'tsne' and len(x) > 2:
        # scikit-learn requires fewer neighbors than points.
        perplexity = min(30.0, (len(x) - 1) / 3)
        tsne = TSNE(2, perplexity=perplexity, init='pca', random_state=0)
        return Map(tsne.fit_transform(reduced[:, :_WIDTH]), clusters, 't-SNE')
    share = float(np.nan_to_num(pca.explained_variance_ratio_[:2]).sum())
    name = f'PCA: the two directions of the largest variance, {share:.0%} of it'
    if asked == 'auto' and kind == 'pca':
        name += '; after pip install umap-learn this is a UMAP, which keeps neighbors closer'
    points = np.pad(reduced[:, :2], ((0, 0), (0, 2 - min(2, reduced.shape[1]))))
    return Map(points, clusters, name)


def _clusters(x: Float[np.ndarray, 'N D']) -> Int[np.ndarray, 'N']:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', ConvergenceWarning)  # fewer distinct points than groups
        found = KMeans(min(_CLUSTERS, len(x)), n_init=3, random_state=0).fit_predict(x)
    order = np.argsort(-np.bincount(found), kind='stable')
    return np.argsort(order)[found]


def _umap(x: Float[np.ndarray, 'N D']) -> Float[np.ndarray, 'N 2']:
    # umap-learn imports TensorFlow, if that is installed.
    with contextlib.suppress(errors.UserError):
        lazy_tf.load()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        import umap

        # One thread and a seed: the same features give the same map.
        return umap.UMAP(random_state=0, n_jobs=1).fit_transform(x)
