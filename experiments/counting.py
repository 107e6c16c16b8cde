"""Multiply-adds of a function, counted in its JAX program."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def count_macs(function: Callable[..., Any], *arguments: Any) -> int:
    """Multiply-adds in the convolutions and products of a function of arrays or their shapes."""
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
    return sum(_count_one(equation) for equation in jaxpr.eqns)


def _count_one(equation: Any) -> int:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = kernel[parameters["dimension_numbers"].rhs_spec[0]]
        return equation.outvars[0].aval.size * math.prod(kernel) // outputs
    inner = sum(_count(sub) for sub in core.jaxprs_in_params(parameters))
    return inner * parameters["length"] if name == "scan" else inner
