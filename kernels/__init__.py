"""Compute kernels of this project. They import nothing of `dvmsr_jax`."""

from kernels.xla_flags import turn_off_ynnpack

turn_off_ynnpack()
