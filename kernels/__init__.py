"""This project's compute kernels. They import nothing else from `dvmsr_jax`."""

from dvmsr_jax.kernels.xla_flags import turn_off_ynnpack

turn_off_ynnpack()
