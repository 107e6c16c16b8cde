"""Upscales pictures of all kinds: grey, colour, transparent, 8 and 16 bits, by any factor.

>>> from dvmsr_jax import Upscaler
>>> upscale = Upscaler()  # or Upscaler("x4-scratch"), Upscaler(scale=3)
>>> large = upscale(Image.open("photo.jpg"))
>>> large.save("photo_x4.png", **large.info)  # with ICC profile, DPI and EXIF
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, overload

import numpy as np
from jaxtyping import Float
from PIL import Image
from scipy.ndimage import maximum_filter, minimum_filter

from dvmsr_jax import bicubic
from dvmsr_jax.errors import UserError
from dvmsr_jax.pictures.reading import BandedFrame, Frame, from_pillow, to_pillow
from dvmsr_jax.registry import default_for
from dvmsr_jax.rgb import RgbUpscale, RgbView, self_ensembled

MAX_SCALE = 16

# Weights of red, green and blue in grey (ITU-R BT.601).
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


class PictureUpscaler:
    """Enlarges pictures of all kinds with a function for RGB pictures."""

    def __init__(
        self,
        upscale: RgbUpscale,
        model_scale: int,
        *,
        scale: int | float | None = None,
        holds_result: bool = False,
    ):
        """
        Args:
            upscale: a function made by `inference`.
            model_scale: its enlargement factor.
            scale: the enlargement factor for pictures, above 0 and at most MAX_SCALE. If it differs
                from `model_scale`, the model's output is resized.
            holds_result: whether `upscale` holds the whole result in memory, in float32.

        Raises:
            UserError: `scale` is out of range.
        """
        scale = model_scale if scale is None else scale
        if not 0 < scale <= MAX_SCALE:
            raise UserError(f"scale is {scale:g}, not within (0, {MAX_SCALE}]")
        self._upscale, self._model_scale, self.scale = upscale, model_scale, float(scale)
        self.holds_result = holds_result

    @overload
    def __call__(self, picture: Image.Image) -> Image.Image: ...

    @overload
    def __call__(self, picture: np.ndarray) -> np.ndarray: ...

    def __call__(self, picture: object) -> Image.Image | np.ndarray:
        """Enlarges a Pillow image or an array.

        Args:
            picture: a Pillow image with 8 bits per sample, or grey with 16 bits (its current frame,
                turned upright by its EXIF orientation); or an array of shape (h, w) or (h, w, c):
                c = 1 is grey, 2 grey and alpha, 3 RGB, and 4 RGB and alpha. Arrays are uint8,
                uint16, or floating point in [0, 1] up to rounding.

        Returns:
            For an image, one of mode L, LA, RGB, RGBA or I;16, with ICC profile, DPI and EXIF in
            its `info`. For an array, one of the same type and number of axes.

        Raises:
            UserError: the picture is of another kind, or has values out of range.
        """
        if isinstance(picture, Image.Image):
            frame = self.enlarge(from_pillow(picture))
            image = to_pillow(_joined(frame.bands, frame.shape, frame.dtype))
            metadata = frame.metadata
            exif = metadata.exif_bytes()
            kept = {"icc_profile": metadata.icc, "dpi": metadata.dpi, "exif": exif}
            image.info |= {key: value for key, value in kept.items() if value}
            return image
        if not isinstance(picture, np.ndarray):
            kind = type(picture).__name__
            raise UserError(f"a {kind} is not a picture: expected a Pillow image or a NumPy array")
        picture = np.asarray(picture)  # a np.matrix would stay two-dimensional
        pixels = picture[:, :, None] if picture.ndim == 2 else picture
        if pixels.ndim != 3 or not 1 <= pixels.shape[2] <= 4 or 0 in pixels.shape:
            raise UserError(
                f"an array of shape {picture.shape} is not a picture: expected (h, w) or (h, w, c) "
                "with c from 1 to 4"
            )
        _check_values(pixels)
        shape = (*self._enlarged(*pixels.shape[:2]), pixels.shape[2])
        enlarged = _joined(self._bands(pixels), shape, pixels.dtype)
        return enlarged[:, :, 0] if picture.ndim == 2 else enlarged

    def enlarge(self, frame: Frame) -> BandedFrame:
        """Enlarges a frame. The pixels are computed during iteration over the bands."""
        *size, channels = frame.pixels.shape
        height, width = self._enlarged(*size)
        metadata = frame.metadata.scaled(self.scale, height, width)
        bands = self._bands(frame.pixels)
        return BandedFrame((height, width, channels), frame.pixels.dtype, bands, metadata)

    def _enlarged(self, h: int, w: int) -> tuple[int, int]:
        return max(round(h * self.scale), 1), max(round(w * self.scale), 1)

    def _bands(self, pixels: np.ndarray) -> Iterator[np.ndarray]:
        """Yields the enlarged pixels in bands of rows, with the same dtype."""
        dtype = pixels.dtype
        for band in self._enlarge_values(pixels):
            band = np.clip(band, 0, 1)
            if dtype.kind == "u":
                band = np.rint(band * np.iinfo(dtype).max)
            yield band.astype(dtype)

    def _enlarge_values(self, pixels: np.ndarray) -> Iterator[Float[np.ndarray, "rows W channels"]]:
        if pixels.shape[2] in (1, 3):
            yield from self._enlarge_colours(pixels, lambda values: values)
        elif _values(pixels[:, :, -1].min(keepdims=True)).item() == 1:
            for band in self._enlarge_colours(pixels, lambda values: values[:, :, :-1]):
                yield np.pad(band, ((0, 0), (0, 0), (0, 1)), constant_values=1)
        else:
            yield from self._enlarge_transparent(pixels)

    def _enlarge_transparent(
        self, pixels: np.ndarray
    ) -> Iterator[Float[np.ndarray, "rows W channels"]]:
        """Enlarges the picture blended with black, and blended with white.

        Alpha follows from the difference of the two results, and the colour from alpha. On black
        and on white, the enlarged picture then looks like the enlarged blend, without fringes.
        """

        def on_black(values: np.ndarray) -> np.ndarray:
            return values[:, :, :-1] * values[:, :, -1:]

        def on_white(values: np.ndarray) -> np.ndarray:
            return on_black(values) + (1 - values[:, :, -1:])

        h, w, _ = pixels.shape
        height, width = self._enlarged(h, w)
        columns = ((np.arange(width) + 0.5) * (w / width)).astype(int)
        reach = math.ceil(max(1, 1 / self.scale))  # alpha is bounded by the pixels this near
        window = (2 * reach + 1, 2 * reach + 1, 1)
        bottom = 0
        for black, white in zip(
            self._enlarge_colours(pixels, on_black),
            self._enlarge_colours(pixels, on_white),
            strict=True,
        ):
            top, bottom = bottom, bottom + len(black)
            rows = ((np.arange(top, bottom) + 0.5) * (h / height)).astype(int)
            # Opaque and clear areas stay exactly that, and alpha does not overshoot at edges.
            first = max(rows[0] - reach, 0)
            alpha = _values(pixels[first : rows[-1] + reach + 1, :, -1:])
            area = np.ix_(rows - first, columns)
            lowest = minimum_filter(alpha, window)[area]
            highest = maximum_filter(alpha, window)[area]
            black, white = np.clip(black, 0, 1), np.clip(white, 0, 1)
            coverage = 1 - (white - black).mean(axis=2, keepdims=True)
            coverage = np.clip(coverage, lowest, highest)
            colour = np.divide(black, coverage, out=np.zeros_like(black), where=coverage > 0)
            yield np.concatenate([colour, coverage], axis=2)

    def _enlarge_colours(
        self, pixels: np.ndarray, colours: Callable[[np.ndarray], np.ndarray]
    ) -> Iterator[Float[np.ndarray, "rows W colours"]]:
        """Yields enlarged grey or RGB bands.

        `colours` extracts grey or RGB from any part of the pixels, given as values in [0, 1].
        """

        def to_rgb(part: np.ndarray) -> np.ndarray:
            seen = colours(_values(part))
            return np.broadcast_to(seen, (*seen.shape[:2], 3))

        bands = self._upscale(RgbView(pixels, to_rgb))
        h, w, channels = pixels.shape
        if self.scale != self._model_scale:
            bands = bicubic.resize_bands(bands, h * self._model_scale, *self._enlarged(h, w))
        for band in bands:
            yield band @ _LUMA[:, None] if channels < 3 else band


class Upscaler(PictureUpscaler):
    """Enlarges pictures of all kinds with a model.

    It may be used from several threads at once.
    """

    def __init__(
        self,
        weights: str | os.PathLike[str] | None = None,
        *,
        scale: int | float | None = None,
        self_ensemble: bool = False,
        tile: int | None = None,
        overlap: int | None = None,
        precision: Literal["float32", "bfloat16"] = "float32",
    ):
        """Loads a model.

        Args:
            weights: a name (see `registry`), a checkpoint directory, a .safetensors file or a
                published .pth file. None: the project's weights for this scale.
            scale: enlargement factor, not necessarily an integer. None: the model's.
            self_ensemble: average over the eight flips and rotations of each picture: slightly
                better, eight times slower, and the result is held in memory in float32.
            tile: upscale in square tiles of this side, in pixels. None: in bands of rows, without
                approximating, in as little memory; for bidirectional models, in tiles of 256.
            overlap: overlap of the tiles in pixels. None: 16.
            precision: see `config.Compute`.

        Raises:
            UserError: the weights cannot be read, or an argument is invalid or has no effect.
        """
        # These import JAX, which a PictureUpscaler does not need.
        from dvmsr_jax.config import Compute
        from dvmsr_jax.inference import make_streamer, make_tiler
        from dvmsr_jax.pretrained import load_model

        if weights is None:
            weights = default_for(scale)
        model = load_model(weights, compute=Compute(precision=precision))
        if tile is None and model.config.bidirectional:
            tile = 256
        if tile is not None:
            upscale = make_tiler(model, tile=tile, overlap=16 if overlap is None else overlap)
        elif overlap is None:
            upscale = make_streamer(model)
        else:
            raise UserError("--overlap has no effect without tiles: add --tile, or leave it out")
        if self_ensemble:
            upscale = self_ensembled(upscale)
        super().__init__(upscale, model.config.scale, scale=scale, holds_result=self_ensemble)

    @classmethod
    def from_pretrained(cls, weights: str | os.PathLike[str], **options: Any) -> "Upscaler":
        """Equivalent to `Upscaler(weights, **options)`."""
        return cls(weights, **options)


def _check_values(pixels: np.ndarray) -> None:
    """Raises UserError for pixels of an unsupported type, or out of range."""
    dtype = pixels.dtype
    if not (dtype.kind == "f" or (dtype.kind == "u" and dtype.itemsize <= 2)):
        raise UserError(f"pixels of type {dtype}: expected uint8, uint16 or floating point")
    lowest, highest = pixels.min(), pixels.max()
    if not (np.isfinite(lowest) and np.isfinite(highest)):  # both are NaN if any value is
        raise UserError("the array contains NaN or infinity: replace those values first")
    if dtype.kind == "f" and not (lowest >= -_ROUNDING and highest <= 1 + _ROUNDING):
        raise UserError(
            f"floating-point values range from {lowest:g} to {highest:g}, and must lie in [0, 1]:"
            " divide them by the value of white, or clip them"
        )


_ROUNDING = 1e-3  # how far values may lie outside [0, 1]; float16 needs this much


def _values(pixels: np.ndarray) -> np.ndarray:
    """Pixels of any type as float32 values in [0, 1]."""
    values = pixels.astype(np.float32)
    return values / np.float32(np.iinfo(pixels.dtype).max) if pixels.dtype.kind == "u" else values


def _joined(bands: Iterable[np.ndarray], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Joins bands into an array of this shape, holding only one of them at a time."""
    whole = np.empty(shape, dtype)
    bottom = 0
    for band in bands:
        top, bottom = bottom, bottom + len(band)
        whole[top:bottom] = band
    return whole
