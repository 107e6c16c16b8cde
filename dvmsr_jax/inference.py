"""Upscaling pictures with a model: whole, in bands of rows, or in tiles."""

import functools
import itertools
import operator
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from dvmsr_jax.bands import Band
from dvmsr_jax.errors import UserError
from dvmsr_jax.images import to_uint8
from dvmsr_jax.model import DVMSR

# A function from an RGB image in [0, 1], (h, w, 3), to its upscaled rows from top to bottom in
# arrays of (any number, w s, 3), which may leave that range slightly.
Upscale = Callable[[np.ndarray], Iterator[np.ndarray]]


def make_upscaler(
    model: DVMSR, *, self_ensemble: bool = False
) -> Callable[[UInt8[np.ndarray, "h w 3"]], UInt8[np.ndarray, "H W 3"]]:
    """A function from RGB pictures to RGB pictures, `scale` times larger, compiled once a size.

    With `self_ensemble` it averages the results of the eight flips and turns, turned back.
    """
    graph, parameters = nnx.split(model)

    @jax.jit
    def run(parameters, image):
        model = nnx.merge(graph, parameters)
        return average_over_symmetries(model, image) if self_ensemble else model(image)

    def upscale(image: np.ndarray) -> np.ndarray:
        batch = jnp.asarray(image[None], jnp.float32) / 255
        return to_uint8(np.asarray(run(parameters, batch)[0]))

    return upscale


def average_over_symmetries(
    model: Callable[[Array], Array], images: Float[Array, "b h w 3"]
) -> Float[Array, "b H W 3"]:
    """The mean of the model's answers to the eight flips and turns of the images, turned back."""

    def answers() -> Iterator[Array]:
        for turns in range(4):
            for flip in (False, True):
                x = jnp.rot90(images, turns, axes=(1, 2))
                y = model(x[:, :, ::-1] if flip else x)
                yield jnp.rot90(y[:, :, ::-1] if flip else y, -turns, axes=(1, 2))

    return functools.reduce(operator.add, answers()) / 8


def make_streamer(model: DVMSR, *, band_rows: int = 32) -> Upscale:
    """Upscales in bands of rows, exactly, in memory that does not grow with the image's height.

    Compiled once a width. Raises UserError if the model is bidirectional.
    """
    if model.config.bidirectional:
        raise UserError("a bidirectional model reads a picture from both ends: upscale it in tiles")
    graph, parameters = nnx.split(model)
    s = model.config.scale

    def step(parameters, carried, rows, first, height):
        """(what the next band needs, the upscaled rows, the place of the first among the rows)."""
        band = Band(first, height, rows.shape[1], carried)
        upscaled = nnx.merge(graph, parameters)(rows[None], band=band)[0]
        return band.left, upscaled, band.first

    @functools.cache
    def shapes_carried(w):
        rows = jax.ShapeDtypeStruct((band_rows, w, 3), jnp.float32)
        return jax.eval_shape(step, parameters, None, rows, 0, 0)[0]

    compiled_step = jax.jit(step, donate_argnums=1)

    def stream(image: Float[np.ndarray, "h w 3"]) -> Iterator[Float[np.ndarray, "rows ws 3"]]:
        h, w, _ = image.shape
        carried = [jnp.zeros(x.shape, x.dtype) for x in shapes_carried(w)]
        done = 0
        for first in itertools.count(0, band_rows):
            rows = image[first : first + band_rows]
            rows = np.pad(rows, ((0, band_rows - len(rows)), (0, 0), (0, 0)))
            carried, upscaled, place = compiled_step(parameters, carried, rows, first, h)
            start, end = done - int(place), min(band_rows, h - int(place))
            if start < end:
                yield np.asarray(upscaled)[start * s : end * s]
                done += end - start
            if done == h:
                return

    return stream
