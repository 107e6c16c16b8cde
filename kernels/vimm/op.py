"""The public function and its arguments; vimm.h computes it.

Names of dimensions:

    b  batch      l  tokens      c  channels      d  inner channels      n  states per channel
    r  rank of the step sizes    k  taps of the causal convolution, and h = k - 1
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from dvmsr_jax.kernels.native_library import SUFFIXES, Factors, NativeLibrary

LIBRARY = NativeLibrary(
    Path(__file__).with_name("vimm.cc"), ("FusedViMMFloat32", "FusedViMMBFloat16")
)

missing = LIBRARY.missing


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
    shapes = tokens.shape, previous.shape, state.shape
    out, last, end = LIBRARY.function(f"FusedViMM{SUFFIXES[factors]}", *shapes)(
        tokens,
        *weights,
        previous,
        state,
        first,
        height,
        width,
        columns=columns,
        epsilon=np.float32(epsilon),
    )
    return out, last, end
