"""A whole ViMM as one function, for CPUs: `vimm`. README.md describes its design."""

from dvmsr_jax.kernels.vimm.op import Weights, gradient_is_fast, missing, vimm, vimm_of_images

__all__ = ["Weights", "gradient_is_fast", "missing", "vimm", "vimm_of_images"]
