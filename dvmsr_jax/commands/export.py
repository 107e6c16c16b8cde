"""Exports weights for other programs: `dvmsr export IN OUT.onnx`, or OUT.stablehlo."""

import tyro

from dvmsr_jax import program
from dvmsr_jax.export import export
from dvmsr_jax.program import one_line_errors


def main() -> None:
    """Runs the command line."""
    with one_line_errors():
        tyro.cli(export, prog=program.name())
