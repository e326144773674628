"""Geometry of uint8 images on the host, compiled to run without Python's global lock."""

import math
from typing import Any, no_type_check

import numba
import numpy as np

from simsiam_jax import paths


def _compiled(function: Any) -> Any:
    """Returns the function as compiled by numba.

    It needs no_type_check: the tests check types at run time by wrapping functions, and numba
    cannot compile the wrappers.
    """
    # numba raises if it finds no folder for its cache, here or beside cache_folder().
    cache = paths.cache_folder() is not None
    return numba.njit(nogil=True, cache=cache, fastmath=True)(function)


@_compiled
@no_type_check
def _taps(start: int, length: int, size: int, begin: int, count: int) -> Any:
    """Returns first pixel and weights of `count` of `size` outputs, from `begin`.

    They are a sparse jax_augment.resize_weights.
    """
    scale = length / size
    support = max(scale, 1.0)
    first = np.empty(count, np.int64)
    weights = np.zeros((count, 2 * math.ceil(support) + 1), np.float32)
    for i in range(count):
        center = start + (begin + i + 0.5) * scale
        low = max(int(center - support + 0.5), start)
        high = min(int(center + support + 0.5), start + length)
        first[i] = low
        total = 0.0
        for j in range(low, high):
            weight = max(1.0 - abs(j + 0.5 - center) / support, 0.0)
            weights[i, j - low] = weight
            total += weight
        for j in range(high - low):
            weights[i, j] /= total
    return first, weights


@_compiled
@no_type_check
def crop_resize(
    image: Any, top: int, left: int, height: int, width: int, out_height: int, out_width: int
) -> Any:
    """Crops a uint8 [H, W, C] image and resizes the crop to uint8 [out_height, out_width, C].

    Bilinear, and antialiased if the crop shrinks: as PIL and torchvision, within rounding. Rows
    come first, because whole rows are summed at a time.
    """
    out = np.empty((out_height, out_width, image.shape[2]), np.uint8)
    taps_y = _taps(top, height, out_height, 0, out_height)
    taps_x = _taps(left, width, out_width, 0, out_width)
    _resize(image, left + width, taps_y, taps_x, out)
    return out


@_compiled
@no_type_check
def crop_resize_into(outputs: Any, i: int, image: Any, boxes: Any) -> None:
    """Writes the crop_resize of an image with boxes[i], int64 [n, 4], to outputs[i]."""
    top, left, height, width = boxes[i]
    taps_y = _taps(top, height, outputs.shape[1], 0, outputs.shape[1])
    taps_x = _taps(left, width, outputs.shape[2], 0, outputs.shape[2])
    _resize(image, left + width, taps_y, taps_x, outputs[i])


@_compiled
@no_type_check
def resize_crop(image: Any, height: int, width: int, top: int, left: int, size: int) -> Any:
    """Resizes a uint8 [H, W, C] image to height x width and crops uint8 [size, size, C].

    It computes only the crop, to the bits of crop_resize: of a long, thin image the rest would take
    gigabytes.
    """
    out = np.empty((size, size, image.shape[2]), np.uint8)
    taps_y = _taps(0, image.shape[0], height, top, size)
    taps_x = _taps(0, image.shape[1], width, left, size)
    _resize(image, image.shape[1], taps_y, taps_x, out)
    return out


@_compiled
@no_type_check
def _resize(image: Any, right: int, taps_y: Any, taps_x: Any, out: Any) -> None:
    """Writes uint8 outputs [Y, X, C] of their taps in rows and in columns left of `right`."""
    channels = image.shape[2]
    rows = image.reshape(image.shape[0], -1)
    first_y, weights_y = taps_y
    first_x, weights_x = taps_x
    left = first_x[0]
    begin = left * channels
    count = (min(first_x[-1] + weights_x.shape[1], right) - left) * channels
    row = np.empty(count, np.float32)
    for y in range(len(first_y)):
        row[:] = 0.0
        for k in range(weights_y.shape[1]):
            weight = weights_y[y, k]
            if weight != 0.0:
                source = rows[first_y[y] + k, begin : begin + count]
                for x in range(count):
                    row[x] += weight * np.float32(source[x])
        if channels == 3:
            _columns_rgb(row, first_x - left, weights_x, out[y])
        else:
            _columns(row, first_x - left, weights_x, out[y])


@_compiled
@no_type_check
def _columns(row: Any, first: Any, weights: Any, out: Any) -> None:
    channels = out.shape[1]
    for x in range(out.shape[0]):
        for c in range(channels):
            value = np.float32(0.5)  # rounds
            for k in range(weights.shape[1]):
                if weights[x, k] != 0.0:
                    value += weights[x, k] * row[(first[x] + k) * channels + c]
            out[x, c] = np.uint8(value)


@_compiled
@no_type_check
def _columns_rgb(row: Any, first: Any, weights: Any, out: Any) -> None:
    # Three sums in registers are three times as fast as the loop over channels.
    for x in range(out.shape[0]):
        r = g = b = np.float32(0.5)
        for k in range(weights.shape[1]):
            weight = weights[x, k]
            if weight != 0.0:
                at = (first[x] + k) * 3
                r += weight * row[at]
                g += weight * row[at + 1]
                b += weight * row[at + 2]
        out[x, 0], out[x, 1], out[x, 2] = np.uint8(r), np.uint8(g), np.uint8(b)


@_compiled
@no_type_check
def rotate(image: Any, angle: float) -> Any:
    """Rotates about the center by `angle` radians, bilinear, zero outside: jax_augment.rotate."""
    height, width, channels = image.shape
    y0, x0 = (height - 1) / 2, (width - 1) / 2
    cos, sin = math.cos(angle), math.sin(angle)
    out = np.empty_like(image)
    for i in range(height):
        for j in range(width):
            y = y0 + cos * (i - y0) - sin * (j - x0)
            x = x0 + sin * (i - y0) + cos * (j - x0)
            top, left = math.floor(y), math.floor(x)
            for c in range(channels):
                value = 0.5  # rounds
                for k in range(2):
                    for m in range(2):
                        if 0 <= top + k < height and 0 <= left + m < width:
                            weight = (1 - abs(y - top - k)) * (1 - abs(x - left - m))
                            value += weight * image[top + k, left + m, c]
                out[i, j, c] = np.uint8(value)
    return out
