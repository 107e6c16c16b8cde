"""Converts weights: `dvmsr convert IN OUT.safetensors`."""

import tyro

from dvmsr_jax import program
from dvmsr_jax.pretrained import convert
from dvmsr_jax.program import one_line_errors


def main() -> None:
    """Runs the command line."""
    with one_line_errors():
        tyro.cli(
            tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(convert), prog=program.name()
        )
