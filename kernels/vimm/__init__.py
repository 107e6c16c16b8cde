"""A whole ViMM as one function, for inference on CPUs: `vimm`. README.md describes its design."""

from dvmsr_jax.kernels.vimm.op import Weights, missing, vimm

__all__ = ["Weights", "missing", "vimm"]
