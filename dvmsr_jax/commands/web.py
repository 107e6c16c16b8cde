"""Serves or writes the page that upscales in the browser: `dvmsr web`."""

import tyro

from dvmsr_jax import program
from dvmsr_jax.program import one_line_errors
from dvmsr_jax.web import web


def main() -> None:
    """Runs the command line."""
    with one_line_errors(interrupted="stopped"):
        tyro.cli(web, prog=program.name())
