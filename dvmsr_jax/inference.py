"""Upscaling whole pictures with a model."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from dvmsr_jax.images import to_uint8
from dvmsr_jax.model import DVMSR


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
    outputs = []
    for turns in range(4):
        for flip in (False, True):
            x = jnp.rot90(images, turns, axes=(1, 2))
            y = model(x[:, :, ::-1] if flip else x)
            outputs.append(jnp.rot90(y[:, :, ::-1] if flip else y, -turns, axes=(1, 2)))
    return sum(outputs[1:], outputs[0]) / len(outputs)
