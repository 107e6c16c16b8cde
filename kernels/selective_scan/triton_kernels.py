"""The selective scan as Triton kernels: the formulas of README.md on NVIDIA GPUs.

Each kernel follows a tile of channels through a chunk of tokens, one token after the other:

    phase   forward                                     backward
    1       chunk_ends: each chunk from a zero state    chunk_start_gradients: the same, reversed
    2       chunk_borders: composes the chunks          chunk_borders, reversed
    3       outputs: y, from the true start states      gradients

A sequence of a single chunk needs phase 3 only. A program is one warp. Each lane has one channel
(with more than 16 states, several lanes share one), so that states stay in registers, a sum over
states stays within a lane, and a load of u, delta or z is one row of neighbouring channels.

    d, n            channels and states; compile-time constants, like all names in capitals
    l, chunk        tokens of a sequence; of a chunk, a multiple of BLOCK
    h, g            the state and the gradient by it, (TILE_N, TILE_D)
    decay           exp(delta A), taken as 2^(delta A log2(e)), which is one instruction

All arithmetic is float32, for inputs of any type, and offsets of tokens have 64 bits.
"""

import inspect

import triton
import triton.language as tl

# Number of tokens between two states that the forward pass saves for the backward pass, and number
# of tokens whose states the backward pass holds in registers at once.
BLOCK = tl.constexpr(8)
HELD = tl.constexpr(4)

LOG2_E = tl.constexpr(1.4426950408889634)


def jit(function):
    """triton.jit of the function as written, without the type checks that tests wrap around it."""
    return triton.jit(inspect.unwrap(function))


# The position of a program, and its loads.


@jit
def position(chunks, d: tl.constexpr, TILE_D: tl.constexpr):
    """(sequence, chunk, tile of channels) of this program."""
    tiles: tl.constexpr = (d + TILE_D - 1) // TILE_D
    program = tl.program_id(0)
    sequence = program // (tiles * chunks)
    return sequence.to(tl.int64), program // tiles % chunks, program % tiles


@jit
def tile_channels(tile, d: tl.constexpr, TILE_D: tl.constexpr):
    """(the tile's channels, a mask of those in no earlier tile); d is at least TILE_D."""
    first = tile * TILE_D
    channel = tl.minimum(first, d - TILE_D) + tl.arange(0, TILE_D)
    # Without a declared alignment, Triton gives each lane one channel instead of four.
    return tl.multiple_of(channel, 1), channel >= first


@jit
def tile_states(channel, own, d: tl.constexpr, n: tl.constexpr, TILE_N: tl.constexpr):
    """(offsets of these channels' states in (n, d), a mask of those that are the tile's own)."""
    k = tl.arange(0, TILE_N)[:, None]
    return tl.minimum(k, n - 1) * d + channel[None, :], (k < n) & own[None, :]


@jit
def load_states(x, row, n: tl.constexpr, TILE_N: tl.constexpr):
    """A token's n values of B or C, padded with zeros to TILE_N."""
    k = tl.arange(0, TILE_N)
    if n == TILE_N:
        return tl.load(x + row * n + k)
    else:
        return tl.load(x + row * n + k, mask=k < n, other=0.0)


@jit
def load_tokens(x, sequence, t, l, channel, d: tl.constexpr, COUNT: tl.constexpr):
    """A tuple with the channels of COUNT tokens from t on; past the end, the last one repeats."""
    tokens = ()
    for i in tl.static_range(COUNT):
        row = sequence * l + tl.minimum(t + i, l - 1)
        tokens += (tl.load(x + row * d + channel).to(tl.float32),)
    return tokens


@jit
def all_loads_out():
    """A point before which all loads so far are issued, to be waited for together.

    Otherwise, the compiler would move each load close to its use, and the program would wait for
    every token.
    """
    tl.debug_barrier()


# The maps of single tokens (pointwise.py), each with its derivative.


@jit
def step_size(x, SOFTPLUS: tl.constexpr):
    """(delta, its derivative by x)."""
    if SOFTPLUS:
        t = tl.exp2(tl.abs(x) * -LOG2_E)
        # softplus(x) = max(x, 0) + log(1 + t); here log(1 + t) / t for t in [0, 1], to 2e-7.
        p = 0.005253457929939032 * t - 0.02958850748836994
        p = p * t + 0.07836166769266129
        p = p * t - 0.13674770295619965
        p = p * t + 0.19111430644989014
        p = p * t - 0.24844369292259216
        p = p * t + 0.33319270610809326
        p = p * t - 0.49999502301216125
        p = p * t + 1.0
        return tl.maximum(x, 0.0) + p * t, tl.where(x < 0, t, 1.0) / (1 + t)
    else:
        return x, tl.full(x.shape, 1.0, tl.float32)


@jit
def silu(z):
    """(z sigmoid(z), its derivative)."""
    sigmoid = 1 / (1 + tl.exp2(z * -LOG2_E))
    return z * sigmoid, sigmoid * (1 + z * (1 - sigmoid))


@jit
def step(h, u, delta, A_log2, B):
    """The recurrence."""
    decay = tl.exp2(delta[None, :] * A_log2)
    return decay * h + (delta * u)[None, :] * B[:, None]


@jit
def compose(decay_1, input_1, decay_2, input_2):
    """Two steps h -> decay * h + input, one after the other."""
    return decay_1 * decay_2, decay_2 * input_1 + input_2


@jit
def store_channel_sums(out, x, factor, real, n: tl.constexpr):
    """Stores sum(x * factor, axis=1), x (TILE_N, TILE_D) and factor (TILE_D,), for n states.

    tl.sum would take log2(TILE_D) exchanges between lanes for every state. Here, the lanes divide
    the states among them: in each exchange, a lane gives away half of its states, and receives the
    other lane's part of the half that it keeps. For 16 states and 32 lanes, this takes 16 exchanges
    instead of 80.
    """
    TILE_N: tl.constexpr = x.shape[0]
    TILE_D: tl.constexpr = x.shape[1]
    lane = tl.arange(0, TILE_D)[None, :]
    k = tl.zeros_like(lane)  # the lane's first state
    if TILE_D == 1 or TILE_N == 1:
        x *= factor[None, :]
    for i in tl.static_range(1, 6):
        if TILE_D >> i > 0:
            upper = (lane & (TILE_D >> i)) != 0
            if TILE_N >> i > 0:
                halves = tl.reshape(x, (2, TILE_N >> i, TILE_D))
                low, high = tl.split(tl.permute(halves, (1, 2, 0)))
                x = tl.where(upper, high, low)
                given = tl.where(upper, low, high)
                k += tl.where(upper, TILE_N >> i, 0)
            else:  # one state is left, which both lanes keep
                given = x
            # Not before the loop, so that half of the products are fused with the sum; but with a
            # single state, the two lanes that keep it would then differ by rounding.
            if i == 1 and TILE_N > 1:
                x *= factor[None, :]
                given *= factor[None, :]
            partner = tl.broadcast_to(lane ^ (TILE_D >> i), given.shape)
            x += tl.gather(given, partner, axis=1)
    k += tl.arange(0, x.shape[0])[:, None]
    tl.store(out + k, x, mask=tl.where(real, k < n, False))


# The kernels. Arguments: inputs, sizes, outputs, constants. Each group of `sharing` sequences has
# its own row of A, D and delta_bias.


@jit
def chunk_ends(
    u, delta, A, B, delta_bias,
    l, chunk, chunks, sharing,
    ends, delta_sums,
    d: tl.constexpr, n: tl.constexpr, TILE_D: tl.constexpr, TILE_N: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Phase 1: ends (b, chunks, n, d), the states after whole chunks that start from zero, and
    delta_sums (b, chunks, d)."""
    sequence, c, tile = position(chunks, d, TILE_D)
    channel, own = tile_channels(tile, d, TILE_D)
    state, real = tile_states(channel, own, d, n, TILE_N)
    weights = sequence // sharing
    A_log2 = tl.load(A + weights * n * d + state) * LOG2_E
    bias = tl.load(delta_bias + weights * d + channel)

    h = tl.zeros((TILE_N, TILE_D), tl.float32)
    delta_sum = tl.zeros((TILE_D,), tl.float32)
    for t in range(c * chunk, c * chunk + chunk, BLOCK):
        us = load_tokens(u, sequence, t, l, channel, d, BLOCK)
        deltas = load_tokens(delta, sequence, t, l, channel, d, BLOCK)
        all_loads_out()
        for i in tl.static_range(BLOCK):
            B_t = load_states(B, sequence * l + t + i, n, TILE_N)
            delta_t, _ = step_size(deltas[i] + bias, SOFTPLUS)
            h = step(h, us[i], delta_t, A_log2, B_t)
            delta_sum += delta_t

    at = sequence * chunks + c
    tl.store(ends + at * n * d + state, h, mask=real)
    tl.store(delta_sums + at * d + channel, delta_sum, mask=own)


@jit
def chunk_start_gradients(
    delta, A, C, z, delta_bias, dout,
    l, chunk, chunks, sharing,
    starts, delta_sums,
    d: tl.constexpr, n: tl.constexpr, TILE_D: tl.constexpr, TILE_N: tl.constexpr,
    SOFTPLUS: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Phase 1 of the backward pass, for all chunks but the first: starts (b, chunks, n, d), the
    gradients by the states before chunks if those by the states after them are zero, and
    delta_sums (b, chunks, d)."""
    sequence, c, tile = position(chunks, d, TILE_D)
    channel, own = tile_channels(tile, d, TILE_D)
    state, real = tile_states(channel, own, d, n, TILE_N)
    weights = sequence // sharing
    A_log2 = tl.load(A + weights * n * d + state) * LOG2_E
    bias = tl.load(delta_bias + weights * d + channel)

    g = tl.zeros((TILE_N, TILE_D), tl.float32)
    delta_sum = tl.zeros((TILE_D,), tl.float32)
    start = (c + 1) * chunk
    blocks = tl.cdiv(tl.minimum(chunk, l - start), BLOCK)
    for block in range(blocks - 1, -1, -1):
        t = start + block * BLOCK
        deltas = load_tokens(delta, sequence, t, l, channel, d, BLOCK)
        dys = load_tokens(dout, sequence, t, l, channel, d, BLOCK)
        if GATE:
            zs = load_tokens(z, sequence, t, l, channel, d, BLOCK)
        all_loads_out()
        for i in tl.static_range(BLOCK - 1, -1, -1):
            inside = t + i < l
            C_t = load_states(C, sequence * l + tl.minimum(t + i, l - 1), n, TILE_N)
            delta_t, _ = step_size(deltas[i] + bias, SOFTPLUS)
            delta_t = tl.where(inside, delta_t, 0.0)
            dy_t = tl.where(inside, dys[i], 0.0)
            if GATE:
                gate, _ = silu(zs[i])
                dy_t *= gate
            g = tl.exp2(delta_t[None, :] * A_log2) * (g + C_t[:, None] * dy_t[None, :])
            delta_sum += delta_t

    at = sequence * chunks + c
    tl.store(starts + at * n * d + state, g, mask=real)
    tl.store(delta_sums + at * d + channel, delta_sum, mask=own)


@jit
def chunk_borders(
    from_zero, delta_sums, A, first,
    chunks, sharing,
    borders,
    d: tl.constexpr, n: tl.constexpr, TILE_D: tl.constexpr, TILE_C: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """Phase 2: borders (b, chunks + 1, n, d), the states that enter each chunk and leave the last
    one, from those that leave the chunks if started from zero (`from_zero`), and the one that
    enters the first. In reverse, gradients, from the last chunk to the first."""
    sequence, k, tile = position(n, d, TILE_D)
    channel, own = tile_channels(tile, d, TILE_D)
    A_log2 = tl.load(A + (sequence // sharing * n + k) * d + channel) * LOG2_E
    carry = tl.load(first + (sequence * n + k) * d + channel)

    end = chunks if REVERSE else 0
    tl.store(borders + ((sequence * (chunks + 1) + end) * n + k) * d + channel, carry, mask=own)
    for c0 in range(0, chunks, TILE_C):
        row = tl.arange(0, TILE_C)[:, None]
        real = (c0 + row < chunks) & own[None, :]
        c = chunks - 1 - c0 - row if REVERSE else c0 + row
        entered = c if REVERSE else c + 1
        at = sequence * chunks + c
        delta_sum = tl.load(delta_sums + at * d + channel[None, :], mask=real, other=0.0)
        out = tl.load(from_zero + (at * n + k) * d + channel[None, :], mask=real, other=0.0)
        decay, out = tl.associative_scan((tl.exp2(delta_sum * A_log2[None, :]), out), 0, compose)
        out += decay * carry[None, :]
        to = (sequence * (chunks + 1) + entered) * n + k
        tl.store(borders + to * d + channel[None, :], out, mask=real)
        carry = tl.sum(tl.where(row == TILE_C - 1, out, 0.0), axis=0)


@jit
def outputs(
    u, delta, A, B, C, D, z, delta_bias, starts,
    l, chunk, chunks, sharing,
    y, final_state, saved,
    d: tl.constexpr, n: tl.constexpr, TILE_D: tl.constexpr, TILE_N: tl.constexpr,
    SOFTPLUS: tl.constexpr, GATE: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """Phase 3: y and the final state, from starts (b, chunks, n, d). With SAVE also the states
    before every BLOCK tokens, saved (b, ceil(l / BLOCK), n, d)."""
    sequence, c, tile = position(chunks, d, TILE_D)
    channel, own = tile_channels(tile, d, TILE_D)
    state, real = tile_states(channel, own, d, n, TILE_N)
    weights = sequence // sharing
    A_log2 = tl.load(A + weights * n * d + state) * LOG2_E
    skip = tl.load(D + weights * d + channel)
    bias = tl.load(delta_bias + weights * d + channel)

    h = tl.load(starts + (sequence * chunks + c) * n * d + state)
    for t in range(c * chunk, tl.minimum(c * chunk + chunk, l), BLOCK):
        if SAVE:
            at = sequence * tl.cdiv(l, BLOCK) + t // BLOCK
            tl.store(saved + at * n * d + state, h, mask=real)
        us = load_tokens(u, sequence, t, l, channel, d, BLOCK)
        deltas = load_tokens(delta, sequence, t, l, channel, d, BLOCK)
        if GATE:
            zs = load_tokens(z, sequence, t, l, channel, d, BLOCK)
        all_loads_out()
        ys = ()
        for i in tl.static_range(BLOCK):
            row = sequence * l + tl.minimum(t + i, l - 1)
            B_t = load_states(B, row, n, TILE_N)
            C_t = load_states(C, row, n, TILE_N)
            delta_t, _ = step_size(deltas[i] + bias, SOFTPLUS)
            delta_t = tl.where(t + i < l, delta_t, 0.0)
            h = step(h, us[i], delta_t, A_log2, B_t)
            y_t = tl.sum(h * C_t[:, None], axis=0) + skip * us[i]
            if GATE:
                gate, _ = silu(zs[i])
                y_t *= gate
            ys += (y_t,)
        for i in tl.static_range(BLOCK):
            at = (sequence * l + t + i) * d + channel
            tl.store(y + at, ys[i].to(y.dtype.element_ty), mask=tl.where(t + i < l, own, False))

    if c == chunks - 1:
        tl.store(final_state + sequence * n * d + state, h, mask=real)


@jit
def gradients(
    u, delta, A, B, C, D, z, delta_bias, saved, dout, ends,
    l, chunk, chunks, sharing,
    du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dstart,
    d: tl.constexpr, n: tl.constexpr, TILE_D: tl.constexpr, TILE_N: tl.constexpr,
    SOFTPLUS: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Phase 3 of the backward pass, from ends (b, chunks, n, d), the gradients by the states after
    the chunks: those by u, delta, z and the initial state; the parts of dA (b, chunks, n, d), dD
    and ddelta_bias (b, chunks, d) of each chunk, and of dB, dC (b, tiles, l, n) of each tile."""
    sequence, c, tile = position(chunks, d, TILE_D)
    channel, own = tile_channels(tile, d, TILE_D)
    state, real = tile_states(channel, own, d, n, TILE_N)
    weights = sequence // sharing
    skip = tl.load(D + weights * d + channel)
    bias = tl.load(delta_bias + weights * d + channel)

    g = tl.load(ends + (sequence * chunks + c) * n * d + state, mask=real, other=0.0)
    sum_dA = tl.zeros((TILE_N, TILE_D), tl.float32)
    sum_dD = tl.zeros((TILE_D,), tl.float32)
    sum_dbias = tl.zeros((TILE_D,), tl.float32)
    start = c * chunk
    parts = tl.cdiv(tl.minimum(chunk, l - start), BLOCK) * (BLOCK // HELD)
    for part in range(parts - 1, -1, -1):
        t = start + part * HELD
        block = t // BLOCK

        # Up to the state before the part's tokens.
        h = tl.load(saved + (sequence * tl.cdiv(l, BLOCK) + block) * n * d + state)
        A_log2 = tl.load(A + weights * n * d + state) * LOG2_E
        for part_before in range(block * BLOCK, t, HELD):
            us = load_tokens(u, sequence, part_before, l, channel, d, HELD)
            deltas = load_tokens(delta, sequence, part_before, l, channel, d, HELD)
            all_loads_out()
            for i in tl.static_range(HELD):
                row = sequence * l + tl.minimum(part_before + i, l - 1)
                delta_t, _ = step_size(deltas[i] + bias, SOFTPLUS)
                h = step(h, us[i], delta_t, A_log2, load_states(B, row, n, TILE_N))

        # Forward through the part's tokens, holding their states: dz, dC.
        us = load_tokens(u, sequence, t, l, channel, d, HELD)
        raws = load_tokens(delta, sequence, t, l, channel, d, HELD)
        douts = load_tokens(dout, sequence, t, l, channel, d, HELD)
        if GATE:
            zs = load_tokens(z, sequence, t, l, channel, d, HELD)
        all_loads_out()
        hs, deltas, slopes, dys = (), (), (), ()
        for i in tl.static_range(HELD):
            row = sequence * l + tl.minimum(t + i, l - 1)
            inside = tl.where(t + i < l, own, False)
            delta_t, slope = step_size(raws[i] + bias, SOFTPLUS)
            delta_t = tl.where(inside, delta_t, 0.0)
            dy_t = tl.where(inside, douts[i], 0.0)
            hs += (h,)
            h = step(h, us[i], delta_t, A_log2, load_states(B, row, n, TILE_N))
            if GATE:
                gate, gate_slope = silu(zs[i])
                y_t = tl.sum(h * load_states(C, row, n, TILE_N)[:, None], axis=0) + skip * us[i]
                dz_t = dy_t * y_t * gate_slope
                tl.store(dz + row * d + channel, dz_t.to(dz.dtype.element_ty), mask=inside)
                dy_t *= gate
            at = (sequence * tl.cdiv(d, TILE_D) + tile) * l + t + i
            store_channel_sums(dC + at * n, h, dy_t, t + i < l, n)
            deltas += (delta_t,)
            slopes += (slope,)
            dys += (dy_t,)

        # Back through them: all other gradients. A is loaded again, to free registers until here.
        A_part = tl.load(A + weights * n * d + state)
        for i in tl.static_range(HELD - 1, -1, -1):
            row = sequence * l + tl.minimum(t + i, l - 1)
            inside = tl.where(t + i < l, own, False)
            B_t = load_states(B, row, n, TILE_N)
            C_t = load_states(C, row, n, TILE_N)
            g += C_t[:, None] * dys[i][None, :]
            x_t = deltas[i] * us[i]
            at = (sequence * tl.cdiv(d, TILE_D) + tile) * l + t + i
            store_channel_sums(dB + at * n, g, x_t, t + i < l, n)
            dx_t = tl.sum(g * B_t[:, None], axis=0)
            g *= tl.exp2((deltas[i] * LOG2_E)[None, :] * A_part)
            dexponent = g * hs[i]  # by delta A
            sum_dA += deltas[i][None, :] * dexponent
            ddelta_t = (us[i] * dx_t + tl.sum(A_part * dexponent, axis=0)) * slopes[i]
            du_t = skip * dys[i] + deltas[i] * dx_t
            sum_dbias += tl.where(inside, ddelta_t, 0.0)
            sum_dD += dys[i] * us[i]
            tl.store(ddelta + row * d + channel, ddelta_t.to(ddelta.dtype.element_ty), mask=inside)
            tl.store(du + row * d + channel, du_t.to(du.dtype.element_ty), mask=inside)

    at = sequence * chunks + c
    tl.store(dA + at * n * d + state, sum_dA, mask=real)
    tl.store(dD + at * d + channel, sum_dD, mask=own)
    tl.store(ddelta_bias + at * d + channel, sum_dbias, mask=own)
    if c == 0:
        tl.store(dstart + sequence * n * d + state, g, mask=real)
