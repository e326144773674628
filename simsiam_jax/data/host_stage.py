"""The part of the augmentation that runs on the host: one class for each choice of on_device.

A stage processes a few images in one call: Python holds its global lock for each call, not for each
image and parameter.
"""

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
    """What the host computes for some images of a batch, and the batch that they become."""

    def outputs(self) -> list[tuple[tuple[int, ...], type]]:
        """Returns shape, without the number of images, and dtype of each array of `load`."""

    def load(
        self, images: list[np.ndarray], params: list[Params], outputs: list[np.ndarray]
    ) -> None:
        """Fills the arrays of n images; runs in threads.

        Args:
          images: Decoded images, uint8 [H, W, C] of any sizes.
          params: Parameters of each view, arrays [n, ...].
          outputs: Arrays [n, ...] to fill.
        """

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
    return ViewStage(crops, tf_augment.color_views(lazy_tf.load(), recipes))


@dataclasses.dataclass(frozen=True)
class CropStage:
    """The host crops; the device does the color operations, blur and flip."""

    recipes: Sequence[Recipe]
    channels: int

    def outputs(self) -> list[tuple[tuple[int, ...], type]]:
        return [((r.size, r.size, self.channels), np.uint8) for r in self.recipes]

    def load(
        self, images: list[np.ndarray], params: list[Params], outputs: list[np.ndarray]
    ) -> None:
        for crops, view, recipe in zip(outputs, params, self.recipes, strict=True):
            _crop(images, view, recipe, crops)

    def assemble(self, arrays: list[np.ndarray], params: list[Params]) -> dict[str, Any]:
        return {'crops': arrays, 'views': params}


@dataclasses.dataclass(frozen=True)
class ViewStage:
    """The host makes the whole views; the device only normalizes them.

    Attributes:
      crops: What makes the crops.
      color: Function (crops, packed parameters) of all views -> views; tf_augment.color_views.
    """

    crops: CropStage
    color: Callable[..., list[np.ndarray]]

    def outputs(self) -> list[tuple[tuple[int, ...], type]]:
        return self.crops.outputs()

    def load(
        self, images: list[np.ndarray], params: list[Params], outputs: list[np.ndarray]
    ) -> None:
        self.crops.load(images, params, outputs)
        views = self.color(outputs, [tf_augment.pack(view) for view in params])
        for output, view in zip(outputs, views, strict=True):
            output[:] = view

    def assemble(self, arrays: list[np.ndarray], params: list[Params]) -> dict[str, Any]:
        return {'crops': arrays}


@dataclasses.dataclass(frozen=True)
class CanvasStage:
    """The host pads images to a common size; the device does the whole augmentation."""

    canvas: int
    channels: int

    def outputs(self) -> list[tuple[tuple[int, ...], type]]:
        return [((self.canvas, self.canvas, self.channels), np.uint8), ((2,), np.float32)]

    def load(
        self, images: list[np.ndarray], params: list[Params], outputs: list[np.ndarray]
    ) -> None:
        padded, sizes = outputs
        padded[:] = 0
        for i, image in enumerate(images):
            shrunk = self._shrunk(image)
            sizes[i] = height, width = shrunk.shape[:2]
            padded[i, :height, :width] = shrunk

    def _shrunk(self, image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        if max(height, width) <= self.canvas:
            return image
        from simsiam_jax.data import geometry

        scale = self.canvas / max(height, width)
        shape = (max(1, round(height * scale)), max(1, round(width * scale)))
        return geometry.crop_resize(image, 0, 0, height, width, shape[0], shape[1])

    def assemble(self, arrays: list[np.ndarray], params: list[Params]) -> dict[str, Any]:
        image, size = arrays
        return {'image': image, 'size': size, 'views': params}


def _crop(images: list[np.ndarray], params: Params, recipe: Recipe, crops: np.ndarray) -> None:
    """Fills a view's crop of each image, uint8 [n, S, S, C]."""
    from simsiam_jax.data import geometry  # a dataset cached on the device needs no numba

    if recipe.rotation:
        images = [
            geometry.rotate(image, float(angle))
            for image, angle in zip(images, params['angle'], strict=True)
        ]
    shapes = np.array([image.shape[:2] for image in images], np.float32)
    edges = crop_box(params, shapes[:, 0], shapes[:, 1], recipe.crop_ratio, np)
    boxes = np.stack(edges, -1).astype(np.int64)
    for i, image in enumerate(images):
        geometry.crop_resize_into(crops, i, image, boxes)
