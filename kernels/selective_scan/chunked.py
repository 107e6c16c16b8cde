"""The fastest form in plain JAX: chunks of tokens, sequential inside, with a hand-written VJP.

For the backward pass, only the states at the chunks' borders are stored; the others are recomputed
chunk by chunk, so no array of size (b, l, d, n) ever exists. README.md derives the formulas.

Sequences are cut into *lanes* that are scanned independently. The two forms differ in the number
of lanes:

* carried: a lane is a whole sequence; each chunk takes its state from the one before. The lanes run
  one after the other. Least work and memory; for CPUs.
* parallel: about sqrt(l) lanes per sequence, all at once. A first pass finds each lane's end state
  when started from zero, an associative scan over the lanes turns those into true start states, and
  a second pass does the rest. Twice the work in sqrt(l) as many steps; for accelerators, where a
  step costs a launch.

Channels are last in every array, so that XLA vectorises over them:

    q  tokens per chunk    k  chunks per lane    p  lanes per sequence    m = b p  lanes in all
    a lane's tokens (k, q, d or n), a chunk's (q, d or n); its state h and h's gradient g (n, d)
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dvmsr_jax.kernels.selective_scan.associative import combine
from dvmsr_jax.kernels.selective_scan.inputs import Inputs
from dvmsr_jax.kernels.selective_scan.pointwise import readout, step_size

# Tokens per chunk. A few arrays of q states per lane exist at a time; a CPU is fastest when they
# fit its cache.
CARRIED_CHUNK = 128
PARALLEL_CHUNK = 8


class Tokens(NamedTuple):
    """The inputs that differ from token to token, `delta` in float32 after bias and softplus."""

    u: Array
    delta: Array
    B: Array
    C: Array
    z: Array | None


def selective_scan(
    inputs: Inputs, delta_softplus: bool, *, parallel: bool
) -> tuple[Float[Array, "b l d"], Float[Array, "b d n"]]:
    """Returns (y, final state); see `op.selective_scan` for the contract."""
    (b, l, d), dtype = inputs.u.shape, inputs.u.dtype
    # Before the padding, whose step size must be 0 (decay 1, input 0) to leave the state unchanged.
    delta = step_size(inputs.delta, inputs.delta_bias, delta_softplus)
    tokens = Tokens(inputs.u, delta, inputs.B, inputs.C, inputs.z)
    if not parallel:  # on CPUs, XLA would convert a loop's whole bfloat16 arrays in each step
        tokens = jax.tree.map(_float32, tokens)
    p = math.isqrt(l) if parallel else 1
    lane_length = math.ceil(l / p)
    q = min(PARALLEL_CHUNK if parallel else CARRIED_CHUNK, lane_length)
    k = math.ceil(lane_length / q)
    padding = p * k * q - l

    def to_lanes(x):
        x = jnp.pad(x, ((0, 0), (0, padding), (0, 0)))
        return x.reshape(b * p, k, q, x.shape[-1])

    weights = inputs.A.T, inputs.D
    h0 = inputs.initial_state.mT
    y, h = _scan(parallel, jax.tree.map(to_lanes, tokens), weights, h0)
    return y.reshape(b, l + padding, d)[:, :l].astype(dtype), h.mT


def _float32(x):
    return x.astype(jnp.float32)


def _outer(x_n, x_d):
    """(..., n), (..., d) -> (..., n, d)."""
    return x_n[..., :, None] * x_d[..., None, :]


def _decay(delta, A):
    """exp(delta A): (..., d), (n, d) -> (..., n, d)."""
    delta = delta[..., None, :]
    return jnp.exp(delta * jnp.broadcast_to(A, (*delta.shape[:-2], *A.shape)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(parallel: bool, tokens: Tokens, weights: tuple[Array, Array], h0):
    """tokens (m, k, q, ...), weights A (n, d) and D, h0 (b, n, d) -> y like u, state like h0."""
    return _scan_forward(parallel, tokens, weights, h0)[0]


def _scan_forward(parallel, tokens, weights, h0):
    starts = h0
    if parallel:
        lane = functools.partial(_lane_end_from_zero, weights)
        starts = _lane_borders(*_each_lane(lane, parallel, tokens), h0, reverse=False)
    lane = functools.partial(_lane_forward, weights)
    y, ends, borders = _each_lane(lane, parallel, tokens, starts)
    return (y, _by_sequence(ends, h0)[:, -1]), (tokens, weights, borders)


def _scan_backward(parallel, residuals, gradients):
    tokens, weights, borders = residuals
    dout, dh_last = gradients
    ends = dh_last
    if parallel:
        lane = functools.partial(_lane_start_gradient_from_zero, weights)
        ends = _lane_borders(*_each_lane(lane, parallel, tokens, dout), dh_last, reverse=True)
    lane = functools.partial(_lane_backward, weights)
    dtokens, dweights, starts = _each_lane(lane, parallel, tokens, borders, dout, ends)
    dweights = jax.tree.map(lambda x: jnp.sum(x, axis=0), dweights)
    return dtokens, dweights, _by_sequence(starts, dh_last)[:, 0]


_scan.defvjp(_scan_forward, _scan_backward)


def _each_lane(function, parallel, *inputs):
    """Applies `function` to each lane's inputs and stacks the results."""
    if parallel:
        return jax.vmap(function)(*inputs)
    return jax.lax.map(lambda lane: function(*lane), inputs)


def _by_sequence(x, like):
    """(m, n, d) -> (b, p, n, d), with the b of `like`."""
    return x.reshape(like.shape[0], -1, *x.shape[1:])


# One lane: a scan over its chunks, and inside each a scan over the chunk's tokens.


def _lane_forward(weights, tokens, start):
    """y (k, q, d), the end state, and the states before each chunk, (k, n, d)."""
    A, D = weights

    def step(h, token):
        decay_t, x_t, B_t, C_t = token
        h = decay_t * h + _outer(B_t, x_t)
        return h, jnp.sum(h * C_t[:, None], axis=0)

    def chunk(h, tokens):
        x = tokens.delta * _float32(tokens.u)
        inputs = _decay(tokens.delta, A), x, _float32(tokens.B), _float32(tokens.C)
        end, y = jax.lax.scan(step, h, inputs)
        return end, (readout(y, tokens.u, D, tokens.z), h)

    end, (y, borders) = jax.lax.scan(chunk, start, tokens)
    return y, end, borders


def _lane_backward(weights, tokens, borders, dout, end):
    """The gradients of tokens, weights and start state, given those of y and the end state."""
    A, D = weights

    def forward_step(h, token):
        decay_t, x_t, B_t = token
        h = decay_t * h + _outer(B_t, x_t)
        return h, h

    def backward_step(g, token):
        decay_t, C_t, dy_t = token
        g = g + _outer(C_t, dy_t)
        return decay_t * g, g

    def chunk(carry, inputs):
        g, dweights = carry
        tokens, border, dout = inputs
        u, B, C = _float32(tokens.u), _float32(tokens.B), _float32(tokens.C)
        delta = tokens.delta
        x = delta * u
        decay = _decay(delta, A)
        _, h = jax.lax.scan(forward_step, border, (decay, x, B))

        y = jnp.sum(h * C[..., None], axis=1)
        _, readout_vjp = jax.vjp(readout, y, tokens.u, D, tokens.z)
        dy, du, dD, dz = readout_vjp(dout)
        before, g = jax.lax.scan(backward_step, g, (decay, C, dy), reverse=True)

        dB = jnp.einsum("qnd,qd->qn", g, x, precision="highest")
        dC = jnp.einsum("qnd,qd->qn", h, dy, precision="highest")
        dx = jnp.sum(g * B[..., None], axis=1)
        dexponent = g * (h - _outer(B, x))  # by delta A; h - B x is decay times the h before
        ddelta = dx * u + jnp.sum(dexponent * A[None], axis=1)
        dA = jnp.sum(dexponent * delta[:, None], axis=0)

        dtokens = Tokens(
            u=(_float32(du) + dx * delta).astype(tokens.u.dtype),
            delta=ddelta,
            B=dB.astype(tokens.B.dtype),
            C=dC.astype(tokens.C.dtype),
            z=dz,
        )
        dweights = jax.tree.map(jnp.add, dweights, (dA, dD))
        return (before, dweights), dtokens

    carry = end, jax.tree.map(jnp.zeros_like, weights)
    inputs = tokens, borders, dout
    (start, dweights), dtokens = jax.lax.scan(chunk, carry, inputs, reverse=True)
    return dtokens, dweights, start


# The lanes' borders. A lane maps the state h before it to exp(A sum(delta)) h + (its end from
# zero), and the gradient after it to the gradient before it in the same way.


def _lane_end_from_zero(weights, tokens):
    """(the lane's whole decay, its end state when started from zero), both (n, d)."""
    A, _ = weights

    def step(h, token):
        u_t, delta_t, B_t = token
        h = _decay(delta_t, A) * h + _outer(_float32(B_t), delta_t * _float32(u_t))
        return h, None

    inputs = tokens.u, tokens.delta, tokens.B
    return _lane_reduce(A, tokens.delta, step, inputs, reverse=False)


def _lane_start_gradient_from_zero(weights, tokens, dout):
    """(the lane's whole decay, the gradient by its start state if that by its end is zero)."""
    A, D = weights

    def step(g, token):
        u_t, delta_t, C_t, z_t, dout_t = token
        _, readout_vjp = jax.vjp(lambda y: readout(y, u_t, D, z_t), jnp.zeros_like(delta_t))
        (dy_t,) = readout_vjp(dout_t)
        return _decay(delta_t, A) * (g + _outer(_float32(C_t), dy_t)), None

    inputs = tokens.u, tokens.delta, tokens.C, tokens.z, dout
    return _lane_reduce(A, tokens.delta, step, inputs, reverse=True)


def _lane_reduce(A, delta, step, inputs, *, reverse):
    def chunk(carry, inputs):
        return jax.lax.scan(step, carry, inputs, reverse=reverse)

    result, _ = jax.lax.scan(chunk, jnp.zeros_like(A), inputs, reverse=reverse)
    return _decay(jnp.sum(delta, axis=(0, 1)), A), result


def _lane_borders(decay, from_zero, first, *, reverse):
    """The states (if reverse, gradients) that enter each lane, (m, n, d), given the first."""
    lanes = _by_sequence(decay, first), _by_sequence(from_zero, first)
    decay, out = jax.lax.associative_scan(combine, lanes, axis=1, reverse=reverse)
    first = first[:, None]
    out = out + decay * first
    parts = [out[:, 1:], first] if reverse else [first, out[:, :-1]]
    return jnp.concatenate(parts, axis=1).reshape(from_zero.shape)
