"""Upscaling pictures with a model: whole, in bands of rows, or in tiles."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from dvmsr_jax.bands import Band
from dvmsr_jax.errors import UserError
from dvmsr_jax.model import DVMSR, Network
from dvmsr_jax.rgb import RgbUpscale, RgbView, average_over_symmetries, joined, rows_of_band

# As `rgb.BAND_PIXELS` and `MAX_BAND_ROWS`: an accelerator takes as long for a small band as for a
# somewhat larger one (these two values are guesses, not measured).
ACCELERATOR_BAND_PIXELS, ACCELERATOR_MAX_BAND_ROWS = 131_072, 128

Item = TypeVar("Item")
AnyArray = TypeVar("AnyArray", Array, np.ndarray)


def upscale_pixels(
    model: Callable[[AnyArray], AnyArray],
    pictures: UInt8[AnyArray, "b h w 3"],
    *,
    self_ensemble: bool,
) -> UInt8[AnyArray, "b H W 3"]:
    """`upscale_batch` for 8-bit pictures; the result is clamped and rounded to 8 bits."""
    xp = pictures.__array_namespace__()  # NumPy's or JAX's
    images = pictures.astype(np.float32) / np.float32(255)
    upscaled = upscale_batch(model, images, self_ensemble=self_ensemble)
    return xp.rint(xp.clip(upscaled, 0, 1) * 255).astype(np.uint8)


def upscale_batch(
    model: Callable[[AnyArray], AnyArray],
    images: Float[AnyArray, "b h w 3"],
    *,
    self_ensemble: bool,
) -> Float[AnyArray, "b H W 3"]:
    """The model's output for the images, averaged over their symmetries if `self_ensemble`."""
    return average_over_symmetries(model, images) if self_ensemble else model(images)


def make_streamer(model: DVMSR, *, band_rows: int | None = None, width_bits: int = 4) -> RgbUpscale:
    """Upscales in bands of rows, in memory that does not grow with the image's height.

    The result equals the model's output for the whole image up to float rounding. One compiled step
    serves images of any height and of all widths that agree when rounded up to `width_bits`
    significant bits. Raises UserError if the model is bidirectional.
    """
    if not model.streams:
        raise UserError("a bidirectional model reads a picture from both ends: upscale it in tiles")
    graph, parameters = nnx.split(model)
    s, late = model.config.scale, model.rows_late

    def step(parameters, *arguments):
        return band_step(nnx.merge(graph, parameters), *arguments)

    @functools.cache
    def shapes_carried(rows, columns):
        image = jax.ShapeDtypeStruct((rows, columns, 3), jnp.float32)
        place = jax.ShapeDtypeStruct((), jnp.int32)
        return jax.eval_shape(step, parameters, None, image, place, place, place)[0]

    compiled_step = jax.jit(step, donate_argnums=1)

    def stream(
        image: Float[np.ndarray, "h w 3"] | Float[RgbView, "h w 3"],
    ) -> Iterator[Float[np.ndarray, "rows ws 3"]]:
        h, w, _ = image.shape
        columns = _columns(w, width_bits)
        count = band_rows or _rows_of_band(columns)

        def outputs() -> Iterator[tuple[int, Array]]:
            """(position of the first row, the upscaled rows); JAX may still be computing them."""
            shapes = shapes_carried(count, columns)
            carried = {name: jnp.zeros(x.shape, x.dtype) for name, x in shapes.items()}
            for first in range(0, h + late, count):
                rows = image[first : first + count]
                rows = np.pad(rows, ((0, count - len(rows)), (0, columns - w), (0, 0)))
                carried, upscaled, _ = compiled_step(parameters, carried, rows, first, h, w)
                yield first - late, upscaled

        for place, upscaled in _one_ahead(outputs()):
            start, end = max(0, -place), min(count, h - place)
            if start < end:
                yield np.asarray(upscaled)[start * s : end * s, : w * s]

    return stream


def band_step(
    model: DVMSR,
    carried: Mapping[str, Array] | None,
    rows: Float[Array, "rows columns 3"],
    first: Int[Array, ""],
    height: Int[Array, ""],
    width: Int[Array, ""],
) -> tuple[dict[str, Array], Float[Array, "_ _ 3"], Int[Array, ""]]:
    """The arrays for the next band, the upscaled rows, and the index of the row they begin with.

    See `Band` for the arguments.
    """
    band = Band(first, height, width, rows.shape[1], carried)
    upscaled = model(rows[None], band=band)[0]
    return band.left, upscaled, first - model.rows_late


def make_upscaler(
    model: Network, *, self_ensemble: bool = False
) -> Callable[[UInt8[np.ndarray, "h w 3"]], UInt8[np.ndarray, "H W 3"]]:
    """Returns a function that enlarges RGB pictures by the model's scale.

    It streams, so that pictures of many sizes share a program. Widths are rounded up coarsely: for
    a benchmark, compiling more programs takes longer than computing more columns. For models that
    cannot be streamed, such as bidirectional ones, one program is compiled per size. With
    `self_ensemble`, it averages over the eight flips and rotations of the picture.
    """
    if isinstance(model, DVMSR) and model.streams:
        whole = joined(make_streamer(model, width_bits=2))
    else:
        whole = make_whole(model)
    return lambda picture: upscale_pixels(whole, picture[None], self_ensemble=self_ensemble)[0]


def make_whole(
    model: Network,
) -> Callable[[Float[np.ndarray, "b h w 3"]], Float[np.ndarray, "b H W 3"]]:
    """Returns a function that enlarges images whole, compiled once per size."""
    graph, parameters = nnx.split(model)
    run = jax.jit(lambda parameters, images: nnx.merge(graph, parameters)(images))
    return lambda images: np.asarray(run(parameters, images))


def make_tiler(model: DVMSR, *, tile: int, overlap: int) -> RgbUpscale:
    """Upscales in squares of `tile` pixels, which fade into each other where they overlap.

    The result approximates the model's output for the whole image. This is for bidirectional
    models, or if even a band needs too much memory. Compiled once, and again for images smaller
    than a tile. Raises UserError if the overlap is not smaller than the tile.
    """
    if not 0 <= overlap < tile:
        raise UserError(f"tiles of {tile} pixels cannot overlap by {overlap}")
    graph, parameters = nnx.split(model)
    s = model.config.scale

    @jax.jit
    def run(parameters, image):
        return nnx.merge(graph, parameters)(image[None])[0]

    def upscale(
        image: Float[np.ndarray, "h w 3"] | Float[RgbView, "h w 3"],
    ) -> Iterator[Float[np.ndarray, "rows ws 3"]]:
        h, w, _ = image.shape
        tops, weights_down = _tiles_along(h, tile, overlap, s)
        lefts, weights_across = _tiles_along(w, tile, overlap, s)
        begun = np.zeros((0, w * s, 3), np.float32)  # rows that the tiles above overlap
        for top, below, down in zip(tops, [*tops[1:], h], weights_down, strict=True):
            rows = np.zeros((len(down), w * s, 3), np.float32)
            rows[: len(begun)] = begun
            for left, across in zip(lefts, weights_across, strict=True):
                part = image[top : top + tile, left : left + tile]
                weights = (down[:, None] * across)[:, :, None]
                upscaled = np.asarray(run(parameters, part))
                rows[:, left * s : left * s + len(across)] += weights * upscaled
            done = (below - top) * s
            yield rows[:done]
            begun = rows[done:]

    return upscale


def _tiles_along(
    size: int, tile: int, overlap: int, scale: int
) -> tuple[list[int], list[np.ndarray]]:
    """The start of each tile along an axis, and the weight of each of its upscaled pixels.

    The tiles overlap by at least `overlap`. At every pixel, the tiles' weights add up to 1.
    """
    count = 1 if size <= tile else math.ceil((size - overlap) / (tile - overlap))
    tile = min(tile, size)
    starts = np.linspace(0, size - tile, count).round().astype(int).tolist()
    from_start = np.arange(tile * scale) + 0.5
    from_border = np.minimum(from_start, from_start[::-1])
    rising = np.minimum(from_border, max(overlap * scale, 1))
    total = np.zeros(size * scale)
    for start in starts:
        total[start * scale :][: len(rising)] += rising
    shares = [rising / total[start * scale :][: len(rising)] for start in starts]
    return starts, [share.astype(np.float32) for share in shares]


def _one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Yields each item only after requesting the next, which JAX can compute in the meantime."""
    ahead = next(items)
    for item in items:
        yield ahead
        ahead = item
    yield ahead


def _rows_of_band(columns: int) -> int:
    if jax.default_backend() == "cpu":
        return rows_of_band(columns)
    return rows_of_band(columns, ACCELERATOR_BAND_PIXELS, ACCELERATOR_MAX_BAND_ROWS)


def _columns(width: int, bits: int) -> int:
    """The width rounded up to this many significant bits.

    Four bits add 4% on average, and at most eight programs are compiled for each doubling of the
    width. Two bits add 18%, and at most two are compiled.
    """
    unit = 1 << max(width.bit_length() - bits, 0)
    return -(-width // unit) * unit
