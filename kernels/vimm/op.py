"""The public function and its arguments; vimm.h computes it.

Names of dimensions:

    b  batch      l  tokens      c  channels      d  inner channels      n  states per channel
    r  rank of the step sizes    k  taps of the causal convolution, and h = k - 1
"""

import functools
import math
import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dvmsr_jax.kernels.native_library import SUFFIXES, Factors, NativeLibrary

LIBRARY = NativeLibrary(
    Path(__file__).with_name("vimm.cc"),
    ("FusedViMMFloat32", "FusedViMMBFloat16", "FusedViMMGradient"),
)
# As in cpp/matrix.h and cpp/factors.h: tokens in a piece, and channels in a block.
PIECE, BLOCK = 96, 16

missing = LIBRARY.missing


def gradient_is_fast(b: int, factors: Factors) -> bool:
    """Whether `vimm_of_images` gives the gradient of b images faster than the code in JAX.

    It takes one thread for each image, and is as fast with half of the threads as JAX with all.
    """
    return factors == "float32" and 2 * b >= _threads()


def _threads() -> int:
    """The number of threads that XLA's pool has."""
    if hasattr(os, "sched_getaffinity"):  # only on some systems
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Weights(NamedTuple):
    """The parameters of a ViMM, float32. Products have no bias; u comes before the gate."""

    norm_scale: Float[Array, " c"]
    norm_bias: Float[Array, " c"]
    in_proj: Float[Array, "c 2*d"]
    conv_kernel: Float[Array, "k d"]
    conv_bias: Float[Array, " d"]
    x_proj: Float[Array, "d r+2*n"]
    dt_proj: Float[Array, "r d"]
    dt_bias: Float[Array, " d"]
    A: Float[Array, "d n"]
    D: Float[Array, " d"]
    out_proj: Float[Array, "d c"]


def vimm(
    tokens: Float[Array, "b l c"],
    weights: Weights,
    previous: Float[Array, "b h d"],
    state: Float[Array, "b d n"],
    *,
    first: Int[Array, ""],
    height: Int[Array, ""],
    width: Int[Array, ""],
    columns: int,
    epsilon: float,
    factors: Factors = "float32",
) -> tuple[Float[Array, "b l c"], Float[Array, "b h d"], Float[Array, "b d n"]]:
    """LayerNorm, then the Mamba mixer, for the tokens of a band of rows; not differentiable.

    Args:
        tokens: the band's rows, each of `columns` tokens; all arrays are float32.
        weights: the parameters.
        previous: u of the tokens just before the band, unconvolved; zeros above the image.
        state: the scan's state before the band; zeros above the image.
        first: index in the image of the band's first row, int32; negative above the image.
        height: of the image, int32. Tokens outside the image do not take part.
        width: of the image, int32.
        columns: the band's width, at least that of the image.
        epsilon: LayerNorm's.
        factors: type to which the factors of products are rounded; sums are float32.

    Returns:
        (the result, zero outside the image; `previous` and `state` for the band below).

    Raises:
        NativeUnavailableError: it cannot run here; `missing()` gives the reason.
    """
    place = first, height, width
    out, last, end, _, _ = _call(
        tokens, weights, previous, state, place, columns, epsilon, factors, keep=False
    )
    return out, last, end


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def vimm_of_images(
    tokens: Float[Array, "b l c"], weights: Weights, epsilon: float
) -> Float[Array, "b l c"]:
    """`vimm` for whole images, with float32 factors; differentiable once, in reverse mode.

    Raises NativeUnavailableError.
    """
    return _call_for_images(tokens, weights, epsilon, keep=False)[0]


def _forward(tokens, weights, epsilon):
    out, _, _, tails, borders = _call_for_images(tokens, weights, epsilon, keep=True)
    return out, (tokens, weights, tails, borders)


def _backward(epsilon, residuals, dout):
    tokens, weights, tails, borders = residuals
    shapes = tokens.shape, *((len(tokens), *weight.shape) for weight in weights)
    gradient = LIBRARY.function("FusedViMMGradient", *shapes)
    dtokens, *of_sequences = gradient(
        tokens, *weights, tails, borders, dout, epsilon=np.float32(epsilon)
    )
    return dtokens, Weights(*(jnp.sum(x, axis=0) for x in of_sequences))


vimm_of_images.defvjp(_forward, _backward)


def _call_for_images(tokens, weights, epsilon, *, keep):
    (b, l, _), (d, n), h = tokens.shape, weights.A.shape, len(weights.conv_kernel) - 1
    previous, state = jnp.zeros((b, h, d), jnp.float32), jnp.zeros((b, d, n), jnp.float32)
    row = jnp.int32(0), jnp.int32(1), jnp.int32(l)
    return _call(tokens, weights, previous, state, row, l, epsilon, "float32", keep=keep)


def _call(tokens, weights, previous, state, place, columns, epsilon, factors, *, keep):
    """(result, previous, state, and, with `keep`, those before each piece for the gradient)."""
    (b, l, _), (d, n), h = tokens.shape, weights.A.shape, previous.shape[1]
    blocks = (b, math.ceil(l / PIECE), math.ceil(d / BLOCK)) if keep else (0, 0, 0)
    shapes = tokens.shape, previous.shape, state.shape, (*blocks, h, BLOCK), (*blocks, n, BLOCK)
    function = LIBRARY.function(f"FusedViMM{SUFFIXES[factors]}", *shapes)
    return function(
        tokens,
        *weights,
        previous,
        state,
        *place,
        columns=columns,
        epsilon=np.float32(epsilon),
    )
