"""MATLAB's bicubic imresize, with which the low-resolution files of benchmarks are made.

Keys' kernel with a = -0.5 (IEEE Trans. ASSP 29, 1981), widened by the scale when shrinking. The
files published for Set5 and Set14 are reproduced bit for bit. This depends on two details that are
easily missed: uint8 pictures are rounded after each of the two passes, and the outermost pixel
repeats beyond the border (MATLAB's releases since about 2016 mirror the picture there instead,
which changes only the outermost pixels of the result).
"""

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from jaxtyping import Float, Float64, UInt8
from scipy.sparse import csr_array


def resize(
    image: UInt8[np.ndarray, "h w c"] | Float[np.ndarray, "h w c"], height: int, width: int
) -> UInt8[np.ndarray, "{height} {width} c"] | Float64[np.ndarray, "{height} {width} c"]:
    """imresize(image, [height width], 'bicubic'); both sizes must be at least 1.

    Computed in float64. As in MATLAB, a uint8 image stays uint8, rounded (halves up) and clamped
    after each pass; a float image is neither rounded nor clamped.
    """
    sizes = (height, width)
    rounded = image.dtype == np.uint8
    # The order matters because of rounding: the axis that shrinks most first, rows before columns.
    for axis in sorted((0, 1), key=lambda axis: sizes[axis] / image.shape[axis]):
        lines = image.swapaxes(0, axis)
        weights = resampling(len(lines), sizes[axis])
        resized = weights @ lines.reshape(len(lines), -1)
        image = resized.reshape(sizes[axis], *lines.shape[1:]).swapaxes(0, axis)
        if rounded:
            image = np.clip(np.floor(image + 0.5), 0, 255).astype(np.uint8)
    return image


def resize_bands(
    bands: Iterable[Float[np.ndarray, "rows w c"]], h: int, height: int, width: int
) -> Iterator[Float[np.ndarray, "rows width c"]]:
    """`resize` in float32, for a float image of h rows that arrives, and is returned, in bands."""
    weights = resampling(h, height).astype(np.float32)
    weights.sum_duplicates()  # also sorts the indices
    starts, ends = weights.indptr[:-1], weights.indptr[1:]
    first_sources, last_sources = weights.indices[starts], weights.indices[ends - 1]
    columns, held, first, done = None, None, 0, 0
    for band in bands:
        if columns is None:
            columns = resampling(band.shape[1], width).astype(np.float32)
        lines = (columns @ band.swapaxes(0, 1).reshape(band.shape[1], -1)).astype(np.float32)
        lines = lines.reshape(width, len(band), -1).swapaxes(0, 1)
        held = lines if held is None else np.concatenate([held, lines])
        seen = first + len(held)
        ready = int(np.searchsorted(last_sources, seen))
        if ready > done:
            rows = weights[done:ready, first:seen] @ held.reshape(len(held), -1)
            yield rows.reshape(ready - done, width, -1)
            done = ready
            if done < height:
                held, first = held[first_sources[done] - first :], first_sources[done]


def modcrop(image: UInt8[np.ndarray, "h w 3"], scale: int) -> UInt8[np.ndarray, "hs ws 3"]:
    """Crops rows and columns at the end, so that height and width are multiples of the scale.

    Raises ValueError if nothing is left.
    """
    height, width = (size - size % scale for size in image.shape[:2])
    if not (height and width):
        raise ValueError(
            f"{image.shape[1]}x{image.shape[0]} pixels are too few to shrink by {scale}"
        )
    return image[:height, :width]


def downscale(image: UInt8[np.ndarray, "hs ws 3"], scale: int) -> UInt8[np.ndarray, "h w 3"]:
    """The low-resolution picture that belongs to a high-resolution one, cropped by `modcrop`."""
    image = modcrop(image, scale)
    return resize(image, image.shape[0] // scale, image.shape[1] // scale)


def upscale(image: UInt8[np.ndarray, "h w 3"], scale: int) -> UInt8[np.ndarray, "hs ws 3"]:
    """Bicubic upscaling, the baseline of every table."""
    return resize(image, image.shape[0] * scale, image.shape[1] * scale)


def _keys(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def resampling(
    n_in: int,
    n_out: int,
    kernel: Callable[[np.ndarray], np.ndarray] = _keys,
    radius: float = 2.0,
) -> csr_array:
    """(n_out, n_in) matrix that resizes a line of pixels.

    `kernel` must be zero beyond `radius`, but need not be normalised. It is widened if the line
    shrinks.
    """
    scale = n_out / n_in
    shrink = min(scale, 1.0)
    taps = math.ceil(2 * radius / shrink)
    # In pixels of the input. Pixel i covers [i, i + 1], so its centre is at i + 0.5.
    centres = (np.arange(n_out) + 0.5) / scale - 0.5
    first = np.floor(centres - radius / shrink).astype(int) + 1
    sources = first[:, None] + np.arange(taps)
    weights = kernel((sources - centres[:, None]) * shrink)
    weights /= weights.sum(axis=1, keepdims=True)
    # A repeated border pixel is listed several times in a row of the matrix; its weights add up.
    columns = np.clip(sources, 0, n_in - 1)
    row_starts = np.arange(n_out + 1) * taps
    return csr_array((weights.ravel(), columns.ravel(), row_starts), shape=(n_out, n_in))
