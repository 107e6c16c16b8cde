"""A 3x3 convolution for inference on CPUs."""

from dvmsr_jax.kernels.conv3x3.op import conv3x3, missing

__all__ = ["conv3x3", "missing"]
