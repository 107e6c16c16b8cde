"""ViMM, the Vision-Mamba module: the Mamba mixer (arXiv 2312.00752) on an image's tokens."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from dvmsr_jax.bands import WHOLE, Band, Whole
from dvmsr_jax.config import Compute, ModelConfig
from dvmsr_jax.differentiation import unless_differentiated
from dvmsr_jax.errors import UserError
from dvmsr_jax.kernels import vimm as kernel
from dvmsr_jax.kernels.selective_scan import missing, selective_scan

LAYER_NORM_EPSILON = 1e-5
# Becomes a step size of 0 after the softplus: the token leaves the scan's state unchanged.
NO_STEP = -1e30
dense_init = nnx.initializers.truncated_normal(0.02)


class ScanError(UserError):
    """The requested implementation of the scan cannot run here."""


def check_scan(compute: Compute) -> None:
    """Raises ScanError if the requested implementation of the scan cannot run here."""
    if lack := missing(compute.scan):
        raise ScanError(f"the scan {compute.scan!r} cannot run here: {lack}")


class CausalConv(nnx.Module):
    """Depthwise convolution along the tokens, over each token and the `width - 1` before it.

    Written as shifted multiply-adds: XLA's grouped convolution takes 40 times as long on CPUs.
    """

    def __init__(self, channels: int, width: int, *, rngs: nnx.Rngs):
        init = torch_uniform(fan_in=width)
        self.kernel = nnx.Param(init(rngs.params(), (width, channels)))
        self.bias = nnx.Param(init(rngs.params(), (channels,)))

    def __call__(self, u: Float[Array, "b l d"], band: Whole | Band) -> Float[Array, "b l d"]:
        """Convolves, with zeros before the image's first token."""
        kernel, bias = self.kernel[...].astype(u.dtype), self.bias[...].astype(u.dtype)
        width = kernel.shape[0]
        runs = band.with_previous(u, width - 1)
        length = runs.shape[1] - (width - 1)
        out = jnp.broadcast_to(bias, (runs.shape[0], length, runs.shape[2]))
        for i, tap in enumerate(kernel):
            out = out + tap[None, None] * runs[:, i : i + length]
        return out.reshape(u.shape)


class Direction(nnx.Module):
    """Causal convolution and selective scan along the tokens, in one direction.

    A bidirectional ViMM has one for each direction.
    """

    def __init__(self, config: ModelConfig, compute: Compute, *, rngs: nnx.Rngs):
        check_scan(compute)
        d, n = config.inner_channels, config.states
        self.rank = config.delta_rank
        self.scan = compute.scan
        self.conv = CausalConv(d, config.conv_width, rngs=rngs)
        self.x_proj = projection(d, self.rank + 2 * n, dense_init, compute, rngs)
        self.dt_proj = projection(self.rank, d, torch_uniform(fan_in=self.rank), compute, rngs)
        self.dt_bias = nnx.Param(step_size_bias(rngs.params(), (d,)))
        self.A_log = nnx.Param(jnp.tile(jnp.log(jnp.arange(1, n + 1, dtype=jnp.float32)), (d, 1)))
        self.D = nnx.Param(jnp.ones(d))

    def __call__(
        self, u: Float[Array, "b l d"], z: Float[Array, "b l d"], band: Whole | Band
    ) -> Float[Array, "b l d"]:
        """The gated scan of u; z is the gate before its silu."""
        u = jax.nn.silu(self.conv(u, band.at("conv")))
        d, n = self.A_log.shape
        low_rank, B, C = jnp.split(self.x_proj(u), [self.rank, self.rank + n], axis=-1)
        y, state = selective_scan(
            u,
            band.masked(self.dt_proj(low_rank), outside=NO_STEP),
            -jnp.exp(self.A_log[...]),
            B,
            C,
            self.D[...],
            z=z,
            delta_bias=self.dt_bias[...],
            delta_softplus=True,
            initial_state=band.scan_state(u.shape[0], d, n),
            return_final_state=True,
            implementation=self.scan,
        )
        band.keep_scan_state(state)
        return y


class ViMM(nnx.Module):
    """LayerNorm, then the Mamba mixer.

    It has no skip connection: the published code passes the image size in place of a residual, so
    none is added, and the published weights depend on that.
    """

    def __init__(self, config: ModelConfig, index: int, compute: Compute, *, rngs: nnx.Rngs):
        """`index` counts the network's ViMMs from 0."""
        c, d = config.channels, config.inner_channels
        self.index = index
        self.may_be_fused = compute.may_be_native and not config.bidirectional
        self.factors = compute.precision
        self.drop_path = config.drop_path * index / max(config.vimms - 1, 1)
        self.norm = nnx.LayerNorm(c, epsilon=LAYER_NORM_EPSILON, rngs=rngs)
        self.in_proj = projection(c, 2 * d, dense_init, compute, rngs)
        self.forward = Direction(config, compute, rngs=rngs)
        self.backward = Direction(config, compute, rngs=rngs) if config.bidirectional else None
        self.out_proj = projection(d, c, dense_init, compute, rngs)

    def __call__(
        self,
        tokens: Float[Array, "b l c"],
        keys: Key[Array, " b"] | None = None,
        band: Whole | Band = WHOLE,
    ) -> Float[Array, "b l c"]:
        """Mixes an image's tokens, given in raster order. With `keys`, drop-path is active."""
        if keys is not None and self.drop_path:
            tokens = drop_samples(tokens, self.drop_path, _fold_in(keys, self.index))
        if not self.may_be_fused or kernel.missing(self.factors):
            return self.unfused(tokens, band)
        if isinstance(band, Band):
            return self.fused(tokens, band)
        if kernel.gradient_is_fast(len(tokens), self.factors):
            return kernel.vimm_of_images(tokens, self.weights, LAYER_NORM_EPSILON)
        return unless_differentiated(ViMM.fused, ViMM.unfused, self, tokens)

    def unfused(
        self, tokens: Float[Array, "b l c"], band: Whole | Band = WHOLE
    ) -> Float[Array, "b l c"]:
        """The result, in JAX; any configuration, on any platform."""
        tokens = band.masked(self.norm(tokens))
        u, z = jnp.split(self.in_proj(tokens), 2, axis=-1)
        y = self.forward(u, z, band.at("forward"))
        if self.backward is not None:
            y = y + self.backward(u[:, ::-1], z[:, ::-1], WHOLE)[:, ::-1]
        return self.out_proj(y).astype(jnp.float32)

    @property
    def weights(self) -> kernel.Weights:
        """The parameters, as kernels/vimm takes them."""
        assert self.norm.scale is not None
        assert self.norm.bias is not None
        direction = self.forward
        return kernel.Weights(
            norm_scale=self.norm.scale[...],
            norm_bias=self.norm.bias[...],
            in_proj=self.in_proj.kernel[...],
            conv_kernel=direction.conv.kernel[...],
            conv_bias=direction.conv.bias[...],
            x_proj=direction.x_proj.kernel[...],
            dt_proj=direction.dt_proj.kernel[...],
            dt_bias=direction.dt_bias[...],
            A=-jnp.exp(direction.A_log[...]),
            D=direction.D[...],
            out_proj=self.out_proj.kernel[...],
        )

    def fused(
        self, tokens: Float[Array, "b l c"], band: Whole | Band = WHOLE
    ) -> Float[Array, "b l c"]:
        """The same result from kernels/vimm, which cannot be differentiated."""
        weights = self.weights
        band = band.at("forward")
        (b, l, _), (d, n) = tokens.shape, weights.A.shape
        out, previous, state = kernel.vimm(
            tokens,
            weights,
            band.at("conv").previous(b, len(weights.conv_kernel) - 1, d, tokens.dtype),
            band.scan_state(b, d, n),
            **band.place(l)._asdict(),
            epsilon=LAYER_NORM_EPSILON,
            factors=self.factors,
        )
        band.at("conv").keep_previous(previous)
        band.keep_scan_state(state)
        return out


def drop_samples(
    x: Float[Array, "b l c"], rate: float, keys: Key[Array, " b"]
) -> Float[Array, "b l c"]:
    """Zeroes each sample with probability `rate` and scales the others to preserve the mean.

    Each sample has its own key, so that the result does not depend on how the batch is divided.
    """
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate))(keys)
    return jnp.where(keep[:, None, None], x / (1 - rate), 0)


_fold_in = jax.vmap(jax.random.fold_in, in_axes=(0, None))


def projection(d_in: int, d_out: int, init, compute: Compute, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear map without bias, in the precision of `compute`."""
    return nnx.Linear(
        d_in,
        d_out,
        use_bias=False,
        kernel_init=init,
        dtype=compute.precision,
        precision=compute.products,
        rngs=rngs,
    )


def torch_uniform(fan_in: int):
    """PyTorch's default for convolutions and linear layers: uniform within +-fan_in^-0.5."""
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def step_size_bias(key, shape, dtype=jnp.float32):
    """Mamba's initial bias: its softplus is log-uniform in [1e-3, 1e-1]."""
    step = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(1e-3), math.log(1e-1)))
    return step + jnp.log(-jnp.expm1(-step))  # softplus' inverse
