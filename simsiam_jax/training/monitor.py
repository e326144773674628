"""Metrics that distinguish healthy training from representation collapse."""

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
    """Returns the mean over channels of the standard deviation of ``z/|z|``, times sqrt(D).

    It is 1 if embeddings spread evenly over the sphere and 0 if they collapsed (SimSiam, Figure 2,
    there without the factor). With `axis_name`, the deviation is over the batch of all devices.
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
    """Returns what summary() needs from a batch, averaged over all devices.

    Averages over several batches are valid input to summary() too.

    Args:
      views: Two views of every image of this device, [b, H, W, C] each.
      outputs: Outputs of the network for the views.
      axis_name: Axis of the devices.
    """
    features = jnp.concatenate([output.feature for output in outputs]).astype(jnp.float32)
    z1, z2 = (l2_normalize(output.z) for output in outputs)
    row = collectives.first_row(len(z1), axis_name) + jnp.arange(len(z1))
    all_z1 = collectives.gather(z1, axis_name)
    others = jnp.arange(len(all_z1)) != row[:, None]
    distances = 2 - 2 * inner_products(z1, all_z1)
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
    """Metrics of a network's representation, over one or more batches.

    Attributes:
      rankme: Effective rank of the features, from 1 to their width: the exponential of the entropy
        of their normalized singular values (RankMe, Garrido et al., 2023).
      z_std: Mean z_std() of both views.
      alignment: Mean squared distance between the ``z/|z|`` of an image's two views, from 0 to 4
        (Wang & Isola, 2020).
      uniformity: Log of the mean of exp(-2 d^2) over the distances d between different images'
        ``z/|z|`` (Wang & Isola, 2020). It is 0 if all are identical, about -log n if they form n
        groups, and near -4 if all are far apart.
      dead_channels: Share of the features' channels whose standard deviation over the images is
        below a hundredth of the features' root mean square.
      loss_floor: Lowest mean of -cos(p, z) for a predictor that knows the image but not the
        augmentation: ``-|E z/|z||`` over the views (SimSiam, section 5).
      view_distance: Root mean square pixel distance between the network's two views of an image,
        as a share of the distance between views of different images.
    """

    rankme: float
    z_std: float
    alignment: float
    uniformity: float
    dead_channels: float
    loss_floor: float
    view_distance: float


def summary(mean: dict[str, Any]) -> RepresentationMetrics:
    """Returns the metrics from the mean of moments() over batches, which must be finite."""
    mean = jax.tree.map(lambda x: np.asarray(x, np.float64), mean)
    squares = np.diag(mean['second'])
    deviation = np.sqrt(np.maximum(squares - mean['mean'] ** 2, 0))
    return RepresentationMetrics(
        rankme=effective_rank(mean['second']),
        z_std=float(mean['z_std']),
        alignment=float(mean['alignment']),
        uniformity=float(np.log(mean['potential'])),
        dead_channels=float((deviation <= 0.01 * np.sqrt(squares.mean())).mean()),
        loss_floor=-float(np.sqrt(max(1 - mean['alignment'] / 2, 0))),
        view_distance=float(np.sqrt(mean['between_views'] / max(mean['between_images'], 1e-12))),
    )


def is_finite(moments: dict[str, Any]) -> bool:
    """Returns whether all moments are finite."""
    return all(np.isfinite(x).all() for x in moments.values())


def effective_rank(second: Float[np.ndarray, 'C C']) -> float:
    """Returns RankMe of features from their second moments E[f f^T], computed in float32."""
    squares = np.linalg.eigvalsh(second)
    singular = np.sqrt(squares[squares > np.finfo(np.float32).eps * squares[-1]])
    share = singular / singular.sum()
    return float(np.exp(-(share * np.log(share)).sum()))
