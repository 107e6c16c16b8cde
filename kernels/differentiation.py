"""Functions whose fast implementation has no derivative."""

from collections.abc import Callable
from typing import Any

import jax


def unless_differentiated(
    fast: Callable[..., Any], differentiable: Callable[..., Any]
) -> Callable[..., Any]:
    """`fast`, or `differentiable` where a reverse-mode derivative is wanted.

    The two must have equal results up to rounding, and use no traced values but their arguments.
    """
    function = jax.custom_vjp(fast)
    function.defvjp(
        lambda *arguments: jax.vjp(differentiable, *arguments), lambda vjp, gradient: vjp(gradient)
    )
    return function
