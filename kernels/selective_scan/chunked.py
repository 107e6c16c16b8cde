"""The default: chunks of tokens, sequential inside, with a hand-written VJP.

Only the states at the chunks' borders are kept for the backward pass, which recomputes the others
chunk by chunk, so nothing of size (b, l, d, n) ever exists. README.md derives the formulas.

The sequences are cut into *lanes* that are scanned independently of each other, and the two forms
differ in how many:

* carried: a lane is a whole sequence; each chunk takes its state from the one before. The lanes run
  one after the other. The least work, in the smallest memory; for CPUs.
* parallel: about sqrt(l) lanes a sequence, all at once. A first pass finds each lane's end state
  when started from zero, an associative scan over the lanes turns those into true start states, and
  a second pass does the rest. Twice the work in sqrt(l) as many steps; for accelerators, where a
  step costs a launch.

Channels are last in every array, so that XLA vectorises over them:

    q  tokens a chunk      k  chunks a lane      p  lanes a sequence      m = b p  lanes in all
    a lane's tokens (k, q, d or n), a chunk's (q, d or n); its state h and h's gradient g (n, d)
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.selective_scan.associative import combine
from kernels.selective_scan.pointwise import readout, step_size

# Tokens a chunk: a few arrays of q states of every lane exist at a time, and a CPU is fastest
# where they fit its cache.
CARRIED_CHUNK = 128
PARALLEL_CHUNK = 8


class Tokens(NamedTuple):
    """The inputs that each token has its own of."""

    u: Array
    delta: Array
    B: Array
    C: Array
    z: Array | None


class Weights(NamedTuple):
    """The inputs that all tokens share."""

    A: Array  # (n, d)
    D: Array
    delta_bias: Array | None


def selective_scan(
    u: Float[Array, "b l d"],
    delta: Float[Array, "b l d"],
    A: Float[Array, "d n"],
    B: Float[Array, "b l n"],
    C: Float[Array, "b l n"],
    D: Float[Array, " d"],
    z: Float[Array, "b l d"] | None,
    delta_bias: Float[Array, " d"] | None,
    delta_softplus: bool,
    initial_state: Float[Array, "b d n"],
    *,
    parallel: bool,
) -> tuple[Float[Array, "b l d"], Float[Array, "b d n"]]:
    """(y, final state); `op.selective_scan` has the contract."""
    (b, l, d), dtype = u.shape, u.dtype
    if not parallel:  # else XLA, on CPUs, converts a loop's bfloat16 arrays whole in each step
        u, delta, B, C, z = jax.tree.map(_float32, (u, delta, B, C, z))
    p = math.isqrt(l) if parallel else 1
    lane_length = math.ceil(l / p)
    q = min(PARALLEL_CHUNK if parallel else CARRIED_CHUNK, lane_length)
    k = math.ceil(lane_length / q)
    padding = p * k * q - l

    def to_lanes(x, pad_value=0.0):
        x = jnp.pad(x, ((0, 0), (0, padding), (0, 0)), constant_values=pad_value)
        return x.reshape(b * p, k, q, x.shape[-1])

    # Padding tokens get a step size of 0 (decay 1, input 0), which leaves the state alone.
    tokens = Tokens(
        u=to_lanes(u),
        delta=to_lanes(delta, pad_value=-1e30 if delta_softplus else 0.0),
        B=to_lanes(B),
        C=to_lanes(C),
        z=None if z is None else to_lanes(z),
    )
    weights = Weights(A.T, D, delta_bias)
    y, h = _scan(delta_softplus, parallel, tokens, weights, initial_state.mT)
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(delta_softplus: bool, parallel: bool, tokens: Tokens, weights: Weights, h0):
    """tokens (m, k, q, ...), h0 (b, n, d) -> y like u, final state (b, n, d)."""
    return _scan_forward(delta_softplus, parallel, tokens, weights, h0)[0]


def _scan_forward(delta_softplus, parallel, tokens, weights, h0):
    starts = h0
    if parallel:
        lane = functools.partial(_lane_end_from_zero, delta_softplus, weights)
        starts = _lane_borders(*_each_lane(lane, parallel, tokens), h0, reverse=False)
    lane = functools.partial(_lane_forward, delta_softplus, weights)
    y, ends, borders = _each_lane(lane, parallel, tokens, starts)
    return (y, _by_sequence(ends, h0)[:, -1]), (tokens, weights, borders)


def _scan_backward(delta_softplus, parallel, residuals, gradients):
    tokens, weights, borders = residuals
    dout, dh_last = gradients
    ends = dh_last
    if parallel:
        lane = functools.partial(_lane_start_gradient_from_zero, delta_softplus, weights)
        ends = _lane_borders(*_each_lane(lane, parallel, tokens, dout), dh_last, reverse=True)
    lane = functools.partial(_lane_backward, delta_softplus, weights)
    dtokens, dweights, starts = _each_lane(lane, parallel, tokens, borders, dout, ends)
    dweights = jax.tree.map(lambda x: jnp.sum(x, axis=0), dweights)
    return dtokens, dweights, _by_sequence(starts, dh_last)[:, 0]


_scan.defvjp(_scan_forward, _scan_backward)


def _each_lane(function, parallel, *inputs):
    """`function` of each lane's inputs, stacked."""
    if parallel:
        return jax.vmap(function)(*inputs)
    return jax.lax.map(lambda lane: function(*lane), inputs)


def _by_sequence(x, like):
    """(m, n, d) -> (b, p, n, d), with the b of `like`."""
    return x.reshape(like.shape[0], -1, *x.shape[1:])


# One lane: a scan over its chunks, and inside each a scan over the chunk's tokens.


def _lane_forward(delta_softplus, weights, tokens, start):
    """y (k, q, d), the end state, and the states before each chunk, (k, n, d)."""

    def step(h, token):
        decay_t, x_t, B_t, C_t = token
        h = decay_t * h + _outer(B_t, x_t)
        return h, jnp.sum(h * C_t[:, None], axis=0)

    def chunk(h, tokens):
        delta = step_size(tokens.delta, weights.delta_bias, delta_softplus)
        x = delta * _float32(tokens.u)
        inputs = _decay(delta, weights.A), x, _float32(tokens.B), _float32(tokens.C)
        end, y = jax.lax.scan(step, h, inputs)
        return end, (readout(y, tokens.u, weights.D, tokens.z), h)

    end, (y, borders) = jax.lax.scan(chunk, start, tokens)
    return y, end, borders


def _lane_backward(delta_softplus, weights, tokens, borders, dout, end):
    """Gradients by tokens, by weights, and by the start state, from those by y and end state."""
    A = weights.A

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
        delta, step_size_vjp = jax.vjp(
            lambda delta, bias: step_size(delta, bias, delta_softplus),
            tokens.delta,
            weights.delta_bias,
        )
        x = delta * u
        decay = _decay(delta, A)
        _, h = jax.lax.scan(forward_step, border, (decay, x, B))

        y = jnp.sum(h * C[..., None], axis=1)
        _, readout_vjp = jax.vjp(readout, y, tokens.u, weights.D, tokens.z)
        dy, du, dD, dz = readout_vjp(dout)
        before, g = jax.lax.scan(backward_step, g, (decay, C, dy), reverse=True)

        dB = jnp.einsum("qnd,qd->qn", g, x, precision="highest")
        dC = jnp.einsum("qnd,qd->qn", h, dy, precision="highest")
        dx = jnp.sum(g * B[..., None], axis=1)
        dexponent = g * (h - _outer(B, x))  # by delta A; h - B x is decay times the h before
        ddelta = dx * u + jnp.sum(dexponent * A[None], axis=1)
        dA = jnp.sum(dexponent * delta[:, None], axis=0)
        ddelta, ddelta_bias = step_size_vjp(ddelta)

        dtokens = Tokens(
            u=(_float32(du) + dx * delta).astype(tokens.u.dtype),
            delta=ddelta,
            B=dB.astype(tokens.B.dtype),
            C=dC.astype(tokens.C.dtype),
            z=dz,
        )
        dweights = jax.tree.map(jnp.add, dweights, Weights(dA, dD, ddelta_bias))
        return (before, dweights), dtokens

    carry = end, jax.tree.map(jnp.zeros_like, weights)
    inputs = tokens, borders, dout
    (start, dweights), dtokens = jax.lax.scan(chunk, carry, inputs, reverse=True)
    return dtokens, dweights, start


# The lanes' borders. A lane maps the state before it, h, to exp(A sum(delta)) h + (its end from 0),
# and the gradient after it to the one before it by the same factor.


def _lane_end_from_zero(delta_softplus, weights, tokens):
    """(the lane's whole decay, its end state when started from zero), both (n, d)."""

    def step(h, token):
        u_t, delta_t, B_t = token
        delta_t = step_size(delta_t, weights.delta_bias, delta_softplus)
        h = _decay(delta_t, weights.A) * h + _outer(_float32(B_t), delta_t * _float32(u_t))
        return h, None

    inputs = tokens.u, tokens.delta, tokens.B
    return _lane_reduce(delta_softplus, weights, tokens, step, inputs, reverse=False)


def _lane_start_gradient_from_zero(delta_softplus, weights, tokens, dout):
    """(the lane's whole decay, the gradient by its start state if its end state's is zero)."""

    def step(g, token):
        u_t, delta_t, C_t, z_t, dout_t = token
        delta_t = step_size(delta_t, weights.delta_bias, delta_softplus)
        _, readout_vjp = jax.vjp(lambda y: readout(y, u_t, weights.D, z_t), jnp.zeros_like(delta_t))
        (dy_t,) = readout_vjp(dout_t)
        return _decay(delta_t, weights.A) * (g + _outer(_float32(C_t), dy_t)), None

    inputs = tokens.u, tokens.delta, tokens.C, tokens.z, dout
    return _lane_reduce(delta_softplus, weights, tokens, step, inputs, reverse=True)


def _lane_reduce(delta_softplus, weights, tokens, step, inputs, *, reverse):
    def chunk(carry, inputs):
        return jax.lax.scan(step, carry, inputs, reverse=reverse)

    result, _ = jax.lax.scan(chunk, jnp.zeros_like(weights.A), inputs, reverse=reverse)
    delta = step_size(tokens.delta, weights.delta_bias, delta_softplus)
    return _decay(jnp.sum(delta, axis=(0, 1)), weights.A), result


def _lane_borders(decay, from_zero, first, *, reverse):
    """What enters each lane, (m, n, d), given what enters a sequence's first (last in reverse)."""
    lanes = _by_sequence(decay, first), _by_sequence(from_zero, first)
    decay, out = jax.lax.associative_scan(combine, lanes, axis=1, reverse=reverse)
    first = first[:, None]
    out = out + decay * first
    parts = [out[:, 1:], first] if reverse else [first, out[:, :-1]]
    return jnp.concatenate(parts, axis=1).reshape(from_zero.shape)
