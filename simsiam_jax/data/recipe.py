"""Augmentation recipe of a view: settings, sampling of parameters, and crop geometry."""

import dataclasses
import logging
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Int

from simsiam_jax import errors
from simsiam_jax.data.sampler import IndexSampler

_TRIES = 10


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Augmentation settings of a view; the defaults are the paper's for ImageNet (section 3).

    Attributes:
      size: Side of the view in pixels.
      crop_scale: Range of the crop's share of the image's area.
      crop_ratio: Range of the crop's width/height.
      rotation: Largest angle in degrees, in both directions, before the crop; 0 disables it.
      jitter: Probability of the four color operations, applied in random order.
      brightness, contrast, saturation: Strength x; the factor is from U[max(0, 1 - x), 1 + x].
      hue: Strength x; the shift is from U[-x, x] turns.
      gray: Probability of conversion to gray.
      blur: Probability of a Gaussian blur.
      blur_sigma: Range of the blur's sigma in pixels.
      solarize: Probability that values x above 1/2 become 1 - x, after the blur (BYOL).
      flip: Probability of a horizontal flip.
      mean, std: Normalization by channel, of values in [0, 1]; one value applies to all channels.
    """

    size: int = 224
    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    rotation: float = 0.0
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    gray: float = 0.2
    blur: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0
    flip: float = 0.5
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        for key in ('jitter', 'gray', 'blur', 'solarize', 'flip'):
            if not 0 <= getattr(self, key) <= 1:
                raise errors.UserError(
                    f'augment.{key} is {getattr(self, key)}; expected a probability from 0 to 1'
                )
        for key, most in (('crop_scale', 1), ('crop_ratio', math.inf), ('blur_sigma', math.inf)):
            pair = getattr(self, key)
            if len(pair) != 2 or not 0 < pair[0] <= pair[1] <= most:
                raise errors.UserError(
                    f'augment.{key} is {pair}; expected (low, high) with 0 < low <= high'
                    + (' <= 1' if most == 1 else '')
                )
        for key in ('brightness', 'contrast', 'saturation', 'rotation'):
            if not 0 <= getattr(self, key) < math.inf:
                raise errors.UserError(f'augment.{key} is {getattr(self, key)}; expected 0 or more')
        if not 0 <= self.hue <= 0.5:
            raise errors.UserError(f'augment.hue is {self.hue}; expected 0 to 0.5 turns')
        if self.size < 1:
            raise errors.UserError(f'augment.size is {self.size}; expected 1 pixel or more')
        if min(self.std, default=0) <= 0:
            raise errors.UserError(f'augment.std is {self.std}; expected values above 0')
        if self.blur and self.size <= BLUR_RADIUS:
            raise errors.UserError(
                f'augment.size is {self.size}; expected more than the blur radius {BLUR_RADIUS}. '
                'Set augment.blur=0 or a larger augment.size'
            )

    def for_channels(self, channels: int) -> 'Recipe':
        """Returns the recipe, without the RGB operations if `channels` is not 3.

        Raises:
          UserError: The mean or std has another number of channels.
        """
        for key in ('mean', 'std'):
            if len(getattr(self, key)) not in (1, channels):
                raise errors.UserError(
                    f'augment.{key} has {len(getattr(self, key))} values for images of '
                    f'{channels} channels; expected 1 or {channels} values'
                )
        colors = self.gray or (self.jitter and (self.saturation or self.hue))
        if channels == 3 or not colors:
            return self
        logging.warning('%d channels: saturation, hue and gray are disabled', channels)
        return dataclasses.replace(self, saturation=0.0, hue=0.0, gray=0.0)


# Three times the largest sigma of the paper: 13 taps, as in torchvision.
BLUR_RADIUS = 6


def sample(recipe: Recipe, rng: np.random.Generator, n: int) -> dict[str, np.ndarray]:
    """Samples the parameters of n views.

    Returns arrays [n, ...]: `area`, `ratio`, `position` for crop_box; `angle` in radians;
    `factors` of brightness, contrast, saturation (1: no change) and hue (0: no change); `order`
    of the four; `gray`, `flip`, `solarize`; `sigma` of the blur (0: no blur).
    """

    def uniform(low: Any, high: Any, *shape: int) -> np.ndarray:
        return rng.uniform(low, high, (n, *shape)).astype(np.float32)

    def chance(probability: float) -> np.ndarray:
        return rng.random(n) < probability

    strength = np.array([recipe.brightness, recipe.contrast, recipe.saturation])
    factors = uniform(
        np.append(np.maximum(0, 1 - strength), -recipe.hue), np.append(1 + strength, recipe.hue), 4
    )
    neutral = np.array([1, 1, 1, 0], np.float32)
    return {
        'area': uniform(*recipe.crop_scale, _TRIES),
        'ratio': np.exp(uniform(*np.log(recipe.crop_ratio), _TRIES)),
        'position': uniform(0, 1, 2),
        'angle': np.radians(uniform(-recipe.rotation, recipe.rotation)),
        'factors': np.where(chance(recipe.jitter)[:, None], factors, neutral),
        'order': np.argsort(rng.random((n, 4)), axis=1).astype(np.int32),
        'gray': chance(recipe.gray),
        'sigma': np.where(chance(recipe.blur), uniform(*recipe.blur_sigma), 0).astype(np.float32),
        'flip': chance(recipe.flip),
        'solarize': chance(recipe.solarize),
    }


def check_resize(size: int, resize: int) -> None:
    """Raises UserError if the center crop `size` exceeds the shorter side `resize`."""
    if resize and resize < size:
        raise errors.UserError(
            f'config.eval.resize is {resize}, below config.augment.size {size}. Set it to {size} '
            'or more, or to 0 if the images have that size already'
        )


def sample_batch_params(
    sampler: IndexSampler, recipes: Sequence[Recipe], step: int, local: slice
) -> tuple[Int[np.ndarray, 'B'], list[dict[str, np.ndarray]]]:
    """Returns image indices and parameters of each view for the part `local` of a step's batch."""
    views = [
        sample(recipe, sampler.rng(step, view), sampler.batch_size)
        for view, recipe in enumerate(recipes)
    ]
    return sampler.indices(step)[local], [{k: v[local] for k, v in p.items()} for p in views]


def crop_box(
    params: dict[str, Any],
    height: Any,
    width: Any,
    ratio_range: tuple[float, float],
    xp: ModuleType,
) -> tuple[Any, Any, Any, Any]:
    """Returns (top, left, height, width) in whole pixels: torchvision's RandomResizedCrop.

    The box is the first of ten tries that fits, otherwise the largest central crop within the
    ratios.

    Args:
      params: Area [..., 10], ratio [..., 10] and position [..., 2] of views, from `sample`.
      height, width: Size of the images, float32 [...].
      ratio_range: Range of the ratios, crop_ratio of the recipe.
      xp: Module of the arrays: numpy or jax.numpy.
    """
    rows, columns = height[..., None], width[..., None]
    area = params['area'] * (rows * columns)
    tries_h = xp.round(xp.sqrt(area / params['ratio']))
    tries_w = xp.round(xp.sqrt(area * params['ratio']))
    fits = (tries_h > 0) & (tries_h <= rows) & (tries_w > 0) & (tries_w <= columns)
    first = xp.argmax(fits, -1)[..., None]

    def of_first(tries: Any) -> Any:
        return xp.take_along_axis(tries, first, -1)[..., 0]

    fit = of_first(fits)
    low, high = ratio_range
    crop_h = xp.where(fit, of_first(tries_h), xp.minimum(height, xp.round(width / low)))
    crop_w = xp.where(fit, of_first(tries_w), xp.minimum(width, xp.round(height * high)))
    place = xp.where(fit[..., None], params['position'], 0.5)
    ends = xp.where(fit, 1.0, 0.0)  # a try may start at either end of its slack

    def start(position: Any, slack: Any) -> Any:
        # A position just under 1 may round up to the end of its range in float32.
        return xp.minimum(xp.floor(position * (slack + ends)), slack)

    top, left = start(place[..., 0], height - crop_h), start(place[..., 1], width - crop_w)
    return top, left, crop_h, crop_w
