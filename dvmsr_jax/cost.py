"""The cost of a model, counted from its configuration."""

import functools
from typing import NamedTuple

from dvmsr_jax.config import ModelConfig, NetworkConfig


class Cost(NamedTuple):
    """The cost of upscaling one image."""

    macs: int
    """Multiply-adds of all convolutions and projections."""
    scan_flops: int
    """Floating-point operations of the scans, nine for each token, channel and state."""
    usual_macs: int
    """The count that papers quote, by fvcore on the published code: it omits the fused mixer (the
    causal convolution, W_x, W_dt, W_out and the scan), and counts five operations for each input of
    a LayerNorm."""


@functools.singledispatch
def cost(config: NetworkConfig, height: int, width: int) -> Cost:
    """The cost of upscaling a `height` x `width` low-resolution image."""
    raise NotImplementedError(f"the cost of {config}, {height} x {width}")


@cost.register
def _(config: ModelConfig, height: int, width: int) -> Cost:
    c, d, n = config.channels, config.inner_channels, config.states
    rank, vimms = config.delta_rank, config.vimms
    directions = 2 if config.bidirectional else 1

    convolutions = 9 * (3 * c + config.rssbs * c * c + c * c + c * 3 * config.scale**2)
    in_proj, out_proj = c * 2 * d, d * c
    direction = config.conv_width * d + d * (rank + 2 * n) + rank * d
    norms = 5 * c * (vimms + 2)

    tokens = height * width
    return Cost(
        macs=tokens * (convolutions + vimms * (in_proj + out_proj + directions * direction)),
        scan_flops=tokens * vimms * directions * 9 * d * n,
        usual_macs=tokens * (convolutions + vimms * in_proj + norms),
    )
