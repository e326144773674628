"""The part of the augmentation that runs on the host: one class for each choice of on_device."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from simsiam_jax import lazy_tf
from simsiam_jax.data import tf_augment
from simsiam_jax.data.recipe import Recipe, crop_box

Params = dict[str, Any]


@runtime_checkable
class HostStage(Protocol):
    """What the host computes for each image of a batch, and the batch that it becomes."""

    def outputs(self) -> list[tuple[tuple[int, ...], type]]:
        """Returns shape and dtype of each array of `load`."""

    def load(self, image: np.ndarray, params: list[Params]) -> tuple[np.ndarray, ...]:
        """Computes the arrays of an image, given each view's parameters; runs in threads."""

    def assemble(self, arrays: list[np.ndarray], params: list[Params]) -> dict[str, Any]:
        """Returns the entries of a device batch, given batched arrays and parameters."""


def make_stage(
    on_device: str, recipes: Sequence[Recipe], *, channels: int, canvas: int
) -> HostStage:
    """Returns the stage that leaves to the device what `on_device` names.

    Args:
      on_device: One of host.ON_DEVICE.
      recipes: Recipe of each view.
      channels: Number of channels of the images.
      canvas: Side of the canvas if `on_device` is 'all'.
    """
    if on_device == 'all':
        return CanvasStage(canvas, channels)
    crops = CropStage(recipes, channels)
    if on_device == 'color':
        return crops
    return ViewStage(crops, tf_augment.color_views(lazy_tf.load(), recipes, channels))


@dataclasses.dataclass(frozen=True)
class CropStage:
    """The host crops; the device does the color operations, blur and flip."""

    recipes: Sequence[Recipe]
    channels: int

    def outputs(self) -> list[tuple[tuple[int, ...], type]]:
        return [((r.size, r.size, self.channels), np.uint8) for r in self.recipes]

    def load(self, image: np.ndarray, params: list[Params]) -> tuple[np.ndarray, ...]:
        return tuple(_crop(image, p, r) for p, r in zip(params, self.recipes, strict=True))

    def assemble(self, arrays: list[np.ndarray], params: list[Params]) -> dict[str, Any]:
        return {'crops': arrays, 'views': params}


@dataclasses.dataclass(frozen=True)
class ViewStage:
    """The host makes the whole views; the device only normalizes them.

    Attributes:
      crops: What makes the crops.
      color: Function (*crops, *packed parameters) -> views; see tf_augment.color_views.
    """

    crops: CropStage
    color: Callable[..., list[np.ndarray]]

    def outputs(self) -> list[tuple[tuple[int, ...], type]]:
        return self.crops.outputs()

    def load(self, image: np.ndarray, params: list[Params]) -> tuple[np.ndarray, ...]:
        return tuple(self.color(*self.crops.load(image, params), *map(tf_augment.pack, params)))

    def assemble(self, arrays: list[np.ndarray], params: list[Params]) -> dict[str, Any]:
        return {'crops': arrays}


@dataclasses.dataclass(frozen=True)
class CanvasStage:
    """The host pads images to a common size; the device does the whole augmentation."""

    canvas: int
    channels: int

    def outputs(self) -> list[tuple[tuple[int, ...], type]]:
        return [((self.canvas, self.canvas, self.channels), np.uint8), ((2,), np.float32)]

    def load(self, image: np.ndarray, params: list[Params]) -> tuple[np.ndarray, ...]:
        height, width, channels = image.shape
        if max(height, width) > self.canvas:
            from simsiam_jax.data import geometry

            scale = self.canvas / max(height, width)
            shape = (max(1, round(height * scale)), max(1, round(width * scale)))
            image = geometry.crop_resize(image, 0, 0, height, width, shape[0], shape[1])
        padded = np.zeros((self.canvas, self.canvas, channels), np.uint8)
        padded[: image.shape[0], : image.shape[1]] = image
        return padded, np.array(image.shape[:2], np.float32)

    def assemble(self, arrays: list[np.ndarray], params: list[Params]) -> dict[str, Any]:
        image, size = arrays
        return {'image': image, 'size': size, 'views': params}


def _crop(image: np.ndarray, params: Params, recipe: Recipe) -> np.ndarray:
    from simsiam_jax.data import geometry  # a dataset cached on the device needs no numba

    if recipe.rotation:
        image = geometry.rotate(image, float(params['angle']))
    shape = np.float32(image.shape[0]), np.float32(image.shape[1])
    box = crop_box(params, *shape, recipe.crop_ratio, np)
    top, left, height, width = (int(edge) for edge in box)
    return geometry.crop_resize(image, top, left, height, width, recipe.size, recipe.size)
