"""Inspects JAX programs."""

import jax.extend


def equations(jaxpr):
    """All equations of a program, including those of programs inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)
