"""Functions that upscale RGB images, whatever computes them; this module needs no JAX."""

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float


class RgbView:
    """An RGB image in [0, 1] that is computed from other pixels part by part, when indexed.

    It has the parts of an array's interface that upscaling uses: shape, slices and np.asarray.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, pixels: np.ndarray, to_rgb: Callable[[np.ndarray], np.ndarray]):
        """`to_rgb` converts any part of the pixels, (h, w, channels), to (h, w, 3), float32."""
        self.shape = (*pixels.shape[:2], 3)
        self._pixels, self._to_rgb = pixels, to_rgb

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, part: slice | tuple[slice, slice]) -> np.ndarray:
        return self._to_rgb(self._pixels[part])

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.array(self[:], dtype, copy=copy)


# A function from an RGB image in [0, 1] to its upscaled rows, from top to bottom, in arrays of
# shape (any number, w s, 3), whose values may leave that range slightly.
RgbUpscale = Callable[[np.ndarray | RgbView], Iterator[np.ndarray]]


# Approximate number of pixels and largest number of rows of a band. A CPU is fastest if a layer's
# features fit its cache. The delay of the result (see `DVMSR.rows_late`) can cost up to one more
# band, which matters for small pictures.
BAND_PIXELS, MAX_BAND_ROWS = 8_192, 16


def rows_of_band(columns: int, pixels: int = BAND_PIXELS, most: int = MAX_BAND_ROWS) -> int:
    """The number of rows of a band of this width."""
    return min(most, max(1, pixels // columns))


def joined(
    upscale: RgbUpscale,
) -> Callable[[Float[np.ndarray, "1 h w 3"]], Float[np.ndarray, "1 H W 3"]]:
    """Returns a function of a whole image, as a batch of one, that joins the rows of `upscale`."""
    return lambda images: np.concatenate([*upscale(images[0])])[None]


def self_ensembled(upscale: RgbUpscale) -> RgbUpscale:
    """Returns a function that averages over the symmetries of an image."""

    def average(image: np.ndarray | RgbView) -> Iterator[np.ndarray]:
        yield average_over_symmetries(joined(upscale), np.asarray(image)[None])[0]

    return average


def average_over_symmetries(
    model: Callable[[Any], Any], images: Float[Any, "b h w 3"]
) -> Float[Any, "b H W 3"]:
    """The mean of the model's outputs for the eight flips and rotations of the images, undone.

    The images are NumPy's or JAX's arrays.
    """
    rot90 = images.__array_namespace__().rot90

    def outputs() -> Iterator[Any]:
        for turns in range(4):
            for flip in (False, True):
                x = rot90(images, turns, axes=(1, 2))
                y = model(x[:, :, ::-1] if flip else x)
                yield rot90(y[:, :, ::-1] if flip else y, -turns, axes=(1, 2))

    return functools.reduce(operator.add, outputs()) / 8
