"""ViMM, the Vision-Mamba module: the Mamba mixer (arXiv 2312.00752) on an image's tokens."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dvmsr_jax.bands import WHOLE, Band, Whole
from dvmsr_jax.config import ModelConfig
from kernels.selective_scan import selective_scan

LAYER_NORM_EPSILON = 1e-5
dense_init = nnx.initializers.truncated_normal(0.02)


class CausalConv(nnx.Module):
    """Depthwise convolution along the tokens; each sees itself and the `width - 1` before it.

    Written as shifted multiply-adds: XLA's grouped convolution takes 40 times as long on CPUs.
    """

    def __init__(self, channels: int, width: int, *, rngs: nnx.Rngs):
        init = torch_uniform(fan_in=width)
        self.kernel = nnx.Param(init(rngs.params(), (width, channels)))
        self.bias = nnx.Param(init(rngs.params(), (channels,)))

    def __call__(self, u: Float[Array, "b l d"], band: Whole | Band) -> Float[Array, "b l d"]:
        """The convolution, zeros before the image's first token."""
        kernel, length = self.kernel[...], u.shape[1]
        out = jnp.broadcast_to(self.bias[...], u.shape)
        u = band.with_previous(u, kernel.shape[0] - 1)
        for i, tap in enumerate(kernel):
            out = out + tap[None, None] * u[:, i : i + length]
        return out


class Direction(nnx.Module):
    """Causal convolution and selective scan along the tokens, one way.

    All that the two directions of a bidirectional ViMM have each of their own.
    """

    def __init__(self, config: ModelConfig, scan: str, *, rngs: nnx.Rngs):
        d = config.expand * config.channels
        n = config.states
        self.rank = math.ceil(config.channels / 16)
        self.scan = scan
        self.conv = CausalConv(d, config.conv_width, rngs=rngs)
        self.x_proj = nnx.Linear(
            d, self.rank + 2 * n, use_bias=False, kernel_init=dense_init, rngs=rngs
        )
        self.dt_proj = nnx.Linear(
            self.rank, d, use_bias=False, kernel_init=torch_uniform(fan_in=self.rank), rngs=rngs
        )
        self.dt_bias = nnx.Param(step_size_bias(rngs.params(), (d,)))
        self.A_log = nnx.Param(jnp.tile(jnp.log(jnp.arange(1, n + 1, dtype=jnp.float32)), (d, 1)))
        self.D = nnx.Param(jnp.ones(d))

    def __call__(
        self, u: Float[Array, "b l d"], z: Float[Array, "b l d"], band: Whole | Band
    ) -> Float[Array, "b l d"]:
        """The gated scan of u; z is the gate before its silu."""
        # Zeros before the image's first token leave the state at zero.
        u = band.masked(jax.nn.silu(self.conv(u, band)))
        d, n = self.A_log.shape
        delta, B, C = jnp.split(self.x_proj(u), [self.rank, self.rank + n], axis=-1)
        y, state = selective_scan(
            u,
            self.dt_proj(delta),
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

    There is no skip connection around it: the published code passes the image size where a residual
    was meant, so none is added, and the published weights depend on that.
    """

    def __init__(self, config: ModelConfig, drop_path: float, scan: str, *, rngs: nnx.Rngs):
        c = config.channels
        d = config.expand * c
        # Drops a whole sample's input, and scales the kept ones to leave the mean unchanged.
        self.drop_path = nnx.Dropout(drop_path, broadcast_dims=(1, 2))
        self.norm = nnx.LayerNorm(c, epsilon=LAYER_NORM_EPSILON, rngs=rngs)
        self.in_proj = nnx.Linear(c, 2 * d, use_bias=False, kernel_init=dense_init, rngs=rngs)
        self.forward = Direction(config, scan, rngs=rngs)
        self.backward = Direction(config, scan, rngs=rngs) if config.bidirectional else None
        self.out_proj = nnx.Linear(d, c, use_bias=False, kernel_init=dense_init, rngs=rngs)

    def __call__(
        self,
        tokens: Float[Array, "b l c"],
        *,
        rngs: nnx.Rngs | None = None,
        band: Whole | Band = WHOLE,
    ) -> Float[Array, "b l c"]:
        """Mixes an image's tokens, in raster order. With `rngs`, drop-path is active."""
        tokens = self.drop_path(tokens, deterministic=rngs is None, rngs=rngs)
        tokens = band.masked(self.norm(tokens))
        u, z = jnp.split(self.in_proj(tokens), 2, axis=-1)
        y = self.forward(u, z, band)
        if self.backward is not None:
            y = y + self.backward(u[:, ::-1], z[:, ::-1], WHOLE)[:, ::-1]
        return self.out_proj(y)


def torch_uniform(fan_in: int):
    """PyTorch's default for convolutions and linear layers: uniform within +-fan_in^-0.5."""
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def step_size_bias(key, shape, dtype=jnp.float32):
    """Mamba's: softplus of it is log-uniform in [1e-3, 1e-1]."""
    step = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(1e-3), math.log(1e-1)))
    return step + jnp.log(-jnp.expm1(-step))  # softplus' inverse
