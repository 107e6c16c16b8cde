"""Layers whose fast implementation has no derivative."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx

Layer = TypeVar("Layer", bound=nnx.Module)


def unless_differentiated(
    fast: Callable[..., Any], differentiable: Callable[..., Any], layer: Layer, *arguments: Any
) -> Any:
    """`fast(layer, *arguments)`, or `differentiable` where a reverse-mode derivative is wanted.

    The two must have equal results up to rounding, and use no traced values but their arguments.
    """
    graph, parameters = nnx.split(layer)

    def run_fast(parameters, *arguments):
        return fast(nnx.merge(graph, parameters), *arguments)

    def run_differentiable(parameters, *arguments):
        return differentiable(nnx.merge(graph, parameters), *arguments)

    function = jax.custom_vjp(run_fast)
    function.defvjp(
        lambda *inputs: jax.vjp(run_differentiable, *inputs), lambda vjp, gradient: vjp(gradient)
    )
    return function(parameters, *arguments)
