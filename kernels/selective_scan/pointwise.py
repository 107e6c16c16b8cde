"""The maps of single tokens before and after the recurrence, in float32; any leading axes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def step_size(
    delta: Float[Array, "*axes d"], delta_bias: Float[Array, " d"] | None, delta_softplus: bool
) -> Float[Array, "*axes d"]:
    """The recurrence's step size: softplus(delta + delta_bias); softplus and bias are optional."""
    delta = delta.astype(jnp.float32)
    if delta_bias is not None:
        delta = delta + jnp.broadcast_to(delta_bias, delta.shape)
    return jax.nn.softplus(delta) if delta_softplus else delta


def readout(
    y: Float[Array, "*axes d"],
    u: Float[Array, "*axes d"],
    D: Float[Array, " d"],
    z: Float[Array, "*axes d"] | None,
) -> Float[Array, "*axes d"]:
    """Applies the skip D u and the gate silu(z); returns u's dtype."""
    out = y + jnp.broadcast_to(D, y.shape) * u.astype(jnp.float32)
    if z is not None:
        out = out * jax.nn.silu(z.astype(jnp.float32))
    return out.astype(u.dtype)
