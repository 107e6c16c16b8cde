"""The fused form for NVIDIA GPUs: shapes, phases and gradients around `triton_kernels.py`.

Besides y, only the states at the borders of chunks leave the chip and, for the backward pass, those
before every `BLOCK` tokens. In this file, states are laid out as (n, d), and every array of
`Inputs` has a leading axis: A (w, n, d), D and delta_bias (w, d), and b first in the others, where
w divides b:

    b  sequences    w  sets of weights, each shared by b / w adjacent sequences (1 without vmap)
"""

import functools
import importlib.util
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dvmsr_jax.kernels.selective_scan.inputs import Inputs


class Pass(NamedTuple):
    """How much of the GPU a pass can use."""

    programs: int
    """Programs (warps) that a multiprocessor runs at once, limited by the registers of the kernels
    (from compute capability 9.0 on; 12 instead of 16 below it)."""
    split_cost: float
    """Work of a split pass relative to a whole one (README.md, What it costs)."""


FORWARD = Pass(programs=16, split_cost=(136 + 152) / 152)
BACKWARD = Pass(programs=8, split_cost=(152 + 528) / 528)
FULL = 0.9  # the fraction of those slots that must be filled, over all rounds of programs
STATES_A_PROGRAM = 512  # 16 registers per lane for the states
LANES = 32
MIN_CHUNK = 64
BORDER_TILE = (256, 8)  # chunks and channels that a program of phase 2 composes at a time
BORDER_WARPS = 4

MIN_COMPUTE_CAPABILITY = 8.0
MULTIPROCESSORS = 132  # those of an H100 or H200, assumed when lowering without a GPU


def selective_scan(
    inputs: Inputs, delta_softplus: bool
) -> tuple[Float[Array, "b l d"], Float[Array, "b d n"]]:
    """Returns (y, final state); see `op.selective_scan` for the contract."""
    bias = jnp.zeros_like(inputs.D) if inputs.delta_bias is None else inputs.delta_bias
    inputs = inputs._replace(
        A=inputs.A.T[None],
        # All channels read B and C, so they are converted once here instead of in every program.
        B=inputs.B.astype(jnp.float32),
        C=inputs.C.astype(jnp.float32),
        D=inputs.D[None],
        delta_bias=bias[None],
        initial_state=inputs.initial_state.mT,
    )
    y, final_state = _scan(delta_softplus, inputs)
    return y, final_state.mT


def missing() -> str | None:
    """The missing requirement of this implementation and how to get it; None if it can run."""
    if lack := missing_package():
        return lack
    if not cuda_plugin():
        return (
            "JAX's CUDA plugin is not installed; "
            f'`pip install "jax[cuda13]=={jax.__version__}"` installs it'
        )
    gpu = _gpu()
    if gpu is None:
        return "JAX finds no NVIDIA GPU; run `nvidia-smi` to check whether the driver does"
    if float(gpu.compute_capability) < MIN_COMPUTE_CAPABILITY:
        return (
            f"{gpu.device_kind} has compute capability {gpu.compute_capability}; "
            f"a GPU of {MIN_COMPUTE_CAPABILITY} (Ampere) or newer is needed"
        )
    return None


def missing_package() -> str | None:
    """The missing package that compiling the kernels needs; None if none is missing."""
    for package in ("triton", "jax_triton"):
        if importlib.util.find_spec(package) is None:
            return (
                f"the package {package} is not installed; on Linux, "
                "`pip install -r requirements.txt` installs it"
            )
    return None


def cuda_plugin() -> bool:
    """Whether JAX's plugin for NVIDIA GPUs is installed."""
    return any(importlib.util.find_spec(f"jax_cuda{i}_plugin") for i in (12, 13))


def launch(
    kernel: str,
    programs: int,
    arrays: tuple[Array, ...],
    sizes: tuple[int, ...],
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    *,
    warps: int = 1,
    **constants: Any,
) -> tuple[Array, ...]:
    """Runs a kernel of `triton_kernels.py`. The only place that depends on jax-triton."""
    import jax_triton  # raises without JAX's CUDA plugin

    from dvmsr_jax.kernels.selective_scan import triton_kernels

    return jax_triton.triton_call(
        *arrays,
        *sizes,
        kernel=getattr(triton_kernels, kernel),
        name=f"selective_scan_{kernel}",
        out_shape=outputs,
        grid=programs,
        num_warps=warps,
        compute_capability=_compute_capability(),
        **constants,
    )


def _gpu() -> Any:
    """The first NVIDIA GPU, assumed to be like all others; None if there is none."""
    try:
        return jax.devices("cuda")[0]
    except RuntimeError:
        return None


def _compute_capability() -> int:
    """The GPU's compute capability times 10; without a GPU, the lowest supported."""
    gpu = _gpu()
    return round(10 * (float(gpu.compute_capability) if gpu else MIN_COMPUTE_CAPABILITY))


def _one_call_under_vmap(function: Callable) -> Callable:
    """Makes jax.vmap call the function once, with the mapped axis merged into the arrays' first.

    jax-triton's calls have no batching rule of their own.
    """
    function = jax.custom_batching.custom_vmap(function)

    @function.def_vmap
    def rule(axis_size, is_batched, *args):
        def merge(x, is_batched):
            x = x if is_batched else jnp.broadcast_to(x[None], (axis_size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        out = function(*jax.tree.map(merge, args, tuple(is_batched)))
        out = jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return function


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(delta_softplus: bool, inputs: Inputs):
    """(y like u, final state (b, n, d))."""
    forward = functools.partial(_forward, delta_softplus, False)
    y, final_state, _ = _one_call_under_vmap(forward)(inputs)
    return y, final_state


def _scan_forward(delta_softplus, inputs):
    forward = functools.partial(_forward, delta_softplus, True)
    y, final_state, saved = _one_call_under_vmap(forward)(inputs)
    return (y, final_state), (inputs, saved)


def _scan_backward(delta_softplus, residuals, gradients):
    backward = functools.partial(_backward, delta_softplus)
    return (_one_call_under_vmap(backward)(*residuals, *gradients),)


_scan.defvjp(_scan_forward, _scan_backward)


def tile_sizes(d: int, n: int) -> tuple[int, int]:
    """The numbers of channels and of states (n, rounded up) that a program handles."""
    tile_n = _power_of_2_above(n)
    return _power_of_2_below(min(LANES, STATES_A_PROGRAM // tile_n, d)), tile_n


def chunk_count(columns: int, slots: int, split_cost: float) -> int:
    """The number of chunks to cut each of `columns` tiles into, if `slots` chunks run at a time: as
    many as fill the slots in the fewest rounds. 1 if the tiles alone fill so many slots that
    filling the others would gain less than it costs (see `Pass`)."""
    if columns * split_cost >= FULL * slots:
        return 1
    most = (rounds * slots // columns for rounds in itertools.count(1))
    return next(n for i, n in enumerate(most, 1) if n * columns >= FULL * i * slots)


class Plan:
    """The division of one pass over the inputs into programs."""

    def __init__(self, inputs: Inputs, kind: Pass):
        from dvmsr_jax.kernels.selective_scan.triton_kernels import BLOCK

        self.block = BLOCK.value
        self.b, self.l, self.d = inputs.u.shape
        w, self.n, _ = inputs.A.shape
        self.sharing = self.b // w
        self.tile_d, self.tile_n = tile_sizes(self.d, self.n)
        self.tiles = _ceil_div(self.d, self.tile_d)
        gpu = _gpu()
        slots = kind.programs * (gpu.core_count if gpu else MULTIPROCESSORS)
        count = chunk_count(self.b * self.tiles, slots, kind.split_cost)
        chunk = max(_ceil_div(self.l, count), MIN_CHUNK)
        self.chunk = _ceil_div(chunk, self.block) * self.block
        self.chunks = _ceil_div(self.l, self.chunk)

    def launch(self, kernel: str, chunks: int, arrays, outputs, **constants):
        """Runs a kernel with one program for each tile of channels of each chunk."""
        return launch(
            kernel,
            self.b * chunks * self.tiles,
            arrays,
            (self.l, self.chunk, chunks, self.sharing),
            outputs,
            d=self.d,
            n=self.n,
            TILE_D=self.tile_d,
            TILE_N=self.tile_n,
            **constants,
        )

    def compose(self, from_zero, delta_sums, A, first, *, reverse: bool):
        """Phase 2: the states (in reverse, gradients) that enter each chunk, (b, chunks, n, d)."""
        count = self.chunks - 1
        tile_c = min(BORDER_TILE[0], _power_of_2_above(count))
        tile_d = min(BORDER_TILE[1], _power_of_2_below(self.d))
        (borders,) = launch(
            "chunk_borders",
            self.b * self.n * _ceil_div(self.d, tile_d),
            (from_zero, delta_sums, A, first),
            (count, self.sharing),
            (_float32(self.b, self.chunks, self.n, self.d),),
            warps=BORDER_WARPS,
            d=self.d,
            n=self.n,
            TILE_D=tile_d,
            TILE_C=tile_c,
            REVERSE=reverse,
        )
        return borders


def _forward(delta_softplus, save, inputs: Inputs):
    """(y, final state, saved states or None)."""
    plan = Plan(inputs, FORWARD)
    u, delta, A, B, C, D, z, delta_bias, h0 = inputs
    b, d, n = plan.b, plan.d, plan.n

    starts = h0[:, None]
    if plan.chunks > 1:
        whole = plan.chunks - 1  # the last chunk's end is not needed
        ends, delta_sums = plan.launch(
            "chunk_ends",
            whole,
            (u, delta, A, B, delta_bias),
            (_float32(b, whole, n, d), _float32(b, whole, d)),
            SOFTPLUS=delta_softplus,
        )
        starts = plan.compose(ends, delta_sums, A, h0, reverse=False)
    y, final_state, saved = plan.launch(
        "outputs",
        plan.chunks,
        (u, delta, A, B, C, D, u if z is None else z, delta_bias, starts),
        (
            jax.ShapeDtypeStruct(u.shape, u.dtype),
            _float32(b, n, d),
            _float32(b, _ceil_div(plan.l, plan.block), n, d) if save else _float32(1),
        ),
        SOFTPLUS=delta_softplus,
        GATE=z is not None,
        SAVE=save,
    )
    return y, final_state, saved if save else None


def _backward(delta_softplus, inputs: Inputs, saved, dout, dfinal_state) -> Inputs:
    """The gradients by all inputs."""
    plan = Plan(inputs, BACKWARD)
    u, delta, A, B, C, D, z, delta_bias, _ = inputs
    b, l, d, n = plan.b, plan.l, plan.d, plan.n
    gate = u if z is None else z
    constants = {"SOFTPLUS": delta_softplus, "GATE": z is not None}

    ends = dfinal_state[:, None]
    if plan.chunks > 1:
        after_first = plan.chunks - 1
        starts, delta_sums = plan.launch(
            "chunk_start_gradients",
            after_first,
            (delta, A, C, gate, delta_bias, dout),
            (_float32(b, after_first, n, d), _float32(b, after_first, d)),
            **constants,
        )
        ends = plan.compose(starts, delta_sums, A, dfinal_state, reverse=True)
    du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dh0 = plan.launch(
        "gradients",
        plan.chunks,
        (u, delta, A, B, C, D, gate, delta_bias, saved, dout, ends),
        (
            jax.ShapeDtypeStruct(u.shape, u.dtype),
            jax.ShapeDtypeStruct(delta.shape, delta.dtype),
            _float32(b, plan.chunks, n, d),
            _float32(b, plan.tiles, l, n),
            _float32(b, plan.tiles, l, n),
            _float32(b, plan.chunks, d),
            _float32(1) if z is None else jax.ShapeDtypeStruct(z.shape, z.dtype),
            _float32(b, plan.chunks, d),
            _float32(b, n, d),
        ),
        **constants,
    )

    def over_chunks(x, like):
        """Sums over the chunks of all sequences that share a set of weights."""
        return jnp.sum(x.reshape(like.shape[0], -1, *like.shape[1:]), axis=1)

    return Inputs(
        u=du,
        delta=ddelta,
        A=over_chunks(dA, A),
        B=jnp.sum(dB, axis=1),
        C=jnp.sum(dC, axis=1),
        D=over_chunks(dD, D),
        z=None if z is None else dz,
        delta_bias=over_chunks(ddelta_bias, delta_bias),
        initial_state=dh0,
    )


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _ceil_div(x: int, y: int) -> int:
    return -(-x // y)


def _power_of_2_above(x: int) -> int:
    """The smallest power of 2 that is at least x."""
    return 1 << (x - 1).bit_length()


def _power_of_2_below(x: int) -> int:
    """The largest power of 2 that is at most x, but at least 1."""
    return 1 << max(x, 1).bit_length() - 1
