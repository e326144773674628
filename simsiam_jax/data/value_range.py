"""The values of deep images (16 bits, floats, ...) that become 0 and 255."""

import dataclasses
import math

import numpy as np
from jaxtyping import Float, UInt8

from simsiam_jax import errors


@dataclasses.dataclass(frozen=True)
class ValueRange:
    """Values that become 0 and 255.

    Attributes:
      low, high: Value of all channels, or by channel; () is what the type can hold, and 0 to 1 for
        floats.
    """

    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()

    def __str__(self) -> str:
        pairs = zip(self.low, self.high, strict=True)
        return ','.join(f'{low:.8g},{high:.8g}' for low, high in pairs) or 'dtype'

    def bounds(self, dtype: np.dtype, bits: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns low and high for images of a type, with `bits` in use."""
        low, high = self.low, self.high
        if not low:
            lowest = -(2.0 ** (bits - 1)) if dtype.kind == 'i' else 0.0
            low, high = (lowest,), (1.0 if dtype.kind == 'f' else lowest + 2.0**bits - 1,)
        return np.array(low), np.array(high)


DTYPE = ValueRange()
# Percentiles of the values of a channel that become 0 and 255 with config.data.range=auto.
PERCENTILES = 0.1, 99.9


def parse(text: str, channels: int) -> ValueRange:
    """Returns the range that config.data.range names: dtype, or low,high[,low,high...].

    Raises:
      UserError: There are no such numbers, or not 2 or 2 for each channel.
    """
    if text == 'dtype':
        return DTYPE
    try:
        numbers = tuple(float(number) for number in text.split(','))
    except ValueError:
        numbers = ()
    low, high = numbers[::2], numbers[1::2]
    if (
        len(low) not in {1, channels}
        or len(low) != len(high)
        or not all(map(math.isfinite, numbers))
    ):
        raise errors.UserError(
            f'config.data.range is {text}; expected auto, dtype, or low,high for all channels or '
            f'for each of {channels}'
        )
    if any(a >= b for a, b in zip(low, high, strict=True)):
        raise errors.UserError(f'config.data.range is {text}; expected each low below its high')
    return ValueRange(low, high)


def percentiles(values: Float[np.ndarray, 'n C']) -> ValueRange:
    """Returns the 0.1% and 99.9% percentiles of the finite values of each channel."""
    low, high = [], []
    for channel in values.T:
        finite = channel[np.isfinite(channel)]
        ends = np.percentile(finite, PERCENTILES).tolist() if len(finite) else [0.0, 1.0]
        low.append(ends[0])
        high.append(ends[1] if ends[1] > ends[0] else ends[0] + 1)
    # Rounded as in configurations, so that a resumed run decodes the same values.
    return parse(str(ValueRange(tuple(low), tuple(high))), len(low))


def stretch(
    values: Float[np.ndarray, '... C'], low: np.ndarray, high: np.ndarray
) -> UInt8[np.ndarray, '... C']:
    """Returns 0 for values up to `low` and for NaN, 255 from `high`, rounded between."""
    factor = (255 / (high - low)).astype(values.dtype)
    scaled = np.clip((values - low.astype(values.dtype)) * factor, 0, 255)
    return np.nan_to_num(np.round(scaled), nan=0.0).astype(np.uint8)
