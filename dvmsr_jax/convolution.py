"""The 3x3 convolution of the network."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dvmsr_jax.bands import Band, Whole
from dvmsr_jax.config import Compute
from dvmsr_jax.differentiation import unless_differentiated
from dvmsr_jax.kernels import conv3x3
from dvmsr_jax.vimm import torch_uniform


class Conv3x3(nnx.Conv):
    """A 3x3 convolution with zero padding that keeps the size; its result is float32."""

    def __init__(self, c_in: int, c_out: int, compute: Compute, *, rngs: nnx.Rngs):
        init = torch_uniform(fan_in=9 * c_in)
        super().__init__(
            c_in,
            c_out,
            (3, 3),
            padding=((0, 0), (1, 1)),
            kernel_init=init,
            bias_init=init,
            dtype=compute.precision,
            precision=compute.products,
            rngs=rngs,
        )
        self.may_be_native = compute.may_be_native
        self.factors = compute.precision

    def __call__(  # type: ignore[override]
        self, x: Float[Array, "b h w _"], band: Whole | Band
    ) -> Float[Array, "b h w _"]:
        """Convolves, in inference with kernels/conv3x3 if it can run."""
        x = band.with_neighbours(x)
        if not self.may_be_native or conv3x3.missing(self.factors):
            return self.in_jax(x)
        return unless_differentiated(Conv3x3.native, Conv3x3.in_jax, self, x)

    def in_jax(self, x: Float[Array, "b rows w _"]) -> Float[Array, "b h w _"]:
        """The convolution of rows that include those above and below."""
        return super().__call__(x).astype(jnp.float32)

    def native(self, x: Float[Array, "b rows w _"]) -> Float[Array, "b h w _"]:
        """The same result from kernels/conv3x3, which cannot be differentiated."""
        assert self.bias is not None
        x = x.astype(jnp.float32)
        return conv3x3.conv3x3(x, self.kernel[...], self.bias[...], factors=self.factors)
