"""The two phases' losses: pure functions of arrays."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float


def l1(prediction: Float[Array, "*shape"], target: Float[Array, "*shape"]) -> Float[Array, ""]:
    """Mean absolute difference: the pixel loss, and the paper's distillation loss at the output."""
    return jnp.mean(jnp.abs(prediction - target))


def mid_level(
    student: Sequence[Float[Array, "b h w _"]],
    teacher: Sequence[Float[Array, "b h w _"]],
    projections: Sequence[Float[Array, "_ _"]],
) -> Float[Array, ""]:
    """Mean L1 between the teacher's features and the student's, projected to the teacher's width.

    The projections are trained along and thrown away afterwards.
    """
    pairs = zip(student, teacher, projections, strict=True)
    return sum((l1(s @ projection, t) for s, t, projection in pairs), jnp.zeros(())) / len(student)
