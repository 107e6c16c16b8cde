"""This project's compute kernels. They import nothing from `dvmsr_jax`."""

from kernels.xla_flags import turn_off_ynnpack

turn_off_ynnpack()
