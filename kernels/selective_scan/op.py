"""The public function: contract, argument checks and choice of implementation.

Shapes throughout this package:

    b  batch            l  tokens, in scan order       d  channels            n  states per channel
"""

import functools
import logging
from collections.abc import Callable
from typing import Literal, TypeAlias, get_args, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dvmsr_jax.kernels.selective_scan import associative, chunked, native, sequential, triton_scan
from dvmsr_jax.kernels.selective_scan.inputs import Inputs

log = logging.getLogger(__name__)

Implementation: TypeAlias = Literal[
    "auto",
    "sequential",
    "associative",
    "chunked",
    "chunked-carried",
    "chunked-parallel",
    "native",
    "triton",
]

_FUNCTIONS: dict[str, Callable[..., tuple[Array, Array]]] = {
    "sequential": sequential.selective_scan,
    "associative": associative.selective_scan,
    "chunked-carried": functools.partial(chunked.selective_scan, parallel=False),
    "chunked-parallel": functools.partial(chunked.selective_scan, parallel=True),
    "native": native.selective_scan,
    "triton": triton_scan.selective_scan,
}
# Implementations that cannot run everywhere.
_PARTICULAR = {"native": native, "triton": triton_scan}


@no_type_check  # `_check_arguments` gives better messages
def selective_scan(
    u: Float[Array, "b l d"],
    delta: Float[Array, "b l d"],
    A: Float[Array, "d n"],
    B: Float[Array, "b l n"],
    C: Float[Array, "b l n"],
    D: Float[Array, " d"],
    *,
    z: Float[Array, "b l d"] | None = None,
    delta_bias: Float[Array, " d"] | None = None,
    delta_softplus: bool = False,
    initial_state: Float[Array, "b d n"] | None = None,
    return_final_state: bool = False,
    implementation: Implementation = "auto",
) -> Float[Array, "b l d"] | tuple[Float[Array, "b l d"], Float[Array, "b d n"]]:
    """Runs the selective state-space recurrence over `l` tokens.

        delta_t = softplus(delta_t + delta_bias)            (bias and softplus optional)
        h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t      h_0 = initial_state or 0
        y_t = (C_t . h_t + D u_t) silu(z_t)                 (gate where z is given)

    Both outputs are differentiable with respect to every array: once in "native" and "triton", any
    number of times in the others. A sequence may be cut anywhere, with the final state of one part
    as the initial state of the next.

    Args:
        u: input; like `delta`, `B`, `C` and `z`, float32 or bfloat16 (may be mixed).
        delta: step sizes before bias and softplus; non-negative if `delta_softplus` is False.
        A: decay rates, negative; like `D`, `delta_bias` and `initial_state`, float32.
        B: input projection of each token.
        C: output projection of each token.
        D: skip weight of each channel.
        z: gate before its silu.
        delta_bias: added to `delta`.
        delta_softplus: apply softplus to the biased `delta`.
        initial_state: the state before the first token; zeros if None.
        return_final_state: also return the state after the last token.
        implementation: "sequential" (the specification), "associative", "chunked" (short for
            "chunked-carried" on CPUs and "chunked-parallel" elsewhere), "native" (C++, on CPUs
            with a compiler), "triton" (on NVIDIA GPUs), or "auto": one of the last two if it can
            run, otherwise "chunked".

    Returns:
        y in u's dtype, or (y, final state in float32). State and sums are float32 throughout.

    Raises:
        TypeError: an argument has a dtype outside the contract.
        ValueError: an argument has the wrong shape, or `implementation` is unknown.
        RuntimeError: `implementation` is "native" or "triton", which cannot run here.
    """
    _check_arguments(u, delta, A, B, C, D, z, delta_bias, initial_state)
    if initial_state is None:
        initial_state = jnp.zeros((u.shape[0], *A.shape), jnp.float32)
    function = _FUNCTIONS[_resolve(implementation)]
    inputs = Inputs(u, delta, A, B, C, D, z, delta_bias, initial_state)
    y, final_state = function(inputs, delta_softplus)
    return (y, final_state) if return_final_state else y


def missing(implementation: str) -> str | None:
    """The reason why this implementation cannot run here; None if it can."""
    module = _PARTICULAR.get(implementation)
    return None if module is None else module.missing()


def _resolve(implementation: str) -> str:
    """The key in _FUNCTIONS that `implementation` stands for on the current platform."""
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"selective_scan: implementation is {implementation!r}, expected one of "
            + ", ".join(repr(name) for name in get_args(Implementation))
        )
    if lack := missing(implementation):
        raise RuntimeError(f"selective_scan: implementation {implementation!r} cannot run: {lack}")
    if implementation not in ("auto", "chunked"):
        return implementation
    device = jax.config.values["jax_default_device"]  # a Device, a platform's name, or None
    platform = getattr(device, "platform", device) or jax.default_backend()
    if implementation == "auto" and platform in ("gpu", "cuda"):
        lack = missing("triton")
        if lack is None:
            return "triton"
        _log_once(f"selective_scan runs without its Triton kernels, slower: {lack}")
    if platform != "cpu":
        return "chunked-parallel"
    if implementation == "auto":
        lack = missing("native")
        if lack is None:
            return "native"
        _log_once(f"selective_scan runs without its C++ scan, slower: {lack}")
    return "chunked-carried"


@functools.cache
def _log_once(message: str) -> None:
    log.warning(message)


def _check_arguments(u, delta, A, B, C, D, z, delta_bias, initial_state) -> None:
    if getattr(u, "ndim", None) != 3:
        raise ValueError(f"selective_scan: u has shape {np.shape(u)}, expected (b, l, d)")
    if getattr(A, "ndim", None) != 2:
        raise ValueError(f"selective_scan: A has shape {np.shape(A)}, expected (d, n)")
    b, l, d = u.shape
    sizes = {"b": b, "l": l, "d": d, "n": A.shape[1]}
    if l == 0:
        raise ValueError(f"selective_scan: u has shape {u.shape}, expected at least one token")

    activations, parameters = (jnp.float32, jnp.bfloat16), (jnp.float32,)
    for name, x, dims, dtypes in (
        ("u", u, "bld", activations),
        ("delta", delta, "bld", activations),
        ("A", A, "dn", parameters),
        ("B", B, "bln", activations),
        ("C", C, "bln", activations),
        ("D", D, "d", parameters),
        ("z", z, "bld", activations),
        ("delta_bias", delta_bias, "d", parameters),
        ("initial_state", initial_state, "bdn", parameters),
    ):
        if x is None and name in ("z", "delta_bias", "initial_state"):
            continue
        expected = tuple(sizes[dim] for dim in dims)
        if np.shape(x) != expected:
            raise ValueError(
                f"selective_scan: {name} has shape {np.shape(x)}, "
                f"expected ({', '.join(dims)}) = {expected}"
            )
        if jnp.result_type(x) not in dtypes:
            raise TypeError(
                f"selective_scan: {name} has dtype {jnp.result_type(x)}, expected "
                + " or ".join(jnp.dtype(dtype).name for dtype in dtypes)
            )
