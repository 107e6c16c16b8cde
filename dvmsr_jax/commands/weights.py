"""Lists the weights that have a name: `dvmsr weights`."""

import tyro

from dvmsr_jax import program
from dvmsr_jax.program import one_line_errors
from dvmsr_jax.registry import describe


def main() -> None:
    """Runs the command line."""
    with one_line_errors():
        tyro.cli(show, prog=program.name())


def show() -> None:
    """Lists the weights that have a name: scale, scores and purpose."""
    print(describe())
