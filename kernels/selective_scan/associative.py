"""The textbook parallel form: `jax.lax.associative_scan` over all (decay, input) pairs.

Logarithmic depth, but it holds several arrays of shape (b, l, d, n): the baseline, not the default.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dvmsr_jax.kernels.selective_scan.inputs import Inputs
from dvmsr_jax.kernels.selective_scan.pointwise import readout, step_size


def combine(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
    """Composes two steps h -> decay * h + input, `first` then `second`; associative."""
    decay_1, input_1 = first
    decay_2, input_2 = second
    return decay_1 * decay_2, decay_2 * input_1 + input_2


def selective_scan(
    inputs: Inputs, delta_softplus: bool
) -> tuple[Float[Array, "b l d"], Float[Array, "b d n"]]:
    """Returns (y, final state); see `op.selective_scan` for the contract."""
    u, delta, A, B, C, D, z, delta_bias, initial_state = inputs
    delta = step_size(delta, delta_bias, delta_softplus)
    B, C = B.astype(jnp.float32), C.astype(jnp.float32)

    decay = jnp.exp(delta[..., None] * A[None, None])
    added = (delta * u.astype(jnp.float32))[..., None] * B[:, :, None, :]
    total_decay, h = jax.lax.associative_scan(combine, (decay, added), axis=1)
    h = h + total_decay * initial_state[:, None]

    y = jnp.sum(h * C[:, :, None, :], axis=-1)
    return readout(y, u, D, z), h[:, -1]
