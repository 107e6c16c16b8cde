"""The commands, each with its arguments; `dvmsr_jax.__main__` lists them."""
