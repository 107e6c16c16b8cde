"""DVMSR (arXiv 2405.03008), distilled Vision-Mamba super-resolution, in JAX and Flax."""
