"""The scan in C++ for CPUs (native.cc), compiled by the system's compiler on first use.

This is the carried form of `chunked`, in hand-written loops. It can be differentiated only once.
"""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dvmsr_jax.kernels.native_library import NativeLibrary
from dvmsr_jax.kernels.selective_scan.inputs import Inputs

LIBRARY = NativeLibrary(
    Path(__file__).with_suffix(".cc"), ("SelectiveScan", "SelectiveScanGradient")
)
# Tokens per chunk, and channels per group in the backward pass. The four arrays with a chunk's
# states for one vector of channels should fit a core's second-level cache (128 KiB for n = 16 with
# AVX2). The sums over a vector's elements are computed once per group. Tuned on two cores.
CHUNK = 64
CHANNELS = 64

missing = LIBRARY.missing  # the reason why the scan cannot run here, or None


def selective_scan(
    inputs: Inputs, delta_softplus: bool
) -> tuple[Float[Array, "b l d"], Float[Array, "b d n"]]:
    """Returns (y, final state); see `op.selective_scan` for the contract."""
    return _scan(delta_softplus, inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(delta_softplus: bool, inputs: Inputs):
    return _call_scan(delta_softplus, inputs, keep_borders=False)[:2]


def _scan_forward(delta_softplus, inputs):
    y, end, borders = _call_scan(delta_softplus, inputs, keep_borders=True)
    return (y, end), (inputs, borders)


def _call_scan(delta_softplus, inputs, *, keep_borders):
    """y, the end state, and the states before each chunk, (b, k, n, d), or nothing."""
    (b, l, d), n = inputs.u.shape, inputs.A.shape[1]
    k = math.ceil(l / CHUNK) if keep_borders else 0
    scan = LIBRARY.function("SelectiveScan", (b, l, d), (b, n, d), (b, k, n, d))
    y, end, borders = scan(
        *_prepared(inputs),
        delta_softplus=delta_softplus,
        gated=inputs.z is not None,
        chunk=CHUNK,
    )
    return y.astype(inputs.u.dtype), end.mT, borders


def _scan_backward(delta_softplus, residuals, gradients):
    inputs, borders = residuals
    dout, dend = gradients
    prepared = _prepared(inputs)
    (b, l, d), n = inputs.u.shape, inputs.A.shape[1]
    # Per sequence for the weights, and per group of channels for B and C; summed below.
    groups = math.ceil(d / CHANNELS)
    shapes = Inputs(
        u=(b, l, d),
        delta=(b, l, d),
        A=(b, n, d),
        B=(groups, b, l, n),
        C=(groups, b, l, n),
        D=(b, d),
        z=prepared.z.shape,
        delta_bias=(b, d),
        initial_state=(b, n, d),
    )
    gradient = LIBRARY.function("SelectiveScanGradient", *shapes)
    found = gradient(
        *prepared[:-1],  # the borders begin with the initial state
        borders,
        dout.astype(jnp.float32),
        dend.mT,
        delta_softplus=delta_softplus,
        gated=inputs.z is not None,
        chunk=CHUNK,
        channels=CHANNELS,
    )
    found = Inputs(*found)
    found = found._replace(
        A=jnp.sum(found.A, axis=0).T,
        B=jnp.sum(found.B, axis=0),
        C=jnp.sum(found.C, axis=0),
        D=jnp.sum(found.D, axis=0),
        delta_bias=jnp.sum(found.delta_bias, axis=0),
        initial_state=found.initial_state.mT,
    )
    typed = (None if x is None else dx.astype(x.dtype) for x, dx in zip(inputs, found, strict=True))
    return (Inputs(*typed),)


_scan.defvjp(_scan_forward, _scan_backward)


def _prepared(inputs):
    """The arrays in the dtype and layout of native.cc."""
    z, bias = inputs.z, inputs.delta_bias
    inputs = inputs._replace(
        A=inputs.A.T,
        z=jnp.zeros(0) if z is None else z,
        delta_bias=jnp.zeros_like(inputs.D) if bias is None else bias,
        initial_state=inputs.initial_state.mT,
    )
    return Inputs(*(x.astype(jnp.float32) for x in inputs))
