"""The specification: the recurrence as written, one token per step, in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dvmsr_jax.kernels.selective_scan.inputs import Inputs


def selective_scan(
    inputs: Inputs, delta_softplus: bool
) -> tuple[Float[Array, "b l d"], Float[Array, "b d n"]]:
    """Returns (y, final state); see `op.selective_scan` for the contract."""
    u, delta, A, B, C, D, z, delta_bias, initial_state = inputs

    def step(h, token):
        u_t, delta_t, B_t, C_t, z_t = token
        if delta_bias is not None:
            delta_t = delta_t + delta_bias[None]
        if delta_softplus:
            delta_t = jax.nn.softplus(delta_t)
        decay = jnp.exp(delta_t[:, :, None] * A[None])
        h = decay * h + (delta_t * u_t)[:, :, None] * B_t[:, None, :]
        y_t = jnp.sum(h * C_t[:, None, :], axis=-1) + D[None] * u_t
        if z_t is not None:
            y_t = y_t * jax.nn.silu(z_t)
        return h, y_t

    # Outside the loop: on CPUs, XLA would convert the loop's whole bfloat16 arrays in each step.
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x.astype(jnp.float32), 1, 0), (u, delta, B, C, z))
    final_state, y = jax.lax.scan(step, initial_state, tokens)
    return jnp.moveaxis(y, 0, 1).astype(u.dtype), final_state
