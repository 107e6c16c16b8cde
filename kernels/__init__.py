"""Compute kernels of this project. They import nothing of `dvmsr_jax`."""
