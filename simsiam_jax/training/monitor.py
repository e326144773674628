"""Measures that tell a healthy run from a collapsing one."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from simsiam_jax.methods import collectives
from simsiam_jax.methods.losses import inner_products, l2_normalize
from simsiam_jax.models.network import Outputs


def z_std(z: Float[Array, 'B D'], axis_name: str | None = None) -> Float[Array, '']:
    """Mean over channels of the standard deviation of z/|z| over the batch, times sqrt(D).

    1 for embeddings spread evenly over the sphere, 0 for collapsed ones (SimSiam, Figure 2,
    there without the factor). With `axis_name`, over the batch of all devices.
    """
    z = l2_normalize(z)
    mean = z.mean(0)
    if axis_name is not None:
        mean = jax.lax.pmean(mean, axis_name)
    variance = jnp.square(z - mean).mean(0)
    if axis_name is not None:
        variance = jax.lax.pmean(variance, axis_name)
    return jnp.sqrt(variance).mean() * jnp.sqrt(z.shape[-1])


def moments(views: Sequence[Array], outputs: Sequence[Outputs], axis_name: str) -> dict[str, Array]:
    """What summary() needs of a batch, its mean over all devices; means over batches may be taken.

    Args:
      views: two of every image [b, H, W, C], this device's share.
      outputs: what the network makes of them.
    """
    features = jnp.concatenate([output.feature for output in outputs]).astype(jnp.float32)
    z1, z2 = (l2_normalize(output.z) for output in outputs)
    row = collectives.first_row(len(z1), axis_name) + jnp.arange(len(z1))
    everybody = collectives.gather(z1, axis_name)
    others = jnp.arange(len(everybody)) != row[:, None]
    distances = 2 - 2 * inner_products(z1, everybody)
    first, second = (view.astype(jnp.float32) for view in views)
    pixel = jax.lax.pmean(first.mean(0), axis_name)
    local = {
        'mean': features.mean(0),
        'second': inner_products(features.T, features.T) / len(features),
        'z_std': (z_std(z1, axis_name) + z_std(z2, axis_name)) / 2,
        'alignment': jnp.square(z1 - z2).sum(1).mean(),
        'potential': (jnp.exp(-2 * distances) * others).sum() / others.sum(),
        'between_views': jnp.square(first - second).mean(),
        'between_images': 2 * jnp.square(first - pixel).mean(),
    }
    return jax.lax.pmean(local, axis_name)


@dataclasses.dataclass(frozen=True)
class RepresentationMetrics:
    """Of a network, over some batches.

    Attributes:
      rank: of the features, the exponential of the entropy of their singular values' shares, from
        1 to their width (RankMe, Garrido et al., 2023).
      z_std: of both views, see z_std().
      alignment: mean squared distance of the two views' z/|z|, from 0 to 4.
      uniformity: log of the mean of exp(-2 d^2) over the distances d of different images' z/|z|: 0
        where all are the same, about -log n where they lie in n groups, towards -4 where all are
        apart (this and alignment: Wang & Isola, 2020).
      dead_channels: share of the features' channels whose standard deviation over the images is
        below a hundredth of the features' root mean square.
      loss_floor: the least mean of -cos(p, z) that a predictor can reach that knows the image but
        not the augmentation, -|E z/|z|| over the views (SimSiam, section 5).
      view_distance: between the two views of an image as the network is given them, root mean
        square by pixel, as a share of that between views of different images.
    """

    rank: float
    z_std: float
    alignment: float
    uniformity: float
    dead_channels: float
    loss_floor: float
    view_distance: float


def summary(mean: dict[str, Any]) -> RepresentationMetrics:
    """The measures, from the mean of moments() over batches; these must be finite."""
    mean = jax.tree.map(lambda x: np.asarray(x, np.float64), mean)
    squares = np.diag(mean['second'])
    deviation = np.sqrt(np.maximum(squares - mean['mean'] ** 2, 0))
    return RepresentationMetrics(
        rank=effective_rank(mean['second']),
        z_std=float(mean['z_std']),
        alignment=float(mean['alignment']),
        uniformity=float(np.log(mean['potential'])),
        dead_channels=float((deviation <= 0.01 * np.sqrt(squares.mean())).mean()),
        loss_floor=-float(np.sqrt(max(1 - mean['alignment'] / 2, 0))),
        view_distance=float(np.sqrt(mean['between_views'] / max(mean['between_images'], 1e-12))),
    )


def is_finite(moments: dict[str, Any]) -> bool:
    return all(np.isfinite(x).all() for x in moments.values())


def effective_rank(second: Float[np.ndarray, 'C C']) -> float:
    """RankMe of features from their second moments E[f f^T], which came from float32."""
    squares = np.linalg.eigvalsh(second)
    singular = np.sqrt(squares[squares > np.finfo(np.float32).eps * squares[-1]])
    share = singular / singular.sum()
    return float(np.exp(-(share * np.log(share)).sum()))
